package main

import (
	"strconv"
	"strings"

	"github.com/spf13/cobra"
)

// topkLine is the greatest elements of a row as the API writes it.
type topkLine struct {
	Request  string `json:"request"`
	Site     string `json:"site"`
	Position int64  `json:"position"`
	Level    string `json:"level"`
	Elements []struct {
		Index uint32  `json:"index"`
		Value float64 `json:"value"`
	} `json:"elements"`
}

func (l topkLine) cells() []string {
	elements := make([]string, len(l.Elements))
	for i, e := range l.Elements {
		elements[i] = strconv.FormatUint(uint64(e.Index), 10) + ":" + humanNumber(&e.Value)
	}
	return []string{l.Request, l.Site, strconv.FormatInt(l.Position, 10), l.Level, strings.Join(elements, " ")}
}

func topkCommand(o *options) *cobra.Command {
	s := &selection{}
	var tokens string
	var k int
	c := &cobra.Command{Use: "topk", Short: "The greatest elements of each row, and which they are", Args: cobra.NoArgs,
		Long:    "The greatest elements of each row that is there, and which they are; `dmi coverage` says what became of the others.",
		Example: "  dmi topk --request r1a2b3c4.0 --site logits --tokens=-1: --k 10",
		RunE: func(c *cobra.Command, _ []string) error {
			r, err := o.reader(c)
			if err != nil {
				return err
			}
			defer r.close()
			if err := s.latest(c, r); err != nil {
				return err
			}
			v := s.arguments(c)
			set(v, "tokens", tokens)
			v.Set("k", strconv.Itoa(k))
			return printList(c, o, r, "/topk", v, 0, []string{"request", "site", "position", "level", "index:value"}, func(l topkLine) []string { return l.cells() })
		}}
	s.register(c, true, true)
	c.Flags().StringVarP(&tokens, "tokens", "t", "", "positions A:B, half-open; negative ones count from the end")
	c.Flags().IntVarP(&k, "k", "k", 5, "elements a row, at most 64")
	return c
}

package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"

	"github.com/spf13/cobra"
)

// statsLine is a line of statistics as the API writes it.
type statsLine struct {
	Request   *string  `json:"request"`
	Site      string   `json:"site"`
	Layer     *int     `json:"layer"`
	Position  *int64   `json:"position"`
	Rows      uint64   `json:"rows"`
	Mean      *float64 `json:"mean"`
	RMS       *float64 `json:"rms"`
	Min       *float64 `json:"min"`
	Max       *float64 `json:"max"`
	AbsMax    *float64 `json:"absmax"`
	L2        *float64 `json:"l2"`
	NonFinite uint64   `json:"nonfinite"`
	Count     uint64   `json:"count"`
	Level     string   `json:"level"`
}

var statsHead = []string{"request", "site", "position", "rows", "mean", "rms", "min", "max", "absmax", "l2", "nonfinite", "count", "level"}

func (l statsLine) cells() []string {
	request, position := "-", "-"
	if l.Request != nil {
		request = *l.Request
	}
	if l.Position != nil {
		position = strconv.FormatInt(*l.Position, 10)
	}
	return []string{request, l.Site, position, humanCount(l.Rows), humanNumber(l.Mean), humanNumber(l.RMS), humanNumber(l.Min), humanNumber(l.Max), humanNumber(l.AbsMax),
		humanNumber(l.L2), humanCount(l.NonFinite), humanCount(l.Count), l.Level}
}

func statsCommand(o *options) *cobra.Command {
	s := &selection{}
	var per, tokens, out string
	c := &cobra.Command{Use: "stats", Short: "Statistics of what was captured: a line per row, per request and site, or per site", Args: cobra.NoArgs,
		Example: "  dmi stats --request r1a2b3c4.0 --site resid_post\n  dmi stats --run r1a2b3c4 --per row --out stats.parquet",
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
			v.Set("per", per)
			set(v, "tokens", tokens)
			if out != "" {
				format, err := formatOf(out, "", "json", "parquet", "arrow")
				if err != nil {
					return err
				}
				v.Set("format", format)
				return download(c, o, r, "/stats", v, out)
			}
			return printList(c, o, r, "/stats", v, 0, statsHead, func(l statsLine) []string { return l.cells() })
		}}
	s.register(c, true, true)
	c.Flags().StringVar(&per, "per", "request", "row, request or site")
	c.Flags().StringVarP(&tokens, "tokens", "t", "", "positions A:B, half-open; negative ones count from the end")
	c.Flags().StringVarP(&out, "out", "o", "", "write a file: .parquet, .arrow or .json")
	return c
}

// download writes an answer's body to a file, which appears under its name only when it is whole. "-" is the standard output.
func download(c *cobra.Command, o *options, r *reader, path string, arguments url.Values, name string) error {
	answer, err := r.do(c.Context(), http.MethodGet, path, arguments)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	return save(c, o, answer.Body, name)
}

func save(c *cobra.Command, o *options, body io.Reader, name string) error {
	if name == "-" {
		_, err := io.Copy(c.OutOrStdout(), body)
		return err
	}
	n, err := writeWhole(name, body)
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	if o.json {
		return printJSON(c, map[string]any{"file": name, "bytes": n})
	}
	_, err = fmt.Fprintf(c.OutOrStdout(), "%s: %s\n", name, humanBytes(uint64(n)))
	return err
}

func writeWhole(name string, body io.Reader) (int64, error) {
	partial := name + ".partial"
	f, err := os.OpenFile(partial, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return 0, err
	}
	n, err := io.Copy(f, body)
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(partial, name)
	}
	if err != nil {
		os.Remove(partial)
	}
	return n, err
}

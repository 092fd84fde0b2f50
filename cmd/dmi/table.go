package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"
)

// table prints aligned columns. Nothing is held back beyond what aligning needs.
type table struct {
	out   *tabwriter.Writer
	lines int
	head  []string
}

func newTable(w io.Writer, head ...string) *table {
	return &table{out: tabwriter.NewWriter(w, 0, 8, 2, ' ', 0), head: head}
}

func (t *table) row(cells ...string) {
	if t.lines%500 == 0 { // a long table is aligned, and headed, in parts
		if t.lines > 0 {
			_ = t.out.Flush() // the last one says
		}
		if len(t.head) > 0 {
			fmt.Fprintln(t.out, strings.ToUpper(strings.Join(t.head, "\t")))
		}
	}
	t.lines++
	for i, cell := range cells { // what came from a producer must not move the cursor
		cells[i] = strings.Map(func(c rune) rune {
			if c < ' ' || c == 0x7f {
				return ' '
			}
			return c
		}, cell)
	}
	fmt.Fprintln(t.out, strings.Join(cells, "\t"))
}

func (t *table) flush() error { return t.out.Flush() }

func printJSON(c *cobra.Command, value any) error {
	out := json.NewEncoder(c.OutOrStdout())
	out.SetIndent("", "  ")
	out.SetEscapeHTML(false)
	return out.Encode(value)
}

func humanBytes(n uint64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"}
	v, u := float64(n), 0
	for v >= 1024 && u < len(units)-1 {
		v, u = v/1024, u+1
	}
	if u == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", v, units[u])
}

// humanCount groups digits by thousands.
func humanCount[N uint64 | uint32 | int](n N) string {
	text := strconv.FormatUint(uint64(n), 10)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

func humanTime(unixNs int64) string {
	if unixNs == 0 {
		return "-"
	}
	return time.Unix(0, unixNs).Format("2006-01-02 15:04:05")
}

func humanLabels(labels map[string]string, tags []string) string {
	var parts []string
	for _, k := range sortedKeys(labels) {
		parts = append(parts, k+"="+labels[k])
	}
	for _, tag := range tags {
		parts = append(parts, "#"+tag)
	}
	return strings.Join(parts, " ")
}

// humanNumber prints a statistic; nil is one that there is none of.
func humanNumber(v *float64) string {
	if v == nil || math.IsNaN(*v) {
		return "-"
	}
	return strconv.FormatFloat(*v, 'g', 5, 64)
}

func dash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && isatty.IsTerminal(f.Fd())
}

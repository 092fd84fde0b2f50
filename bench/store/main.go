// Store measures the store: reads of what lies on the disk alone, very many chunks, memory at its bound, and what readers, retention and deletion cost who writes.
package main

import (
	"flag"
	"fmt"
	"os"
	"strings"

	"dmi/bench/result"
)

func main() {
	dir := flag.String("dir", ".", "a directory on the disk to measure")
	mib := flag.Int("mib", 4096, "size of the stores that are read")
	millions := flag.Float64("chunks", 10, "chunks, in millions: each takes 250 bytes of the disk")
	rounds := flag.Int("rounds", 3, "rounds of what is compared; medians are reported")
	only := flag.String("only", "", "one of reads, chunks, memory, readers, retention (default: all)")
	out := flag.String("out", "", "directory to write the result to (default: standard output only)")
	flag.Parse()
	if err := run(*dir, *mib, *millions, *rounds, *only, *out); err != nil {
		fmt.Fprintln(os.Stderr, "store:", err)
		os.Exit(1)
	}
}

func run(dir string, mib int, millions float64, rounds int, only, out string) error {
	work, err := os.MkdirTemp(dir, ".store-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	rows := []result.Row{result.Load()}
	for _, part := range []struct {
		name    string
		measure func() ([]result.Row, error)
	}{
		{"memory", func() ([]result.Row, error) { return memory(work) }}, // first: what was before is least
		{"reads", func() ([]result.Row, error) { return reads(work, mib) }},
		{"chunks", func() ([]result.Row, error) { return chunks(work, millions) }},
		{"readers", func() ([]result.Row, error) { return readers(work, mib/2, rounds) }},
		{"retention", func() ([]result.Row, error) { return retention(work, rounds) }},
	} {
		if only != "" && only != part.name {
			continue
		}
		fmt.Fprintln(os.Stderr, "==", part.name)
		measured, err := part.measure()
		if err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
		rows = append(rows, measured...)
	}
	command := fmt.Sprintf("go run ./bench/store -mib %d -chunks %g -rounds %d", mib, millions, rounds)
	if only != "" {
		command += " -only " + only
	}
	return result.Report(strings.TrimSuffix("store_"+only, "_"), command+" -out bench/results", rows, out)
}

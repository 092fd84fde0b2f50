// Page measures how long the page takes to show what it is asked for, in Chromium without a GPU, on a store of a model of Qwen3-4B's
// shape (36 layers x 4,096 tokens x 2,560) beside 10,000 short requests and one with the attention of all heads; then how far it is behind a model that runs. The store is made here, and deleted; the browser is driven by
// views.mjs, online.mjs and beside.mjs. It needs `make setup`, Node and Chromium, and 2 GB of disk for a minute or two.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"dmi/bench/longstore"
	"dmi/bench/result"
)

func main() {
	dir := flag.String("dir", os.TempDir(), "where to make the store")
	tokens := flag.Int("tokens", 4096, "tokens of the long request")
	requests := flag.Int("requests", 10_000, "short requests beside it")
	attended := flag.Int("attended", 512, "tokens of the request with attention")
	readers := flag.Int("readers", 200, "pages that are open beside the one that is looked at, while a model runs")
	out := flag.String("out", "", "directory to write the result to (default: standard output only)")
	flag.Parse()
	if err := run(*dir, *tokens, *requests, *attended, *readers, *out); err != nil {
		fmt.Fprintln(os.Stderr, "page:", err)
		os.Exit(1)
	}
}

func run(dir string, tokens, requests, attended, readers int, out string) error {
	work, err := os.MkdirTemp(dir, "dmi-page-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	store := filepath.Join(work, "s")
	begun := time.Now()
	if err := longstore.Fill(store, tokens, requests, attended); err != nil {
		return fmt.Errorf("make the store: %w", err)
	}
	fmt.Fprintf(os.Stderr, "store made in %.0f s\n", time.Since(begun).Seconds())
	load := result.Load()
	rows, err := drive(nil, "bench/page/views.mjs", store, longstore.LongRequest, longstore.ShortRequest, longstore.AttendedRequest, strconv.Itoa(tokens), strconv.Itoa(attended))
	if err != nil {
		return err
	}
	online, err := drive(nil, "bench/page/online.mjs", filepath.Join(work, "online"), strconv.Itoa(readers))
	if err != nil {
		return err
	}
	rows = append(rows, online...)
	if last := runtime.NumCPU() - 1; last > 0 {
		beside, err := drive([]string{"taskset", "-c", strconv.Itoa(last)}, "bench/page/beside.mjs", filepath.Join(work, "beside"), strconv.Itoa(readers))
		if err != nil {
			return err
		}
		rows = append(rows, beside...)
	}
	return result.Report("page", fmt.Sprintf("go run ./bench/page -tokens %d -requests %d -attended %d -readers %d -out bench/results", tokens, requests, attended, readers), append([]result.Row{load}, rows...), out)
}

// drive runs one of the scripts beside this file, with a prefix before the command, and says which of its figures reach their goals.
func drive(prefix []string, script string, arguments ...string) ([]result.Row, error) {
	ctx, stop := context.WithTimeout(context.Background(), 10*time.Minute)
	defer stop()
	command := append(append(prefix, "node", script), arguments...)
	node := exec.CommandContext(ctx, command[0], command[1:]...)
	node.Stderr = os.Stderr
	text, err := node.Output()
	if err != nil {
		return nil, fmt.Errorf("node %s: %w", script, err)
	}
	var figures []struct {
		Metric, Unit string
		Value        float64
		Baseline     *float64
		AtMost       *float64 `json:"at_most"`
		AtLeast      *float64 `json:"at_least"`
	}
	if err := json.Unmarshal(text, &figures); err != nil {
		return nil, fmt.Errorf("node %s: %w: %.200s", script, err, text)
	}
	var rows []result.Row
	for _, f := range figures {
		row := result.Row{Metric: f.Metric, Value: f.Value, Unit: f.Unit}
		if f.Baseline != nil {
			row = row.Against(*f.Baseline, f.Value / *f.Baseline)
		}
		if f.AtMost != nil {
			row = row.For(fmt.Sprintf("<= %g", *f.AtMost), f.Value <= *f.AtMost)
		}
		if f.AtLeast != nil {
			row = row.For(fmt.Sprintf(">= %g", *f.AtLeast), f.Value >= *f.AtLeast)
		}
		rows = append(rows, row)
	}
	return rows, nil
}

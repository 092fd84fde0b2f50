// Inspect measures the tools of `dmi inspect` that read a whole run, on captures of Qwen3-4B's size: bytes read per second from a cold disk, against what the disk gives a plain sequential read, and against what
// memory gives the processor's cores: a plain pass that sums the same rows up, and the tool's own arithmetic on them, neither of which reads a file. The slowest of the three is the most that the tool could do. All
// in rounds that alternate; and the most memory that a tool takes. The logit lens in bulk and CKA are not bound by reading, and not here. It needs 1.4 GB of disk, and as much memory. Take rows that no cache holds
// all of, as the defaults are on most machines.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"dmi/bench/longstore"
	"dmi/bench/result"
	"dmi/inspect"
	"dmi/query"
)

const (
	residualRun  = "r0000b1b1"
	attentionRun = "r0000a77e"
)

// tools are what is measured: as a command, and as the same code on rows that are in memory already.
var tools = []struct {
	name      string
	stored    func(tokens, attended int) int64 // bytes of the chunks that it reads
	arguments []string
	inMemory  func(context.Context, *query.Engine) error
}{
	{"stats", residual, []string{"stats", "--run", residualRun}, func(ctx context.Context, e *query.Engine) error {
		return inspect.Stats(ctx, e, inspect.StatsQuery{Scope: query.Scope{Run: residualRun}, Per: query.PerSite}, ignore)
	}},
	{"outliers", residual, []string{"outliers", "--run", residualRun}, func(ctx context.Context, e *query.Engine) error {
		return inspect.Outliers(ctx, e, inspect.OutliersQuery{Scope: query.Scope{Run: residualRun}}, ignore)
	}},
	{"tokens", residual, []string{"tokens", "--run", residualRun}, func(ctx context.Context, e *query.Engine) error {
		return inspect.Tokens(ctx, e, inspect.TokensQuery{Scope: query.Scope{Run: residualRun}}, ignore)
	}},
	{"similarity, cosine", residual, []string{"similarity", "--run", residualRun, "--sample", "2"}, func(ctx context.Context, e *query.Engine) error {
		return inspect.Similarity(ctx, e, inspect.SimilarityQuery{Scope: query.Scope{Run: residualRun}, Sample: 2}, ignore)
	}},
	{"compare, with itself", func(tokens, attended int) int64 { return 2 * residual(tokens, attended) }, []string{"compare", longstore.LongRequest, longstore.LongRequest}, func(ctx context.Context, e *query.Engine) error {
		return inspect.Compare(ctx, e, inspect.CompareQuery{A: longstore.LongRequest, B: longstore.LongRequest, Per: query.PerSite}, ignore)
	}},
	{"heads", attention, []string{"heads", "--run", attentionRun}, func(ctx context.Context, e *query.Engine) error {
		return inspect.Heads(ctx, e, inspect.HeadsQuery{Scope: query.Scope{Run: attentionRun}}, ignore)
	}},
}

func ignore[T any](T) error { return nil }

func residual(tokens, _ int) int64  { return longstore.ResidualBytes(tokens) }
func attention(_, tokens int) int64 { return longstore.AttentionBytes(tokens) }

const (
	goal       = 0.7 // of the slowest of disk, memory, and the tool's own arithmetic in memory
	mostMemory = 256 << 20
)

func main() {
	dir := flag.String("dir", ".", "where to make the store: on the disk that is to be measured")
	tokens := flag.Int("tokens", 4096, "tokens of the request with the residual stream")
	attended := flag.Int("attended", 512, "tokens of the request with attention")
	rounds := flag.Int("rounds", 5, "rounds; medians are reported")
	out := flag.String("out", "", "directory to write the result to (default: standard output only)")
	flag.Parse()
	if err := run(*dir, *tokens, *attended, *rounds, *out); err != nil {
		fmt.Fprintln(os.Stderr, "inspect:", err)
		os.Exit(1)
	}
}

// measured is what the rounds found of a tool.
type measured struct {
	cold, inMemory         []float64 // GB/s
	ofDisk, ofPass, ofBest []float64 // each round's own shares
	costs                  []float64 // s/GB
	most                   int64
}

func run(dir string, tokens, attended, rounds int, out string) error {
	work, err := os.MkdirTemp(dir, "dmi-inspect-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	path := filepath.Join(work, "s")
	begun := time.Now()
	if err := longstore.Fill(path, tokens, 0, attended); err != nil {
		return fmt.Errorf("make the store: %w", err)
	}
	fmt.Fprintf(os.Stderr, "store made in %.0f s\n", time.Since(begun).Seconds())
	segments, err := filepath.Glob(filepath.Join(path, "segments", "*.safetensors"))
	if err != nil || len(segments) == 0 {
		return fmt.Errorf("the store has no segment: %w", err)
	}
	rows, err := load(path)
	if err != nil {
		return err
	}
	defer rows.Close()
	load := result.Load()
	var disk, pass []float64
	all := make([]measured, len(tools))
	for round := range rounds {
		d, err := sequential(segments)
		if err != nil {
			return err
		}
		p := rows.pass()
		disk, pass = append(disk, d), append(pass, p)
		for i, tool := range tools {
			m, size := &all[i], tool.stored(tokens, attended)
			speed, busy, peak, err := measure(path, segments, tool.arguments, size)
			if err != nil {
				return fmt.Errorf("%s: %w", tool.name, err)
			}
			own, err := rows.speed(tool.inMemory, size)
			if err != nil {
				return fmt.Errorf("%s in memory: %w", tool.name, err)
			}
			m.cold, m.inMemory, m.costs, m.most = append(m.cold, speed), append(m.inMemory, own), append(m.costs, busy), max(m.most, peak)
			m.ofDisk, m.ofPass, m.ofBest = append(m.ofDisk, speed/d), append(m.ofPass, own/p), append(m.ofBest, speed/min(d, p, own))
		}
		fmt.Fprintf(os.Stderr, "round %d of %d: disk %.2f GB/s, memory %.2f GB/s\n", round+1, rounds, d, p)
	}
	cores := runtime.NumCPU()
	lines := []result.Row{load,
		{Metric: "sequential read of the segments, cold", Value: result.Median(disk), Unit: "GB/s"},
		{Metric: fmt.Sprintf("sums of the same rows in memory, %d cores", cores), Value: result.Median(pass), Unit: "GB/s"}}
	for i, tool := range tools {
		m := &all[i]
		slowest, share := min(result.Median(disk), result.Median(pass), result.Median(m.inMemory)), result.Median(m.ofBest)
		lines = append(lines,
			result.Row{Metric: fmt.Sprintf("%s, on the same rows in memory, %d cores, against their sums", tool.name, cores), Value: result.Median(m.inMemory), Unit: "GB/s"}.Against(result.Median(pass), result.Median(m.ofPass)),
			result.Row{Metric: tool.name + ", cold, against the disk", Value: result.Median(m.cold), Unit: "GB/s"}.Against(result.Median(disk), result.Median(m.ofDisk)),
			result.Row{Metric: tool.name + ", cold, against the slowest of disk, sums and its own arithmetic in memory", Value: result.Median(m.cold), Unit: "GB/s"}.Against(slowest, share).For(fmt.Sprintf("ratio >= %g", goal), share >= goal),
			result.Row{Metric: tool.name + ", processor time, all cores together", Value: result.Median(m.costs), Unit: "s/GB"},
			result.Row{Metric: tool.name + ", most memory", Value: float64(m.most) / (1 << 20), Unit: "MiB"}.For(fmt.Sprintf("<= %d", mostMemory>>20), m.most <= mostMemory))
	}
	return result.Report("inspect", fmt.Sprintf("go run ./bench/inspect -tokens %d -attended %d -rounds %d -out bench/results", tokens, attended, rounds), lines, out)
}

// sequential is how fast the segments can be read from disk, one after the other, in GB/s.
func sequential(segments []string) (float64, error) {
	if err := forget(segments); err != nil {
		return 0, err
	}
	total := 0
	begun := time.Now()
	for _, path := range segments {
		data, err := readSequentially(path)
		if err != nil {
			return 0, err
		}
		total += len(data)
	}
	return float64(total) / time.Since(begun).Seconds() / 1e9, nil
}

func readSequentially(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	data := make([]byte, info.Size())
	_, err = io.ReadFull(file, data)
	return data, err
}

// forget makes the system drop what it holds of files in memory.
func forget(paths []string) error {
	for _, path := range paths {
		file, err := os.Open(path)
		if err != nil {
			return err
		}
		err = file.Sync()
		if err == nil {
			err = unix.Fadvise(int(file.Fd()), 0, 0, unix.FADV_DONTNEED)
		}
		file.Close()
		if err != nil {
			return fmt.Errorf("drop %s from memory: %w", path, err)
		}
	}
	return nil
}

// measure runs a tool on cold segments: GB/s of what it reads, the processor's seconds for each GB, which other work beside it changes less, and the most memory that it held.
func measure(store string, segments, arguments []string, size int64) (speed, busy float64, peak int64, err error) {
	if err := forget(segments); err != nil {
		return 0, 0, 0, err
	}
	tool := exec.Command("bin/dmi", append(append([]string{"inspect"}, arguments...), "--store", store, "--json")...)
	var said, complained bytes.Buffer
	tool.Stdout, tool.Stderr = &said, &complained
	begun := time.Now()
	if err := tool.Start(); err != nil {
		return 0, 0, 0, err
	}
	watched := make(chan int64)
	go func() { watched <- mostResident(tool.Process.Pid) }()
	err = tool.Wait()
	took := time.Since(begun).Seconds()
	peak = <-watched
	if err != nil {
		return 0, 0, 0, fmt.Errorf("%w: %s", err, complained.String())
	}
	var lines []json.RawMessage
	if err := json.Unmarshal(said.Bytes(), &lines); err != nil || len(lines) == 0 {
		return 0, 0, 0, fmt.Errorf("it printed %d lines: %w", len(lines), err)
	}
	used := tool.ProcessState.UserTime() + tool.ProcessState.SystemTime()
	return float64(size) / took / 1e9, used.Seconds() / float64(size) * 1e9, peak, nil
}

// mostResident watches a process until it has ended: the system's own high-water mark of its memory, looked at 200 times a second. (What wait4 tells counts this process's memory, too, from before the exec.)
func mostResident(pid int) (most int64) {
	for {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		_, rest, found := bytes.Cut(text, []byte("VmHWM:"))
		if err != nil || !found { // ended
			return most
		}
		var kib int64
		fmt.Sscan(string(rest), &kib)
		most = max(most, kib<<10)
		time.Sleep(5 * time.Millisecond)
	}
}

// Persist measures how fast the store makes tensors durable, against raw O_DIRECT writes of the same size to the same disk in the same run.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime/pprof"
	"syscall"
	"time"

	"dmi/bench/result"
	"dmi/bench/traffic"
	"dmi/internal/vfs"
	"dmi/store"
)

const (
	hidden = 2560 // Qwen3-4B's, in bf16
	width  = hidden * 2
	sites  = 37
)

func main() {
	dir := flag.String("dir", ".", "a directory on the disk to measure")
	mib := flag.Int("mib", 2048, "how much to write each time")
	rounds := flag.Int("rounds", 5, "rounds; medians are reported")
	out := flag.String("out", "", "directory to write the result to (default: standard output only)")
	profile := flag.String("cpuprofile", "", "write a CPU profile here")
	flag.Parse()
	if *profile != "" {
		f, err := os.Create(*profile)
		if err == nil {
			err = pprof.StartCPUProfile(f)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "persist:", err)
			os.Exit(1)
		}
		defer pprof.StopCPUProfile()
	}
	if err := run(*dir, *mib, *rounds, *out); err != nil {
		fmt.Fprintln(os.Stderr, "persist:", err)
		os.Exit(1)
	}
}

func run(dir string, mib, rounds int, out string) error {
	load := result.Load() // the machine's other work takes its share of the processors, which raw writes hardly need
	work, err := os.MkdirTemp(dir, ".persist-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	bytes := int64(mib) << 20
	loads := []struct {
		name string
		rows int // of a chunk handed over
	}{{"prefill, 1024 rows a chunk", 1024}, {"decode, 64 requests, a row a chunk", 1}}
	var raws []float64
	var names []string
	for _, l := range loads {
		names = append(names, l.name)
	}
	rates, cpus := map[string][]float64{}, map[string][]float64{}
	for r := range rounds {
		raw, err := rawRate(filepath.Join(work, "raw"), bytes)
		if err != nil {
			return err
		}
		raws = append(raws, raw)
		fmt.Fprintf(os.Stderr, "round %d: raw %.0f MB/s", r+1, raw/1e6)
		for _, l := range loads {
			rate, cpu, err := storeRate(filepath.Join(work, "store"), bytes, l.rows)
			if err != nil {
				return err
			}
			rates[l.name], cpus[l.name] = append(rates[l.name], rate), append(cpus[l.name], cpu)
			fmt.Fprintf(os.Stderr, "; %s %.0f MB/s, %.2f CPU s/GB", l.name, rate/1e6, cpu)
		}
		fmt.Fprintln(os.Stderr)
	}
	return report(load, names, raws, rates, cpus, mib, rounds, out)
}

// rawRate writes as a program would that knows nothing but the disk: 8 MiB at a time past the page cache, made durable every 128 MiB.
func rawRate(name string, bytes int64) (float64, error) {
	defer os.Remove(name)
	f, err := vfs.OS{}.Create(name, true)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if !f.Direct() {
		return 0, fmt.Errorf("%s: the file system has no O_DIRECT, and there is nothing to compare with", name)
	}
	buf := vfs.Aligned(8 << 20)
	for i := range buf {
		buf[i] = byte(i * 7)
	}
	begun := time.Now()
	for at := int64(0); at < bytes; at += int64(len(buf)) {
		if _, err := f.WriteAt(buf, at); err != nil {
			return 0, err
		}
		if at%(128<<20) == 0 {
			if err := f.Sync(); err != nil {
				return 0, err
			}
		}
	}
	if err := f.Sync(); err != nil {
		return 0, err
	}
	return float64(bytes) / time.Since(begun).Seconds(), nil
}

// storeRate appends chunks of a few sites and requests, with steps and books, and waits until all of it is durable.
func storeRate(dir string, bytes int64, rows int) (rate, cpu float64, err error) {
	defer os.RemoveAll(dir)
	s, err := store.Open(dir, store.Options{})
	if err != nil {
		return 0, 0, err
	}
	t, err := traffic.Begin(s, "s00000001", sites, width)
	if err != nil {
		return 0, 0, err
	}
	requests := make([]uint64, 64)
	if rows > 1 {
		requests = requests[:1]
	}
	for i := range requests {
		requests[i] = uint64(i)
	}
	before, begun := processTime(), time.Now()
	var written int64
	for step := uint32(0); written < bytes; step++ {
		n, err := t.Step(requests, step*uint32(rows), uint32(rows))
		if err != nil {
			return 0, 0, err
		}
		written += n
	}
	if err := s.Barrier(context.Background()); err != nil {
		return 0, 0, err
	}
	elapsed := time.Since(begun).Seconds()
	spent := processTime() - before
	return float64(written) / elapsed, spent.Seconds() / (float64(written) / 1e9), s.Close()
}

func processTime() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func report(load result.Row, names []string, raws []float64, rates, cpus map[string][]float64, mib, rounds int, out string) error {
	raw := result.Median(raws) / 1e6
	rows := []result.Row{load, {Metric: "raw O_DIRECT writes", Value: raw, Unit: "MB/s"}}
	for _, name := range names {
		var ratios []float64 // of neighbours in time: the disk's own speed changes from minute to minute
		for i := range raws {
			ratios = append(ratios, rates[name][i]/raws[i])
		}
		ratio, cpu := result.Median(ratios), result.Median(cpus[name])
		rows = append(rows, result.Row{Metric: name + ": durable", Value: result.Median(rates[name]) / 1e6, Unit: "MB/s"}.Against(raw, ratio).For(">= 0.85 of raw", ratio >= 0.85),
			result.Row{Metric: name + ": CPU", Value: cpu, Unit: "s/GB"}.For("<= 0.6", cpu <= 0.6))
	}
	return result.Report("persist", fmt.Sprintf("go run ./bench/persist -mib %d -rounds %d -out bench/results", mib, rounds), rows, out)
}

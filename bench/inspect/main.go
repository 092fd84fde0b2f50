// Inspect measures the tools of `dmi inspect` that read a whole run, on captures of Qwen3-4B's size: bytes read per second from a cold disk, against what the disk gives a plain sequential read and memory gives the processor's
// cores, all in rounds that alternate; and the most memory that a tool takes. The logit lens in bulk and CKA are not bound by reading, and not here. It needs 1 GB of disk.
package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"dmi/bench/longstore"
	"dmi/bench/result"
)

// tools are what is measured.
var tools = []struct {
	name      string
	stored    func(tokens, attended int) int64 // bytes of the chunks that it reads
	arguments []string
}{
	{"stats", residual, []string{"stats", "--run", "r0000b1b1"}},
	{"outliers", residual, []string{"outliers", "--run", "r0000b1b1"}},
	{"tokens", residual, []string{"tokens", "--run", "r0000b1b1"}},
	{"similarity, cosine", residual, []string{"similarity", "--run", "r0000b1b1", "--sample", "2"}},
	{"compare, with itself", func(tokens, attended int) int64 { return 2 * residual(tokens, attended) }, []string{"compare", longstore.LongRequest, longstore.LongRequest}},
	{"heads", attention, []string{"heads", "--run", "r0000a77e"}},
}

func residual(tokens, _ int) int64  { return longstore.ResidualBytes(tokens) }
func attention(_, tokens int) int64 { return longstore.AttentionBytes(tokens) }

const (
	goal       = 0.7 // of the slower of disk and memory
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

func run(dir string, tokens, attended, rounds int, out string) error {
	work, err := os.MkdirTemp(dir, "dmi-inspect-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	store := filepath.Join(work, "s")
	begun := time.Now()
	if err := longstore.Fill(store, tokens, 0, attended); err != nil {
		return fmt.Errorf("make the store: %w", err)
	}
	fmt.Fprintf(os.Stderr, "store made in %.0f s\n", time.Since(begun).Seconds())
	segments, err := filepath.Glob(filepath.Join(store, "segments", "*.safetensors"))
	if err != nil || len(segments) == 0 {
		return fmt.Errorf("the store has no segment: %w", err)
	}
	load := result.Load()
	var disk, memory []float64
	speeds := make([][]float64, len(tools))
	shares := make([][]float64, len(tools))
	costs := make([][]float64, len(tools))
	most := make([]int64, len(tools))
	for round := range rounds {
		d, m, err := limits(segments)
		if err != nil {
			return err
		}
		disk, memory = append(disk, d), append(memory, m)
		for i, tool := range tools {
			speed, busy, peak, err := measure(store, segments, tool.arguments, tool.stored(tokens, attended))
			if err != nil {
				return fmt.Errorf("%s: %w", tool.name, err)
			}
			speeds[i], shares[i], costs[i], most[i] = append(speeds[i], speed), append(shares[i], speed/min(d, m)), append(costs[i], busy), max(most[i], peak)
		}
		fmt.Fprintf(os.Stderr, "round %d of %d: disk %.2f GB/s, memory %.2f GB/s\n", round+1, rounds, d, m)
	}
	rows := []result.Row{load,
		{Metric: "sequential read of the segments, cold", Value: result.Median(disk), Unit: "GB/s"},
		{Metric: fmt.Sprintf("sums of the same bytes in memory, %d cores", runtime.NumCPU()), Value: result.Median(memory), Unit: "GB/s"}}
	slower := min(result.Median(disk), result.Median(memory))
	for i, tool := range tools {
		share := result.Median(shares[i])
		rows = append(rows,
			result.Row{Metric: tool.name + ", cold", Value: result.Median(speeds[i]), Unit: "GB/s"}.Against(slower, share).For(fmt.Sprintf("ratio >= %g", goal), share >= goal),
			result.Row{Metric: tool.name + ", processor time, all cores together", Value: result.Median(costs[i]), Unit: "s/GB"},
			result.Row{Metric: tool.name + ", most memory", Value: float64(most[i]) / (1 << 20), Unit: "MiB"}.For(fmt.Sprintf("<= %d", mostMemory>>20), most[i] <= mostMemory))
	}
	return result.Report("inspect", fmt.Sprintf("go run ./bench/inspect -tokens %d -attended %d -rounds %d -out bench/results", tokens, attended, rounds), rows, out)
}

// limits are how fast the segments can be read from disk, one after the other, and summed up from memory, by all cores, in GB/s.
func limits(segments []string) (disk, memory float64, err error) {
	if err := forget(segments); err != nil {
		return 0, 0, err
	}
	var all [][]byte
	total := 0
	begun := time.Now()
	for _, path := range segments {
		data, err := readSequentially(path)
		if err != nil {
			return 0, 0, err
		}
		all = append(all, data)
		total += len(data)
	}
	disk = float64(total) / time.Since(begun).Seconds() / 1e9
	whole := bytes.Join(all, nil)
	share := len(whole) / runtime.NumCPU() &^ 7
	sums := make([]uint64, runtime.NumCPU())
	var working sync.WaitGroup
	begun = time.Now()
	for core := range sums {
		working.Go(func() {
			sum := uint64(0)
			for part := whole[core*share : (core+1)*share]; len(part) >= 8; part = part[8:] {
				sum += uint64(part[0]) | uint64(part[1])<<8 | uint64(part[2])<<16 | uint64(part[3])<<24 | uint64(part[4])<<32 | uint64(part[5])<<40 | uint64(part[6])<<48 | uint64(part[7])<<56
			}
			sums[core] = sum
		})
	}
	working.Wait()
	return disk, float64(share*len(sums)) / time.Since(begun).Seconds() / 1e9, nil
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

//go:build linux

// Drain measures how fast payload goes from its publication in shared memory through pump, drain and pipeline to a sink, against a plain copy out
// of a memfd in the same run. Producer, pump and engine are goroutines of this process, on real shared memory; the two former have threads of their own,
// whose CPU time is not the engine's.
//
// Sinks: "books" keeps manifest and books in a store, and lets each chunk pass, as the engine does with what nobody keeps; "checksum" looks at every byte;
// "disk" keeps everything.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"dmi/bench/result"
	"dmi/control"
	"dmi/drain"
	"dmi/internal/crc32c"
	"dmi/internal/ringtape"
	"dmi/pipeline"
	"dmi/ring"
	"dmi/store"
	"dmi/tensor"

	"golang.org/x/sys/unix"
)

const (
	hidden = 2560 // Qwen3-4B's, in bf16
	most   = 726  // sites: those that Qwen3-4B has in vLLM
)

type load struct {
	name  string
	sites uint32
	rows  uint32 // of a step
	each  uint32 // of one request
	stats bool   // rows are statistics
}

// Of few sites it is bytes that cost, of the statistics of many it is records.
var loads = []load{
	{"prefill, 512 rows of one request a step", 38, 512, 512, false},
	{"decode, 32 requests a step", 38, 32, 1, false},
	{"statistics of 726 sites, decode, 1 request a step", most, 1, 1, true},
	{"statistics of 726 sites, decode, 32 requests a step", most, 32, 1, true},
}

// width is the bytes of a row.
func (l load) width() uint64 {
	if l.stats {
		return 4 * tensor.Figures
	}
	return 2 * hidden
}

func (l load) stepBytes() uint64 { return uint64(l.sites) * uint64(l.rows) * l.width() }

func main() {
	dir := flag.String("dir", ".", "a directory on the disk to measure")
	mib := flag.Int("mib", 4096, "how much to drain each time")
	rounds := flag.Int("rounds", 5, "rounds; medians are reported")
	only := flag.String("only", "", "measure only what has this in its name")
	out := flag.String("out", "", "directory to write the result to (default: standard output only)")
	profile := flag.String("cpuprofile", "", "write a CPU profile here")
	flag.Parse()
	if *profile != "" {
		if f, err := os.Create(*profile); err == nil {
			pprof.StartCPUProfile(f)
			defer pprof.StopCPUProfile()
		}
	}
	if err := run(*dir, *only, *mib, *rounds, *out); err != nil {
		fmt.Fprintln(os.Stderr, "drain:", err)
		os.Exit(1)
	}
}

func run(dir, only string, mib, rounds int, out string) error {
	work, err := os.MkdirTemp(dir, ".drain-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	control.HoldHeap()
	machine, bytes := result.Load(), uint64(mib)<<20
	var copies []float64
	rates, cpus := map[string][]float64{}, map[string][]float64{}
	var names []string
	for r := range rounds {
		base, err := copyRate(bytes)
		if err != nil {
			return err
		}
		copies = append(copies, base)
		fmt.Fprintf(os.Stderr, "round %d: copy %.2f GB/s", r+1, base/1e9)
		for _, l := range loads {
			for _, sink := range []string{"books", "checksum", "disk"} {
				name := l.name + ", sink " + sink
				if !strings.Contains(name, only) {
					continue
				}
				n := bytes
				switch {
				case l.stats:
					n = bytes / 16
				case sink == "disk":
					n = bytes / 4
				}
				rate, cpu, err := drainRate(l, sink, filepath.Join(work, "store"), n)
				if err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
				if r == 0 {
					names = append(names, name)
				}
				rates[name], cpus[name] = append(rates[name], rate), append(cpus[name], cpu)
				fmt.Fprintf(os.Stderr, "; %s %.2f GB/s, %.3f s/GB", name, rate/1e9, cpu)
			}
		}
		fmt.Fprintln(os.Stderr)
	}
	if len(names) == 0 {
		return fmt.Errorf("nothing that is measured has %q in its name", only)
	}
	command := fmt.Sprintf("go run ./bench/drain -mib %d -rounds %d", mib, rounds)
	if only != "" {
		command += fmt.Sprintf(" -only %q", only)
	}
	return report(command, machine, names, copies, rates, cpus, out)
}

// copyRate copies out of a memfd, 1 MiB at a time, with one thread: the least that anybody has to do.
func copyRate(bytes uint64) (float64, error) {
	const region = 256 << 20
	fd, err := unix.MemfdCreate("copy", unix.MFD_CLOEXEC)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, region); err != nil {
		return 0, err
	}
	mem, err := unix.Mmap(fd, 0, region, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return 0, err
	}
	defer unix.Munmap(mem)
	for i := 0; i < region; i += 64 {
		mem[i] = byte(i >> 6)
	}
	to := make([]byte, region)
	copy(to, mem)
	begun := time.Now()
	for at := uint64(0); at < bytes; at += 1 << 20 {
		i := at % region
		copy(to[i:i+1<<20], mem[i:i+1<<20])
	}
	return float64(bytes) / time.Since(begun).Seconds(), nil
}

// checksums is the sink that keeps nothing: every chunk is checksummed and counted.
type checksums struct {
	rows atomic.Uint64
	sum  atomic.Uint32
}

func (c *checksums) AppendChunks(chunks []tensor.Chunk) (int, error) {
	var sum, rows uint32
	for i := range chunks {
		if i+1 < len(chunks) {
			crc32c.Expect(chunks[i+1].Data)
		}
		sum += crc32c.Checksum(chunks[i].Data)
		rows += chunks[i].Rows
	}
	c.sum.Add(sum)
	c.rows.Add(uint64(rows))
	return len(chunks), nil
}
func (c *checksums) Book([]tensor.Entry) error                  { return nil }
func (c *checksums) Append(int, uint64, []byte, [][]byte) error { return nil }

// kept is the sink that keeps manifest and books, and with them the rows or not.
type kept struct {
	*store.Store
	session uint32
	tensors bool
	bySite  [most]struct { // each is one goroutine's at a time; apart, so that none waits for another's cache
		rows uint64
		_    [56]byte
	}
}

func (k *kept) rows() (n uint64) {
	for i := range k.bySite {
		n += k.bySite[i].rows
	}
	return n
}

func (k *kept) AppendChunks(chunks []tensor.Chunk) (int, error) {
	for i := range chunks {
		k.bySite[chunks[i].Site].rows += uint64(chunks[i].Rows)
	}
	if !k.tensors {
		return len(chunks), nil
	}
	return k.Store.AppendChunks(chunks)
}

func (k *kept) Append(lane int, first uint64, records []byte, tables [][]byte) error {
	return k.AppendStep(store.Step{Session: k.session, Lane: lane, First: first, Count: len(records) / ring.RecordSize, Records: records, Tables: tables})
}

type sink interface {
	pipeline.Store
	drain.Manifest
}

// drainRate publishes steps as fast as they are drained, until bytes have reached the sink and, on disk, are durable.
func drainRate(l load, kind, dir string, bytes uint64) (rate, cpu float64, err error) {
	p, err := ringtape.NewProducer(ringtape.Shape{Mode: ring.ModeComplete, Lanes: 1, RecordCapacity: 1 << 14, CommandCapacity: 1 << 10, SiteCapacity: 1024,
		Payload: 256 << 20, Table: 1 << 20, Staging: 256 << 20})
	if err != nil {
		return 0, 0, err
	}
	defer p.Close()
	for i := 0; i < len(p.PayloadMem); i += 8 {
		p.PayloadMem[i] = byte(i>>3) * 31
	}
	for i := uint64(0); i < p.Header.StagingBytes; i += 4096 {
		p.Mem[p.Header.StagingOffset+i] = 1
	}
	session := uint32(1)
	var list []tensor.Site
	for i := range l.sites {
		name := fmt.Sprintf("blocks.%d.hook_resid_post", i)
		p.AddSite(ring.Site{Layer: i, NDim: 2, Role: [6]uint8{ring.RoleRow, ring.RoleInner}}, name)
		list = append(list, tensor.Site{ID: i, Name: name, Layer: int(i)})
	}
	var to sink
	var rows func() uint64
	finish := func() error { return nil }
	if kind != "checksum" {
		defer os.RemoveAll(dir)
		s, err := store.Open(dir, store.Options{})
		if err != nil {
			return 0, 0, err
		}
		defer s.Close()
		if session, err = s.BeginSession(tensor.Session{ID: "s00000001", Producer: p.Name(), Mode: "complete"}); err != nil {
			return 0, 0, err
		}
		if err := s.AddSites(session, list); err != nil {
			return 0, 0, err
		}
		k := &kept{Store: s, session: session, tensors: kind == "disk"}
		to, rows, finish = k, k.rows, func() error { return s.Barrier(context.Background()) }
	} else {
		c := &checksums{}
		to, rows = c, c.rows.Load
	}

	r, err := ring.Map(p.FDs[0], 1<<40)
	if err != nil {
		return 0, 0, err
	}
	defer r.Close()
	var bells [2]int
	for i := range bells {
		if bells[i], err = unix.FcntlInt(uintptr(p.FDs[1+i]), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			return 0, 0, err
		}
	}
	bell, err := ring.NewBell(r, bells[0], bells[1])
	if err != nil {
		return 0, 0, err
	}
	defer bell.Close()
	var trouble atomic.Value
	event := func(level, code, message string) { trouble.Store(code + ": " + message) }
	items := make(chan []*drain.Item, 16)
	d := drain.New(r, bell, items, drain.Options{Manifest: to, Sites: func([]ring.Site) error { return nil }, Event: event})
	line := pipeline.New(pipeline.Options{Session: session, Store: to, Event: event})
	ended := make(chan error, 1)
	go func() {
		done := make(chan error, 1)
		go func() { done <- d.Run() }()
		line.Run(items)
		ended <- <-done
	}()
	p.StartPump()

	runtime.LockOSThread() // the producer's
	defer runtime.UnlockOSThread()
	steps := max(bytes/l.stepBytes(), 1)
	spent, publishing, begun := processTime(), ringtape.ThreadTime(), time.Now()
	for step := range steps {
		if err := publishStep(p, l, step+1); err != nil {
			return 0, 0, err
		}
	}
	publishing = ringtape.ThreadTime() - publishing
	p.Finish()
	d.Finish(tensor.ProducerExit, 10*time.Second)
	if err := <-ended; err != nil {
		return 0, 0, err
	}
	if err := finish(); err != nil {
		return 0, 0, err
	}
	elapsed := time.Since(begun).Seconds()
	p.StopPump()
	spent = processTime() - spent - publishing - p.PumpTime()
	if t := trouble.Load(); t != nil {
		return 0, 0, fmt.Errorf("%v", t)
	}
	if want := steps * uint64(l.sites) * uint64(l.rows); rows() != want {
		return 0, 0, fmt.Errorf("%d of %d rows arrived", rows(), want)
	}
	total := float64(steps * l.stepBytes())
	return total / elapsed, spent.Seconds() / (total / 1e9), nil
}

func publishStep(p *ringtape.Producer, l load, step uint64) error {
	lane := p.Lanes[0]
	until := time.Now().Add(time.Minute)
	var spans []ring.Span
	for first := uint32(0); first < l.rows; first += l.each {
		spans = append(spans, ring.Span{Request: uint64(first / l.each), First: first, Count: l.each, Position: uint32(step-1) * l.each})
	}
	table := ringtape.EncodeTable(step, spans, 0, [3]uint32{}, true)
	at, err := lane.WriteTable(table, until)
	if err != nil {
		return err
	}
	var b [ring.RecordSize]byte
	open := ring.OpenRecord{Step: step, Table: at, TableBytes: uint64(len(table)), Sites: l.sites, Kind: ring.KindOpen, Rows: [3]uint32{l.rows}}
	open.Encode(b[:])
	if err := lane.Publish(b[:], until); err != nil {
		return err
	}
	bytes := uint64(l.rows) * l.width()
	for site := range l.sites {
		at, ok := p.ReservePayload(bytes)
		for !ok {
			if time.Now().After(until) {
				return fmt.Errorf("step %d: no room in the payload ring", step)
			}
			time.Sleep(100 * time.Microsecond)
			at, ok = p.ReservePayload(bytes)
		}
		r := ring.Record{Step: step, Payload: at, PayloadBytes: bytes, TensorBytes: bytes, Site: site, Rows: l.rows, Kind: ring.KindCapture, Outcome: ring.OutcomeCaptured,
			Size: [6]uint32{l.rows, hidden}, Stride: [6]uint32{hidden, 1}, Role: [6]uint8{ring.RoleRow, ring.RoleInner}, DType: ring.DTypeBF16, NDim: 2,
			Place: ring.PlaceRing, Flags: ring.RecordGathered}
		if l.stats {
			r.Level = ring.LevelStats
		}
		r.Encode(b[:])
		if err := lane.Publish(b[:], until); err != nil {
			return err
		}
	}
	end := ring.CloseRecord{Step: step, Records: uint64(l.sites), Kind: ring.KindClose}
	end.Encode(b[:])
	return lane.Publish(b[:], until)
}

func processTime() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func report(command string, machine result.Row, names []string, copies []float64, rates, cpus map[string][]float64, out string) error {
	base := result.Median(copies) / 1e9
	rows := []result.Row{machine, {Metric: "copy out of a memfd, one thread", Value: base, Unit: "GB/s"}}
	for _, name := range names {
		rate, cpu := result.Median(rates[name])/1e9, result.Median(cpus[name])
		if i := slices.IndexFunc(loads, func(l load) bool { return strings.HasPrefix(name, l.name) }); loads[i].stats {
			bytes := float64(loads[i].stepBytes()) / float64(loads[i].sites) // of a record
			rows = append(rows, result.Row{Metric: name, Value: rate * 1e3 / bytes, Unit: "million records/s"},
				result.Row{Metric: name + ": CPU of the engine", Value: cpu * bytes / 1e3, Unit: "us a record"})
			continue
		}
		engine := result.Row{Metric: name + ": CPU of the engine", Value: cpu, Unit: "s/GB"}
		switch {
		case strings.HasSuffix(name, "books"):
			engine = engine.For("<= 0.05", cpu <= 0.05)
		case strings.HasSuffix(name, "disk"):
			engine = engine.For("<= 0.6", cpu <= 0.6)
		}
		rows = append(rows, result.Row{Metric: name, Value: rate, Unit: "GB/s"}.Against(base, rate/base), engine)
	}
	return result.Report("drain", command+" -out bench/results", rows, out)
}

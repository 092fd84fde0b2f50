//go:build linux

// Sink is an engine for measurements: it admits producers, drains, slices by request, checksums and counts every chunk, and throws it away; all
// else (sessions, requests, manifest, books, HTTP) is the real engine's. So what a capture costs can be told apart from what a disk costs.
//
//	sink [-level LEVEL] [-share N] DIR    store in DIR; producers attach to DIR/engine.sock
//
// Producers capture at LEVEL, full unless said, and of one in N requests alone, by the hash of their numbers.
//
// SIGTERM, or the end of standard input, ends it; it then writes {"rows", "bytes", "crc", "cpu_s"} to standard output.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"dmi/control"
	"dmi/internal/crc32c"
	"dmi/ring"
	"dmi/serve"
	"dmi/store"
	"dmi/tensor"

	"golang.org/x/sync/errgroup"
)

func main() {
	name, share := flag.String("level", "full", "of all rows"), flag.Uint64("share", 1, "one in so many requests")
	flag.Parse()
	level, err := tensor.ParseLevel(*name)
	if flag.NArg() != 1 || err != nil || *share == 0 {
		fmt.Fprintln(os.Stderr, "usage: sink [-level LEVEL] [-share N] DIR")
		os.Exit(2)
	}
	gate := tensor.Gate{Level: level, Stride: 1}
	if *share > 1 {
		gate = tensor.Gate{Level: tensor.Off, Stride: 1, Clauses: []tensor.GateClause{{Level: level, Stride: 1, Threshold: math.MaxUint64 / *share, Phases: 3, Stop: ring.OpenEnd, Step: 1}}}
	}
	if err := run(flag.Arg(0), gate); err != nil {
		fmt.Fprintln(os.Stderr, "sink:", err)
		os.Exit(1)
	}
}

// sink is a store that keeps everything but the tensors.
type sink struct {
	*store.Store
	rows, bytes atomic.Uint64
	crc         atomic.Uint32 // sum of the chunks' CRC32Cs: their order does not matter
}

// shareBytes is how much of one record several cores checksum together: logits of a large batch are most of a step's bytes, and of one site.
const shareBytes = 8 << 20

func (s *sink) AppendChunks(chunks []tensor.Chunk) (int, error) {
	bytes := 0
	for i := range chunks {
		bytes += len(chunks[i].Data)
	}
	parts := max(1, min(bytes/shareBytes, len(chunks), runtime.GOMAXPROCS(0)/4))
	each := (len(chunks) + parts - 1) / parts
	var group sync.WaitGroup
	for others := chunks[min(each, len(chunks)):]; len(others) > 0; others = others[min(each, len(others)):] {
		part := others[:min(each, len(others))]
		group.Go(func() { s.checksum(part) })
	}
	s.checksum(chunks[:min(each, len(chunks))])
	group.Wait()
	s.bytes.Add(uint64(bytes))
	return len(chunks), nil
}

func (s *sink) checksum(chunks []tensor.Chunk) {
	var crc, rows uint32
	for i := range chunks {
		if i+1 < len(chunks) {
			crc32c.Expect(chunks[i+1].Data)
		}
		crc += crc32c.Checksum(chunks[i].Data)
		rows += chunks[i].Rows
	}
	s.crc.Add(crc)
	s.rows.Add(uint64(rows))
}

func run(dir string, gate tensor.Gate) error {
	if path := os.Getenv("SINK_PROFILE"); path != "" {
		f, err := os.Create(path)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	kept, err := store.Open(dir, store.Options{})
	if err != nil {
		return err
	}
	defer kept.Close()
	s := &sink{Store: kept}
	producers, err := net.Listen("unix", filepath.Join(dir, "engine.sock"))
	if err != nil {
		return err
	}
	door, err := net.Listen("unix", filepath.Join(dir, "http.sock"))
	if err != nil {
		return err
	}
	intake := control.New(control.Options{Store: s, Engine: "sink", Version: "bench", StorePath: dir, HTTPUnix: filepath.Join(dir, "http.sock"),
		Event: func(level, code, session, message string) {
			fmt.Fprintf(os.Stderr, "%s %s: %s\n", level, code, message)
		}})
	intake.SetGates(control.Gates{Revision: 1, Of: func(_ uint32, _ string, sites []tensor.Site) ([]tensor.Gate, []tensor.Watch) {
		return slices.Repeat([]tensor.Gate{gate}, len(sites)), nil
	}})
	readers := serve.New(serve.Options{Identity: serve.Identity{ID: "sink", Version: "bench", Store: dir, Started: time.Now()}, Store: kept,
		Attached: func() []serve.Attached { return nil }, Flush: intake.Flush})
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	go func() { // the process that started us is gone
		io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	group, ctx := errgroup.WithContext(ctx)
	server := &http.Server{Handler: readers.Local(), ReadHeaderTimeout: 10 * time.Second}
	group.Go(func() error { return intake.Serve(ctx, producers) })
	group.Go(func() error {
		if err := server.Serve(door); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	fmt.Fprintln(os.Stderr, "sink: ready")
	<-ctx.Done()
	server.Close()
	if err := group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]any{"rows": s.rows.Load(), "bytes": s.bytes.Load(), "crc": s.crc.Load(),
		"cpu_s": time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()})
}

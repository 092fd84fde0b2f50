package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"dmi/bench/result"
	"dmi/bench/traffic"
	"dmi/store"
)

// memory writes 512 requests at 430 sites, two rows each, and looks at what is held meanwhile: more streams are open than any bound has room for.
func memory(dir string) ([]result.Row, error) {
	dir = filepath.Join(dir, "memory")
	defer os.RemoveAll(dir)
	s, err := store.Open(dir, store.Options{})
	if err != nil {
		return nil, err
	}
	defer s.Close()
	t, err := traffic.Begin(s, "s00000001", manySites, width)
	if err != nil {
		return nil, err
	}
	debug.FreeOSMemory()
	before, err := resident()
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil { // the peak counts from here
		return nil, err
	}
	var held, streams float64
	over, looking := make(chan struct{}), sync.WaitGroup{}
	looking.Go(func() {
		for tick := time.NewTicker(5 * time.Millisecond); ; {
			select {
			case <-over:
				tick.Stop()
				return
			case <-tick.C:
				m := s.Stats()
				held, streams = max(held, float64(m.BufferBytes)), max(streams, float64(m.Streams))
			}
		}
	})
	ids := make([]uint64, together)
	for i := range ids {
		ids[i] = uint64(i)
	}
	for at := range uint32(2) {
		if _, err = t.Step(ids, at, 1); err != nil {
			break
		}
	}
	close(over)
	looking.Wait()
	peak, failed := field("VmHWM")
	if err = errors.Join(err, failed); err != nil {
		return nil, err
	}
	const mib = 1 << 20
	return []result.Row{
		result.Row{Metric: "512 requests x 430 sites, 2 rows of 5 kB each: held in the buffer, most", Value: held / mib, Unit: "MiB"}.For("<= 256", held <= 256*mib),
		{Metric: "512 requests x 430 sites: streams in the buffer, most", Value: streams, Unit: "streams"},
		{Metric: "512 requests x 430 sites: resident memory, most, beyond what was before", Value: (peak - before) / mib, Unit: "MiB"},
	}, nil
}

func resident() (float64, error) { return field("VmRSS") }

// field reads a size of this process.
func field(name string) (float64, error) {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	_, rest, _ := bytes.Cut(text, []byte(name+":"))
	var kib float64
	_, err = fmt.Fscan(bytes.NewReader(rest), &kib)
	return kib * 1024, err
}

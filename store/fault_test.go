package store

import (
	"context"
	"errors"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"dmi/internal/vfs"
	"dmi/tensor"
)

// TestDiskFull fills the disk for a while: what was accepted is kept, the error says what to do, and once there is room again nothing is missing.
func TestDiskFull(t *testing.T) {
	random := seeded(t)
	for _, kind := range []struct {
		name  string
		fails func(op, name string) bool
		lag   bool // nothing becomes durable
	}{
		{"segments", func(op, name string) bool { return op == "write" && strings.Contains(name, "segments") }, true},
		{"everything", func(op, name string) bool { return op == "write" || op == "create" }, true},
		{"sealing", func(op, name string) bool { return op == "rename" || op == "syncdir" }, false}, // a segment is durable before it is sealed
		{"sync", func(op, name string) bool { return op == "sync" }, true},
	} {
		t.Run(kind.name, func(t *testing.T) {
			mem := vfs.NewMem()
			var full atomic.Bool
			mem.Fault = func(op, name string) error {
				if full.Load() && kind.fails(op, name) {
					return syscall.ENOSPC
				}
				return nil
			}
			o := small()
			o.FS, o.Catalogue = mem, catalogueFile(t)
			o.FlushAge, o.SyncAge = 5*time.Millisecond, 5*time.Millisecond
			var told atomic.Value
			o.Log = func(level, code, message string) { told.Store(level + " " + code + " " + message) }
			s := mustOpen(t, "store", o)
			l, err := newLoad(t, s, rand.New(rand.NewPCG(random.Uint64(), 0)), "s0000000a")
			if err != nil {
				t.Fatal(err)
			}
			forward := func() error { return l.forward(uint64(l.random.IntN(3)), 5) }
			for range 10 {
				if err := forward(); err != nil {
					t.Fatal(err)
				}
			}
			if err := l.barrier(); err != nil {
				t.Fatal(err)
			}
			full.Store(true)
			refused := 0
			for range 10 {
				produced, records := l.produced, l.records
				if err := forward(); err != nil {
					if !errors.Is(err, ErrDiskFull) {
						t.Fatalf("got %v, want ErrDiskFull", err)
					}
					refused++
					if l.records == records && l.produced != produced {
						t.Fatal("counted a step that was refused")
					}
					break // a step that was accepted in part: its other rows are settled at the end
				}
			}
			if err := s.Barrier(context.Background()); !errors.Is(err, ErrDiskFull) {
				t.Fatalf("barrier on a full disk: %v", err)
			}
			if m := s.Stats(); !strings.Contains(m.Failure, "free space") || (kind.lag && m.DurableLag == 0 && refused == 0) {
				t.Fatalf("metrics do not tell: %+v", m)
			}
			if text, _ := told.Load().(string); !strings.Contains(text, "disk is full") {
				t.Fatalf("the operator was told %q", text)
			}
			l.check(s, killed) // what was accepted can still be read
			full.Store(false)
			if err := l.barrier(); err != nil {
				t.Fatalf("barrier after there is room: %v", err)
			}
			if refused == 0 {
				for range 5 {
					if err := forward(); err != nil {
						t.Fatal(err)
					}
				}
				l.check(s, all)
				balanced(t, s, l.produced)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			o.Log = nil
			s = mustOpen(t, "store", o)
			if refused == 0 {
				l.check(s, all)
			}
			selfBalanced(t, s)
			verified(t, s)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestDurableByItself: rows that a sync finds in the buffer count as not durable after it, and become durable without anybody asking.
func TestDurableByItself(t *testing.T) {
	o := small()
	o.FS, o.Catalogue = vfs.NewMem(), catalogueFile(t)
	o.FlushAge, o.SyncAge = 200*time.Millisecond, 5*time.Millisecond
	s := mustOpen(t, "store", o)
	l, err := newLoad(t, s, seeded(t), "s0000000a")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.barrier(); err != nil {
		t.Fatal(err)
	}
	if err := l.forward(1, 5); err != nil {
		t.Fatal(err)
	}
	durable := false
	for deadline := time.Now().Add(time.Minute); !durable && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		m := s.Stats()
		durable = m.DurableLag == 0
		if durable && m.BufferBytes > 0 {
			t.Fatalf("durable, with %d bytes in the buffer", m.BufferBytes)
		}
	}
	if !durable {
		t.Fatal("rows that nobody asked for did not become durable")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestFullBufferOnFullDisk: a session that would rather lose rows than wait is told at once, one in complete mode after the bound; neither blocks for ever.
func TestFullBufferOnFullDisk(t *testing.T) {
	for _, mode := range []string{"best-effort", "complete"} {
		mem := vfs.NewMem()
		var full atomic.Bool
		mem.Fault = func(op, name string) error {
			if full.Load() && op == "write" && strings.Contains(name, "segments") {
				return syscall.ENOSPC
			}
			return nil
		}
		o := small()
		o.FS, o.Catalogue, o.FullDiskWait = mem, catalogueFile(t), 300*time.Millisecond
		s := mustOpen(t, "store", o)
		l, err := newLoad(t, s, seeded(t), "s0000000a")
		if err != nil {
			t.Fatal(err)
		}
		s.mu.Lock()
		s.sessions[l.session].Mode = mode
		s.mu.Unlock()
		full.Store(true)
		begun := time.Now()
		for err = nil; err == nil; {
			err = l.forward(1, 2, 3, 4, 5, 6, 7)
		}
		if !errors.Is(err, ErrDiskFull) {
			t.Fatalf("%s: %v", mode, err)
		}
		if took := time.Since(begun); took > time.Minute || (mode == "complete" && took < o.FullDiskWait) {
			t.Errorf("%s: refused after %v", mode, took)
		}
		if held := s.Stats().BufferBytes; held > uint64(o.BufferMiB)<<20 {
			t.Errorf("%s: the buffer holds %d bytes", mode, held)
		}
		l.check(s, killed)
		full.Store(false)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = mustOpen(t, "store", o)
		selfBalanced(t, s)
		verified(t, s)
		s.Close()
	}
}

// TestBufferBoundHoldsForManyAppenders: those who wait for room hold none.
func TestBufferBoundHoldsForManyAppenders(t *testing.T) {
	const appenders, chunk = 64, 4 << 20
	mem := vfs.NewMem()
	var full atomic.Bool
	mem.Fault = func(op, name string) error {
		if full.Load() && op == "write" && strings.Contains(name, "segments") {
			return syscall.ENOSPC
		}
		return nil
	}
	o := Options{BufferMiB: 16, HeaderKiB: 64, FS: mem, Catalogue: catalogueFile(t), FlushAge: 5 * time.Millisecond, TidyEvery: time.Hour}
	s := mustOpen(t, "store", o)
	session, err := s.BeginSession(tensor.Session{ID: "s0000000a", Mode: "complete"})
	must(t, err)
	must(t, s.AddSites(session, []tensor.Site{{Name: "x"}}))
	full.Store(true)
	data := make([]byte, chunk)
	before := heapInUse()
	taken := make(chan error, appenders)
	for i := range uint64(appenders) {
		go func() {
			taken <- s.AppendChunk(tensor.Chunk{Key: tensor.RequestKey{Session: session, Request: i}, Rows: 1, DType: tensor.U8, Shape: []int{chunk}, Data: data})
		}()
	}
	const fit = 16/4 - 1 // with what is kept about them
	for range fit {
		must(t, <-taken)
	}
	time.Sleep(50 * time.Millisecond) // for the others to come as far as they get
	if held := s.Stats().BufferBytes; held > 16<<20 || len(taken) > 0 {
		t.Errorf("the buffer of 16 MiB holds %d bytes, and %d more were taken", held, len(taken))
	}
	if grown := heapInUse() - before; grown > (16+32+16)<<20 { // the buffer, what is on its way, and slack; the others' would be 240 MiB
		t.Errorf("%d MiB more are in use", grown>>20)
	}
	full.Store(false)
	for range appenders - fit {
		must(t, <-taken)
	}
	must(t, s.Barrier(t.Context()))
	for i := range uint64(appenders) {
		if refs, err := s.Chunks(tensor.RequestKey{Session: session, Request: i}, 0, 0, 1); err != nil || len(refs) != 1 {
			t.Errorf("request %d: %d chunks, %v", i, len(refs), err)
		}
	}
	if m := s.Stats(); m.BufferBytes != 0 {
		t.Errorf("%d bytes are held of nothing", m.BufferBytes)
	}
	must(t, s.Close())
}

// TestBufferBoundHoldsForThinRows: what is kept about rows is in the bound, which rows of a few bytes would else be far beyond.
func TestBufferBoundHoldsForThinRows(t *testing.T) {
	const most = 400_000
	mem := vfs.NewMem()
	var full atomic.Bool
	mem.Fault = func(op, name string) error {
		if full.Load() && op == "write" && strings.Contains(name, "segments") {
			return syscall.ENOSPC
		}
		return nil
	}
	o := Options{BufferMiB: 32, HeaderKiB: 64, FS: mem, Catalogue: catalogueFile(t), FlushAge: 5 * time.Millisecond, TidyEvery: time.Hour}
	s := mustOpen(t, "store", o)
	session, err := s.BeginSession(tensor.Session{ID: "s0000000a", Mode: "best-effort"})
	must(t, err)
	must(t, s.AddSites(session, []tensor.Site{{Name: "x"}}))
	full.Store(true)
	before, taken := heapInUse(), uint64(0)
	for err = nil; err == nil && taken < most; taken++ {
		err = s.AppendChunk(tensor.Chunk{Key: tensor.RequestKey{Session: session, Request: taken}, Rows: 1, DType: tensor.BF16, Shape: []int{4}, Data: make([]byte, 8)})
	}
	grown := heapInUse() - before
	t.Logf("%d rows of 8 bytes in a buffer of 32 MiB, %.0f MiB are in use", taken, float64(grown)/(1<<20))
	if !errors.Is(err, ErrDiskFull) || grown > 32<<20+32<<20 { // and what is on its way
		t.Errorf("%v", err)
	}
	full.Store(false)
	must(t, s.Barrier(t.Context()))
	must(t, s.Close())
}

// heapInUse is what is allocated and reachable. It may shrink: stores of tests before may not have been collected.
func heapInUse() int64 {
	runtime.GC()
	runtime.GC() // what pools have survives the first
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

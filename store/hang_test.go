package store

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"dmi/internal/vfs"
	"dmi/tensor"
)

var faults = flag.Int("faults", 1, "stores whose disk fails, hangs and is slow, by chance, twelve times")

// troubled is a file system whose changes fail, take their time or do not return, as chance has it, until it is mended. Reads work.
type troubled struct {
	vfs.FS
	mu     sync.Mutex
	random *rand.Rand
	ill    bool
	odds   [3]int // of 100: that a change fails, hangs, takes its time
	mended chan struct{}
	failed int
	hung   int // now
	hangs  int // ever
}

func (d *troubled) sicken(odds [3]int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ill, d.odds, d.mended = true, odds, make(chan struct{})
}

func (d *troubled) mend() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ill {
		d.ill = false
		close(d.mended)
	}
}

func (d *troubled) hanging() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.hung
}

// change does what changes something: or not, or later.
func (d *troubled) change(do func() error) error {
	d.mu.Lock()
	if !d.ill {
		d.mu.Unlock()
		return do()
	}
	luck, mended, before := d.random.IntN(100), d.mended, d.random.IntN(2) == 0
	pause := time.Duration(d.random.IntN(5000)) * time.Microsecond
	failure := []error{syscall.ENOSPC, syscall.EROFS, syscall.EIO}[d.random.IntN(3)]
	fails, hangs, slow := luck < d.odds[0], luck-d.odds[0] < d.odds[1], luck-d.odds[0]-d.odds[1] < d.odds[2]
	if fails {
		d.failed++
		d.mu.Unlock()
		return failure
	}
	if hangs {
		d.hung++
		d.hangs++
	}
	d.mu.Unlock()
	switch {
	case hangs:
		defer func() {
			d.mu.Lock()
			d.hung--
			d.mu.Unlock()
		}()
		if before {
			<-mended
			return do()
		}
		err := do() // it is done, and the disk does not say so
		<-mended
		return err
	case slow:
		time.Sleep(pause)
	}
	return do()
}

func (d *troubled) file(open func() (vfs.File, error)) (f vfs.File, err error) {
	err = d.change(func() error { f, err = open(); return err })
	if err != nil {
		return nil, err
	}
	return troubledFile{f, d}, nil
}

func (d *troubled) Create(name string, direct bool) (vfs.File, error) {
	return d.file(func() (vfs.File, error) { return d.FS.Create(name, direct) })
}

func (d *troubled) Open(name string, write bool) (vfs.File, error) {
	f, err := d.FS.Open(name, write)
	if err != nil {
		return nil, err
	}
	return troubledFile{f, d}, nil
}

func (d *troubled) Remove(name string) error {
	return d.change(func() error { return d.FS.Remove(name) })
}

func (d *troubled) Rename(from, to string) error {
	return d.change(func() error { return d.FS.Rename(from, to) })
}

func (d *troubled) SyncDir(name string) error {
	return d.change(func() error { return d.FS.SyncDir(name) })
}

type troubledFile struct {
	vfs.File
	disk *troubled
}

func (f troubledFile) WriteAt(p []byte, off int64) (n int, err error) {
	err = f.disk.change(func() error { n, err = f.File.WriteAt(p, off); return err })
	return n, err
}

func (f troubledFile) Truncate(size int64) error {
	return f.disk.change(func() error { return f.File.Truncate(size) })
}

func (f troubledFile) Sync() error { return f.disk.change(f.File.Sync) }

// TestRandomFaults: a disk that fails, hangs and is slow by chance, again and again, under load. While it hangs readers are answered, a barrier returns when its time is up, and the operator
// is told what hangs; what was called durable outlives a power loss at any such moment; and when the disk works again everything that was accepted is there and durable.
func TestRandomFaults(t *testing.T) {
	for n := range *faults {
		t.Run(strconv.Itoa(n), randomFaults)
	}
}

func randomFaults(t *testing.T) {
	const patience = time.Minute
	random := seeded(t)
	mem := vfs.NewMem()
	disk := &troubled{FS: mem, random: rand.New(rand.NewPCG(random.Uint64(), 1))}
	o := small()
	o.FS, o.Catalogue, o.FlushAge, o.SyncAge, o.FullDiskWait, o.TidyEvery = disk, catalogueFile(t), 2*time.Millisecond, 3*time.Millisecond, time.Millisecond, time.Hour
	o.StallAfter = 20 * time.Millisecond
	var told sync.Map // codes
	o.Log = func(level, code, message string) {
		if level == "error" {
			told.Store(message, code)
		}
	}
	s := mustOpen(t, "store", o)
	l, err := newLoad(t, s, rand.New(rand.NewPCG(random.Uint64(), 0)), "s0000000a")
	must(t, err)
	l.patient = true
	defer disk.mend() // whoever waits for it is to end
	within := func(what string, do func()) {
		t.Helper()
		done := make(chan struct{})
		go func() { defer close(done); do() }()
		select {
		case <-done:
		case <-time.After(patience):
			t.Fatalf("%s does not return", what)
		}
	}
	interrupted, stalls := 0, 0
	for episode := range 12 {
		must(t, l.forward(uint64(random.IntN(3)), 3))
		must(t, l.barrier())
		known := l.next[3]
		kinds := [][3]int{{30, 0, 0}, {0, 30, 0}, {0, 0, 60}, {10, 10, 20}}
		odds := kinds[(episode+1)%len(kinds)]
		disk.sicken(odds)
		loaded := make(chan error, 1)
		seed := random.Uint64()
		go func() {
			random := rand.New(rand.NewPCG(seed, 2))
			for i := range 12 {
				if err := l.forward(uint64(random.IntN(3)), uint64(3+random.IntN(3))); err != nil && !errors.Is(err, errRefused) {
					loaded <- err
					return
				}
				switch {
				case i%4 == 3:
					ctx, cancel := context.WithTimeout(context.Background(), time.Duration(random.IntN(20))*time.Millisecond)
					if l.barrierWithin(ctx) != nil {
						interrupted++
					}
					cancel()
				case i == 6:
					_, _ = s.Compact(t.Context(), nil) // it may fail: what must hold is the same
				}
			}
			loaded <- nil
		}()
		var over error
		ended := false
		moment := 200 * time.Millisecond
		if odds[1] > 0 {
			moment = patience // until something hangs, or nothing did
		}
		for until := time.Now().Add(moment); disk.hanging() == 0 && !ended && time.Now().Before(until); {
			select {
			case over = <-loaded:
				ended = true
			case <-time.After(time.Millisecond):
			}
		}
		if disk.hanging() > 0 { // until it is mended
			within("a read on a disk that hangs", func() {
				refs, err := s.Chunks(l.key(3), 0, 0, known)
				for _, ref := range refs {
					err = errors.Join(err, s.ReadRows(ref, 0, ref.Rows, make([]byte, int(ref.Rows)*ref.RowBytes())))
				}
				if err != nil {
					t.Errorf("a read on a disk that hangs: %v", err)
				}
			})
			within("a barrier on a disk that hangs", func() {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
				defer cancel()
				_ = s.Barrier(ctx) // whether it succeeds depends on what hangs
			})
			within("what an operator is told", func() {
				for s.Stats().Failure == "" {
					time.Sleep(time.Millisecond)
				}
				if m := s.Stats(); strings.Contains(m.Failure, ErrStalled.Error()) {
					stalls++
					if m.Stalled == 0 {
						t.Errorf("%q, for %v", m.Failure, m.Stalled)
					}
				}
			})
		}
		disk.mend()
		if !ended {
			select {
			case over = <-loaded:
			case <-time.After(2 * patience):
				t.Fatal("the load does not end on a disk that works")
			}
		}
		must(t, over)
		if episode%3 == 0 { // what was durable by now, whatever became of the rest
			for how, left := range map[string]survived{"killed": killed, "no power": noPower} {
				after := mem.AfterKill()
				if left == noPower {
					after = mem.AfterPowerLoss(func() bool { return random.IntN(2) == 0 })
				}
				p := o
				p.FS, p.Catalogue, p.Log = after, catalogueFile(t), nil
				crashed, err := Open("store", p)
				if err != nil {
					t.Fatalf("episode %d, %s: %v", episode, how, err)
				}
				l.check(crashed, left)
				selfBalanced(t, crashed)
				verified(t, crashed)
				must(t, crashed.Close())
			}
		}
		must(t, l.barrier())
		l.check(s, all)
		balanced(t, s, l.produced)
		for begun := time.Now(); s.Stats().Failure != ""; { // what takes a while on a busy machine is said to hang, too, until something was written
			if time.Since(begun) > patience {
				t.Fatalf("the disk works again, and the store says %q", s.Stats().Failure)
			}
			must(t, l.forward(1, 3))
			must(t, l.barrier())
		}
	}
	codes := map[any]int{}
	told.Range(func(_, code any) bool { codes[code]++; return true })
	t.Logf("%d changes failed, %d hung; %d barriers were given up; %d times the disk was said to hang; messages: %v", disk.failed, disk.hangs, interrupted, stalls, codes)
	if disk.failed == 0 || disk.hangs == 0 || stalls == 0 || codes["store_write"] == 0 {
		t.Error("too little happened to show anything")
	}
	must(t, s.Close())
	o.Log = nil
	s = mustOpen(t, "store", o)
	l.check(s, all)
	balanced(t, s, l.produced)
	verified(t, s)
	must(t, s.Close())
}

// TestFirstOfTwoSegmentsFails: rows of one request and site that are written together go on in the next segment where the first is full. When the first then cannot be written and the
// next one can, none of them is durable, and none is lost.
func TestFirstOfTwoSegmentsFails(t *testing.T) {
	const rows, width = 64, 1024
	mem := vfs.NewMem()
	var failing atomic.Bool
	mem.Fault = func(op, name string) error {
		if failing.Load() && op == "write" && strings.Contains(name, "/00000001.") {
			return syscall.EIO
		}
		return nil
	}
	o := small()
	o.FS, o.Catalogue, o.SegmentTensors, o.FlushAge, o.SyncAge, o.TidyEvery = mem, catalogueFile(t), 20, time.Hour, time.Hour, time.Hour
	s := mustOpen(t, "store", o)
	session, err := s.BeginSession(tensor.Session{ID: "s00000001", Mode: "complete"})
	must(t, err)
	must(t, s.AddSites(session, []tensor.Site{{Name: "x"}, {ID: 1, Name: "y"}}))
	key := tensor.RequestKey{Session: session, Request: 1}
	add := func(site, first, n uint32) {
		t.Helper()
		var data []byte
		for i := range n {
			data = append(data, goldenRow(key, site, 0, first+i, width)...)
		}
		must(t, s.AppendChunk(tensor.Chunk{Key: key, Site: site, First: first, Rows: n, DType: tensor.U8, Shape: []int{width}, Data: data}))
	}
	add(1, 0, 1) // so that the first segment is there
	must(t, s.Barrier(t.Context()))
	failing.Store(true)
	add(0, 0, rows)
	if err := s.Barrier(t.Context()); !errors.Is(err, ErrDevice) {
		t.Errorf("a barrier with half of the rows written: %v", err)
	}
	failing.Store(false)
	must(t, s.Barrier(t.Context()))
	refs, err := s.Chunks(key, 0, 0, rows)
	must(t, err)
	next := uint32(0)
	for _, ref := range refs {
		data := make([]byte, int(ref.Rows)*width)
		must(t, s.ReadRows(ref, 0, ref.Rows, data))
		for i := range ref.Rows {
			if ref.First+i != next || !bytes.Equal(data[i*width:(i+1)*width], goldenRow(key, 0, 0, next, width)) {
				t.Fatalf("row %d comes after row %d, or is another", ref.First+i, next)
			}
			next++
		}
	}
	if next != rows {
		t.Errorf("%d rows of %d", next, rows)
	}
	must(t, s.Close())
}

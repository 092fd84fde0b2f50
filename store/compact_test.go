package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"dmi/internal/vfs"
	"dmi/tensor"
)

// scatteredLoad has requests whose rows lie in many segments and small chunks.
func scatteredLoad(t *testing.T, o Options) (*Store, *load) {
	s := mustOpen(t, "store", o)
	l, err := newLoad(t, s, seeded(t), "s0000000a")
	must(t, err)
	for range 60 {
		must(t, l.forward(uint64(l.random.IntN(4)), uint64(4+l.random.IntN(4))))
		must(t, l.barrier())
	}
	for request := range l.next {
		must(t, s.PutRequests([]tensor.Request{{Key: l.key(request), ID: fmt.Sprint("r.", request), Ended: time.Unix(9, 0)}}))
	}
	must(t, l.barrier())
	return s, l
}

func inMemory(t *testing.T) (*vfs.Mem, Options) {
	o, mem := small(), vfs.NewMem()
	o.FS, o.Catalogue, o.TidyEvery = mem, catalogueFile(t), time.Hour
	return mem, o
}

// TestCompaction: every answer stays, a request's site costs three reads where its rows can be one chunk, references stay readable, and there is nothing left to do.
func TestCompaction(t *testing.T) {
	_, o := inMemory(t)
	o.SegmentTensors = 60
	s, l := scatteredLoad(t, o)
	books := s.Books()
	type rows struct {
		ref  ChunkRef
		data []byte
	}
	var held []rows
	most := 0
	for request, end := range l.next {
		for site := range l.sites {
			refs, err := s.Chunks(l.key(request), uint32(site), 0, end)
			must(t, err)
			most = max(most, len(refs))
			for _, ref := range refs {
				data := make([]byte, ref.RowBytes()*int(ref.Rows))
				must(t, s.ReadRows(ref, 0, ref.Rows, data))
				held = append(held, rows{ref, data})
			}
		}
	}
	if most < 5 {
		t.Fatalf("the load has %d chunks a site at most: nothing to show", most)
	}
	s.opt.SegmentTensors = 600 // room for a request in one
	var last CompactionProgress
	done, err := s.Compact(t.Context(), func(p CompactionProgress) { last = p })
	must(t, err)
	t.Logf("%+v, at most %d chunks of a request and site before", done, most)
	if done.Merged >= done.Chunks || done.Made >= done.Segments || last.Compaction != done || last.RequestsTotal == 0 {
		t.Errorf("%+v, progress %+v", done, last)
	}
	check := func(s *Store) {
		t.Helper()
		l.check(s, all)
		balanced(t, s, l.produced)
		if now := s.Books(); fmt.Sprint(now) != fmt.Sprint(books) {
			t.Errorf("books were %+v, are %+v", books, now)
		}
		verified(t, s)
		for request, end := range l.next {
			groups, err := s.groups(l.key(request))
			must(t, err)
			for site := range l.sites {
				refs, err := s.Chunks(l.key(request), uint32(site), 0, end)
				must(t, err)
				dropped := 0 // rows that are not there part chunks
				for i := 1; i < len(refs); i++ {
					if refs[i-1].First+refs[i-1].Rows != refs[i].First {
						dropped++
					}
				}
				if reads := len(groups) + len(refs); !l.sites[site].Keyed && reads > enoughReads+dropped {
					t.Errorf("request %d, site %d: %d reads, with %d gaps", request, site, reads, dropped)
				}
			}
		}
	}
	check(s)
	for _, h := range held {
		data := make([]byte, len(h.data))
		if err := s.ReadRows(h.ref, 0, h.ref.Rows, data); err != nil || !bytes.Equal(data, h.data) {
			t.Fatalf("rows %d+%d of request %d, site %d, read by a reference from before: %v, or other bytes", h.ref.First, h.ref.Rows, h.ref.Key.Request, h.ref.Site, err)
		}
	}
	if again, err := s.Compact(t.Context(), nil); err != nil || again.Segments != 0 {
		t.Errorf("again: %+v, %v", again, err)
	}
	must(t, s.Close())
	o.Catalogue = catalogueFile(t)
	for range 2 { // made anew, and as it then is
		s = mustOpen(t, "store", o)
		check(s)
		must(t, s.Close())
	}
}

// TestCrashInCompaction: at every change to a file, whatever is lost, no row is.
func TestCrashInCompaction(t *testing.T) {
	written := 0
	compact := func(s *Store) error {
		done, err := s.Compact(context.Background(), nil)
		written += done.Segments
		return err
	}
	defer func() {
		if written == 0 {
			t.Error("nothing was ever compacted")
		}
	}()
	crashEverywhere(t, func(o *Options) { o.SegmentTensors = 20 }, func(l *load) error { return compact(settled(l)) }, func(s *Store, l *load) { must(t, compact(s)) })
}

// TestCrashInDeletionAndCompaction: what is deleted does not come back.
func TestCrashInDeletionAndCompaction(t *testing.T) {
	both := func(s *Store, l *load) error {
		if _, err := s.Compact(context.Background(), nil); err != nil {
			return err
		}
		if _, err := s.Delete(context.Background(), []tensor.RequestKey{l.key(1)}, nil); err != nil {
			return err
		}
		_, err := s.Compact(context.Background(), nil)
		return err
	}
	crashEverywhere(t, func(o *Options) { o.SegmentTensors = 20 }, func(l *load) error { return both(settled(l), l) }, func(s *Store, l *load) {
		must(t, both(s, l))
		for site := range l.sites {
			if refs, err := s.Chunks(l.key(1), uint32(site), 0, 1<<30); err != nil || len(refs) > 0 {
				t.Errorf("it is deleted: site %d: %d chunks, %v", site, len(refs), err)
			}
		}
	})
}

// settled is a load's store, whose requests count as ended: so that they are compacted.
func settled(l *load) *Store {
	l.store.mu.Lock()
	defer l.store.mu.Unlock()
	l.store.sessions[l.session].busy = false
	return l.store
}

// TestIdleCompaction: it begins when nothing has come for a while, stops at once when something does, and goes on where it was.
func TestIdleCompaction(t *testing.T) {
	_, o := inMemory(t)
	o.CompactAfter, o.CompactMiBs = time.Minute, 1<<20
	var events atomic.Int64
	o.Log = func(level, code, message string) {
		if code == "compaction" {
			events.Add(1)
		}
	}
	s, l := scatteredLoad(t, o)
	defer s.Close()
	must(t, s.barrier(t.Context(), &barrier{done: make(chan error, 1), seal: true}))
	idle := newIdleness(s)
	now := time.Now()
	look := func() uint64 {
		t.Helper()
		must(t, idle.look(now))
		return s.Stats().CompactedSegments
	}
	if n := look(); n != 0 {
		t.Errorf("%d segments at once", n)
	}
	now = now.Add(59 * time.Second)
	must(t, l.forward(1)) // it is not idle
	look()
	now = now.Add(59 * time.Second)
	if n := look(); n != 0 {
		t.Errorf("%d segments though rows came a moment ago", n)
	}
	now = now.Add(2 * time.Second)
	interrupted := false
	passing := idle.run.pace
	idle.run.pace = func(bytes int64) error {
		if bytes > 0 && !interrupted {
			interrupted = true
			must(t, l.forward(2))
		}
		return passing(bytes)
	}
	if n := look(); n != 0 || !interrupted {
		t.Errorf("%d segments, though a step came while they were written", n)
	}
	for range 5 {
		now = now.Add(2 * time.Minute)
		look()
	}
	if look() == 0 || events.Load() == 0 {
		t.Errorf("%d segments, %d events", look(), events.Load())
	}
	before := look()
	now = now.Add(time.Hour)
	if look() != before {
		t.Error("there was something left to do")
	}
	l.check(s, all)
	balanced(t, s, l.produced)
	verified(t, s)
}

// TestCompactionLeavesADamagedSegment: it is as it was, alone, and it is told once. What else is of its requests is compacted.
func TestCompactionLeavesADamagedSegment(t *testing.T) {
	mem, o := inMemory(t)
	told := 0
	o.Log = func(level, code, message string) {
		if code == "damaged" {
			told++
		}
	}
	s, l := scatteredLoad(t, o)
	must(t, s.barrier(t.Context(), &barrier{done: make(chan error, 1), seal: true}))
	name := s.segmentPath(2, true)
	f, err := mem.Open(name, true)
	must(t, err)
	data := make([]byte, 16)
	_, err = f.ReadAt(data, 64<<10+4096)
	for i := range data {
		data[i] ^= 0xff
	}
	_, wrong := f.WriteAt(data, 64<<10+4096)
	must(t, errors.Join(err, wrong))
	before := l.produced
	done, err := s.Compact(t.Context(), nil)
	must(t, err)
	_, err = mem.Stat(name)
	if err != nil || told != 1 || len(s.spared) != 1 || !s.spared[2] || done.Segments == 0 {
		t.Errorf("%+v, told %d times, left %v, %v", done, told, s.spared, err)
	}
	balanced(t, s, before)
	must(t, s.Close())
	reportsDamage(t, o, l, "a damaged segment")
}

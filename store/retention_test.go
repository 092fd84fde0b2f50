package store

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"dmi/internal/vfs"
)

// TestRetention: the oldest segments go, what they held is booked as expired since, nothing else changes; also for the next engine, for one that lost the
// catalogue, and for a reader.
func TestRetention(t *testing.T) {
	random := seeded(t)
	mem := vfs.NewMem()
	o := small()
	o.FS, o.Catalogue, o.TidyEvery, o.RetainAge, o.SegmentTensors = mem, catalogueFile(t), time.Hour, time.Hour, 20
	s := mustOpen(t, "store", o)
	l, err := newLoad(t, s, random, "s0000000a")
	must(t, err)
	fill := func() {
		for range 20 {
			must(t, l.forward(uint64(random.IntN(4)), uint64(4+random.IntN(2))))
		}
		must(t, l.barrier())
	}
	fill()
	sealed := s.Stats().Segments
	must(t, s.tidyOnce(time.Now()))
	if got := s.Stats(); got.Segments < sealed || got.ExpiredRows != 0 {
		t.Fatalf("rows younger than an hour went: %+v", got)
	}
	must(t, s.tidyOnce(time.Now().Add(3*time.Hour)))
	got := s.Stats()
	if got.Segments != 0 || got.RetiredSegments < uint64(sealed) || got.RetiredBytes == 0 {
		t.Fatalf("%d segments were sealed; then %+v", sealed, got)
	}
	if got.ExpiredRows == 0 || got.ExpiredRows != s.Books().Expired[l.session] {
		t.Fatalf("expired %d, %v", got.ExpiredRows, s.Books().Expired)
	}
	l.check(s, all)
	balanced(t, s, l.produced)
	verified(t, s)
	fill()
	l.check(s, all)
	must(t, s.Close())
	for _, catalogue := range []string{o.Catalogue, catalogueFile(t)} {
		p := o
		p.Catalogue = catalogue
		r, err := openReadOnly("store", p)
		must(t, err)
		l.check(r, all)
		verified(t, r)
		must(t, r.Close())
		s = mustOpen(t, "store", p)
		l.check(s, all)
		balanced(t, s, l.produced)
		verified(t, s)
		if s.Stats().ExpiredRows != got.ExpiredRows {
			t.Errorf("expired %d, after reopening %d", got.ExpiredRows, s.Stats().ExpiredRows)
		}
		must(t, s.Close())
	}
}

// TestRetentionByBytes runs by itself while a load is written.
func TestRetentionByBytes(t *testing.T) {
	o := small()
	o.RetainMiB, o.TidyEvery, o.FlushAge, o.SegmentTensors = 2, 5*time.Millisecond, 5*time.Millisecond, 50
	o.HeaderKiB = 256
	dir := t.TempDir()
	s := mustOpen(t, dir, o)
	l, err := newLoad(t, s, seeded(t), "s0000000a")
	must(t, err)
	for i := range 120 {
		must(t, l.forward(uint64(i/50), uint64(6+i%3)))
	}
	must(t, l.barrier())
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		m := s.Stats()
		files, err := os.ReadDir(filepath.Join(dir, "segments"))
		must(t, err)
		bytes := int64(0)
		for _, f := range files {
			if info, err := f.Info(); err == nil { // else it was removed just now
				bytes += info.Size()
			}
		}
		if m.SegmentBytes <= 2<<20 && bytes <= 2<<20 && m.RetiredSegments > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%+v", m)
		}
	}
	l.check(s, all)
	balanced(t, s, l.produced)
	verified(t, s)
	must(t, s.Close())
}

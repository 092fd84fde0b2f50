package store

import (
	"context"
	"errors"
	"flag"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"dmi/internal/vfs"
	"dmi/tensor"
)

var crashes = flag.Int("crashes", 5, "crash points to try, of all that a recorded load has; 0: every one")

// crashLoad is the load that is crashed: everything that a session does, with barriers, sealing and rotation; and now and then what else changes the store.
func crashLoad(l *load, forwards int, besides func(*load) error) error {
	for i := range forwards {
		if err := l.forward(uint64(l.random.IntN(3)), uint64(3+l.random.IntN(2))); err != nil {
			return err
		}
		if i%7 == 3 {
			if err := l.barrier(); err != nil {
				return err
			}
			if err := besides(l); err != nil {
				return err
			}
		}
	}
	return l.store.Close()
}

// TestCrashAtEveryWrite runs one load many times, and each time the machine fails at another change to its files: killed (what was written stays) or
// without power (what was not synced stays in pieces, or not at all). What Barrier had reported durable must be there, the rest on the books, and nothing else.
func TestCrashAtEveryWrite(t *testing.T) {
	crashEverywhere(t, func(*Options) {}, func(*load) error { return nil })
}

// TestCrashInRetention: whatever the moment, a row is there, or booked as expired, or lost.
func TestCrashInRetention(t *testing.T) {
	crashEverywhere(t, func(o *Options) { o.RetainAge, o.SegmentTensors = time.Nanosecond, 20 }, func(l *load) error {
		return l.store.tidyOnce(time.Now().Add(24 * time.Hour))
	})
}

// TestCrashInDeletion: likewise; and what a crash leaves of it is finished by deleting again.
func TestCrashInDeletion(t *testing.T) {
	keys := func(l *load) []tensor.RequestKey { return []tensor.RequestKey{l.key(1), l.key(4)} }
	crashEverywhere(t, func(o *Options) { o.SegmentTensors = 20 }, func(l *load) error {
		_, err := l.store.Delete(context.Background(), keys(l), nil)
		return err
	}, func(s *Store, l *load) {
		_, err := s.Delete(context.Background(), keys(l), nil)
		must(t, err)
		again, err := s.Delete(context.Background(), keys(l), nil)
		if err != nil || again.Rows != 0 || again.Prompts != 0 {
			t.Errorf("deleted, and then: %+v, %v", again, err)
		}
		for _, key := range keys(l) {
			for site := range l.sites {
				if refs, err := s.Chunks(key, uint32(site), 0, 1<<30); err != nil || len(refs) > 0 {
					t.Errorf("request %d is deleted: site %d: %d chunks, %v", key.Request, site, len(refs), err)
				}
			}
		}
	})
}

func crashEverywhere(t *testing.T, tune func(*Options), besides func(*load) error, then ...func(*Store, *load)) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	run := func(at int) (mem *vfs.Mem, l *load, durable map[rowKey]bool, o Options) {
		mem = vfs.NewMem()
		count := 0
		mem.Fault = func(string, string) error {
			if count++; at > 0 && count >= at {
				return vfs.ErrCrashed
			}
			return nil
		}
		o = small()
		o.FS, o.Catalogue = mem, catalogueFile(t)
		o.ManifestMiB, o.FlushAge, o.SyncAge, o.FullDiskWait, o.TidyEvery = 1, time.Hour, time.Hour, time.Millisecond, time.Hour
		tune(&o)
		s, err := Open("store", o)
		if err != nil {
			if at == 0 {
				t.Fatal(err)
			}
			return mem, nil, nil, o
		}
		l, err = newLoad(t, s, rand.New(rand.NewPCG(seed, 1)), "s0000000a")
		if l != nil && err == nil {
			err = crashLoad(l, 24, besides)
		}
		if err != nil && at == 0 {
			t.Fatal(err)
		}
		s.Close()
		if l != nil && l.session == 0 {
			l = nil
		}
		return mem, l, nil, o
	}
	whole, _, _, _ := run(0)
	points := whole.Changes()
	t.Logf("%d changes", points)
	random := rand.New(rand.NewPCG(seed, 2))
	order := random.Perm(points)
	if *crashes > 0 && *crashes < points {
		order = order[:*crashes]
	}
	for n, at := range order {
		if n%50 == 49 {
			t.Logf("%d of %d crash points", n+1, len(order))
		}
		mem, l, _, o := run(at + 1)
		for _, how := range []string{"killed", "killed, catalogue lost", "no power", "no power, catalogue lost"} {
			after := mem.AfterKill()
			if how[0] == 'n' {
				after = mem.AfterPowerLoss(func() bool { return random.IntN(2) == 0 })
			}
			p := o
			p.FS = after
			if how[len(how)-1] == 't' {
				p.Catalogue = catalogueFile(t)
			} else {
				p.Catalogue = copied(t, o.Catalogue)
			}
			settleAfterCrash(t, at, how, p, l, then...)
		}
	}
}

func settleAfterCrash(t *testing.T, at int, how string, o Options, l *load, then ...func(*Store, *load)) {
	t.Helper()
	defer func() {
		if t.Failed() {
			t.Logf("at change %d, %s", at+1, how)
		}
	}()
	left := killed
	if how[0] == 'n' {
		left = noPower
	}
	if l != nil { // a reader that changes nothing sees what the engine will make of it
		if r, err := openReadOnly("store", o); err == nil {
			l.check(r, left)
			selfBalanced(t, r)
			r.Close()
		} else if !errors.Is(err, ErrNotStore) {
			t.Fatal(err)
		}
	}
	s, err := Open("store", o)
	if err != nil {
		t.Fatal(err)
	}
	if l != nil {
		l.check(s, left)
	}
	selfBalanced(t, s)
	verified(t, s)
	if l != nil {
		for _, more := range then {
			more(s, l)
			l.check(s, left)
			selfBalanced(t, s)
			verified(t, s)
		}
	}
	again, err := newLoad(t, s, rand.New(rand.NewPCG(1, 1)), "s0000000b")
	if err != nil {
		t.Fatal(err)
	}
	if err := again.forward(1); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = openReadOnly("store", o); err != nil {
		t.Fatal(err)
	}
	if l != nil {
		l.check(s, left)
	}
	again.check(s, all)
	selfBalanced(t, s)
	verified(t, s)
	s.Close()
}

func selfBalanced(t *testing.T, s *Store) { t.Helper(); balanced(t, s, s.Books().Produced) }

// An engine that is killed while it makes its catalogue leaves an empty file.
func TestReadWhileTheCatalogueIsEmpty(t *testing.T) {
	mem, l, o := closedStore(t, 24)
	o.FS, o.Catalogue = mem, catalogueFile(t)
	if err := os.WriteFile(o.Catalogue, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := openReadOnly("store", o)
	if err != nil {
		t.Fatal(err)
	}
	l.check(s, all)
	balanced(t, s, l.produced)
	s.Close()
}

// TestCrashInOpening: a store that was closed is as whole as it was, whatever the moment at which the next engine is killed that opens it.
func TestCrashInOpening(t *testing.T) {
	for at := 1; ; at++ {
		mem, l, o := closedStore(t, 24)
		count := 0
		mem.Fault = func(string, string) error {
			if count++; count >= at {
				return vfs.ErrCrashed
			}
			return nil
		}
		s, err := Open("store", o)
		if err == nil {
			s.Close()
		}
		if at == 1 && err == nil {
			t.Fatal("nothing was changed: this shows nothing")
		}
		p := o
		p.FS = mem.AfterKill()
		reader, err := openReadOnly("store", p)
		must(t, err)
		l.check(reader, all)
		verified(t, reader)
		must(t, reader.Close())
		if count < at {
			t.Logf("%d changes", count)
			return
		}
	}
}

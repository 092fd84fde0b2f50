package store

import (
	"context"
	"errors"
	"time"
)

// idleness compacts while nothing comes. It is of the goroutine that tidies.
type idleness struct {
	s     *Store
	seen  uint64 // of Store.arrivals
	since time.Time
	run   compaction // kept, so that it goes on where it was interrupted
	wrote int64      // bytes since it began
	began time.Time
}

func newIdleness(s *Store) *idleness {
	i := &idleness{s: s, seen: s.arrivals.Load(), since: time.Now()}
	i.run = compaction{Store: s, progress: func(CompactionProgress) {}, pace: i.pace}
	return i
}

// sealAfter is how much the open segment must have to be sealed for compaction's sake: a header of 4 MiB is the price.
const sealAfter = 8 // of a full one

// look compacts, if nothing has come for long enough, until something does.
func (i *idleness) look(now time.Time) error {
	s := i.s
	if n := s.arrivals.Load(); n != i.seen {
		i.seen, i.since = n, now
	}
	if s.opt.CompactAfter == 0 || now.Sub(i.since) < s.opt.CompactAfter {
		return nil
	}
	s.mu.Lock()
	open := int64(0)
	for _, o := range s.open {
		open += o.end
	}
	next := s.nextSegment
	s.mu.Unlock()
	if open > int64(s.opt.SegmentMiB)<<20/sealAfter {
		if err := s.barrier(context.Background(), &barrier{done: make(chan error, 1), seal: true}); err != nil {
			return err
		}
	} else if i.run.from == next && i.run.last == nil {
		return nil // nothing new since the last pass
	}
	i.wrote, i.began = 0, time.Now()
	if _, err := i.run.pass(context.Background()); !errors.Is(err, errBusy) {
		return err
	}
	return nil
}

// pace holds compaction to its rate, and ends it when something comes.
func (i *idleness) pace(bytes int64) error {
	i.wrote += bytes
	due := i.began.Add(time.Duration(float64(i.wrote) / float64(int64(i.s.opt.CompactMiBs)<<20) * float64(time.Second)))
	for {
		if i.s.arrivals.Load() != i.seen || i.s.stopping() || i.s.urgent.Load() > 0 {
			return errBusy
		}
		wait := time.Until(due)
		if wait <= 0 {
			return nil
		}
		time.Sleep(min(wait, 10*time.Millisecond))
	}
}

package store

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// tidy is the goroutine that keeps the store within what Options say of it. It shares nothing with the writing one but the manifest and mu.
func (s *Store) tidy() {
	defer close(s.tidied)
	tick := time.NewTicker(s.opt.TidyEvery)
	defer tick.Stop()
	failing := false
	idle := newIdleness(s)
	for {
		select {
		case <-s.stop:
			return
		case <-tick.C:
		}
		err := s.tidyOnce(time.Now())
		if err == nil {
			err = idle.look(time.Now())
		}
		if errors.Is(err, ErrClosed) {
			return
		}
		if err != nil && !failing {
			s.opt.Log("error", "tidy", fmt.Sprintf("%v; it is tried again every %v", err, s.opt.TidyEvery))
		}
		failing = err != nil
	}
}

func (s *Store) tidyOnce(now time.Time) error {
	s.rewriting.Lock()
	defer s.rewriting.Unlock()
	if err := s.settleFiles(); err != nil { // of a replacement that an error cut short
		return err
	}
	return s.retain(now)
}

// stopping reports whether Close has been called.
func (s *Store) stopping() bool {
	select {
	case <-s.stop:
		return true
	default:
		return false
	}
}

// retain removes the oldest sealed segments while the store has more bytes than it is to keep, and those that hold nothing younger than it is to
// keep. A segment goes whole, so an open one never does; one with rows whose fate is not decided waits for the next time.
func (s *Store) retain(now time.Time) error {
	var removed int
	var rows, bytes uint64
	defer func() {
		if removed > 0 {
			s.opt.Log("info", "retention", fmt.Sprintf("%d segments with %d rows, %d bytes, are removed: the store keeps %s", removed, rows, bytes, s.retention()))
		}
	}()
	for _, g := range s.outlived(now) {
		if s.stopping() {
			return nil
		}
		err := s.removeSegment(g, now)
		switch {
		case errors.Is(err, errUnbooked):
			continue
		case leavable(err):
			s.opt.Log("error", "damaged", fmt.Sprintf("%v; retention leaves %s where it is, and takes others instead", err, s.segmentPath(g.number, true)))
			s.kept[g.number] = true
			continue
		case err != nil:
			return fmt.Errorf("store: retention: remove segment %d: %w", g.number, err)
		}
		removed++
		rows += g.rows
		bytes += uint64(g.bytes)
		s.mu.Lock()
		s.metrics.RetiredSegments++
		s.metrics.RetiredBytes += uint64(g.bytes)
		s.mu.Unlock()
	}
	return nil
}

// Retain has the store keep no more than so many bytes, and nothing for longer than so long, from the next look on: beside what its options say, of which the smaller holds. 0: as those say.
func (s *Store) Retain(bytes uint64, age time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.retained.bytes, s.retained.age = bytes, age
}

// bounds is what holds the store now; 0: nothing does.
func (s *Store) bounds() (bytes uint64, age time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	bytes, age = uint64(s.opt.RetainMiB)<<20, s.opt.RetainAge
	if asked := s.retained.bytes; asked > 0 && (bytes == 0 || asked < bytes) {
		bytes = asked
	}
	if asked := s.retained.age; asked > 0 && (age == 0 || asked < age) {
		age = asked
	}
	return bytes, age
}

// retention says what is kept, for people.
func (s *Store) retention() string {
	bytes, age := s.bounds()
	var parts []string
	if bytes > 0 {
		parts = append(parts, fmt.Sprintf("%d bytes", bytes))
	}
	if age > 0 {
		parts = append(parts, age.String())
	}
	return strings.Join(parts, " and ")
}

// outlived lists the segments that are to go, oldest first, but for those that cannot be listed. A segment holds what came within SegmentAge of its beginning.
func (s *Store) outlived(now time.Time) []sealedSegment {
	most, age := s.bounds()
	if most == 0 && age == 0 {
		return nil
	}
	s.mu.Lock()
	var all []sealedSegment
	var bytes int64
	for _, g := range s.sealed {
		if !s.kept[g.number] {
			all = append(all, g)
		}
		bytes += g.bytes
	}
	bytes += s.openBytes()
	s.mu.Unlock()
	slices.SortFunc(all, func(a, b sealedSegment) int {
		return cmp.Or(cmp.Compare(a.created, b.created), cmp.Compare(a.number, b.number))
	})
	n := 0
	for ; n < len(all); n++ {
		tooMuch := most > 0 && uint64(bytes) > most
		tooOld := age > 0 && now.Sub(time.Unix(0, all[n].created)) > age+s.opt.SegmentAge
		if !tooMuch && !tooOld {
			break
		}
		bytes -= all[n].bytes
	}
	return all[:n]
}

// removeSegment books a sealed segment's rows as gone, and removes it.
func (s *Store) removeSegment(g sealedSegment, now time.Time) error {
	listed, err := s.listed(g.number)
	if err != nil {
		return err
	}
	if err := s.expire(listed, now); err != nil {
		return err
	}
	return s.replace([]goneSegment{{g.number, keysOf(listed)}}, nil)
}

package store

import (
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"time"

	"dmi/store/segment"
	"dmi/tensor"
)

// Rows that were captured and are no longer there: their outcome stays on the books, and beside it since when they are gone.
//
// The books learn of it before the bytes go, so that what a crash leaves between the two is rows that nobody reads and the next pass removes,
// and never rows that are promised and missing.

func encodeExpired(at int64, entries []tensor.Entry) []byte {
	return append(binary.AppendUvarint(nil, uint64(at)), encodeEntries(entries)...)
}

func decodeExpired(b []byte) ([]tensor.Entry, error) {
	r := reader{b: b}
	at := int64(r.uint(math.MaxInt64))
	if r.err != nil {
		return nil, r.err
	}
	if at == 0 {
		return nil, errors.New("rows that are gone since no time")
	}
	entries, err := decodeEntries(r.b)
	for i := range entries {
		entries[i].Expired = at
	}
	return entries, err
}

// applyExpire is what the frame changes. With mu held, and every line of the requests in memory.
func (s *Store) applyExpire(entries []tensor.Entry) {
	for _, e := range entries {
		s.touch(e.Key)
		s.books.expire(e)
		s.dirty.expired[e.Key.Session] = true
	}
}

// errUnbooked is that rows are in a segment and their fate is not on the books yet: they cannot be said to be gone before it is.
var errUnbooked = errors.New("rows of it are not on the books yet")

const (
	expiredAtOnce  = 64      // requests: their books are loaded while the drain waits
	entriesInFrame = 1 << 14 // frames are bounded
)

// expire books the rows of chunks as gone.
func (s *Store) expire(listed []segment.Listed, at time.Time) error {
	var entries []tensor.Entry
	requests := 0
	flush := func() error {
		for part := range slices.Chunk(entries, entriesInFrame) {
			if err := s.expireEntries(part, at.UnixNano()); err != nil {
				return err
			}
		}
		entries, requests = entries[:0], 0
		return nil
	}
	for _, l := range listed {
		s.mu.Lock()
		known := s.sessions[l.Key.Session] != nil
		s.mu.Unlock()
		if !known {
			continue // nobody's rows: not on the books either
		}
		entries = append(entries, entriesOf(l.Key, l.Chunks)...)
		if requests++; requests == expiredAtOnce {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}

// entriesOf names the rows of a request's chunks, which are in order of site, attempt and position.
func entriesOf(key tensor.RequestKey, chunks []segment.Chunk) []tensor.Entry {
	byAttempt := map[uint16]*siteRuns{}
	for i := 0; i < len(chunks); {
		c := &chunks[i]
		first, end := uint64(c.First), uint64(c.First)+uint64(c.Rows)
		for i++; i < len(chunks) && chunks[i].Site == c.Site && chunks[i].Attempt == c.Attempt && uint64(chunks[i].First) <= end; i++ {
			end = max(end, uint64(chunks[i].First)+uint64(chunks[i].Rows))
		}
		if byAttempt[c.Attempt] == nil {
			byAttempt[c.Attempt] = &siteRuns{}
		}
		byAttempt[c.Attempt].add(c.Site, uint32(first), uint32(end-first))
	}
	var entries []tensor.Entry
	for attempt, runs := range byAttempt {
		runs.each(func(sites []uint32, first, count uint32) {
			entries = append(entries, tensor.Entry{Key: key, Sites: slices.Compact(sites), Attempt: attempt, First: first, Count: count, Stride: 1, Outcome: tensor.Captured})
		})
	}
	return entries
}

func (s *Store) expireEntries(entries []tensor.Entry, at int64) error {
	if len(entries) == 0 {
		return nil
	}
	for i := range entries {
		entries[i].Expired = at
	}
	prepare := func() error {
		if err := s.loadForExpiry(entries); err != nil {
			return err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		unbooked := false
		for _, e := range entries {
			s.books.account(e.Key).missing(e, func(uint32, uint32, uint32) { unbooked = true })
		}
		if unbooked {
			return errUnbooked
		}
		return nil
	}
	return s.recordAfter(prepare, "book rows as expired", frameExpire, encodeExpired(at, entries), func(position) { s.applyExpire(entries) })
}

// loadForExpiry brings the books of requests into memory; those that were not there are forgotten again once they are committed. With log held.
func (s *Store) loadForExpiry(entries []tensor.Entry) error {
	seen := map[tensor.RequestKey]bool{}
	for _, e := range entries {
		if seen[e.Key] {
			continue
		}
		seen[e.Key] = true
		s.mu.Lock()
		resident := s.books.open[e.Key] != nil || s.requests[e.Key] != nil
		s.mu.Unlock()
		if err := s.loadAccount(e.Key); err != nil {
			return err
		}
		if !resident {
			s.mu.Lock()
			s.finished = append(s.finished, e.Key)
			s.mu.Unlock()
		}
	}
	return nil
}

//go:build linux

package test

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"

	"dmi/store"
	"dmi/tensor"
)

// oracle remembers what a producer captured, slowly and simply, and which of it an engine called durable.
type oracle struct {
	mu       sync.Mutex
	captured map[stream][]run
	requests map[uint64]bool
	durable  []uint64 // by lane: its steps below this are, but for what was lost
	lost     map[row]bool
}

type row struct {
	stream
	position uint32
}

type stream struct {
	request uint64
	site    uint32
}

// run is consecutive positions that a step captured.
type run struct {
	first, count uint32
	step         uint64
	lane         int
}

func newOracle(lanes int) *oracle {
	return &oracle{captured: map[stream][]run{}, requests: map[uint64]bool{}, durable: make([]uint64, lanes), lost: map[row]bool{}}
}

// note is a producer's: rows first..first+count of a step were published at a site.
func (o *oracle) note(f *forward, site, first, count uint32, captured bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, s := range f.spans {
		from, to := max(s.First, first), min(s.First+s.Count, first+count)
		if from >= to {
			continue
		}
		o.requests[s.Request] = true
		if captured {
			k := stream{s.Request, site}
			o.captured[k] = append(o.captured[k], run{s.Position + from - s.First, to - from, f.step, f.lane})
		}
	}
}

func (o *oracle) promise(durable []uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i, n := range durable {
		o.durable[i] = max(o.durable[i], n)
	}
}

// fates of one row.
const (
	isThere = 1 << iota
	isBooked
	isBookedCaptured
	wasCaptured
	wasDurable
)

// check holds a session in a store against what its producer captured. everything: nothing may have been lost. It returns how many rows it read,
// and how many of them were durable.
func (o *oracle) check(t *testing.T, s *store.Store, session uint32, sites uint32, everything bool) (read, durable uint64) {
	t.Helper()
	o.mu.Lock()
	defer o.mu.Unlock()
	buffer := make([]byte, 0, 1<<16)
	for _, request := range slices.Sorted(maps.Keys(o.requests)) {
		key := tensor.RequestKey{Session: session, Request: request}
		fates := make([][]uint8, sites)
		at := func(site, position uint32) *uint8 {
			for uint32(len(fates[site])) <= position {
				fates[site] = append(fates[site], 0)
			}
			return &fates[site][position]
		}
		entries, err := s.Entries(key)
		if err != nil {
			t.Fatalf("entries of request %d: %v", request, err)
		}
		for _, e := range entries {
			for _, site := range e.Sites {
				for i := range e.Count {
					p := at(site, e.First+i*e.Stride)
					if *p&isBooked != 0 {
						t.Fatalf("request %d site %d row %d is on the books twice", request, site, e.First+i*e.Stride)
					}
					if *p |= isBooked; e.Outcome == tensor.Captured {
						*p |= isBookedCaptured
					}
				}
			}
		}
		for site := range sites {
			for _, r := range o.captured[stream{request, site}] {
				for i := range r.count {
					p := at(site, r.first+i)
					if o.lost[row{stream{request, site}, r.first + i}] {
						continue
					}
					if *p |= wasCaptured; r.step < o.durable[r.lane] {
						*p |= wasDurable
					}
				}
			}
			refs, err := s.Chunks(key, site, 0, ^uint32(0))
			if err != nil {
				t.Fatalf("chunks of request %d site %d: %v", request, site, err)
			}
			for _, ref := range refs {
				if ref.RowBytes() != 8 {
					t.Fatalf("request %d site %d: rows of %d bytes", request, site, ref.RowBytes())
				}
				buffer = slices.Grow(buffer[:0], int(ref.Rows)*8)[:ref.Rows*8]
				if err := s.ReadRows(ref, 0, ref.Rows, buffer); err != nil {
					t.Fatalf("read request %d site %d rows %d+%d: %v", request, site, ref.First, ref.Rows, err)
				}
				for i := range ref.Rows {
					position := ref.First + i
					p := at(site, position)
					if *p&isThere != 0 {
						t.Fatalf("request %d site %d row %d is there twice", request, site, position)
					}
					if got := binary.LittleEndian.Uint64(buffer[i*8:]); got != value(site, request, position) {
						t.Fatalf("request %d site %d row %d holds %#x, and %#x was captured", request, site, position, got, value(site, request, position))
					}
					*p |= isThere
					read++
				}
			}
			for position, p := range fates[site] {
				switch {
				case p&isThere != 0 && p&wasCaptured == 0:
					t.Fatalf("request %d site %d row %d is there, and was not captured", request, site, position)
				case p&isThere != 0 != (p&isBookedCaptured != 0):
					t.Fatalf("request %d site %d row %d: fate %#x: what is there and what is booked captured differ", request, site, position, p)
				case p&isThere == 0 && p&wasDurable != 0:
					t.Fatalf("request %d site %d row %d was durable, and is not there: %s", request, site, position, o.history(entries, request, site, uint32(position)))
				case p&isThere == 0 && p&wasCaptured != 0 && everything:
					t.Fatalf("request %d site %d row %d was captured, and is not there", request, site, position)
				case p&wasDurable != 0 && p&isBooked == 0:
					t.Fatalf("request %d site %d row %d was durable, and is not on the books", request, site, position)
				}
				if p&wasDurable != 0 {
					durable++
				} else if p&wasCaptured != 0 && p&isBooked != 0 && p&isThere == 0 {
					o.lost[row{stream{request, site}, uint32(position)}] = true // an engine that was killed took it along, and had promised nothing
				}
			}
		}
	}
	return read, durable
}

// history is what both sides say of a row.
func (o *oracle) history(entries []tensor.Entry, request uint64, site, position uint32) string {
	said := fmt.Sprintf("durable up to %v", o.durable)
	for _, r := range o.captured[stream{request, site}] {
		if position >= r.first && position < r.first+r.count {
			said += fmt.Sprintf("; captured in step %d of lane %d", r.step, r.lane)
		}
	}
	for _, e := range entries {
		if slices.Contains(e.Sites, site) && position >= e.First && (position-e.First)%e.Stride == 0 && (position-e.First)/e.Stride < e.Count {
			said += fmt.Sprintf("; booked %v(%v) in step %d", e.Outcome, e.Reason, e.Step)
		}
	}
	return said
}

// books of a store: every row that was produced has one outcome.
type books struct {
	produced, sum uint64
	lines         map[tensor.Outcome]uint64
}

func booksOf(s *store.Store, session uint32) books {
	totals := s.Books()
	b := books{produced: totals.Sessions[session], lines: map[tensor.Outcome]uint64{}}
	for _, l := range totals.Lines {
		if l.Session == session {
			b.sum += l.Rows
			b.lines[l.Outcome] += l.Rows
		}
	}
	return b
}

func verified(t *testing.T, s *store.Store) store.Report {
	t.Helper()
	report, err := s.Verify(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Problems) > 0 {
		t.Fatalf("verify: %+v", report.Problems)
	}
	return report
}

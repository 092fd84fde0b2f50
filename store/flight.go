package store

import (
	"slices"

	"dmi/tensor"
)

// flight follows steps from the moment the manifest tells of them until all their rows are booked, so that what a crash interrupts can be told
// from what was finished. Guarded by Store.mu.
type flight struct {
	steps    map[stepKey]*inFlight
	detailed bool                            // recovering: keep what is needed to settle
	captured map[tensor.RequestKey][]booking // rows booked captured that may not be in a durable segment, by request (detailed only)
	synced   syncPoint                       // last that was read (detailed only)
}

type stepKey struct {
	session uint32
	step    uint64
}

type inFlight struct {
	at   position
	rows int64 // x sites, not yet booked
	opening
	required []uint32 // sites that owe rows
}

type booking struct {
	at position
	tensor.Entry
}

// mostInFlight bounds the steps followed. Beyond it the oldest is forgotten: should the engine then be killed, its unbooked rows are
// missing from the books, and Verify says so.
const mostInFlight = 1 << 16

func newFlight() *flight {
	return &flight{steps: map[stepKey]*inFlight{}, captured: map[tensor.RequestKey][]booking{}}
}

func (f *flight) opened(at position, session uint32, o opening, required []uint32) {
	k := stepKey{session, o.step}
	rows := int64(o.rows)*int64(len(required)) + int64(o.loose)
	if rows == 0 {
		return
	}
	if len(f.steps) >= mostInFlight {
		f.forgetOldest()
	}
	if !f.detailed {
		o.spans = nil
	}
	if other := f.steps[k]; other != nil { // a GAP and a step under one number
		other.rows += rows
		other.loose += o.loose
		return
	}
	f.steps[k] = &inFlight{at: at, rows: rows, opening: o, required: required}
}

func (f *flight) forgetOldest() {
	var oldest stepKey
	var at *position
	for k, s := range f.steps {
		if at == nil || s.at.before(*at) {
			oldest, at = k, &s.at
		}
	}
	delete(f.steps, oldest)
}

// booked settles an entry's rows; owed are those at sites that must give some.
func (f *flight) booked(at position, e *tensor.Entry, owed uint64) {
	if f.detailed && e.Outcome == tensor.Captured {
		f.captured[e.Key] = append(f.captured[e.Key], booking{at, *e})
	}
	k := stepKey{e.Key.Session, e.Step}
	if s := f.steps[k]; s != nil {
		if s.rows -= int64(owed); s.rows <= 0 {
			delete(f.steps, k)
		}
	}
}

// durable forgets what a sync point says is safe.
func (f *flight) durable(p syncPoint) {
	f.synced = p
	for key, bookings := range f.captured {
		f.keep(key, slices.DeleteFunc(bookings, func(c booking) bool { return c.at.before(p.low) }))
	}
}

func (f *flight) ended(session uint32) {
	for k := range f.steps {
		if k.session == session {
			delete(f.steps, k)
		}
	}
}

func (f *flight) low(end position) position {
	for _, s := range f.steps {
		if s.at.before(end) {
			end = s.at
		}
	}
	return end
}

// corrected takes rows whose fate was corrected before out of those that have to be looked for.
func (f *flight) corrected(entries []tensor.Entry) {
	for i := range entries {
		e := &entries[i]
		if before := f.captured[e.Key]; len(before) > 0 {
			f.keep(e.Key, takeOut(before, e))
		}
	}
}

func (f *flight) keep(key tensor.RequestKey, left []booking) {
	if len(left) == 0 {
		delete(f.captured, key)
	} else {
		f.captured[key] = left
	}
}

// takeOut gives what is left of a request's bookings when the rows of an entry are taken out.
func takeOut(bookings []booking, e *tensor.Entry) []booking {
	var kept []booking
	for _, c := range bookings {
		if c.Attempt != e.Attempt || !touches(&c.Entry, e) {
			kept = append(kept, c)
			continue
		}
		common := intersect(c.Sites, e.Sites)
		if len(common) == 0 {
			kept = append(kept, c)
			continue
		}
		if rest := subtract(c.Sites, e.Sites); len(rest) > 0 {
			p := c
			p.Sites = rest
			kept = append(kept, p)
		}
		for _, run := range without(&c.Entry, e) {
			run.Sites = common
			kept = append(kept, booking{c.at, run})
		}
	}
	return kept
}

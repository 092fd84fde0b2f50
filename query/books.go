package query

import (
	"slices"

	"dmi/tensor"
)

// part says that some positions of the request asked about are rows of a request that has rows of its own.
type part struct {
	key  tensor.RequestKey
	span Span
}

// partsOf follows the path of a request, if it has one: a returned sequence of a beam search is made of its beams' rows.
func partsOf(r tensor.Request) ([]part, error) {
	if len(r.Path) == 0 {
		return []part{{r.Key, Span{0, 1<<32 - 1}}}, nil
	}
	var parts []part
	var covered spans
	for _, p := range r.Path {
		span := Span{p.First, p.Count}
		if span.end() > 1<<32-1 {
			return nil, badArgument("verify the store", "request %s: its path reaches position %d", r.ID, span.end())
		}
		if len(covered.and(union(span))) > 0 {
			return nil, badArgument("verify the store", "request %s: its path gives positions %d..%d twice", r.ID, p.First, span.end())
		}
		covered = covered.with(union(span))
		if p.Count > 0 {
			parts = append(parts, part{tensor.RequestKey{Session: r.Key.Session, Request: p.Request}, span})
		}
	}
	slices.SortFunc(parts, func(a, b part) int { return int(int64(a.span.First) - int64(b.span.First)) })
	return parts, nil
}

// clip gives the rows of an entry that lie within a span.
func clip(e tensor.Entry, within Span) (tensor.Entry, bool) {
	stride := uint64(max(1, e.Stride))
	first, count := uint64(e.First), uint64(e.Count)
	if from := uint64(within.First); first < from {
		skip := min(count, (from-first+stride-1)/stride)
		first, count = first+skip*stride, count-skip
	}
	if first >= within.end() {
		return e, false
	}
	count = min(count, (within.end()-first+stride-1)/stride)
	e.First, e.Count = uint32(first), uint32(count)
	return e, count > 0
}

// positionsOf lists the positions of an entry, in order.
func positionsOf(e tensor.Entry) spans {
	if e.Count == 0 {
		return nil
	}
	if e.Stride <= 1 {
		return spans{{e.First, e.Count}}
	}
	set := make(spans, e.Count)
	for i := range e.Count {
		set[i] = Span{e.First + i*e.Stride, 1}
	}
	return set
}

// entriesOf gives the books of a request, through its path, in the order of parts.
func (e *Engine) entriesOf(parts []part) ([]tensor.Entry, error) {
	var all []tensor.Entry
	for _, p := range parts {
		entries, err := e.source.Entries(p.key)
		if err != nil {
			return nil, err
		}
		for _, entry := range entries {
			if clipped, some := clip(entry, p.span); some {
				all = append(all, clipped)
			}
		}
	}
	return all, nil
}

// owed says what an entry's rows are worth to a reader: rows that were never to have values are not missing.
func owed(o tensor.Outcome) bool { return o != tensor.NotComputed && o != tensor.Rejected }

// fate is what the books say of one site of one request.
type fate struct {
	end     uint32           // one past the last position on the books
	refused map[uint16]spans // by attempt: rows of it that are not captured, or gone since, whatever a chunk says
	notOwed spans            // by the latest attempt that the books know
	full    spans            // captured(full) in some attempt
	every   spans            // on the books
}

func fateOf(entries []tensor.Entry, site uint32) fate {
	f := fate{refused: map[uint16]spans{}}
	type attempt struct{ owed, not, refused []Span }
	attempts := map[uint16]*attempt{}
	var full, every []Span
	for _, entry := range entries {
		if !slices.Contains(entry.Sites, site) {
			continue
		}
		a := attempts[entry.Attempt]
		if a == nil {
			a = &attempt{}
			attempts[entry.Attempt] = a
		}
		positions := positionsOf(entry)
		every = append(every, positions...)
		if owed(entry.Outcome) {
			a.owed = append(a.owed, positions...)
		} else {
			a.not = append(a.not, positions...)
		}
		if entry.Outcome != tensor.Captured || entry.Expired != 0 {
			a.refused = append(a.refused, positions...)
		} else if entry.Level == tensor.Full {
			full = append(full, positions...)
		}
		f.end = max(f.end, uint32(positions.end()))
	}
	numbers := make([]uint16, 0, len(attempts))
	for n := range attempts {
		numbers = append(numbers, n)
	}
	slices.Sort(numbers)
	for _, n := range numbers {
		a := attempts[n]
		f.notOwed = f.notOwed.without(union(a.owed...)).with(union(a.not...))
		f.refused[n] = union(a.refused...)
	}
	f.full, f.every = union(full...), union(every...)
	return f
}

// complete says that every position on the books has full values or is not owed.
func (f fate) complete() bool {
	whole := spans{}
	if f.end > 0 {
		whole = spans{{0, f.end}}
	}
	return len(whole.without(f.full).without(f.notOwed)) == 0
}

package query

import "slices"

// spans is a set of positions: sorted, disjoint, not empty, not adjacent.
type spans []Span

func (s Span) end() uint64 { return uint64(s.First) + uint64(s.Count) }

func between(from, to uint64) Span { return Span{uint32(from), uint32(to - from)} }

// union makes a set of spans in any order.
func union(all ...Span) spans {
	slices.SortFunc(all, func(a, b Span) int { return int(int64(a.First) - int64(b.First)) })
	var set spans
	for _, s := range all {
		if s.Count == 0 {
			continue
		}
		if n := len(set); n > 0 && set[n-1].end() >= uint64(s.First) {
			set[n-1] = between(uint64(set[n-1].First), max(set[n-1].end(), s.end()))
			continue
		}
		set = append(set, s)
	}
	return set
}

func (a spans) with(b spans) spans { return union(slices.Concat(a, b)...) }

func (a spans) and(b spans) spans {
	var set spans
	for len(a) > 0 && len(b) > 0 {
		from, to := max(uint64(a[0].First), uint64(b[0].First)), min(a[0].end(), b[0].end())
		if from < to {
			set = append(set, between(from, to))
		}
		if a[0].end() <= b[0].end() {
			a = a[1:]
		} else {
			b = b[1:]
		}
	}
	return set
}

func (a spans) without(b spans) spans {
	var set spans
	for _, s := range a {
		from := uint64(s.First)
		for len(b) > 0 && b[0].end() <= from {
			b = b[1:]
		}
		for _, hole := range b {
			if uint64(hole.First) >= s.end() {
				break
			}
			if uint64(hole.First) > from {
				set = append(set, between(from, uint64(hole.First)))
			}
			from = max(from, hole.end())
		}
		if from < s.end() {
			set = append(set, between(from, s.end()))
		}
	}
	return set
}

func (a spans) count() (n uint64) {
	for _, s := range a {
		n += uint64(s.Count)
	}
	return n
}

// end is one past the last position, 0 of none.
func (a spans) end() uint64 {
	if len(a) == 0 {
		return 0
	}
	return a[len(a)-1].end()
}

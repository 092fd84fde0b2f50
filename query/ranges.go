package query

import (
	"cmp"
	"slices"
)

// joined gives ranges of one request in one form, whatever steps and writes they came in: sorted by site, attempt and first position, neighbours of
// one fate made one. Positions that follow each other are a range of stride 1; lone ones are joined where they are equally far apart. It sorts ranges.
func joined(ranges []CoverageRange) []CoverageRange {
	slices.SortFunc(ranges, func(a, b CoverageRange) int {
		return cmp.Or(cmp.Compare(a.Site, b.Site), cmp.Compare(a.Attempt, b.Attempt), cmp.Compare(a.Outcome, b.Outcome), cmp.Compare(a.Reason, b.Reason),
			cmp.Compare(a.Level, b.Level), cmp.Compare(a.Policy, b.Policy), cmp.Compare(a.Expired, b.Expired))
	})
	var out []CoverageRange
	var runs []progression
	for len(ranges) > 0 {
		like := ranges[0].fate()
		runs = runs[:0]
		for len(ranges) > 0 && ranges[0].fate() == like {
			runs = ranges[0].appendRuns(runs)
			ranges = ranges[1:]
		}
		for _, r := range strided(consecutive(runs)) {
			like.First, like.Count, like.Stride = r.first, r.count, r.stride
			out = append(out, like)
		}
	}
	slices.SortStableFunc(out, func(a, b CoverageRange) int {
		return cmp.Or(cmp.Compare(a.Site, b.Site), cmp.Compare(a.Attempt, b.Attempt), cmp.Compare(a.First, b.First))
	})
	return out
}

// fate is a range without its positions.
func (r CoverageRange) fate() CoverageRange {
	r.First, r.Count, r.Stride = 0, 0, 0
	return r
}

// progression is count positions from first on, stride apart.
type progression struct{ first, count, stride uint32 }

// appendRuns adds a range's positions, as runs of stride 1.
func (r CoverageRange) appendRuns(runs []progression) []progression {
	if r.Stride <= 1 {
		return append(runs, progression{r.First, r.Count, 1})
	}
	for i := range r.Count {
		runs = append(runs, progression{r.First + i*r.Stride, 1, 1})
	}
	return runs
}

// consecutive sorts runs of stride 1 and makes one of those that touch. A position that is there twice, as one that is booked twice, stays so. In place.
func consecutive(runs []progression) []progression {
	slices.SortFunc(runs, func(a, b progression) int { return cmp.Compare(a.first, b.first) })
	out := runs[:0]
	for _, r := range runs {
		if n := len(out); n > 0 && out[n-1].first+out[n-1].count == r.first {
			out[n-1].count += r.count
		} else {
			out = append(out, r)
		}
	}
	return out
}

// strided joins lone positions that are equally far apart, with no longer run between them. In place.
func strided(runs []progression) []progression {
	out := runs[:0]
	for _, r := range runs {
		if n := len(out); n > 0 && r.count == 1 {
			last := &out[n-1]
			gap := r.first - last.first - (last.count-1)*last.stride
			if gap > 0 && (last.count == 1 || last.stride > 1 && last.stride == gap) {
				last.count, last.stride = last.count+1, gap
				continue
			}
		}
		out = append(out, r)
	}
	return out
}

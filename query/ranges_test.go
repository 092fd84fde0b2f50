package query

import (
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// However rows were booked, their ranges are the same, and hold each as often as it was booked.
func TestJoinedRangesDoNotDependOnBookings(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		book := func(rows map[uint32]string) (ranges []CoverageRange) {
			for p := uint32(0); p < 24; {
				r := CoverageRange{Site: "a", First: p, Count: 1, Stride: 1, Outcome: rows[p]}
				if p++; r.Outcome == "" {
					continue
				}
				stride := rapid.Uint32Range(1, 3).Draw(t, "stride")
				delete(rows, r.First)
				for next := r.First + stride; rows[next] == r.Outcome && rapid.IntRange(0, 3).Draw(t, "on") > 0; next += stride {
					r.Count, r.Stride = r.Count+1, stride
					delete(rows, next)
				}
				ranges = append(ranges, r)
			}
			return ranges
		}
		rows := map[uint32]string{}
		for p := range uint32(24) {
			if o := rapid.SampledFrom([]string{"", "captured", "captured", "dropped"}).Draw(t, "outcome"); o != "" {
				rows[p] = o
			}
		}
		clone := func() map[uint32]string {
			c := map[uint32]string{}
			for p, o := range rows {
				c[p] = o
			}
			return c
		}
		one, two := joined(book(clone())), joined(book(clone()))
		if !reflect.DeepEqual(one, two) {
			t.Fatalf("two bookings of %v:\n%v\n%v", rows, one, two)
		}
		for _, r := range one {
			for i := range r.Count {
				p := r.First + i*r.Stride
				if rows[p] != r.Outcome {
					t.Fatalf("position %d is %q in %v, and %q", p, r.Outcome, one, rows[p])
				}
				delete(rows, p)
			}
		}
		if len(rows) > 0 {
			t.Fatalf("%v is missing in %v", rows, one)
		}
	})
}

func TestJoinedRanges(t *testing.T) {
	of := func(first, count, stride uint32) CoverageRange {
		return CoverageRange{Site: "a", First: first, Count: count, Stride: stride, Outcome: "captured"}
	}
	for _, c := range []struct{ in, want []CoverageRange }{
		{[]CoverageRange{of(9, 1, 1), of(0, 9, 1)}, []CoverageRange{of(0, 10, 1)}},
		{[]CoverageRange{of(0, 1, 1), of(4, 1, 1), of(8, 1, 1)}, []CoverageRange{of(0, 3, 4)}},
		{[]CoverageRange{of(0, 5, 2), of(5, 1, 1)}, []CoverageRange{of(0, 2, 2), of(4, 3, 1), of(8, 1, 1)}},
		{[]CoverageRange{of(3, 1, 1), of(3, 1, 1)}, []CoverageRange{of(3, 1, 1), of(3, 1, 1)}},
	} {
		if got := joined(slices.Clone(c.in)); !slices.Equal(got, c.want) {
			t.Errorf("%v: %v, want %v", c.in, got, c.want)
		}
	}
}

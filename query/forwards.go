package query

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"dmi/store"
	"dmi/tensor"
)

// computedIn is the positions that some of a request's forwards computed, the forwards counted from 0 in the order of their steps. Through a
// path, the forwards are those that computed its positions.
func (e *Engine) computedIn(ctx context.Context, r tensor.Request, parts []part, steps Range) (spans, error) {
	var all []store.Forward
	for _, p := range parts {
		forwards, err := e.source.Forwards(ctx, p.key)
		if err != nil {
			return nil, fmt.Errorf("query: forwards of request %s: %w", r.ID, err)
		}
		for _, f := range forwards {
			for _, span := range (spans{{f.First, f.Count}}).and(spans{p.span}) {
				f.First, f.Count = span.First, span.Count
				all = append(all, f)
			}
		}
	}
	slices.SortStableFunc(all, func(a, b store.Forward) int { return cmp.Compare(a.Step, b.Step) })
	var numbers []uint64 // steps, one per forward, even where a forward's rows are in several runs
	for _, f := range all {
		if n := len(numbers); n == 0 || numbers[n-1] != f.Step {
			numbers = append(numbers, f.Step)
		}
	}
	from, to := steps.clip(len(numbers))
	var computed []Span
	for _, f := range all {
		if i, _ := slices.BinarySearch(numbers, f.Step); i >= from && i < to {
			computed = append(computed, Span{f.First, f.Count})
		}
	}
	return union(computed...), nil
}

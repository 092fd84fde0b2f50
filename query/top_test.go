package query

import (
	"context"
	"fmt"
	"math"
	"slices"
	"testing"

	"dmi/tensor"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// The greatest elements of every row that is there, against all of its elements sorted.
func TestTopEqualsSorting(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t, rapid.Bool().Draw(t, "whole"))
		e := New(w.memory(t))
		e.MemoryBytes = rapid.SampledFrom([]int{1, 200, 1 << 20}).Draw(t, "memory")
		tokens, k := drawRange(t), rapid.IntRange(1, 12).Draw(t, "k")
		want := map[string][]tensor.Element{}
		for _, r := range w.requests {
			if r.Hidden {
				continue
			}
			for _, s := range w.sites {
				found := w.want(r, s, tokens)
				for i, row := range found.rows {
					values := make([]float64, len(row)/s.dtype.Size())
					s.dtype.Floats(values, row)
					all := []tensor.Element{}
					for n, v := range values {
						if !math.IsNaN(v) && !math.IsInf(v, 0) {
							all = append(all, tensor.Element{Index: uint32(n), Value: v})
						}
					}
					slices.SortStableFunc(all, func(a, b tensor.Element) int {
						switch {
						case a.Value > b.Value:
							return -1
						case a.Value < b.Value:
							return 1
						}
						return 0
					})
					want[fmt.Sprint(r.ID, s.Name, found.positions[i])] = all[:min(k, len(all))]
				}
			}
		}
		err := e.Top(context.Background(), TopQuery{Scope: Scope{Run: w.run.ID}, Tokens: tokens, K: k}, func(got TopRow) error {
			key := fmt.Sprint(got.Request, got.Site, got.Position)
			elements, owed := want[key]
			if !owed {
				t.Fatalf("line %s twice, or of nothing", key)
			}
			delete(want, key)
			if diff := cmp.Diff(elements, got.Elements); diff != "" {
				t.Fatalf("%s: %s", key, diff)
			}
			return nil
		})
		if err != nil || len(want) > 0 {
			t.Fatalf("%d lines missing: %v", len(want), err)
		}
	})
}

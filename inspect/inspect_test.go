package inspect

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"

	"pgregory.net/rapid"

	"dmi/internal/leaks"
)

func TestMain(m *testing.M) { leaks.Main(m) }

// However a sketch was merged, its quantiles are within 1/128 of those of the sorted data, and its histogram's counts are exact.
func TestSketchAgainstSortedData(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		values := rapid.SliceOfN(rapid.OneOf(rapid.Just(0.0), rapid.Float64Range(-10, 10), rapid.Map(rapid.Float32(), func(f float32) float64 { return float64(f) })), 1, 300).Draw(t, "values")
		values = slices.DeleteFunc(values, func(v float64) bool { return v-v != 0 || v != 0 && math.Abs(v) < 0x1p-149 })
		parts := []*sketch{{}, {}, {}}
		for i, v := range values {
			parts[i%3].add(v, 1)
		}
		whole := &sketch{}
		for _, p := range parts {
			whole.merge(p)
		}
		slices.Sort(values)
		qs := []float64{0, 0.01, 0.25, 0.5, 0.9, 1}
		for i, got := range whole.quantiles(qs...) {
			if len(values) == 0 {
				if !math.IsNaN(got) {
					t.Fatalf("quantile of nothing: %v", got)
				}
				continue
			}
			want := values[int(qs[i]*float64(len(values)-1))]
			if math.Abs(got-want) > math.Abs(want)/128 {
				t.Fatalf("quantile %v: %v, want %v", qs[i], got, want)
			}
		}
		h := whole.histogram()
		if (h == nil) != (len(values) == 0) {
			t.Fatalf("histogram of %d values: %v", len(values), h)
		}
		total := uint64(0)
		for i := range len(values) { // every value is in one bin
			v, in := values[i], 0
			for b := range h.Counts {
				a, z := h.Edges[b], h.Edges[b+1]
				if a < 0 && z > 0 && a < v && v < z || a >= 0 && z > 0 && a > 0 && a <= v && v < z || a < 0 && z <= 0 && z < 0 && a < v && v <= z || a == 0 && z == 0 && v == 0 {
					in++
				}
			}
			if in != 1 {
				t.Fatalf("%v is in %d bins of %v", v, in, h.Edges)
			}
		}
		if h != nil {
			for _, n := range h.Counts {
				total += n
			}
		}
		if total != uint64(len(values)) || whole.count() != uint64(len(values)) {
			t.Fatalf("histogram of %d, sketch of %d, values %d", total, whole.count(), len(values))
		}
	})
}

// Results come in order, few wait, and errors on either side end everything.
func TestInOrder(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		n, failAt, stopAt := random.IntN(60), random.IntN(120), random.IntN(120)
		wrong, enough := errors.New("wrong"), errors.New("enough")
		var took []int
		var ahead atomic.Int64
		err := inOrder(context.Background(), n, func(_ context.Context, i int) (int, error) {
			ahead.Add(1)
			if i == failAt {
				return 0, wrong
			}
			return i * i, nil
		}, func(i, result int) error {
			if result != i*i {
				t.Fatalf("result %d of %d", result, i)
			}
			ahead.Add(-1)
			took = append(took, i)
			if i == stopAt {
				return enough
			}
			return nil
		})
		want, end := error(nil), n
		if failAt < n && failAt <= stopAt {
			want, end = wrong, failAt
		} else if stopAt < n {
			want, end = enough, stopAt+1
		}
		if !errors.Is(err, want) || len(took) != end || !slices.IsSorted(took) {
			t.Fatalf("n %d, fails at %d, stops at %d: took %v, %v", n, failAt, stopAt, took, err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := inOrder(ctx, 3, func(ctx context.Context, i int) (int, error) { return i, ctx.Err() }, func(int, int) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

package query

import (
	"context"
	"math"
	"slices"
	"testing"
	"time"

	"dmi/tensor"

	"pgregory.net/rapid"
)

// A grid holds what Stats says row by row and NaN where Stats has no line, computed or remembered, whole or in part.
func TestGridIsStatsRowByRow(t *testing.T) {
	ctx := context.Background()
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t, false)
		if rapid.Bool().Draw(t, "ended") { // only then are rows remembered
			for i := range w.requests {
				w.requests[i].Ended = time.Unix(1800000000, 0)
			}
		}
		e := New(w.memory(t))
		r := rapid.SampledFrom(w.requests).Draw(t, "request")
		if r.Hidden {
			return
		}
		statistic := rapid.SampledFrom(Statistics).Draw(t, "statistic")
		pattern := rapid.SampledFrom([]string{"**", "blocks.*.hook_resid_post", "blocks.0.**", "logits"}).Draw(t, "site")
		plan, err := e.Stats(ctx, StatsQuery{Scope: Scope{Requests: []string{r.ID}}, Site: pattern})
		if err != nil {
			t.Fatal(err)
		}
		type cell struct {
			site     string
			position int64
		}
		want := map[cell]float64{}
		if err := plan.Each(ctx, func(row StatsRow) error {
			want[cell{row.Site, row.Position}] = map[string]float64{"mean": row.Mean, "rms": row.RMS, "min": row.Min, "max": row.Max, "absmax": row.AbsMax, "l2": row.L2,
				"nonfinite": float64(row.NonFinite)}[statistic]
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second is from memory
			whole, err := e.Grid(ctx, GridQuery{Request: r.ID, Site: pattern, Statistic: statistic, Tokens: Range{0, End}})
			if err != nil {
				t.Fatal(err)
			}
			left := len(want)
			for i, site := range whole.Sites {
				for j := range whole.Width {
					given := whole.Values[i*whole.Width+j]
					value, there := want[cell{site.Name, int64(whole.First + j)}]
					if there {
						left--
					} else {
						value = math.NaN()
					}
					if given != float32(value) && !(math.IsNaN(float64(given)) && math.IsNaN(value)) {
						t.Fatalf("%s of %s at %d: %v, Stats says %v (a line: %v)", statistic, site.Name, j, given, value, there)
					}
				}
			}
			if left != 0 {
				t.Fatalf("%d lines of Stats lie outside the grid", left)
			}
			if whole.Width < 2 {
				continue
			}
			from := rapid.IntRange(0, whole.Width-1).Draw(t, "from")
			part, err := e.Grid(ctx, GridQuery{Request: r.ID, Site: pattern, Statistic: statistic, Tokens: Range{from, End}})
			if err != nil {
				t.Fatal(err)
			}
			for i := range part.Sites {
				a, b := part.Values[i*part.Width:(i+1)*part.Width], whole.Values[i*whole.Width+from:(i+1)*whole.Width]
				if part.First != from || !slices.EqualFunc(a, b, func(a, b float32) bool { return a == b || a != a && b != b }) {
					t.Fatalf("from %d on: %v, want %v", from, a, b)
				}
			}
		}
	})
}

func TestRecentKeepsToItsBound(t *testing.T) {
	s := recent[chunkKey, tensor.Statistics]{most: 1000}
	rows := make([]tensor.Statistics, 250)
	for first := range uint32(6) {
		s.put(chunkKey{first: first}, rows)
		s.get(chunkKey{first: 0}) // used all the time
	}
	s.put(chunkKey{first: 9}, make([]tensor.Statistics, 1001)) // alone too many
	if s.held > 1000 || len(s.byKey) != s.order.Len() {
		t.Errorf("%d rows, %d keys, %d in order", s.held, len(s.byKey), s.order.Len())
	}
	for first, want := range map[uint32]bool{0: true, 1: false, 2: false, 5: true, 9: false} {
		if _, known := s.get(chunkKey{first: first}); known != want {
			t.Errorf("chunk %d remembered: %v, want %v", first, known, want)
		}
	}
}

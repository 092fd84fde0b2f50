package query

import (
	"context"
	"math"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"dmi/store"

	"pgregory.net/rapid"
)

// Each pixel against the weights themselves, as Tensor gives them row by row.
func TestThumbnailsEqualTheirDefinition(t *testing.T) {
	ctx := context.Background()
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t, false)
		e := New(w.memory(t))
		r := rapid.SampledFrom(w.requests).Draw(t, "request")
		size := rapid.IntRange(1, 12).Draw(t, "size")
		got, err := e.Thumbnails(ctx, ThumbnailsQuery{Request: r.ID, Site: "blocks.*.attn.hook_pattern", Size: size})
		if err != nil {
			t.Fatal(err)
		}
		site := got.Sites[0]
		s, err := e.choose(ctx, r, site, Range{}, Range{}, FullOnly)
		if err != nil {
			t.Fatal(err)
		}
		weights := map[uint32][]float64{} // by query: [head, key] of its own keys
		end := int(s.end)
		if err := s.eachStoredRow(ctx, e, func(position uint32, at run, row []byte) error {
			all := make([]float64, at.ref.Shape[0]*at.ref.Shape[1])
			at.ref.DType.Floats(all, row)
			for h := range at.ref.Shape[0] {
				weights[position] = append(weights[position], all[h*at.ref.Shape[1]:h*at.ref.Shape[1]+int(position)+1]...)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if got.Side != min(size, end) {
			t.Fatalf("side %d of %d positions, asked for %d", got.Side, end, size)
		}
		for head := range got.Heads {
			for i := range got.Side {
				row := -1
				for q := i * end / got.Side; q < (i+1)*end/got.Side; q++ {
					if weights[uint32(q)] != nil {
						row = q
					}
				}
				for j := range got.Side {
					want, first := math.NaN(), true
					for k := j * end / got.Side; k < (j+1)*end/got.Side && row >= 0 && k <= row; k++ {
						want, first = max(weights[uint32(row)][head*(row+1)+k], ifFirst(first, want)), false
					}
					if given := got.Values[(head*got.Side+i)*got.Side+j]; given != float32(want) && !(given != given && want != want) {
						t.Fatalf("head %d, pixel %d, %d of %d for %d positions: %v, want %v", head, i, j, got.Side, end, given, want)
					}
				}
			}
		}
	})
}

// What has ended is not read again, what goes on is; the pictures are the same.
func TestThumbnailsOfWhatHasEndedAreRemembered(t *testing.T) {
	ctx := context.Background()
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t, false)
		ended := rapid.Bool().Draw(t, "ended")
		for i := range w.requests {
			w.requests[i].Ended = time.Time{}
			if ended {
				w.requests[i].Ended = time.Unix(1, 0)
			}
		}
		source := &counted{inMemory: w.memory(t)}
		e := New(source)
		q := ThumbnailsQuery{Request: rapid.SampledFrom(w.requests).Draw(t, "request").ID, Site: "blocks.*.attn.hook_pattern", Size: rapid.IntRange(1, 12).Draw(t, "size")}
		var pictures [2]*Thumbnails
		var reads [2]int64
		for i := range pictures {
			before := source.reads.Load()
			var err error
			if pictures[i], err = e.Thumbnails(ctx, q); err != nil {
				t.Fatal(err)
			}
			reads[i] = source.reads.Load() - before
		}
		if want := [2]int64{reads[0], reads[0]}; ended && reads[1] != 0 || !ended && reads != want {
			t.Fatalf("rows read the first time and the second: %v; ended: %v", reads, ended)
		}
		if !slices.EqualFunc(pictures[0].Values, pictures[1].Values, func(a, b float32) bool { return a == b || a != a && b != b }) {
			t.Fatalf("%v, then %v", pictures[0].Values, pictures[1].Values)
		}
	})
}

// counted says how often rows were read.
type counted struct {
	*inMemory
	reads atomic.Int64
}

func (c *counted) ReadRows(ref store.ChunkRef, from, to uint32, dst []byte) error {
	c.reads.Add(1)
	return c.inMemory.ReadRows(ref, from, to, dst)
}

// ifFirst is what a maximum starts from; max keeps a NaN that comes after.
func ifFirst(first bool, so float64) float64 {
	if first {
		return math.Inf(-1)
	}
	return so
}

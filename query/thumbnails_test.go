package query

import (
	"context"
	"math"
	"testing"

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

// ifFirst is what a maximum starts from; max keeps a NaN that comes after.
func ifFirst(first bool, so float64) float64 {
	if first {
		return math.Inf(-1)
	}
	return so
}

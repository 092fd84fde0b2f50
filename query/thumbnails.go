package query

import (
	"context"
	"fmt"
	"math"
	"runtime"
	"slices"

	"dmi/tensor"

	"golang.org/x/sync/errgroup"
)

// ThumbnailsQuery asks for a small picture of every head of a request's attention patterns.
type ThumbnailsQuery struct {
	Request string
	Site    string // glob, alias or name of attention patterns
	Layer   *int
	Size    int // pixels along a side, at most; 0: 32
}

// Thumbnails are pictures: NaN where a key comes after its query, no full row is there, or a weight is NaN itself.
type Thumbnails struct {
	Sites  []tensor.Site // by layer
	Heads  int           // the most that a site has; what others lack is NaN
	Side   int           // pixels, no more than the request has positions
	Values []float32     // [site, head, query, key]
}

const maxThumbnailSize = 256

// Thumbnails cuts the positions of a request into equal bins. A pixel is the greatest weight that the last row of its query's bin gives to the keys of
// its key's bin: no strong weight of these rows is lost. Of a request that has ended they are remembered, for chunks are read whole.
func (e *Engine) Thumbnails(ctx context.Context, q ThumbnailsQuery) (*Thumbnails, error) {
	if q.Size == 0 {
		q.Size = 32
	}
	if q.Size < 1 || q.Size > maxThumbnailSize {
		return nil, badArgument("", "thumbnails of %d pixels: ask for 1 to %d", q.Size, maxThumbnailSize)
	}
	r, err := e.requestByID(q.Request)
	if err != nil {
		return nil, err
	}
	sites, err := e.sitesOf(r.Key.Session, q.Site, q.Layer)
	if err != nil {
		return nil, err
	}
	t := &Thumbnails{Sites: slices.Clone(sites)}
	slices.SortStableFunc(t.Sites, func(a, b tensor.Site) int { return a.Layer - b.Layer })
	selections := make([]*selection, len(sites))
	end := 0
	for i, site := range t.Sites {
		if !site.Keyed || site.Fill != tensor.FillZero {
			return nil, badArgument("ask for attention patterns, such as blocks.*.attn.hook_pattern", "site %s holds no attention weights", site.Name)
		}
		s, err := e.choose(ctx, r, site, Range{}, Range{}, FullOnly)
		if err != nil {
			return nil, err
		}
		for _, run := range s.runs {
			if len(run.ref.Shape) != 2 || !run.ref.DType.Real() {
				return nil, badArgument("", "site %s: rows of %s %v are not weights by head and key", site.Name, run.ref.DType, run.ref.Shape)
			}
			t.Heads = max(t.Heads, run.ref.Shape[0])
		}
		selections[i], end = s, max(end, int(s.end))
	}
	t.Side = min(q.Size, end)
	picture := t.Heads * t.Side * t.Side
	if cells := len(sites) * picture; cells > maxGridCells {
		return nil, &Error{Code: OverLimit, Message: fmt.Sprintf("thumbnails of %d heads at %d sites: at most %d pixels in all", t.Heads, len(sites), maxGridCells), Hint: "ask for a layer, or for smaller ones"}
	}
	t.Values = make([]float32, len(sites)*picture)
	for i := range t.Values {
		t.Values[i] = float32(math.NaN())
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for i, s := range selections {
		group.Go(func() error { return s.picture(ctx, e, end, t.Side, t.Values[i*picture:(i+1)*picture]) })
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return t, nil
}

// pictureKey names a line of pixels in the pictures of all heads: those of a query, cut from so many positions into so many bins.
type pictureKey struct {
	chunk chunkKey
	query uint32
	end   int
	side  int
}

// picture fills the pictures of a site's heads, [head, side, side].
func (s *selection) picture(ctx context.Context, e *Engine, end, side int, into []float32) error {
	var scratch pictureScratch
	for bin := range side {
		if err := ctx.Err(); err != nil {
			return err
		}
		from, to := bin*end/side, (bin+1)*end/side
		at, _ := slices.BinarySearchFunc(s.runs, to, func(r run, to int) int { return int(r.First) - to }) // the first that begins behind the bin
		if at == 0 || s.runs[at-1].end() <= uint64(from) {
			continue // no row of the bin is there
		}
		r := s.runs[at-1]
		key := pictureKey{chunkKeyOf(r.ref), uint32(min(to, int(r.end())) - 1), end, side}
		lines, known := e.pictured.get(key)
		if !known {
			var err error
			if lines, err = s.pictureLines(e, r, key, &scratch); err != nil {
				return err
			}
			if !s.request.Ended.IsZero() { // chunks of one that goes on still grow
				e.pictured.put(key, lines)
			}
		}
		for head := range len(lines) / side {
			copy(into[(head*side+bin)*side:], lines[head*side:(head+1)*side])
		}
	}
	return nil
}

// pictureScratch is what making lines needs again and again.
type pictureScratch struct {
	row     []byte
	weights []float64
}

// pictureLines makes the pixels of a query: [head, side].
func (s *selection) pictureLines(e *Engine, r run, at pictureKey, scratch *pictureScratch) ([]float32, error) {
	scratch.row = resize(scratch.row, rowBytes(r.ref))
	index := at.query - r.ref.First
	if err := s.read(e, r, index, index+1, scratch.row); err != nil {
		return nil, err
	}
	size, stored := r.ref.DType.Size(), r.ref.Shape[1]
	if cap(scratch.weights) < stored {
		scratch.weights = make([]float64, stored)
	}
	keys := scratch.weights[:min(stored, int(at.query)+1)]
	lines := make([]float32, r.ref.Shape[0]*at.side)
	for head := range r.ref.Shape[0] {
		r.ref.DType.Floats(keys, scratch.row[head*stored*size:(head*stored+len(keys))*size])
		for pixel := range at.side {
			from, to := pixel*at.end/at.side, min(len(keys), (pixel+1)*at.end/at.side)
			lines[head*at.side+pixel] = float32(math.NaN())
			if from < to {
				lines[head*at.side+pixel] = float32(slices.Max(keys[from:to]))
			}
		}
	}
	return lines, nil
}

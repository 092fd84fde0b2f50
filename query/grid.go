package query

import (
	"context"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strings"

	"dmi/tensor"

	"golang.org/x/sync/errgroup"
)

// GridQuery asks for one statistic of every row of a request at some sites.
type GridQuery struct {
	Request   string
	Site      string // glob, alias or name; "": every site
	Layer     *int
	Tokens    Range
	Statistic string // a name of Statistics
}

// Grid is a value per site and position: NaN where no full row is there, or none of its elements is finite. Coverage tells which.
type Grid struct {
	Sites  []tensor.Site // by layer
	First  int           // position of the first column
	Width  int
	Values []float32 // [site, position]
}

// Statistics names what a grid can show.
var Statistics = []string{"mean", "rms", "min", "max", "absmax", "l2", "nonfinite"}

// maxGridCells bounds an answer: 64 MiB of values.
const maxGridCells = 16 << 20

// Grid computes a grid, a site per core at a time. Rows of requests that have ended are summed up once and remembered, to a bound.
func (e *Engine) Grid(ctx context.Context, q GridQuery) (*Grid, error) {
	if !slices.Contains(Statistics, q.Statistic) {
		return nil, badArgument("say "+strings.Join(Statistics, ", "), "statistic %q: no such one", q.Statistic)
	}
	r, err := e.requestByID(q.Request)
	if err != nil {
		return nil, err
	}
	sites, err := e.sitesOf(r.Key.Session, q.Site, q.Layer)
	if err != nil {
		return nil, err
	}
	sites = slices.Clone(sites)
	slices.SortStableFunc(sites, func(a, b tensor.Site) int { return a.Layer - b.Layer })
	selections := make([]*selection, len(sites))
	end := 0
	for i, site := range sites {
		if selections[i], err = e.choose(ctx, r, site, Range{}, Range{}, summable); err != nil {
			return nil, err
		}
		end = max(end, int(selections[i].end))
	}
	from, to := q.Tokens.clip(end)
	from, to = max(from, 0), min(to, end)
	g := &Grid{Sites: sites, First: from, Width: max(0, to-from)}
	if cells := len(sites) * g.Width; cells > maxGridCells {
		return nil, &Error{Code: OverLimit, Message: fmt.Sprintf("a grid of %d sites and %d positions: at most %d values", len(sites), g.Width, maxGridCells), Hint: "ask for fewer sites, or for a range of tokens"}
	}
	g.Values = make([]float32, len(sites)*g.Width)
	for i := range g.Values {
		g.Values[i] = float32(math.NaN())
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for i, s := range selections {
		group.Go(func() error {
			line := g.Values[i*g.Width : (i+1)*g.Width]
			return s.eachSummed(ctx, e, uint32(from), uint32(from+g.Width), func(position uint32, sums tensor.Statistics) {
				line[int(position)-from] = float32(sums.Named(q.Statistic))
			})
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return g, nil
}

// eachSummed yields the statistics of the rows of a selection between two positions, from memory where they are remembered.
func (s *selection) eachSummed(ctx context.Context, e *Engine, from, to uint32, yield func(position uint32, sums tensor.Statistics)) error {
	for _, r := range s.runs {
		if r.end() <= uint64(from) || r.First >= to {
			continue
		}
		key := chunkKeyOf(r.ref)
		sums, known := e.summed.get(key)
		if !known {
			whole := &selection{request: s.request, site: s.site, runs: []run{{Span{r.ref.First, r.ref.Rows}, r.ref}}}
			if err := whole.eachRow(ctx, e, func(_ uint32, _ tensor.Level, row tensor.Statistics) error {
				sums = append(sums, row)
				return nil
			}); err != nil {
				return err
			}
			if !s.request.Ended.IsZero() { // chunks of one that goes on still grow
				e.summed.put(key, sums)
			}
		}
		for position := max(from, r.First); position < to && uint64(position) < r.end(); position++ {
			yield(position, sums[position-r.ref.First])
		}
	}
	return nil
}

package inspect

import (
	"cmp"
	"context"
	"errors"
	"math"
	"slices"

	"dmi/query"
)

// TokensQuery asks about every token of some requests.
type TokensQuery struct {
	query.Scope
	Site   string // glob of the sites whose norms are wanted; "": every layer's hook_resid_post
	Layer  *int   // of the sites and of the attention patterns
	Tokens query.Range
	K      int // attended tokens; 0: 3
}

// TokenRow is a token: how long its vectors are, what it attends to and how much it is attended to, both the mean over every head of the
// patterns that are there. Lists are empty, and figures null, where nothing was captured.
type TokenRow struct {
	Request  string      `json:"request"`
	Position int         `json:"position"`
	Token    *int64      `json:"token"` // id, where kept and this reader may see it
	Norms    []TokenNorm `json:"norms"`
	Attends  []Attended  `json:"attends"`  // most first; of equal weights, the earlier token first
	Received Number      `json:"received"` // mean weight that the queries asked about, itself included, give it
}

// TokenNorm is the L2 norm of a token's row; null where it holds a value that is not finite.
type TokenNorm struct {
	Site  string `json:"site"`
	Layer *int   `json:"layer"`
	L2    Number `json:"l2"`
}

// Attended is how much a token attends to another.
type Attended struct {
	Position int    `json:"position"`
	Token    *int64 `json:"token"`
	Weight   Number `json:"weight"`
}

const (
	residuals = "blocks.*.hook_resid_post"
	maxTopK   = 1000
	// queryBlock is how many queries' mean weights are in memory at once, per layer under way.
	queryBlock = 64
)

// Tokens yields the tokens of each request in order. It holds a request's figures, and the weights of a few queries, at a time.
func Tokens(ctx context.Context, e *query.Engine, q TokensQuery, yield func(TokenRow) error) error {
	k := cmp.Or(q.K, 3)
	if k < 1 || k > maxTopK {
		return badArgument("", "the %d most attended tokens: ask for 1 to %d", k, maxTopK)
	}
	norms, err := e.Survey(ctx, q.Scope, cmp.Or(q.Site, residuals), q.Layer, q.Tokens)
	if q.Site == "" && errors.Is(err, query.ErrNotFound) {
		norms, err = e.Survey(ctx, q.Scope, "", nil, q.Tokens) // whether the requests themselves are there
		if norms != nil {
			norms.Sites = nil
		}
	}
	if err != nil {
		return err
	}
	weights, err := e.Survey(ctx, q.Scope, patterns, q.Layer, q.Tokens)
	if errors.Is(err, query.ErrNotFound) {
		weights, err = norms, nil
	}
	if err != nil {
		return err
	}
	progress := progressOf(ctx)
	progress.begin(reading)
	surveys := []*query.Survey{norms}
	if weights != norms {
		surveys = append(surveys, weights)
	}
	shares, err := progress.sharesOf(ctx, surveys...)
	if err != nil {
		return err
	}
	for i, r := range norms.Requests {
		rows := map[int]*TokenRow{}
		row := func(position int) *TokenRow {
			if rows[position] == nil {
				rows[position] = &TokenRow{Request: r.ID, Position: position, Norms: []TokenNorm{}, Attends: []Attended{}, Received: Number(nan)}
			}
			return rows[position]
		}
		if err := addNorms(ctx, norms, i, shares[0], row); err != nil {
			return err
		}
		if weights != norms {
			if err := addAttention(ctx, weights, i, shares[1], k, row, func(p int) bool { return rows[p] != nil }); err != nil {
				return err
			}
		}
		ids, err := tokensOf(ctx, e, r)
		if err != nil {
			return err
		}
		id := func(position int) *int64 {
			if position < len(ids) {
				return &ids[position]
			}
			return nil
		}
		positions := make([]int, 0, len(rows))
		for p := range rows {
			positions = append(positions, p)
		}
		slices.Sort(positions)
		for _, p := range positions {
			rows[p].Token = id(p)
			for j := range rows[p].Attends {
				rows[p].Attends[j].Token = id(rows[p].Attends[j].Position)
			}
			if err := yield(*rows[p]); err != nil {
				return err
			}
		}
	}
	return nil
}

func addNorms(ctx context.Context, s *query.Survey, request int, shares []float64, row func(int) *TokenRow) error {
	type norm struct {
		position uint32
		l2       float64
	}
	return inOrder(ctx, len(s.Sites), func(ctx context.Context, i int) ([]norm, error) {
		selection, err := s.Select(ctx, i, request)
		if err == nil {
			defer progressOf(ctx).follow(selection, shares[i])()
		}
		if selection == nil || err != nil {
			return nil, err
		}
		var norms []norm
		err = selection.EachRow(ctx, blockBytes, func(v query.Values) error {
			squares := 0.0
			for _, x := range v.Data {
				squares += x * x
			}
			norms = append(norms, norm{v.Position, math.Sqrt(squares)})
			return nil
		})
		return norms, err
	}, func(i int, norms []norm) error {
		for _, n := range norms {
			r := row(int(n.position))
			r.Norms = append(r.Norms, TokenNorm{s.Sites[i].Name, layerOf(s.Sites[i]), Number(n.l2)})
		}
		return nil
	})
}

// addAttention adds up the weights of a few queries at a time over every layer and head.
func addAttention(ctx context.Context, s *query.Survey, request int, shares []float64, k int, row func(int) *TokenRow, wanted func(int) bool) error {
	selections := make([]*query.Selection, 0, len(s.Sites))
	from, to := uint32(math.MaxUint32), uint32(0)
	for i := range s.Sites {
		selection, err := s.Select(ctx, i, request)
		if err != nil {
			return err
		}
		defer progressOf(ctx).follow(selection, shares[i])()
		if selection == nil || len(selection.Present()) == 0 {
			continue
		}
		present := selection.Present()
		last := present[len(present)-1]
		from, to = min(from, present[0].First), max(to, last.First+last.Count)
		selections = append(selections, selection)
	}
	var received, attending []float64 // by key: weight, and queries that could have given it some
	for ; from < to; from += queryBlock {
		var block [queryBlock]struct {
			weights []float64
			heads   int
		}
		type part = [queryBlock]struct {
			weights []float64 // summed over heads
			heads   int
		}
		err := inOrder(ctx, len(selections), func(ctx context.Context, i int) (*part, error) {
			p := &part{}
			return p, selections[i].EachRowIn(ctx, blockBytes, from, min(to, from+queryBlock), func(v query.Values) error {
				if len(v.Shape) != 2 {
					return badArgument("verify the store", "site %s: rows of %v are not weights by head and key", selections[i].Site().Name, v.Shape)
				}
				at, keys := &p[v.Position-from], v.Shape[1]
				at.weights, at.heads = make([]float64, int(v.Position)+1), v.Shape[0]
				for h := range v.Shape[0] {
					for j, w := range v.Data[h*keys : (h+1)*keys] {
						at.weights[j] += w
					}
				}
				return nil
			})
		}, func(_ int, p *part) error {
			for q, add := range p {
				if add.heads == 0 {
					continue
				}
				if block[q].weights == nil {
					block[q].weights = add.weights
				} else {
					for j, w := range add.weights {
						block[q].weights[j] += w
					}
				}
				block[q].heads += add.heads
			}
			return nil
		})
		if err != nil {
			return err
		}
		for q, sum := range block {
			if sum.heads == 0 {
				continue
			}
			for len(received) < len(sum.weights) {
				received, attending = append(received, 0), append(attending, 0)
			}
			for j := range sum.weights {
				sum.weights[j] /= float64(sum.heads)
				received[j] += sum.weights[j]
				attending[j]++
			}
			row(int(from) + q).Attends = mostAttended(sum.weights, k)
		}
	}
	for j := range received {
		if attending[j] > 0 && wanted(j) {
			row(j).Received = Number(received[j] / attending[j])
		}
	}
	return nil
}

func mostAttended(weights []float64, k int) []Attended {
	order := make([]int, len(weights))
	for j := range order {
		order[j] = j
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(weights[b], weights[a]) })
	top := make([]Attended, min(k, len(order)))
	for i, j := range order[:len(top)] {
		top[i] = Attended{Position: j, Weight: Number(weights[j])}
	}
	return top
}

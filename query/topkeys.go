package query

import (
	"cmp"
	"context"
	"slices"

	"dmi/tensor"
)

const maxTopKeys = 1000

// TopKeys finds the tokens that heads of an attention pattern attend to most, for one query or on average over all. It streams
// the rows and holds a sum per head and key. Equal weights: the earlier key first.
func (e *Engine) TopKeys(ctx context.Context, q TopKeysQuery) ([]HeadKeys, error) {
	k := cmp.Or(q.K, 5)
	if k < 1 || k > maxTopKeys {
		return nil, badArgument("", "the %d most attended keys: ask for 1 to %d", k, maxTopKeys)
	}
	r, err := e.requestByID(q.Request)
	if err != nil {
		return nil, err
	}
	site, err := e.siteOf(r, q.Site)
	if err != nil {
		return nil, err
	}
	if !site.Keyed || site.Fill != tensor.FillZero {
		return nil, badArgument("ask for an attention pattern, such as blocks.0.attn.hook_pattern", "site %s holds no attention weights", site.Name)
	}
	tokens := Range{}
	if q.Query != nil {
		tokens = Range{*q.Query, *q.Query + 1}
		if *q.Query == -1 {
			tokens.To = End
		}
	}
	s, err := e.choose(ctx, r, site, tokens, Range{}, FullOnly)
	if err != nil {
		return nil, err
	}
	if err := s.sure(); err != nil {
		return nil, err
	}
	if len(s.runs) == 0 {
		return nil, s.none()
	}
	l, err := newLayout(site, s.runs[0].ref, false, int(s.present.count()), int(s.present.end()), q.Heads, tensor.DTypeNone)
	if err != nil {
		return nil, err
	}
	if err := uniform(site, s.pieces(0)); err != nil {
		return nil, err
	}
	if len(s.runs[0].ref.Shape) != 2 || !l.dtype.Real() {
		return nil, badArgument("", "site %s: rows of %s %v are not weights by head and key", site.Name, l.dtype, s.runs[0].ref.Shape)
	}
	heads := l.lines
	sums := make([][]float64, len(heads))
	for i := range sums {
		sums[i] = make([]float64, l.length)
	}
	queries := 0.0
	weights := make([]float64, l.length)
	err = s.eachStoredRow(ctx, e, func(position uint32, r run, row []byte) error {
		size := l.dtype.Size()
		stored := r.ref.Shape[1]
		keys := weights[:min(stored, int(position)+1)]
		queries++
		for i, h := range heads {
			l.dtype.Floats(keys, row[h*stored*size:(h*stored+len(keys))*size])
			for j, w := range keys {
				sums[i][j] += w
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	top := make([]HeadKeys, len(heads))
	for i, h := range heads {
		for j := range sums[i] {
			sums[i][j] /= queries
		}
		top[i] = HeadKeys{Head: h, Keys: mostAttended(sums[i], k, r.Tokens)}
	}
	return top, nil
}

func mostAttended(weights []float64, k int, tokens []int64) []KeyWeight {
	order := make([]int, len(weights))
	for j := range order {
		order[j] = j
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(weights[b], weights[a]) })
	keys := make([]KeyWeight, min(k, len(order)))
	for i, j := range order[:len(keys)] {
		keys[i] = KeyWeight{Position: j, Weight: weights[j]}
		if j < len(tokens) {
			keys[i].Token = &tokens[j]
		}
	}
	return keys
}

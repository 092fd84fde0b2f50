package inspect

import (
	"context"
	"errors"
	"iter"
	"math"

	"dmi/query"
	"dmi/tensor"
)

var nan = math.NaN()

// repeats says where a request's tokens came before.
type repeats struct {
	period int   // > 0: every token is the one so many positions before
	last   []int // else: the latest earlier position with the same token, -1 of none
}

// of gives the earlier positions that hold the token at i, latest first.
func (r repeats) of(i int) iter.Seq[int] {
	return func(yield func(int) bool) {
		if r.period > 0 {
			for j := i - r.period; j >= 0; j -= r.period {
				if !yield(j) {
					return
				}
			}
			return
		}
		for ; i < len(r.last) && r.last[i] >= 0; i = r.last[i] {
			if !yield(r.last[i]) {
				return
			}
		}
	}
}

// repeatsOf finds the repeats of a request; period > 0 says them.
func repeatsOf(ctx context.Context, e *query.Engine, r tensor.Request, period int) (repeats, error) {
	if period > 0 {
		return repeats{period: period}, nil
	}
	ids, err := tokensOf(ctx, e, r)
	if err != nil {
		return repeats{}, err
	}
	if ids == nil {
		return repeats{}, badArgument(`attach with text="ids" or capture the site "tokens" (and read with scope text), or say period=, after how many tokens the prompts repeat themselves`,
			"which tokens of request %s came before: its ids were not kept, or this reader may not see them", r.ID)
	}
	seen := map[int64]int{}
	last := make([]int, len(ids))
	for i, id := range ids {
		last[i] = -1
		if j, before := seen[id]; before {
			last[i] = j
		}
		seen[id] = i
	}
	return repeats{last: last}, nil
}

// tokensOf gives a request's ids as the session kept them, or as captured at the site "tokens" where every position's is there; nil where neither.
func tokensOf(ctx context.Context, e *query.Engine, r tensor.Request) ([]int64, error) {
	kept, err := e.Tokens(r.ID)
	if err != nil || len(kept) > 0 {
		return kept, err
	}
	captured, err := e.Survey(ctx, query.Scope{Requests: []string{r.ID}}, "tokens", nil, query.Range{})
	if errors.Is(err, query.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	rows, err := captured.Select(ctx, 0, 0)
	if err != nil || rows == nil || rows.Missing() > 0 {
		return nil, err
	}
	var ids []int64
	err = rows.EachRow(ctx, blockBytes, func(v query.Values) error {
		if len(v.Data) != 1 {
			return badArgument("", "site tokens of request %s: rows of %v are not ids", r.ID, v.Shape)
		}
		ids = append(ids, int64(v.Data[0]))
		return nil
	})
	return ids, err
}

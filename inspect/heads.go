package inspect

import (
	"cmp"
	"context"

	"dmi/query"
)

// HeadsQuery asks what kind each attention head is.
type HeadsQuery struct {
	query.Scope
	Site      string // glob of attention patterns; "": all of them
	Layer     *int
	Period    int     // > 0: the prompts repeat themselves every so many tokens, whatever their ids, which need not be there
	Threshold float64 // least score of a kind; 0: DefaultThreshold
}

const (
	// DefaultThreshold is the share of attention from which a head is called a kind.
	DefaultThreshold = 0.4
	patterns         = "blocks.*.attn.hook_pattern"
)

// Kinds of heads, in the order of preference where scores are equal.
const (
	PreviousToken  = "previous-token"
	Induction      = "induction"
	DuplicateToken = "duplicate-token"
	FirstTokenSink = "first-token-sink"
	OtherKind      = "other"
)

var kinds = [...]string{PreviousToken, Induction, DuplicateToken, FirstTokenSink}

// HeadRow is one head's scores: mean attention, over queries, to the keys that a kind is about. Kind is the one with the greatest score, or
// other where that is below the threshold; Score is the greatest in either case. Scores without queries to take them over are null.
type HeadRow struct {
	Site      string `json:"site"`
	Layer     *int   `json:"layer"`
	Head      int    `json:"head"`
	Kind      string `json:"kind"`
	Score     Number `json:"score"`
	Previous  Number `json:"previous_token"`
	Induction Number `json:"induction"`
	Duplicate Number `json:"duplicate_token"`
	First     Number `json:"first_token_sink"`
	Queries   uint64 `json:"queries"`   // that have a token before them
	Repeats   uint64 `json:"repeats"`   // of them, those whose token came before
	NonFinite uint64 `json:"nonfinite"` // queries left out because a weight was NaN or infinite
	Missing   uint64 `json:"missing"`   // queries owed that are not there
}

// headSums are, of one head, sums of weights by kind, and over how many queries.
type headSums struct {
	sums      [len(kinds)]float64
	queries   [len(kinds)]uint64
	nonfinite uint64
}

type layerSums struct {
	heads   []headSums
	missing uint64
}

// Heads yields every head's scores, layer by layer.
func Heads(ctx context.Context, e *query.Engine, q HeadsQuery, yield func(HeadRow) error) error {
	threshold := cmp.Or(q.Threshold, DefaultThreshold)
	if !(threshold > 0 && threshold <= 1) {
		return badArgument("say more than 0 and at most 1", "heads from a score of %v", q.Threshold)
	}
	survey, err := e.Survey(ctx, q.Scope, cmp.Or(q.Site, patterns), q.Layer, query.Range{})
	if err != nil {
		return err
	}
	if q.Period < 0 {
		return badArgument("say 1 or more", "prompts that repeat themselves every %d tokens", q.Period)
	}
	var sum *layerSums
	return eachSelection(ctx, survey, func(ctx context.Context, s *query.Selection) (*layerSums, error) {
		earlier, err := repeatsOf(ctx, e, s.Request(), q.Period)
		if err != nil {
			return nil, err
		}
		return scoreHeads(ctx, s, earlier)
	}, func(at place, l *layerSums) error {
		if sum == nil {
			sum = &layerSums{}
		}
		if l != nil {
			sum.merge(l)
		}
		if !at.last {
			return nil
		}
		whole := sum
		sum = nil
		for head := range whole.heads {
			row := whole.heads[head].row(threshold)
			row.Site, row.Layer, row.Head, row.Missing = at.site.Name, layerOf(at.site), head, whole.missing
			if err := yield(row); err != nil {
				return err
			}
		}
		return nil
	})
}

func (l *layerSums) merge(o *layerSums) {
	for len(l.heads) < len(o.heads) {
		l.heads = append(l.heads, headSums{})
	}
	for h := range o.heads {
		for k := range kinds {
			l.heads[h].sums[k] += o.heads[h].sums[k]
			l.heads[h].queries[k] += o.heads[h].queries[k]
		}
		l.heads[h].nonfinite += o.heads[h].nonfinite
	}
	l.missing += o.missing
}

func (h *headSums) row(threshold float64) HeadRow {
	var scores [len(kinds)]Number
	best := -1
	for k := range kinds {
		scores[k] = Number(h.sums[k] / float64(h.queries[k])) // NaN of none
		if h.queries[k] > 0 && (best < 0 || scores[k] > scores[best]) {
			best = k
		}
	}
	row := HeadRow{Kind: OtherKind, Score: Number(nan), Previous: scores[0], Induction: scores[1], Duplicate: scores[2], First: scores[3],
		Queries: h.queries[0], Repeats: h.queries[2], NonFinite: h.nonfinite}
	if best >= 0 {
		row.Score = scores[best]
		if float64(row.Score) >= threshold {
			row.Kind = kinds[best]
		}
	}
	return row
}

// scoreHeads sums up, for each head, the weight that queries give to the keys that each kind is about.
func scoreHeads(ctx context.Context, s *query.Selection, earlier repeats) (*layerSums, error) {
	l := &layerSums{missing: s.Missing()}
	err := s.EachStored(ctx, blockBytes, func(v query.Stored) error { // of a row's weights few are looked at
		if len(v.Shape) != 2 || !s.Site().Keyed {
			return badArgument("name attention patterns, such as "+patterns, "heads of site %s: its rows are not weights by head and key", s.Site().Name)
		}
		for len(l.heads) < v.Shape[0] {
			l.heads = append(l.heads, headSums{})
		}
		i, keys := int(v.Position), v.Shape[1]
		if i == 0 { // it can attend to nothing but itself
			return nil
		}
		for h := range v.Shape[0] {
			weight := func(key int) float64 {
				if key < keys { // a sliding window's pattern may end before
					return v.Float(h*keys + key)
				}
				return 0
			}
			var sums [len(kinds)]float64
			var some [len(kinds)]bool
			sums[0], some[0] = weight(i-1), true
			sums[3], some[3] = weight(0), true
			for j := range earlier.of(i) {
				sums[2], some[2] = sums[2]+weight(j), true
				if j+1 < i {
					sums[1], some[1] = sums[1]+weight(j+1), true
				}
			}
			if total := sums[0] + sums[1] + sums[2] + sums[3]; total-total != 0 {
				l.heads[h].nonfinite++
				continue
			}
			for k := range kinds {
				if some[k] {
					l.heads[h].sums[k] += sums[k]
					l.heads[h].queries[k]++
				}
			}
		}
		return nil
	})
	return l, err
}

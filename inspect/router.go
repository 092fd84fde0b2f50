package inspect

import (
	"context"
	"errors"
	"math"

	"dmi/query"
)

// RouterQuery asks how a mixture's experts share the tokens.
type RouterQuery struct {
	query.Scope
	Layer *int
}

// RouterRow is one expert's load.
type RouterRow struct {
	Layer       *int   `json:"layer"`
	Expert      int    `json:"expert"`
	Tokens      uint64 `json:"tokens"`      // that chose it
	Share       Number `json:"share"`       // of all choices
	Load        Number `json:"load"`        // Share over an even one: 1 is balanced
	Probability Number `json:"probability"` // mean of the router's softmax; null where its logits were not captured
	Balance     Number `json:"balance"`     // of the layer: entropy of the shares over that of even ones
	Missing     uint64 `json:"missing"`     // tokens whose choices are not there
}

const (
	routerChoices = "blocks.*.mlp.hook_expert_indices"
	routerLogits  = "blocks.*.mlp.gate.hook_out"
	maxExperts    = 1 << 16
)

type routing struct {
	chosen        []uint64
	probability   []float64
	rows, missing uint64
}

func (r *routing) merge(o *routing) {
	for len(r.chosen) < len(o.chosen) {
		r.chosen = append(r.chosen, 0)
	}
	for len(r.probability) < len(o.probability) {
		r.probability = append(r.probability, 0)
	}
	for i, n := range o.chosen {
		r.chosen[i] += n
	}
	for i, p := range o.probability {
		r.probability[i] += p
	}
	r.rows += o.rows
	r.missing += o.missing
}

// Router yields the experts of each layer that has any.
func Router(ctx context.Context, e *query.Engine, q RouterQuery, yield func(RouterRow) error) error {
	probabilities := map[int]*routing{} // by layer: an expert each, small
	logits, err := e.Survey(ctx, q.Scope, routerLogits, q.Layer, query.Range{})
	switch {
	case errors.Is(err, query.ErrNotFound): // what follows says what is wrong with the question, if that is it
	case err != nil:
		return err
	default:
		if err := routings(ctx, logits, addProbabilities, func(site query.SurveyedSite, r *routing) error {
			probabilities[site.Layer] = r
			return nil
		}); err != nil {
			return err
		}
	}
	choices, err := e.Survey(ctx, q.Scope, routerChoices, q.Layer, query.Range{})
	if err != nil {
		return err
	}
	return routings(ctx, choices, addChoices, func(site query.SurveyedSite, r *routing) error {
		odds := probabilities[site.Layer]
		if odds == nil {
			odds = &routing{}
		}
		experts := max(len(r.chosen), len(odds.probability))
		total, entropy := uint64(0), 0.0
		for _, n := range r.chosen {
			total += n
		}
		for _, n := range r.chosen {
			if p := float64(n) / float64(total); p > 0 {
				entropy -= p * math.Log(p)
			}
		}
		for i := range experts {
			row := RouterRow{Layer: layerOf(site), Expert: i, Probability: Number(nan), Balance: Number(entropy / math.Log(float64(experts))), Missing: r.missing}
			if i < len(r.chosen) {
				row.Tokens = r.chosen[i]
			}
			row.Share = Number(float64(row.Tokens) / float64(total))
			row.Load = row.Share * Number(experts)
			if i < len(odds.probability) {
				row.Probability = Number(odds.probability[i] / float64(odds.rows))
			}
			if err := yield(row); err != nil {
				return err
			}
		}
		return nil
	})
}

// routings sums each site's rows up.
func routings(ctx context.Context, survey *query.Survey, add func(*routing, query.Values) error, take func(query.SurveyedSite, *routing) error) error {
	var sum *routing
	return eachSelection(ctx, survey, func(ctx context.Context, s *query.Selection) (*routing, error) {
		r := &routing{missing: s.Missing()}
		return r, s.EachRow(ctx, blockBytes, func(v query.Values) error { return add(r, v) })
	}, func(at place, r *routing) error {
		if sum == nil {
			sum = &routing{}
		}
		if r != nil {
			sum.merge(r)
		}
		if !at.last {
			return nil
		}
		whole := sum
		sum = nil
		if whole.rows == 0 {
			return nil
		}
		return take(at.site, whole)
	})
}

func addChoices(r *routing, v query.Values) error {
	r.rows++
	for _, x := range v.Data {
		if !(x >= 0 && x < maxExperts) {
			return badArgument("verify the store", "router choices at position %d: %v is no expert", v.Position, x)
		}
		for len(r.chosen) <= int(x) {
			r.chosen = append(r.chosen, 0)
		}
		r.chosen[int(x)]++
	}
	return nil
}

// addProbabilities leaves rows out that are not finite: they have no softmax.
func addProbabilities(r *routing, v query.Values) error {
	for len(r.probability) < len(v.Data) {
		r.probability = append(r.probability, 0)
	}
	most := math.Inf(-1)
	for _, x := range v.Data {
		if x-x != 0 {
			return nil
		}
		most = max(most, x)
	}
	total := 0.0
	for _, x := range v.Data {
		total += math.Exp(x - most)
	}
	for i, x := range v.Data {
		r.probability[i] += math.Exp(x-most) / total
	}
	r.rows++
	return nil
}

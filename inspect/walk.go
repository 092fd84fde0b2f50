package inspect

import (
	"context"
	"encoding/json"
	"fmt"
	"math"

	"dmi/query"
	"dmi/tensor"
)

// Number is a figure; null in JSON where there is none (NaN) or it is not finite.
type Number float64

// MarshalJSON writes null for what JSON has no number for.
func (n Number) MarshalJSON() ([]byte, error) {
	if v := float64(n); math.IsNaN(v) || math.IsInf(v, 0) {
		return []byte("null"), nil
	}
	return json.Marshal(float64(n))
}

// UnmarshalJSON reads null as NaN.
func (n *Number) UnmarshalJSON(text []byte) error {
	if string(text) == "null" {
		*n = Number(math.NaN())
		return nil
	}
	return json.Unmarshal(text, (*float64)(n))
}

func badArgument(hint, format string, args ...any) error {
	return &query.Error{Code: query.BadArgument, Message: fmt.Sprintf(format, args...), Hint: hint}
}

func layerOf(site query.SurveyedSite) *int {
	if site.Layer == tensor.NoLayer {
		return nil
	}
	return &site.Layer
}

// place is where a walk has come to.
type place struct {
	site    query.SurveyedSite
	request int  // index into the survey's
	last    bool // of the site's requests
}

// eachSelection looks at every request of every site, site by site, on all cores, and hands the results over in that order; nil where a
// request's session lacks the site.
func eachSelection[T any](ctx context.Context, s *query.Survey, look func(context.Context, *query.Selection) (*T, error), take func(place, *T) error) error {
	requests, progress := len(s.Requests), progressOf(ctx)
	progress.begin(reading)
	shares, err := progress.sharesOf(ctx, s)
	if err != nil {
		return err
	}
	return inOrder(ctx, len(s.Sites)*requests, func(ctx context.Context, i int) (*T, error) {
		selection, err := s.Select(ctx, i/requests, i%requests)
		if err == nil {
			defer progress.follow(selection, shares[0][i/requests])()
		}
		if selection == nil || err != nil {
			return nil, err
		}
		return look(ctx, selection)
	}, func(i int, result *T) error {
		return take(place{s.Sites[i/requests], i % requests, i%requests == requests-1}, result)
	})
}

package query

import (
	"context"
	"fmt"
	"slices"

	"dmi/tensor"
)

const (
	defaultPage = 1000
	maxPage     = 10000
)

// page cuts a list after an id; idOf names its items.
func page[T any](list []T, after string, limit int, idOf func(T) string) ([]T, string, error) {
	limit, err := pageSize(limit)
	if err != nil {
		return nil, "", err
	}
	if after != "" {
		at := slices.IndexFunc(list, func(item T) bool { return idOf(item) == after })
		if at < 0 {
			return nil, "", notAsked(after)
		}
		list = list[at+1:]
	}
	if len(list) > limit {
		return list[:limit], idOf(list[limit-1]), nil
	}
	return list, "", nil
}

func pageSize(limit int) (int, error) {
	if limit < 0 || limit > maxPage {
		return 0, badArgument("", "a page of %d: say 1 to %d", limit, maxPage)
	}
	if limit == 0 {
		limit = defaultPage
	}
	return limit, nil
}

func notAsked(after string) error {
	return badArgument("start again without a cursor", "after %q: not in what was asked for", after)
}

func hasLabels(have, want map[string]string) bool {
	for k, v := range want {
		if got, ok := have[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// Runs lists runs in the order they began.
func (e *Engine) Runs(ctx context.Context, q RunsQuery) (Page[RunInfo], error) {
	none := Page[RunInfo]{}
	if q.Session != "" {
		if _, err := e.sessionByID(q.Session); err != nil {
			return none, err
		}
	}
	runs, err := e.source.Runs()
	if err != nil {
		return none, fmt.Errorf("query: list runs: %w", err)
	}
	sessions, err := e.sessions()
	if err != nil {
		return none, err
	}
	runs = slices.DeleteFunc(slices.Clone(runs), func(r tensor.Run) bool {
		return q.Session != "" && sessions[r.Session].ID != q.Session || q.Tag != "" && !slices.Contains(r.Tags, q.Tag) || !hasLabels(r.Labels, q.Labels)
	})
	some, next, err := page(runs, q.After, q.Limit, func(r tensor.Run) string { return r.ID })
	if err != nil {
		return none, err
	}
	list := Page[RunInfo]{Items: make([]RunInfo, 0, len(some)), Next: next}
	for _, r := range some {
		info := RunInfo{ID: r.ID, Session: sessions[r.Session].ID, Labels: r.Labels, Tags: r.Tags, Begun: unixNano(r.Begun), Ended: unixNano(r.Ended)}
		sum, err := e.sumOfRun(ctx, r.ID)
		if err != nil {
			return none, err
		}
		info.Requests, info.Rows, info.Bytes = sum.requests, sum.rows, sum.bytes
		list.Items = append(list.Items, info)
	}
	return list, nil
}

// Requests lists requests in the order they began.
func (e *Engine) Requests(ctx context.Context, q RequestsQuery) (Page[RequestInfo], error) {
	none := Page[RequestInfo]{}
	some, next, err := e.requestsPage(q)
	if err != nil {
		return none, err
	}
	sessions, err := e.sessions()
	if err != nil {
		return none, err
	}
	list := Page[RequestInfo]{Items: make([]RequestInfo, 0, len(some)), Next: next}
	for _, r := range some {
		info, err := e.requestInfo(ctx, r, sessions)
		if err != nil {
			return none, err
		}
		list.Items = append(list.Items, info)
	}
	return list, nil
}

// requestsPage reads what it gives, and what comes before where tags or labels choose.
func (e *Engine) requestsPage(q RequestsQuery) (some []tensor.Request, next string, err error) {
	idOf := func(r tensor.Request) string { return r.ID }
	limit, err := pageSize(q.Limit)
	if err != nil {
		return nil, "", err
	}
	filter, err := e.filterOf(q.Run, q.Session, q.Hidden)
	if err != nil {
		return nil, "", err
	}
	chosen := q.Tag != "" || len(q.Labels) > 0
	switch {
	case chosen:
	case q.Latest > 0:
		filter.Latest = q.Latest
	default:
		if q.After != "" {
			last, found, err := e.source.RequestByID(q.After)
			if err != nil {
				return nil, "", fmt.Errorf("query: look request %q up: %w", q.After, err)
			}
			if !found || q.Run != "" && last.Run != q.Run || filter.Session != 0 && last.Key.Session != filter.Session || last.Hidden && !q.Hidden {
				return nil, "", notAsked(q.After)
			}
		}
		filter.After, filter.Limit = q.After, limit+1
	}
	all, err := e.source.Requests(filter)
	if err != nil {
		return nil, "", fmt.Errorf("query: list requests: %w", err)
	}
	if filter.Limit > 0 {
		return page(all, "", limit, idOf)
	}
	if chosen {
		all = slices.DeleteFunc(slices.Clone(all), func(r tensor.Request) bool {
			return q.Tag != "" && !slices.Contains(r.Tags, q.Tag) || !hasLabels(r.Labels, q.Labels)
		})
	}
	if q.Latest > 0 {
		all = all[max(0, len(all)-q.Latest):]
	}
	return page(all, q.After, limit, idOf)
}

// Request describes one request, hidden or not, with its tokens, text and path as they are kept.
func (e *Engine) Request(ctx context.Context, id string) (RequestInfo, error) {
	r, err := e.requestByID(id)
	if err != nil {
		return RequestInfo{}, err
	}
	sessions, err := e.sessions()
	if err != nil {
		return RequestInfo{}, err
	}
	info, err := e.requestInfo(ctx, r, sessions)
	if err != nil {
		return RequestInfo{}, err
	}
	info.Tokens, info.Text, info.Pieces = r.Tokens, r.Text, r.Pieces
	if len(r.Path) > 0 {
		all, err := e.everyRequestOf(ctx, Scope{Session: info.Session})
		if err != nil {
			return RequestInfo{}, err
		}
		ids := map[uint64]string{}
		for _, other := range all {
			ids[other.Key.Request] = other.ID
		}
		for _, p := range r.Path {
			info.Path = append(info.Path, PathInfo{ids[p.Request], p.First, p.Count})
		}
	}
	return info, nil
}

func (e *Engine) requestInfo(ctx context.Context, r tensor.Request, sessions map[uint32]tensor.Session) (RequestInfo, error) {
	sum, err := e.sumOf(ctx, r)
	if err != nil {
		return RequestInfo{}, err
	}
	return RequestInfo{ID: r.ID, Run: r.Run, Session: sessions[r.Key.Session].ID, Labels: r.Labels, Tags: r.Tags, Begun: unixNano(r.Begun),
		Ended: unixNano(r.Ended), Reason: r.Reason, Hidden: r.Hidden, Positions: sum.positions, Rows: sum.rows, Bytes: sum.bytes}, nil
}

// Sites lists the sites of a request, run or session, as they come in the model.
func (e *Engine) Sites(ctx context.Context, q SitesQuery) ([]SiteInfo, error) {
	requests, err := e.everyRequestOf(ctx, q.Scope)
	if err != nil {
		return nil, err
	}
	var session uint32
	switch {
	case q.Session != "":
		s, err := e.sessionByID(q.Session)
		if err != nil {
			return nil, err
		}
		session = s.Number
	case q.Run != "":
		r, err := e.runByID(q.Run)
		if err != nil {
			return nil, err
		}
		session = r.Session
	default:
		session = requests[0].Key.Session
		for _, r := range requests {
			if r.Key.Session != session {
				return nil, badArgument("ask session by session", "sites of requests %s and %s: they are of different sessions", requests[0].ID, r.ID)
			}
		}
		if len(requests) > 1 { // a path's rows are those of hidden requests: of several, each once
			requests = slices.DeleteFunc(requests, func(r tensor.Request) bool { return len(r.Path) > 0 })
		}
	}
	if len(q.Requests) == 0 {
		requests = slices.DeleteFunc(requests, func(r tensor.Request) bool { return len(r.Path) > 0 })
	}
	sites, err := e.sitesOf(session, q.Site, q.Layer)
	if err != nil {
		return nil, err
	}
	sums := map[uint32]*siteSum{}
	for _, r := range requests {
		if _, err := e.addSums(ctx, sums, r, sites); err != nil {
			return nil, err
		}
	}
	list := make([]SiteInfo, len(sites))
	for i, site := range sites {
		info := SiteInfo{Name: site.Name, Aliases: site.Aliases}
		if site.Layer != tensor.NoLayer {
			info.Layer = &site.Layer
		}
		if sum := sums[site.ID]; sum != nil {
			info.DType, info.RowShape, info.Rows, info.Bytes = sum.form.dtype.String(), sum.form.shape, sum.rows, sum.bytes
			info.Axes = axes(site, len(sum.form.shape))
		}
		list[i] = info
	}
	return list, nil
}

package query

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"dmi/tensor"
)

// Tensor plans a read of one request at one site. Nothing of it is read before it is opened; what was planned stays readable while the
// store writes on.
func (e *Engine) Tensor(ctx context.Context, q TensorQuery) (*Tensor, error) {
	r, err := e.requestByID(q.Request)
	if err != nil {
		return nil, err
	}
	site, err := e.siteOf(r, q.Site)
	if err != nil {
		return nil, err
	}
	return e.tensor(ctx, r, site, q)
}

func (e *Engine) tensor(ctx context.Context, r tensor.Request, site tensor.Site, q TensorQuery) (*Tensor, error) {
	s, err := e.choose(ctx, r, site, q.Tokens, q.Steps, q.Level)
	if err != nil {
		return nil, err
	}
	if !q.Partial {
		if err := s.sure(); err != nil {
			return nil, err
		}
	}
	if len(s.runs) == 0 {
		return nil, s.none()
	}
	keys := min(s.asked.end(), max(uint64(s.end), s.present.end()))
	t, err := e.plan(site, s.pieces(0), int(keys), q.Heads, q.As)
	if err != nil {
		return nil, err
	}
	t.Request, t.Positions, t.Missing, t.Complete = r.ID, s.present, s.missing.count(), len(s.missing) == 0
	if q.Limit > 0 && t.Size() > q.Limit {
		return nil, &Error{Code: OverLimit, Message: fmt.Sprintf("read request %s at site %s: the answer has %d bytes, over the limit of %d",
			r.ID, site.Name, t.Size(), q.Limit), Hint: "ask for fewer tokens or heads, or raise the limit"}
	}
	return t, nil
}

// plan makes a tensor of pieces, one at least.
func (e *Engine) plan(site tensor.Site, pieces []piece, keys int, heads []int, as tensor.DType) (*Tensor, error) {
	if err := uniform(site, pieces); err != nil {
		return nil, err
	}
	last := pieces[len(pieces)-1]
	rows := last.at + int(last.count)
	quantised := slices.ContainsFunc(pieces, func(p piece) bool { return p.ref.Level.Quantised() })
	l, err := newLayout(site, pieces[0].ref, quantised, rows, keys, heads, as)
	if err != nil {
		return nil, err
	}
	t := &Tensor{Site: site, DType: l.as, Shape: l.shape, Axes: l.axes, plan: plan{e.source, pieces, rows, l, e.MemoryBytes}}
	for _, p := range pieces {
		if n := len(t.Levels); n > 0 && t.Levels[n-1].Level == p.ref.Level {
			t.Levels[n-1].Count += p.count
		} else {
			t.Levels = append(t.Levels, LevelSpan{p.ref.Level, p.count})
		}
	}
	return t, nil
}

// none says why there is no row to answer with: an answer without any would have no dtype and no shape.
func (s *selection) none() error {
	why := "nothing of it was captured"
	switch {
	case len(s.asked) == 0 && s.end > 0:
		why = fmt.Sprintf("the range asked for holds none of its %d positions", s.end)
	case len(s.asked) > 0 && len(s.missing) == 0:
		why = "the engine computed none of the rows asked for"
	}
	return &Error{Code: Incomplete, Message: fmt.Sprintf("read request %s at site %s: %s", s.request.ID, s.site.Name, why),
		Hint: "see its coverage", Coverage: s.coverage()}
}

const (
	defaultPageRows = 65536
	maxPageRows     = 1 << 20
)

// Rows plans a page of one site's rows over the requests of a scope, in their order.
func (e *Engine) Rows(ctx context.Context, q RowsQuery) (*Rows, error) {
	if q.Limit < 0 || q.Limit > maxPageRows {
		return nil, badArgument("", "a page of %d rows: say 1 to %d", q.Limit, maxPageRows)
	}
	left := q.Limit
	if left == 0 {
		left = defaultPageRows
	}
	requests, err := e.requestsOf(ctx, q.Scope)
	if err != nil {
		return nil, err
	}
	from := 0
	if q.After != "" {
		id, position, err := parseCursor(q.After)
		if err != nil {
			return nil, err
		}
		at := indexOf(requests, id)
		if at < 0 {
			return nil, badArgument("start again without a cursor", "cursor %q: request %s is not in what was asked for", q.After, id)
		}
		requests, from = requests[at:], position
	}
	page := &Rows{}
	var pieces []piece
	var site tensor.Site
	var missing uint64
	rows := 0
	for _, r := range requests {
		if site, err = e.siteOf(r, q.Site); err != nil {
			return nil, err
		}
		if site.Keyed {
			return nil, badArgument("read it request by request", "site %s: its rows grow with the request and do not fit one table", site.Name)
		}
		s, err := e.choose(ctx, r, site, Range{from, End}, Range{}, FullOnly)
		if err != nil {
			return nil, err
		}
		if left == 0 { // only whether there is more
			if len(s.runs) == 0 && (q.Partial || len(s.missing) == 0) {
				missing += s.missing.count()
				from = 0
				continue
			}
			page.Next = cursor(r.ID, uint64(from))
			break
		}
		next, cut := s.cutTo(left)
		if !q.Partial {
			if err := s.sure(); err != nil {
				return nil, err
			}
		}
		missing += s.missing.count()
		for _, span := range s.present {
			page.Requests = append(page.Requests, RequestRows{r.ID, span.First, span.Count})
		}
		pieces = append(pieces, s.pieces(rows)...)
		rows += int(s.present.count())
		left -= int(s.present.count())
		if cut {
			page.Next = cursor(r.ID, next)
			break
		}
		from = 0
	}
	if len(pieces) == 0 {
		return nil, &Error{Code: Incomplete, Message: fmt.Sprintf("rows of site %s: none was captured in %d requests", q.Site.Name, len(requests)),
			Hint: "see the coverage"}
	}
	site.RowAxis = 0 // rows of many requests are concatenated, whatever the site's own shape
	t, err := e.plan(site, pieces, 0, nil, q.As)
	if err != nil {
		return nil, err
	}
	t.Missing, t.Complete = missing, missing == 0
	page.Tensor = *t
	return page, nil
}

// cutTo keeps the first n rows that are there, n > 0. Where that cuts any, it returns the position to go on from.
func (s *selection) cutTo(n int) (next uint64, cut bool) {
	for i, r := range s.runs {
		if int(r.Count) <= n {
			n -= int(r.Count)
			continue
		}
		next = uint64(r.First) + uint64(n)
		before := union(between(0, next))
		s.runs = keep(s.runs[:i+1], before)
		s.asked, s.present, s.missing = s.asked.and(before), s.present.and(before), s.missing.and(before)
		return next, true
	}
	return 0, false
}

func cursor(id string, position uint64) string { return id + "@" + strconv.FormatUint(position, 10) }

func parseCursor(cursor string) (id string, position int, err error) {
	at := strings.LastIndexByte(cursor, '@')
	if at > 0 {
		var v uint64
		if v, err = strconv.ParseUint(cursor[at+1:], 10, 32); err == nil {
			return cursor[:at], int(v), nil
		}
	}
	return "", 0, badArgument("give back the cursor of the page before, unchanged", "cursor %q: not one of ours", cursor)
}

func indexOf(requests []tensor.Request, id string) int {
	for i, r := range requests {
		if r.ID == id {
			return i
		}
	}
	return -1
}

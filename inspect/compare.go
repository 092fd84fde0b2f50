package inspect

import (
	"context"
	"errors"
	"math"
	"slices"

	"dmi/query"
)

// CompareQuery asks where two requests, or two runs' requests in pairs, part.
type CompareQuery struct {
	A, B      string // each the id of a request or of a run
	Site      string // glob, alias or name; "": every site that both have
	Layer     *int
	Tokens    query.Range
	Per       query.Per // PerSite: a line per pair and site; PerRow: one per position too
	Tolerance float64   // relative difference up to which rows are called the same
}

// CompareRow is how rows x of one request differ from rows y of the other.
type CompareRow struct {
	A          string `json:"a"`
	B          string `json:"b"`
	Site       string `json:"site"`
	Layer      *int   `json:"layer"`
	Position   *int   `json:"position"` // null per site
	Rows       uint64 `json:"rows"`     // that both have
	Differ     uint64 `json:"differ"`   // of them, those beyond the tolerance
	First      *int   `json:"first"`    // position of the first of those
	MaxAbs     Number `json:"max_abs"`  // greatest |x-y|
	Relative   Number `json:"relative"` // ||x-y|| / ||x||
	Cosine     Number `json:"cosine"`
	Mismatched uint64 `json:"mismatched"` // elements of which one is not finite and the other something else; figures leave them out
	Missing    uint64 `json:"missing"`    // rows that one of the two lacks: those that a lacks, and those that b lacks
	MissingA   uint64 `json:"missing_a"`
	MissingB   uint64 `json:"missing_b"`
}

// difference sums up pairs of elements.
type difference struct {
	squares, x2, y2, xy, most float64
	compared, mismatched      uint64
}

func (d *difference) add(x, y []float64) {
	if d.addFinite(x, y) {
		return
	}
	for i, a := range x {
		b := y[i]
		if a-a != 0 || b-b != 0 {
			if !(a == b || a != a && b != b) {
				d.mismatched++
			}
			continue
		}
		d.compared++
		d.squares += (a - b) * (a - b)
		d.x2 += a * a
		d.y2 += b * b
		d.xy += a * b
		d.most = max(d.most, math.Abs(a-b))
	}
}

// addFinite adds rows whose elements are all finite, which nearly all are, without a look at each; it is what comparing costs. False: one is not, and nothing was added.
func (d *difference) addFinite(x, y []float64) bool {
	y = y[:len(x)]
	var squares, x2, y2, xy [2]float64
	most := 0.0
	n := len(x) &^ 1
	for i := 0; i < n; i += 2 {
		for j := range 2 { // two chains of sums, which do not wait for each other
			a, b := x[i+j], y[i+j]
			c := a - b
			squares[j] += c * c
			x2[j] += a * a
			y2[j] += b * b
			xy[j] += a * b
			if c = math.Abs(c); c > most {
				most = c
			}
		}
	}
	for i := n; i < len(x); i++ {
		a, b := x[i], y[i]
		squares[0] += (a - b) * (a - b)
		x2[0] += a * a
		y2[0] += b * b
		xy[0] += a * b
		most = max(most, math.Abs(a-b))
	}
	if total := x2[0] + x2[1] + y2[0] + y2[1]; total-total != 0 { // a square is not finite where its element is not
		return false
	}
	d.merge(difference{squares: squares[0] + squares[1], x2: x2[0] + x2[1], y2: y2[0] + y2[1], xy: xy[0] + xy[1], most: most, compared: uint64(len(x))})
	return true
}

func (d *difference) merge(o difference) {
	d.squares += o.squares
	d.x2 += o.x2
	d.y2 += o.y2
	d.xy += o.xy
	d.most = max(d.most, o.most)
	d.compared += o.compared
	d.mismatched += o.mismatched
}

// relative is 0 of nothing but zeros.
func (d *difference) relative() float64 {
	if d.squares == 0 {
		return 0
	}
	return math.Sqrt(d.squares) / math.Sqrt(d.x2)
}

func (d *difference) line() CompareRow {
	row := CompareRow{MaxAbs: Number(d.most), Relative: Number(d.relative()), Cosine: Number(d.xy / (math.Sqrt(d.x2) * math.Sqrt(d.y2))), Mismatched: d.mismatched}
	if d.compared == 0 {
		row.MaxAbs, row.Relative, row.Cosine = Number(nan), Number(nan), Number(nan)
	}
	return row
}

// pairing is one pair of requests at one site.
type pairing struct {
	site, siteInB int // index into each survey; -1 where the other alone has the site
	a, b          int // requests
	linesPerRow   []CompareRow
	whole         CompareRow
	wholeOfPairs  difference
}

// Compare yields lines by pair of requests and site, as they come in the model.
func Compare(ctx context.Context, e *query.Engine, q CompareQuery, yield func(CompareRow) error) error {
	if q.Per != query.PerSite && q.Per != query.PerRow {
		return badArgument("say per=site or row", "compare per %s", q.Per)
	}
	if !(q.Tolerance >= 0) {
		return badArgument("say 0 or more", "compare with a tolerance of %v", q.Tolerance)
	}
	a, err := surveyOf(ctx, e, q.A, q)
	if err != nil {
		return err
	}
	b, err := surveyOf(ctx, e, q.B, q)
	if err != nil {
		return err
	}
	if len(a.Requests) != len(b.Requests) {
		return badArgument("compare request by request", "compare %s with %s: one has %d requests, the other %d", q.A, q.B, len(a.Requests), len(b.Requests))
	}
	var pairs []pairing
	common := len(a.Requests) == 0
	for r := range a.Requests {
		inA := map[string]bool{}
		for i, site := range a.Sites {
			inA[site.Name] = true
			at := slices.IndexFunc(b.Sites, func(other query.SurveyedSite) bool { return other.Name == site.Name })
			common = common || at >= 0
			pairs = append(pairs, pairing{site: i, siteInB: at, a: r, b: r})
		}
		for i, site := range b.Sites {
			if !inA[site.Name] {
				pairs = append(pairs, pairing{site: -1, siteInB: i, a: r, b: r})
			}
		}
	}
	if !common {
		return &query.Error{Code: query.NotFound, Message: "compare " + q.A + " with " + q.B + ": they have no site in common", Hint: "`dmi ls` lists the sites of each"}
	}
	progress := progressOf(ctx)
	progress.begin(reading)
	shares, err := progress.sharesOf(ctx, a, b)
	if err != nil {
		return err
	}
	return inOrder(ctx, len(pairs), func(ctx context.Context, i int) (*pairing, error) {
		p := pairs[i]
		var shareOfA, shareOfB float64
		if p.site >= 0 {
			shareOfA = shares[0][p.site]
		}
		if p.siteInB >= 0 {
			shareOfB = shares[1][p.siteInB]
		}
		return comparePair(ctx, a, b, p, q, shareOfA, shareOfB)
	}, func(_ int, p *pairing) error {
		if p == nil {
			return nil
		}
		for _, line := range p.linesPerRow {
			if err := yield(line); err != nil {
				return err
			}
		}
		if q.Per == query.PerRow {
			return nil
		}
		return yield(p.whole)
	})
}

// surveyOf looks an id up among requests, then among runs.
func surveyOf(ctx context.Context, e *query.Engine, id string, q CompareQuery) (*query.Survey, error) {
	if id == "" {
		return nil, badArgument("name a request or a run as a and as b", "compare %q with %q: one is not named", q.A, q.B)
	}
	_, err := e.Tokens(id)
	if err == nil {
		return e.Survey(ctx, query.Scope{Requests: []string{id}}, q.Site, q.Layer, q.Tokens)
	}
	if !errors.Is(err, query.ErrNotFound) {
		return nil, err
	}
	survey, failed := e.Survey(ctx, query.Scope{Run: id}, q.Site, q.Layer, q.Tokens)
	if errors.Is(failed, query.ErrNotFound) && survey == nil {
		if _, known := e.Survey(ctx, query.Scope{Run: id}, "", nil, q.Tokens); known != nil {
			return nil, err // neither: say what requests there are
		}
	}
	return survey, failed
}

func comparePair(ctx context.Context, a, b *query.Survey, p pairing, q CompareQuery, shareOfA, shareOfB float64) (*pairing, error) {
	var x, y *query.Selection
	var name query.SurveyedSite
	var err error
	if p.siteInB >= 0 {
		name = b.Sites[p.siteInB]
		if y, err = b.Select(ctx, p.siteInB, p.b); err != nil {
			return nil, err
		}
	}
	if p.site >= 0 {
		name = a.Sites[p.site]
		if x, err = a.Select(ctx, p.site, p.a); err != nil {
			return nil, err
		}
	}
	defer progressOf(ctx).follow(x, shareOfA)()
	defer progressOf(ctx).follow(y, shareOfB)()
	label := func(line CompareRow) CompareRow {
		line.A, line.B, line.Site, line.Layer = a.Requests[p.a].ID, b.Requests[p.b].ID, name.Name, layerOf(name)
		return line
	}
	if x == nil || y == nil { // one of the two has nothing of the site
		if x == nil && y == nil || q.Per == query.PerRow {
			return nil, nil
		}
		p.whole = label(p.wholeOfPairs.line())
		p.whole.MissingB, p.whole.MissingA = lacking(x, 0), lacking(y, 0)
		if p.whole.Missing = p.whole.MissingA + p.whole.MissingB; p.whole.Missing == 0 {
			return nil, nil
		}
		return &p, nil
	}
	var first *int
	rows, differ := uint64(0), uint64(0)
	var left, right []float64
	err = eachTogether(ctx, []*query.Selection{x, y}, blockBytes, func(from uint32, n int, tables []table) error {
		for i := range n {
			left, right = tables[0].row(i).Floats(left), tables[1].row(i).Floats(right)
			if len(left) != len(right) {
				return badArgument("leave the site out, or name sites of equal shape", "compare %s with %s at site %s: rows of %v and of %v",
					a.Requests[p.a].ID, b.Requests[p.b].ID, name.Name, tables[0].row(i).Shape, tables[1].row(i).Shape)
			}
			var d difference
			d.add(left, right)
			p.wholeOfPairs.merge(d)
			rows++
			position := int(from) + i
			parts := d.relative() > q.Tolerance || d.mismatched > 0
			if parts {
				differ++
				if first == nil {
					first = &position
				}
			}
			if q.Per == query.PerRow {
				line := label(d.line())
				line.Position, line.Rows = &position, 1
				if parts {
					line.Differ, line.First = 1, &position
				}
				p.linesPerRow = append(p.linesPerRow, line)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	p.whole = label(p.wholeOfPairs.line())
	p.whole.Rows, p.whole.Differ, p.whole.First = rows, differ, first
	p.whole.MissingB, p.whole.MissingA = lacking(x, rows), lacking(y, rows)
	p.whole.Missing = p.whole.MissingA + p.whole.MissingB
	return &p, nil
}

// lacking counts rows that a selection has and the other lacks.
func lacking(s *query.Selection, common uint64) (n uint64) {
	if s == nil {
		return 0
	}
	for _, span := range s.Present() {
		n += uint64(span.Count)
	}
	return n - common
}

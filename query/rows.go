package query

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"dmi/store"
	"dmi/tensor"
)

// run is positions of a request that lie together in a chunk.
type run struct {
	Span
	ref store.ChunkRef
}

// selection is what a question about one request and site comes to: the positions asked for, and where they are.
type selection struct {
	request tensor.Request
	site    tensor.Site
	asked   spans
	runs    []run // by position, disjoint: the latest attempt of each row that is there
	present spans
	missing spans  // asked for, owed, not there
	end     uint32 // positions of the request at this site
	books   []tensor.Entry
	watch   func(bytes int) // told of every read; may be nil
}

// choose selects the rows of a request at a site.
//
// It reads the books before it looks for chunks: a row's chunk is in the store before the books call it captured, so a row
// that was booked when we looked is there. Rows that are there and not yet booked count as well.
func (e *Engine) choose(ctx context.Context, r tensor.Request, site tensor.Site, tokens, steps Range, level Level) (*selection, error) {
	parts, err := partsOf(r)
	if err != nil {
		return nil, err
	}
	s := &selection{request: r, site: site}
	if s.books, err = e.entriesOf(parts); err != nil {
		return nil, fmt.Errorf("query: books of request %s: %w", r.ID, err)
	}
	fate := fateOf(s.books, site.ID)
	s.end = fate.end

	var runs []run
	for _, p := range parts {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		found, err := e.source.Chunks(p.key, site.ID, p.span.First, uint32(p.span.end()))
		if err != nil {
			return nil, fmt.Errorf("query: chunks of request %s at site %s: %w", r.ID, site.Name, err)
		}
		for _, ref := range found {
			if !level.accepts(ref.Level) {
				continue
			}
			span := spans{{ref.First, ref.Rows}}.and(spans{p.span})
			for _, kept := range span.without(fate.refused[ref.Attempt]) {
				runs = append(runs, run{kept, ref})
				s.end = max(s.end, uint32(kept.end()))
			}
		}
	}
	from, to := tokens.clip(int(s.end))
	if to > from {
		s.asked = spans{between(uint64(min(from, 1<<32-1)), uint64(min(to, 1<<32-1)))}
	}
	if !steps.everything() {
		computed, err := e.computedIn(ctx, r, parts, steps)
		if err != nil {
			return nil, err
		}
		s.asked = s.asked.and(computed)
	}
	s.runs = keep(latest(runs), s.asked)
	s.settle(fate.notOwed)
	return s, nil
}

func (s *selection) settle(notOwed spans) {
	present := make([]Span, len(s.runs))
	for i, r := range s.runs {
		present[i] = r.Span
	}
	s.present = union(present...)
	s.missing = s.asked.without(s.present).without(notOwed)
}

// accepts reports whether a read wants rows at a level.
func (l Level) accepts(of tensor.Level) bool {
	switch l {
	case FullOnly:
		return of == tensor.Full
	case AnyLevel:
		return of.Values()
	}
	return of == tensor.Full || of.Quantised() || of == tensor.Stats
}

// latest keeps, of each position, the run of the latest attempt.
func latest(runs []run) []run {
	slices.SortStableFunc(runs, func(a, b run) int {
		return cmp.Or(cmp.Compare(b.ref.Attempt, a.ref.Attempt), cmp.Compare(a.First, b.First))
	})
	var kept []run
	var covered spans // by later attempts
	for len(runs) > 0 {
		same := runs
		if n := slices.IndexFunc(runs, func(r run) bool { return r.ref.Attempt != runs[0].ref.Attempt }); n >= 0 {
			same = runs[:n]
		}
		runs = runs[len(same):]
		var own []Span
		var to uint64 // of the same attempt twice (a crash between two copies of it), the first does
		for _, r := range same {
			if r.end() <= to {
				continue
			}
			r.Span = between(max(to, uint64(r.First)), r.end())
			to = r.end()
			own = append(own, r.Span)
			for _, span := range (spans{r.Span}).without(overlapping(covered, r.Span)) {
				kept = append(kept, run{span, r.ref})
			}
		}
		covered = covered.with(union(own...))
	}
	slices.SortFunc(kept, func(a, b run) int { return cmp.Compare(a.First, b.First) })
	return kept
}

// keep cuts runs, in order, to a set of positions.
func keep(runs []run, set spans) []run {
	var kept []run
	for _, r := range runs {
		for _, span := range overlapping(set, r.Span).and(spans{r.Span}) {
			kept = append(kept, run{span, r.ref})
		}
	}
	return kept
}

// overlapping is the part of a set, whole spans, that touches a span; it costs a search, not a walk.
func overlapping(set spans, s Span) spans {
	from, _ := slices.BinarySearchFunc(set, s, func(a Span, b Span) int {
		if a.end() <= uint64(b.First) {
			return -1
		}
		return 1
	})
	to := from
	for to < len(set) && uint64(set[to].First) < s.end() {
		to++
	}
	return set[from:to]
}

// sure refuses a selection with rows missing.
func (s *selection) sure() error {
	if len(s.missing) == 0 {
		return nil
	}
	n := s.missing.count()
	return &Error{
		Code: Incomplete,
		Message: fmt.Sprintf("read request %s at site %s: %d of the %d rows asked for are not there (%s)", s.request.ID, s.site.Name, n,
			s.missing.count()+s.present.count(), s.why()),
		Hint:     "ask for a partial answer to get the rows that are, " + s.lower() + "or for the coverage",
		Coverage: s.coverage(),
	}
}

// lower says how to get what is there of missing rows that were captured at a lower level.
func (s *selection) lower() (hint string) {
	var quantised, figures bool
	for _, e := range s.books {
		if e.Outcome == tensor.Captured && e.Expired == 0 && slices.Contains(e.Sites, s.site.ID) && s.missing.and(positionsOf(e)).count() > 0 {
			quantised, figures = quantised || e.Level.Quantised(), figures || e.Level == tensor.Stats
		}
	}
	if quantised {
		hint = "for level any to get quantised ones as well, "
	}
	if figures {
		hint += "for statistics to get the figures of those that have no more, "
	}
	return hint
}

// why sums up what the books say of the missing rows.
func (s *selection) why() string {
	rest := s.missing
	var reasons []string
	counts := map[string]uint64{}
	for _, e := range s.books {
		if !slices.Contains(e.Sites, s.site.ID) {
			continue
		}
		if n := s.missing.and(positionsOf(e)).count(); n > 0 {
			fate := e.Outcome.String() + "(" + inner(e) + ")"
			if e.Expired != 0 {
				fate = "expired"
			}
			if counts[fate] == 0 {
				reasons = append(reasons, fate)
			}
			counts[fate] += n
			rest = rest.without(positionsOf(e))
		}
	}
	for i, fate := range reasons {
		reasons[i] = fmt.Sprintf("%s %d", fate, counts[fate])
	}
	if n := rest.count(); n > 0 {
		reasons = append(reasons, fmt.Sprintf("not on the books %d: the request has %d positions", n, s.end))
	}
	return strings.Join(reasons, ", ")
}

// pieces lays the runs one after the other, from a row of the answer on.
func (s *selection) pieces(at int) []piece {
	pieces := make([]piece, len(s.runs))
	for i, r := range s.runs {
		pieces[i] = piece{r.ref, r.First - r.ref.First, r.Count, at}
		at += int(r.Count)
	}
	return pieces
}

// uniform refuses rows that cannot stand in one tensor.
func uniform(site tensor.Site, pieces []piece) error {
	rowShape := func(ref store.ChunkRef) []int {
		if site.Keyed && len(ref.Shape) > 0 {
			return ref.Shape[:len(ref.Shape)-1]
		}
		return ref.Shape
	}
	for _, p := range pieces[1:] {
		a, b := pieces[0].ref, p.ref
		if a.DType != b.DType || len(a.Shape) != len(b.Shape) || !slices.Equal(rowShape(a), rowShape(b)) {
			return badArgument("ask for a range of positions on one side of the change", "site %s: rows change from %s %v to %s %v at position %d",
				site.Name, a.DType, a.Shape, b.DType, b.Shape, b.First+p.from)
		}
	}
	return nil
}

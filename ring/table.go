package ring

import (
	"cmp"
	"fmt"
	"slices"

	"dmi/tensor"
)

// Rows is a checked row table: which request and position each row of a step is.
type Rows struct {
	Table
	Spaces [Spaces]RowList
	Cached []RowSpan // tokens that no tensor of the step has: the model took their keys and values from its prefix cache
	Chosen bool      // some request asks for some of its rows alone
	// Drafts: some rows of the step are guesses. Rejected are those of the lane's step before that were wrong.
	Drafts   bool
	Rejected []RowSpan
	all      []RowSpan // backing store of the lists

	selections map[selectionKey]*RowList
}

// RowList is the rows of one space, in the order that GATHERED payload has.
type RowList struct {
	Spans []RowSpan
	Count uint32
	ends  *[Levels]uint32 // of a selection: where the rows of each level end
}

// RowSpan is a span with its place in the row list.
type RowSpan struct {
	Span
	Row uint32 // of its first row, in the row list
}

// ParseRows checks a row table against its OPEN record. The table's bytes are not kept.
func ParseRows(b []byte, o *OpenRecord) (*Rows, error) {
	if len(b) < TableSize {
		return nil, fmt.Errorf("ring: step %d: its row table has %d bytes, fewer than %d", o.Step, len(b), TableSize)
	}
	rows := &Rows{}
	t := &rows.Table
	t.Decode(b)
	bad := func(field string, value any, want string) error {
		return fmt.Errorf("ring: step %d: table.%s is %v: %s", o.Step, field, value, want)
	}
	switch {
	case t.Magic != TableMagic:
		return nil, bad("magic", fmt.Sprintf("%#x", t.Magic), fmt.Sprintf("%#x is needed", TableMagic))
	case uint64(t.Bytes) != uint64(len(b)):
		return nil, bad("bytes", t.Bytes, fmt.Sprintf("open.table_bytes is %d", len(b)))
	case t.Step != o.Step:
		return nil, bad("step", t.Step, "of another step")
	case uint64(t.Spans)*SpanSize > uint64(len(b)-TableSize) || (uint64(len(b)-TableSize)-uint64(t.Spans)*SpanSize)%RunSize != 0:
		return nil, bad("spans", t.Spans, fmt.Sprintf("the table has %d bytes", len(b)))
	case t.Flags&^TablePacked != 0:
		return nil, bad("flags", t.Flags, "unknown flags")
	}
	end := TableSize + int(t.Spans)*SpanSize
	if err := rows.parseSpans(b[TableSize:end], o); err != nil {
		return nil, err
	}
	if err := rows.parseRuns(b[end:]); err != nil {
		return nil, err
	}
	return rows, nil
}

func (r *Rows) parseSpans(b []byte, o *OpenRecord) error {
	n := int(r.Table.Spans)
	var sums [Spaces]uint64
	var number [Spaces]int
	spans := make([]Span, n)
	for i := range spans {
		s := &spans[i]
		s.Decode(b[i*SpanSize:])
		bad := func(field string, value any, want string) error {
			return fmt.Errorf("ring: step %d: span %d: span.%s is %v: %s", o.Step, i, field, value, want)
		}
		switch {
		case s.Space >= Spaces:
			return bad("space", s.Space, "no such row space")
		case s.Request == tensor.NoRequest:
			return bad("request", s.Request, "no request has this number")
		case r.Flags&TablePacked != 0 && s.Batch != 0:
			return bad("batch", s.Batch, "a packed step has no batch")
		case uint64(s.First)+uint64(s.Count) > 1<<32-1:
			return bad("count", s.Count, fmt.Sprintf("from %d on there are not so many", s.First))
		case uint64(s.Position)+uint64(s.Count) > 1<<32-1:
			return bad("position", s.Position, "too far along")
		case s.Phase > PhaseDecode:
			return bad("phase", s.Phase, "no such phase")
		case s.Flags&^(SpanCached|SpanDraft|SpanChosen|SpanRejected) != 0:
			return bad("flags", s.Flags, "unknown flags")
		case s.Flags&SpanNoRows == SpanNoRows:
			return bad("flags", s.Flags, "both cached and rejected")
		case s.Flags&SpanNoRows != 0 && s.Space != SpaceTokens:
			return bad("flags", s.Flags, "only tokens are cached or rejected")
		}
		if s.Flags&SpanNoRows != 0 {
			if s.Count > 0 && s.Flags&SpanCached != 0 {
				r.Cached = append(r.Cached, RowSpan{Span: *s})
			} else if s.Count > 0 {
				r.Rejected = append(r.Rejected, RowSpan{Span: *s})
			}
			s.Count = 0 // in no row list
			continue
		}
		r.Chosen = r.Chosen || s.Flags&SpanChosen != 0
		r.Drafts = r.Drafts || s.Flags&SpanDraft != 0
		sums[s.Space] += uint64(s.Count)
		number[s.Space]++
	}
	r.all = make([]RowSpan, 0, n)
	for space := range Spaces {
		if sums[space] != uint64(o.Rows[space]) {
			return fmt.Errorf("ring: step %d: open.rows[%d] is %d, and its spans have %d", o.Step, space, o.Rows[space], sums[space])
		}
		from := len(r.all)
		row := uint32(0)
		for i := range spans {
			if int(spans[i].Space) == space && spans[i].Count > 0 {
				r.all = append(r.all, RowSpan{Span: spans[i], Row: row})
				row += spans[i].Count
			}
		}
		r.Spaces[space] = RowList{Spans: r.all[from:len(r.all):len(r.all)], Count: row}
	}
	return r.checkRows(o)
}

// byPosition orders spans by what rows are: request, attempt, position.
func byPosition(a, b RowSpan) int {
	if c := cmp.Compare(a.Request, b.Request); c != 0 {
		return c
	}
	if c := cmp.Compare(a.Attempt, b.Attempt); c != 0 {
		return c
	}
	return cmp.Compare(a.Position, b.Position)
}

func sorted(spans []RowSpan) []RowSpan {
	if slices.IsSortedFunc(spans, byPosition) {
		return spans
	}
	spans = slices.Clone(spans)
	slices.SortFunc(spans, byPosition)
	return spans
}

// checkRows holds that no row is there twice, and that the rows of every space are tokens of the step.
func (r *Rows) checkRows(o *OpenRecord) error {
	tokens := sorted(r.Spaces[SpaceTokens].Spans)
	for space := range Spaces {
		spans := tokens
		switch {
		case space != SpaceTokens:
			spans = sorted(r.Spaces[space].Spans)
		case len(r.Cached) > 0:
			spans = sorted(slices.Concat(tokens, r.Cached))
		}
		for i := 1; i < len(spans); i++ {
			a, b := &spans[i-1], &spans[i]
			if a.Request == b.Request && a.Attempt == b.Attempt && a.Position+a.Count > b.Position {
				return fmt.Errorf("ring: step %d: spans of space %d give position %d of request %d twice", o.Step, space, b.Position, b.Request)
			}
		}
		if space == SpaceTokens {
			continue
		}
		var covered uint64
		intersect(tokens, spans, func(_ *RowSpan, _, count uint32) { covered += uint64(count) })
		if covered != uint64(r.Spaces[space].Count) {
			return fmt.Errorf("ring: step %d: %d of the %d rows of space %d are not tokens of the step", o.Step,
				uint64(r.Spaces[space].Count)-covered, r.Spaces[space].Count, space)
		}
	}
	return nil
}

// intersect calls each with the runs of tokens that are in spans: the token span, the first row's place in it, and their number. Both sorted.
func intersect(tokens, spans []RowSpan, each func(token *RowSpan, first, count uint32)) {
	i, j := 0, 0
	for i < len(tokens) && j < len(spans) {
		a, b := &tokens[i], &spans[j]
		switch {
		case a.Request != b.Request || a.Attempt != b.Attempt:
			if byPosition(*a, *b) < 0 {
				i++
			} else {
				j++
			}
			continue
		}
		from, to := max(a.Position, b.Position), min(a.Position+a.Count, b.Position+b.Count)
		if from < to {
			each(a, from-a.Position, to-from)
		}
		if a.Position+a.Count <= b.Position+b.Count {
			i++
		} else {
			j++
		}
	}
}

// Outside gives the tokens of the step that are no rows of a space: those whose logits were not computed.
func (r *Rows) Outside(space tensor.Space) []RowSpan {
	if space == tensor.Tokens || r.Spaces[space].Count == r.Spaces[SpaceTokens].Count {
		return nil
	}
	var out []RowSpan
	rest := func(t *RowSpan, from, to uint32) {
		if from < to {
			s := *t
			s.Position, s.Count, s.Row = t.Position+from, to-from, t.Row+from
			out = append(out, s)
		}
	}
	var last *RowSpan
	done := uint32(0)
	tokens := sorted(r.Spaces[SpaceTokens].Spans)
	next := 0
	flush := func(upTo *RowSpan) {
		for next < len(tokens) && &tokens[next] != upTo {
			if t := &tokens[next]; t == last {
				rest(t, done, t.Count)
			} else {
				rest(t, 0, t.Count)
			}
			next++
		}
	}
	intersect(tokens, sorted(r.Spaces[space].Spans), func(t *RowSpan, first, count uint32) {
		flush(t)
		if t != last {
			last, done = t, 0
		}
		rest(t, done, first)
		done = first + count
	})
	flush(nil)
	return out
}

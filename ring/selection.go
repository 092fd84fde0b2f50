package ring

import (
	"fmt"
	"slices"
)

// selectionKey names the rows of a space as sites of one selection have them.
type selectionKey struct {
	selection uint16
	space     uint8
}

// maxSelectedSpans bounds what the runs of one table may come to, which a lie could choose: an honest step has a few for each row.
const maxSelectedSpans = 1 << 22

// List is the rows of a space in the order that records of a selection count in; nil where the table has none such.
func (r *Rows) List(selection uint16, space uint8) *RowList {
	if selection == 0 {
		return &r.Spaces[space]
	}
	if r.Spaces[space].Count == 0 {
		return &r.Spaces[space]
	}
	return r.selections[selectionKey{selection, space}]
}

// Has reports whether rows [from, from+count) may be at a level. A level that elements have no form for comes full.
func (l *RowList) Has(from, count uint32, level uint8) bool {
	if l.ends == nil || count == 0 {
		return true
	}
	for at, end := range l.ends {
		if from < end {
			return from+count <= end && (uint8(at) == level || level == LevelFull && (at == LevelFP8 || at == LevelInt8 || at == LevelStats))
		}
	}
	return false
}

// parseRuns checks what a table says of levels: each selection has every row of its spaces once.
func (r *Rows) parseRuns(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	r.selections = map[selectionKey]*RowList{}
	last := map[selectionKey]uint8{}
	made := 0
	for i := 0; i < len(b); i += RunSize {
		var run Run
		run.Decode(b[i:])
		bad := func(field string, value any, want string) error {
			return fmt.Errorf("ring: step %d: run %d: run.%s is %v: %s", r.Step, i/RunSize, field, value, want)
		}
		switch {
		case run.Space >= Spaces:
			return bad("space", run.Space, "no such row space")
		case run.Selection == 0:
			return bad("selection", run.Selection, "they are numbered from 1")
		case run.Level >= Levels:
			return bad("level", run.Level, "no such level")
		case run.Stride == 0:
			return bad("stride", run.Stride, "at least 1 is needed")
		}
		whole := &r.Spaces[run.Space]
		if run.Count == 0 || uint64(run.First)+uint64(run.Count-1)*uint64(run.Stride) >= uint64(whole.Count) {
			return bad("count", run.Count, fmt.Sprintf("by %d from %d on there are not so many in the %d of its space", run.Stride, run.First, whole.Count))
		}
		key := selectionKey{run.Selection, run.Space}
		list := r.selections[key]
		if list == nil {
			list = &RowList{ends: &[Levels]uint32{}}
			r.selections[key] = list
		}
		if run.Level < last[key] {
			return bad("level", run.Level, fmt.Sprintf("rows at level %d are before it", last[key]))
		}
		if uint64(list.Count)+uint64(run.Count) > uint64(whole.Count) {
			return bad("count", run.Count, "a row is there twice")
		}
		last[key] = run.Level
		before := len(list.Spans)
		if list.take(whole, &run, maxSelectedSpans-made); made+len(list.Spans)-before >= maxSelectedSpans {
			return fmt.Errorf("ring: step %d: its runs come to more than %d spans", r.Step, maxSelectedSpans)
		}
		made += len(list.Spans) - before
		for level := int(run.Level); level < Levels; level++ {
			list.ends[level] = list.Count
		}
	}
	for key, list := range r.selections {
		if err := list.check(&r.Spaces[key.space]); err != nil {
			return fmt.Errorf("ring: step %d: selection %d, space %d: %w", r.Step, key.selection, key.space, err)
		}
	}
	return nil
}

// take adds a run's rows, most spans of them at most.
func (l *RowList) take(whole *RowList, run *Run, most int) {
	at, _ := slices.BinarySearchFunc(whole.Spans, run.First, func(s RowSpan, row uint32) int {
		if s.Row+s.Count <= row {
			return -1
		}
		return 1
	})
	for row, left := run.First, run.Count; left > 0 && most > 0; most-- {
		for whole.Spans[at].Row+whole.Spans[at].Count <= row {
			at++
		}
		s := whole.Spans[at]
		into := row - s.Row
		n := uint32(1)
		if run.Stride == 1 {
			n = min(left, s.Count-into)
		}
		s.First, s.Position, s.Count, s.Row = s.First+into, s.Position+into, n, l.Count
		l.Spans = append(l.Spans, s)
		l.Count += n
		left -= n
		row += n
		if run.Stride != 1 {
			row += run.Stride - 1
		}
	}
}

// check holds that every row of the space is there, once.
func (l *RowList) check(whole *RowList) error {
	if l.Count != whole.Count {
		return fmt.Errorf("%d of the %d rows have a level", l.Count, whole.Count)
	}
	spans := slices.Clone(l.Spans)
	slices.SortFunc(spans, byPosition)
	for i := 1; i < len(spans); i++ {
		a, b := &spans[i-1], &spans[i]
		if a.Request == b.Request && a.Attempt == b.Attempt && a.Position+a.Count > b.Position {
			return fmt.Errorf("position %d of request %d is there twice", b.Position, b.Request)
		}
	}
	return nil
}

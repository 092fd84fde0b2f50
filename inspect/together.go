package inspect

import (
	"context"
	"errors"
	"math"
	"slices"

	"golang.org/x/sync/errgroup"

	"dmi/query"
)

// together lists the positions, as half-open pairs in order, at which all selections have rows.
func together(selections []*query.Selection) [][2]uint32 {
	var common [][2]uint32
	for i, s := range selections {
		var own [][2]uint32
		for _, span := range s.Present() {
			own = append(own, [2]uint32{span.First, span.First + span.Count})
		}
		if i == 0 {
			common = own
			continue
		}
		var both [][2]uint32
		for a, b := common, own; len(a) > 0 && len(b) > 0; {
			if from, to := max(a[0][0], b[0][0]), min(a[0][1], b[0][1]); from < to {
				both = append(both, [2]uint32{from, to})
			}
			if a[0][1] <= b[0][1] {
				a = a[1:]
			} else {
				b = b[1:]
			}
		}
		common = both
	}
	return common
}

// table is rows of one selection at consecutive positions, as they are stored.
type table struct {
	data []byte
	rows []query.Stored // in order; Data is to be found in data
	ends []int          // in data, of each row
}

func (t *table) row(i int) query.Stored {
	row, from := t.rows[i], 0
	if i > 0 {
		from = t.ends[i-1]
	}
	row.Data = t.data[from:t.ends[i]]
	return row
}

// read fills the table with the rows at positions [from, to), all of which the selection has.
func (t *table) read(ctx context.Context, s *query.Selection, from, to uint32) error {
	t.data, t.rows, t.ends = t.data[:0], t.rows[:0], t.ends[:0]
	return s.EachStoredIn(ctx, blockBytes, from, to, func(row query.Stored) error {
		if len(t.rows) == 0 {
			t.data = slices.Grow(t.data, int(to-from)*len(row.Data))
		}
		t.data = append(t.data, row.Data...)
		row.Data = nil
		t.rows, t.ends = append(t.rows, row), append(t.ends, len(t.data))
		return nil
	})
}

// eachTogether reads the rows that all selections have, a few positions at a time: tables[i] holds those of selections[i] from position first
// on. The next are read while yield looks at these. One row of each takes the memory that it takes, twice; of more, all tables together stay within bytes.
func eachTogether(ctx context.Context, selections []*query.Selection, bytes int, yield func(first uint32, rows int, tables []table) error) error {
	var parts [][2]uint32
	for _, span := range together(selections) {
		width := 0
		for _, s := range selections {
			dtype, shape, _ := s.Form()
			row := product(shape)
			if s.Site().Keyed && len(shape) > 0 {
				row = product(shape[:len(shape)-1]) * int(span[1])
			}
			width += dtype.Size() * row
		}
		rows := uint32(min(math.MaxUint32, max(1, bytes/2/max(1, width))))
		ends := selections[0].Ends()
		for from := span[0]; from < span[1]; {
			to := from + min(rows, span[1]-from)
			if i, _ := slices.BinarySearch(ends, to+1); i > 0 && ends[i-1] > from {
				to = ends[i-1]
			}
			parts = append(parts, [2]uint32{from, to})
			from = to
		}
	}
	if len(parts) == 0 {
		return nil
	}
	tables, coming := make([]table, len(selections)), make([]table, len(selections))
	read := func(into []table, part [2]uint32) error {
		return inOrder(ctx, len(selections), func(ctx context.Context, i int) (struct{}, error) {
			return struct{}{}, into[i].read(ctx, selections[i], part[0], part[1])
		}, func(int, struct{}) error { return nil })
	}
	if err := read(tables, parts[0]); err != nil {
		return err
	}
	for i, part := range parts {
		var ahead errgroup.Group
		if i+1 < len(parts) {
			ahead.Go(func() error { return read(coming, parts[i+1]) })
		}
		err := yield(part[0], int(part[1]-part[0]), tables)
		if err := errors.Join(err, ahead.Wait()); err != nil {
			return err
		}
		tables, coming = coming, tables
	}
	return nil
}

package query

import (
	"slices"

	"dmi/store"
	"dmi/tensor"
)

// layout says how the rows of an answer become the reader's shape.
//
// A stored row is a sequence of lines, each contiguous: the finest pieces that choosing heads, moving the row axis or cutting the key axis
// leaves whole. The answer, in C order, is [outer, rows, inner, length]: what stands before the row axis, the rows, the lines
// after it, and a line's elements.
type layout struct {
	dtype  tensor.DType // as stored
	as     tensor.DType // as answered
	decode bool         // stored rows are decoded first, because some are quantised: dtype is F32
	keyed  bool
	fill   tensor.Fill
	shape  []int // reader's
	axes   []string
	outer  int
	inner  int
	lines  []int // lines[o*inner+m]: which of the row's lines
	length int   // elements
	dense  bool  // a stored row is, byte for byte, a row of the answer (keyed rows only where their key axis is as long)
}

// newLayout plans for rows like ref's, quantised if some of them are. keys is the length of the key axis of the answer.
func newLayout(site tensor.Site, ref store.ChunkRef, quantised bool, rows, keys int, heads []int, as tensor.DType) (*layout, error) {
	if quantised {
		ref.DType = tensor.F32
	}
	if as == tensor.DTypeNone {
		as = ref.DType
	}
	if as != ref.DType && (as != tensor.F32 || !ref.DType.Real()) {
		return nil, badArgument("ask for F32, or for the bytes as captured", "site %s: no conversion from %s to %s", site.Name, ref.DType, as)
	}
	row := slices.Clone(ref.Shape)
	l := &layout{dtype: ref.DType, as: as, decode: quantised, keyed: site.Keyed, fill: site.Fill}
	if site.RowAxis < 0 || site.RowAxis > len(row) || site.Keyed && (len(row) == 0 || site.RowAxis >= len(row)) {
		return nil, badArgument("verify the store", "site %s: rows of shape %v cannot have their row axis at %d", site.Name, row, site.RowAxis)
	}
	perHead := 1 // lines
	if len(heads) > 0 {
		if len(row) < 2 {
			return nil, badArgument("leave heads out", "site %s: rows of shape %v have no head axis", site.Name, row)
		}
		if last := slices.Max(heads); last >= row[0] || slices.Min(heads) < 0 {
			return nil, badArgument("", "site %s has %d heads; head %d is not one of them", site.Name, row[0], last)
		}
	}
	// Lines: the last axis of keyed rows; else everything from the row axis on, short of the head axis where heads are chosen.
	split := site.RowAxis
	if len(heads) > 0 {
		split = max(split, 1)
	}
	if site.Keyed {
		split = len(row) - 1
	}
	l.length = product(row[split:])
	if site.Keyed {
		l.length = keys
		row[len(row)-1] = keys
	}
	if split > 0 {
		perHead = product(row[1:split])
	}
	if len(heads) > 0 {
		for _, h := range heads {
			for i := range perHead {
				l.lines = append(l.lines, h*perHead+i)
			}
		}
		row[0] = len(heads)
	} else {
		for i := range product(row[:split]) {
			l.lines = append(l.lines, i)
		}
	}
	l.outer = product(row[:site.RowAxis])
	l.inner = 1
	if l.outer > 0 {
		l.inner = len(l.lines) / l.outer
	}
	l.dense = l.outer == 1 && len(heads) == 0
	l.shape = slices.Insert(row, site.RowAxis, rows)
	l.axes = axes(site, len(ref.Shape))
	return l, nil
}

// axes names the dimensions of what a reader is given of rows with so many dimensions.
func axes(site tensor.Site, rowDims int) []string {
	names := make([]string, rowDims)
	for i := range names {
		names[i] = "dim"
	}
	if rowDims >= 2 {
		names[0] = "head"
	}
	row := "token"
	if site.Keyed && rowDims > 0 {
		names[rowDims-1] = "key"
		row = "query"
	}
	return slices.Insert(names, min(site.RowAxis, rowDims), row)
}

func product(dims []int) int {
	n := 1
	for _, d := range dims {
		n *= d
	}
	return n
}

// rowBytes is the size of one stored row of ref.
func rowBytes(ref store.ChunkRef) int { return ref.RowBytes() }

// cell is the bytes, as stored, of one row at one outer index of the answer.
func (l *layout) cell() int { return l.inner * l.length * l.dtype.Size() }

func (l *layout) size(rows int) int64 {
	return int64(l.outer) * int64(rows) * int64(l.inner) * int64(l.length) * int64(l.as.Size())
}

// place copies one stored row, whose lines have sourceLength elements, into the cells [outerFrom, outerTo) of its row; cells of one row are
// stride bytes apart in dst. Keys beyond the stored ones are filled, those beyond the answer's are cut.
func (l *layout) place(dst []byte, stride int, row []byte, sourceLength, outerFrom, outerTo int) {
	size := l.dtype.Size()
	source, length := sourceLength*size, l.length*size
	both := min(source, length)
	for o := outerFrom; o < outerTo; o++ {
		cell := dst[(o-outerFrom)*stride:]
		for m := range l.inner {
			line := l.lines[o*l.inner+m]
			to := cell[m*length : (m+1)*length]
			copy(to, row[line*source:line*source+both])
			if both < length {
				l.fill.Over(to[both:], l.dtype)
			}
		}
	}
}

package pipeline

import (
	"fmt"
	"math"
	"slices"

	"dmi/ring"
	"dmi/tensor"
)

// layout is where the rows of a captured tensor lie in its payload. It has been checked: any row of it is inside.
type layout struct {
	dtype       tensor.DType
	element     uint64 // bytes, as it lies in the payload
	gathered    bool
	flat        bool   // one ROW dimension: the index is batch * width + first
	batchStride uint64 // bytes, between indices of the first of two ROW dimensions
	rowStride   uint64
	batches     uint64 // sizes of the ROW dimensions
	length      uint64
	shape       []int // of a row, KEY last
	inner       []extent
	keyed       bool
	keys        uint64 // of the KEY dimension
	keyBase     uint64
	rowBytes    uint64
	dense       bool   // a row is one piece, and rows follow each other
	scale       uint64 // bytes before a row's elements, where those are quantised
}

// extent is a dimension of a row, in bytes.
type extent struct{ size, stride uint64 }

// layoutOf checks a record against its site and its payload's length.
func layoutOf(r *ring.Record, site *ring.Site, payload int) (layout, error) {
	level := tensor.Level(r.Level)
	if level != tensor.Stats && !level.Quantised() {
		return elementsOf(r, site, payload, uint64(tensor.DType(r.DType).Size()))
	}
	bad := func(field string, value any, want string) (layout, error) {
		return layout{}, fmt.Errorf("pipeline: step %d, site %q: record.%s is %v: %s", r.Step, site.Text(), field, value, want)
	}
	if r.Flags&ring.RecordGathered == 0 {
		return bad("flags", r.Flags, fmt.Sprintf("rows at level %v are gathered", level))
	}
	l := layout{dtype: tensor.F32, element: 4, gathered: true, flat: true, dense: true, batches: 1, length: uint64(r.Rows), shape: tensor.StatsShape(topOf(r))}
	if level.Quantised() {
		var err error
		if l, err = elementsOf(r, site, payload, 1); err != nil {
			return l, err
		}
		l.scale, l.dense = scaleBytes, true
	}
	l.rowBytes = uint64(tensor.RowBytes(level, l.dtype, l.shape))
	l.rowStride = l.rowBytes
	if r.PartOffset != 0 || r.TensorBytes != uint64(payload) || uint64(r.Rows)*l.rowBytes != uint64(payload) {
		return bad("tensor_bytes", r.TensorBytes, fmt.Sprintf("%d bytes came, and %d rows at level %v have %d each", payload, r.Rows, level, l.rowBytes))
	}
	return l, nil
}

// topOf is how many of the greatest elements rows at level Stats have, by their bytes. That the bytes are those of so many is for layoutOf to check.
func topOf(r *ring.Record) int {
	if r.Rows == 0 || r.TensorBytes/uint64(r.Rows) < 4*tensor.Figures {
		return 0
	}
	return int(min((r.TensorBytes/uint64(r.Rows)-4*tensor.Figures)/8, ring.MostTop))
}

const scaleBytes = 4

// elementsOf finds elements of so many bytes.
func elementsOf(r *ring.Record, site *ring.Site, payload int, element uint64) (layout, error) {
	var l layout
	bad := func(field string, value any, want string) (layout, error) {
		return layout{}, fmt.Errorf("pipeline: step %d, site %q: record.%s is %v: %s", r.Step, site.Text(), field, value, want)
	}
	l.dtype = tensor.DType(r.DType)
	l.element = element
	switch {
	case !l.dtype.Valid():
		return bad("dtype", r.DType, "no such dtype")
	case r.NDim < 1 || r.NDim > ring.MaxDims:
		return bad("ndim", r.NDim, fmt.Sprintf("1 to %d are possible", ring.MaxDims))
	case r.PartOffset != 0 || r.TensorBytes != uint64(payload):
		return bad("tensor_bytes", r.TensorBytes, fmt.Sprintf("%d bytes came", payload))
	}
	l.gathered = r.Flags&ring.RecordGathered != 0
	var rows [2]int
	n := 0
	key := -1
	empty := slices.Contains(r.Size[:r.NDim], 0)
	end := uint64(0) // elements from the first to the last
	for d := range int(r.NDim) {
		size, stride := uint64(r.Size[d]), uint64(r.Stride[d])
		if size > 1 && !empty {
			// Of sizes and strides below 2^32, six products cannot overflow once none leaves the payload.
			if stride > uint64(payload)/element {
				return bad(fmt.Sprintf("stride[%d]", d), stride, fmt.Sprintf("the payload has %d bytes", payload))
			}
			if end += (size - 1) * stride; end > uint64(payload) {
				return bad(fmt.Sprintf("size[%d]", d), size, fmt.Sprintf("the payload has %d bytes", payload))
			}
		}
		switch r.Role[d] {
		case ring.RoleRow:
			if n == 2 {
				return bad("role", r.Role[:r.NDim], "at most two ROW dimensions are possible")
			}
			rows[n] = d
			n++
		case ring.RoleKey:
			if key >= 0 {
				return bad("role", r.Role[:r.NDim], "at most one KEY dimension is possible")
			}
			key = d
		case ring.RoleInner:
			l.shape = append(l.shape, int(size))
			l.inner = append(l.inner, extent{size, stride * element})
		default:
			return bad("role", r.Role[:r.NDim], "ROW, INNER or KEY is needed")
		}
	}
	switch {
	case n == 0 || l.gathered && (n != 1 || rows[0] != 0):
		return bad("role", r.Role[:r.NDim], "rows cannot be found by them")
	case (key >= 0) != site.Keyed():
		return bad("role", r.Role[:r.NDim], "the site has others")
	case !empty && (end+1)*element > uint64(payload):
		return bad("size", fmt.Sprint(r.Size[:r.NDim], " by ", r.Stride[:r.NDim]), fmt.Sprintf("the payload has %d bytes", payload))
	}
	if key >= 0 {
		l.keyed, l.keys, l.keyBase = true, uint64(r.Size[key]), uint64(r.KeyBase)
		l.shape = append(l.shape, int(l.keys))
		l.inner = append(l.inner, extent{l.keys, uint64(r.Stride[key]) * element})
	}
	last := rows[n-1]
	l.flat = n == 1
	l.batches, l.length = 1, uint64(r.Size[last])
	l.rowStride = uint64(r.Stride[last]) * element
	if n == 2 {
		l.batches, l.batchStride = uint64(r.Size[rows[0]]), uint64(r.Stride[rows[0]])*element
	}
	if l.gathered && l.length != uint64(r.Rows) {
		return bad("size[0]", l.length, fmt.Sprintf("the record settles %d rows", r.Rows))
	}
	l.rowBytes = element
	for _, e := range l.inner {
		l.rowBytes *= e.size
		if l.rowBytes > uint64(payload) && !empty || l.rowBytes > math.MaxInt32*64 { // strides may be 0, but no honest ones are
			return bad("size", r.Size[:r.NDim], fmt.Sprintf("the payload has %d bytes", payload))
		}
	}
	if l.keyed && l.rowBytes == 0 && l.length > 0 {
		return bad("size", r.Size[:r.NDim], "a row without heads or keys")
	}
	l.inner, l.dense = collapse(l.inner, element)
	l.dense = l.dense && (l.length <= 1 || l.rowStride == l.rowBytes)
	return l, nil
}

// collapse makes neighbouring dimensions that lie behind each other one, the innermost element included, and reports whether one piece is left.
// A keyed row keeps its last dimension apart, because not all of it is wanted; nobody asks whether that is one piece.
func collapse(dims []extent, element uint64) ([]extent, bool) {
	var out []extent
	for _, d := range dims {
		if d.size == 1 {
			continue
		}
		if n := len(out); n > 0 && out[n-1].stride == d.stride*d.size {
			out[n-1] = extent{out[n-1].size * d.size, d.stride}
			continue
		}
		out = append(out, d)
	}
	return out, len(out) == 0 || len(out) == 1 && out[0].stride == element
}

// at is the offset of a row, given its span and its place there, or false where the payload has no such row.
func (l *layout) at(s *ring.RowSpan, i uint32, row uint32, width uint32, first uint32) (uint64, bool) {
	index := uint64(s.First) + uint64(i)
	switch {
	case l.gathered:
		index = uint64(row - first)
	case l.flat:
		index += uint64(s.Batch) * uint64(width)
	case uint64(s.Batch) >= l.batches:
		return 0, false
	}
	if index >= l.length {
		return 0, false
	}
	if l.flat || l.gathered {
		return index * l.rowStride, true
	}
	return uint64(s.Batch)*l.batchStride + index*l.rowStride, true
}

package pipeline

import (
	"fmt"
	"slices"

	"dmi/drain"
	"dmi/ring"
	"dmi/tensor"
)

const (
	keyedChunk = 2 << 20   // bytes of attention rows that go in one chunk: longer ones make all the rows before them longer
	keyedRow   = 256 << 20 // bytes of one attention row, whose length a lie could choose
)

// slicer cuts payload into chunks.
type slicer struct {
	session uint32
	chunks  []tensor.Chunk // of the record at hand; reused
	memory  []byte         // of their data, where it had to be put together; reused
	last    bool           // no record follows at once
	shown   bool           // live subscribers have the record's rows
	// of the policy on the record's rows; reused
	verdicts []verdict
}

const mostMemory = 16 << 20 // bytes that a slicer keeps between records

// cut gives the rows [from, from+count) of the site's row list that are in a record's payload, as chunks of one request each. Chunks of a
// payload that is dense lie where it lies; all are valid until the next call.
func (s *slicer) cut(step *drain.Step, r *ring.Record, data []byte, from, count uint32) ([]tensor.Chunk, error) {
	s.chunks, s.memory = s.chunks[:0], s.memory[:0]
	if cap(s.memory) > mostMemory {
		s.memory = nil
	}
	site := &step.Sites[r.Site]
	l, err := layoutOf(r, site, len(data))
	if err != nil || count == 0 {
		return nil, err
	}
	list := step.Rows.List(r.Selection, site.Space)
	width := uint32(0)
	if step.Rows.Flags&ring.TablePacked == 0 {
		width = step.Rows.Width[site.Space]
	}
	if l.keyed {
		err = s.cutKeyed(step, r, &l, data, list, width, from, count)
	} else {
		err = s.cutPlain(step, r, &l, data, list, width, from, count)
	}
	if err != nil {
		return nil, err
	}
	for i := range s.chunks {
		s.chunks[i].Data = slices.Clip(s.chunks[i].Data) // whoever appends to it must not reach the next request's
	}
	return s.chunks, nil
}

// room is memory for n bytes of chunks, with whatever was in it before.
func (s *slicer) room(n uint64) []byte {
	at := uint64(len(s.memory))
	if uint64(cap(s.memory))-at < n { // chunks that were cut keep what they have
		s.memory, at = make([]byte, 0, max(n, 1<<20)), 0
	}
	s.memory = s.memory[:at+n]
	return s.memory[at : at+n : at+n]
}

// spansOf calls each with the parts of spans that are rows [from, from+count): the span, the first row's place in it, their number.
func spansOf(list *ring.RowList, from, count uint32, each func(s *ring.RowSpan, first, count uint32) error) error {
	i, _ := slices.BinarySearchFunc(list.Spans, from, func(s ring.RowSpan, row uint32) int {
		if s.Row+s.Count <= row {
			return -1
		}
		return 1
	})
	end := uint64(from) + uint64(count)
	for ; i < len(list.Spans) && uint64(list.Spans[i].Row) < end; i++ {
		s := &list.Spans[i]
		first := max(from, s.Row)
		last := min(end, uint64(s.Row)+uint64(s.Count))
		if err := each(s, first-s.Row, uint32(last-uint64(first))); err != nil {
			return err
		}
	}
	return nil
}

func (s *slicer) chunk(step *drain.Step, r *ring.Record, l *layout, span *ring.RowSpan, first, rows uint32, shape []int, data []byte) {
	position := span.Position + first
	if n := len(s.chunks); n > 0 && !l.keyed {
		// A request whose rows go on in the next span: its data goes on as well.
		c := &s.chunks[n-1]
		if c.Key.Request == span.Request && c.Attempt == span.Attempt && c.First+c.Rows == position {
			c.Rows += rows
			c.Data = c.Data[: len(c.Data)+len(data) : len(c.Data)+len(data)]
			return
		}
	}
	s.chunks = append(s.chunks, tensor.Chunk{Key: tensor.RequestKey{Session: s.session, Request: span.Request}, Site: r.Site, Attempt: span.Attempt,
		First: position, Rows: rows, Step: step.Number, LastStep: step.Number, DType: l.dtype, Level: tensor.Level(r.Level), Policy: step.Policy,
		Shape: shape, Data: data})
}

func outside(step *drain.Step, r *ring.Record, span *ring.RowSpan, i uint32) error {
	return fmt.Errorf("pipeline: step %d, site %q: row %d of its space (batch %d, index %d) is not in a tensor of %v with roles %v",
		step.Number, step.Sites[r.Site].Text(), span.Row+i, span.Batch, uint64(span.First)+uint64(i), r.Size[:r.NDim], r.Role[:r.NDim])
}

// cutPlain gathers rows of fixed size; those of a dense payload stay where they are.
func (s *slicer) cutPlain(step *drain.Step, r *ring.Record, l *layout, data []byte, list *ring.RowList, width, from, count uint32) error {
	if l.rowBytes != 0 && uint64(count) > uint64(len(data))/l.rowBytes { // strides may be 0, so rows may share bytes: but no honest ones do
		return fmt.Errorf("pipeline: step %d, site %q: %d rows of %d bytes in a payload of %d", step.Number, step.Sites[r.Site].Text(), count, l.rowBytes, len(data))
	}
	total := uint64(count) * l.rowBytes
	var out []byte
	if l.gathered && l.dense {
		start := uint64(from-r.RowFirst) * l.rowBytes
		out = data[start : start+total]
	} else {
		out = s.room(total)
	}
	done := uint64(0)
	return spansOf(list, from, count, func(span *ring.RowSpan, first, n uint32) error {
		bytes := uint64(n) * l.rowBytes
		to := out[done : done+bytes]
		// The capacity reaches on: chunk extends into it where the request goes on.
		piece := out[done : done+bytes]
		done += bytes
		if !(l.gathered && l.dense) {
			start, ok := l.at(span, first, span.Row+first, width, r.RowFirst)
			if !ok {
				return outside(step, r, span, first)
			}
			if _, ok := l.at(span, first+n-1, span.Row+first+n-1, width, r.RowFirst); !ok {
				return outside(step, r, span, first+n-1)
			}
			switch {
			case bytes == 0:
			case l.dense:
				copy(to, data[start:start+bytes])
			default:
				for i := range uint64(n) {
					gather(to[i*l.rowBytes:(i+1)*l.rowBytes], data[start+i*l.rowStride:], l.inner, l.element)
				}
			}
		}
		s.chunk(step, r, l, span, first, n, l.shape, piece)
		return nil
	})
}

// gather copies a strided row to dst, dense.
func gather(dst, src []byte, dims []extent, element uint64) []byte {
	if len(dims) == 0 {
		copy(dst[:element], src)
		return dst[element:]
	}
	d := dims[0]
	if len(dims) > 1 {
		for i := range d.size {
			dst = gather(dst, src[i*d.stride:], dims[1:], element)
		}
		return dst
	}
	if d.stride == element {
		n := copy(dst[:d.size*element], src)
		return dst[n:]
	}
	switch element {
	case 1:
		for i := range d.size {
			dst[i] = src[i*d.stride]
		}
	case 2:
		for i := range d.size {
			to, from := dst[2*i:2*i+2], src[i*d.stride:]
			to[0], to[1] = from[0], from[1]
		}
	default:
		for i := range d.size {
			copy(dst[i*element:(i+1)*element], src[i*d.stride:])
		}
	}
	return dst[d.size*element:]
}

// cutKeyed gathers attention rows: key slots become positions of the request, from 0 to the row's own, padded to the chunk's last row.
func (s *slicer) cutKeyed(step *drain.Step, r *ring.Record, l *layout, data []byte, list *ring.RowList, width, from, count uint32) error {
	site := &step.Sites[r.Site]
	element, level := l.element, tensor.Level(r.Level)
	heads := uint64(1)
	for _, n := range l.shape[:len(l.shape)-1] {
		heads *= uint64(n)
	}
	return spansOf(list, from, count, func(span *ring.RowSpan, first, n uint32) error {
		for n > 0 {
			// As many rows as make a chunk of the usual size, one at least.
			rows := uint32(1)
			for rows < n && uint64(rows+1)*heads*uint64(span.Position+first+rows+1)*element <= keyedChunk {
				rows++
			}
			keys := uint64(span.Position+first) + uint64(rows)
			if heads*keys*element > keyedRow {
				return fmt.Errorf("pipeline: step %d, site %q: a row of %d x %d keys is larger than the %d bytes that one may have", step.Number, site.Text(), heads, keys, keyedRow)
			}
			if uint64(span.KeyFirst)+keys > l.keyBase+l.keys {
				return fmt.Errorf("pipeline: step %d, site %q: position %d is key slot %d, and the tensor has slots %d to %d", step.Number, site.Text(),
					keys-1, uint64(span.KeyFirst)+keys-1, l.keyBase, l.keyBase+l.keys)
			}
			shape := append(slices.Clone(l.shape[:len(l.shape)-1]), int(keys))
			row := uint64(tensor.RowBytes(level, l.dtype, shape))
			out := s.room(uint64(rows) * row)
			clear(out)
			if l.scale == 0 {
				tensor.Fill(site.Fill).Over(out, l.dtype)
			}
			for i := range rows {
				start, ok := l.at(span, first+i, span.Row+first+i, width, r.RowFirst)
				if !ok {
					return outside(step, r, span, first+i)
				}
				to := out[uint64(i)*row:][:row]
				if l.scale != 0 {
					to = to[copy(to, data[start:start+l.scale]):]
					for at := range to[:heads*keys] {
						to[at] = tensor.Fill(site.Fill).Code(level)
					}
					start += l.scale
				}
				l.copyKeys(to[:heads*keys*element], data, start, uint64(span.Position+first+i)+1, keys, uint64(span.KeyFirst), r)
			}
			s.chunk(step, r, l, span, first, rows, shape, out)
			first, n = first+rows, n-rows
		}
		return nil
	})
}

// copyKeys copies one row: of every head, the keys of positions [0, own) that the payload has.
func (l *layout) copyKeys(dst, data []byte, start, own, keys, keyFirst uint64, r *ring.Record) {
	element := l.element
	lead, key := l.leading(r)
	from := uint64(0) // first position whose slot is there: those before have left a sliding window
	if l.keyBase > keyFirst {
		from = l.keyBase - keyFirst
	}
	if from >= own {
		return
	}
	slot := keyFirst + from - l.keyBase
	count := own - from
	each := func(at uint64) {
		gather(dst[from*element:(from+count)*element], data[at+slot*key.stride:], []extent{{count, key.stride}}, element)
		dst = dst[keys*element:]
	}
	walk(lead, start, each)
}

// leading is the dimensions of a row before its keys, and the keys'.
func (l *layout) leading(r *ring.Record) (lead []extent, key extent) {
	element := l.element
	for d := range int(r.NDim) {
		e := extent{uint64(r.Size[d]), uint64(r.Stride[d]) * element}
		switch r.Role[d] {
		case ring.RoleInner:
			lead = append(lead, e)
		case ring.RoleKey:
			key = e
		}
	}
	return lead, key
}

func walk(dims []extent, at uint64, each func(uint64)) {
	if len(dims) == 0 {
		each(at)
		return
	}
	for i := range dims[0].size {
		walk(dims[1:], at+i*dims[0].stride, each)
	}
}

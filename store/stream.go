package store

import (
	"bytes"
	"container/list"
	"slices"
	"sync/atomic"
	"time"

	"dmi/store/segment"
	"dmi/tensor"
)

type streamKey struct {
	tensor.RequestKey
	site uint32
}

func (k streamKey) ofSite() streamKeyOfSite { return streamKeyOfSite{k.Session, k.site} }

type stream struct {
	streamKey
	attempt uint16
	dtype   tensor.DType
	level   tensor.Level
	policy  uint64
	keyed   bool
	fill    tensor.Fill
	first   uint32
	rows    uint32
	bytes   int64
	pieces  []piece
	at      position // of the manifest when it was begun: what tells of its rows comes later
	born    time.Time
	place   *list.Element // in waiting; nil once it is not open
	shared  bool          // a ChunkRef points here, and may do so for long
	// How many hold it while it is being written: the writing goroutine until it has given all of it to segments, and each batch, ended or not, that has a part of
	// it and is not known to be in its file; two where it goes on in the next segment.
	holds atomic.Int32
}

// piece is rows that lie together. What lies beyond the length of data is free.
type piece struct {
	first    uint32
	rows     uint32
	step     uint64
	lastStep uint64
	shape    []int
	data     []byte // from the buffer's memory
}

// weight is about what a stream holds.
func (s *stream) weight() int64 {
	return s.bytes + streamOverhead + int64(len(s.pieces))*pieceOverhead
}

// takes reports whether a chunk goes on where s ends.
func (s *stream) takes(c *tensor.Chunk) bool {
	return uint64(s.first)+uint64(s.rows) == uint64(c.First) && s.attempt == c.Attempt && s.dtype == c.DType && s.level == c.Level && s.policy == c.Policy &&
		slices.Equal(s.fixed(s.pieces[0].shape), s.fixed(c.Shape))
}

// fixed is the dimensions of a row that are the same for all rows.
func (s *stream) fixed(shape []int) []int {
	if s.keyed && len(shape) > 0 && s.level.Elements() {
		return shape[:len(shape)-1]
	}
	return shape
}

// join copies a small chunk to where the one before it lies, if there is room.
func (s *stream) join(c *tensor.Chunk) bool {
	p := &s.pieces[len(s.pieces)-1]
	if cap(p.data)-len(p.data) < len(c.Data) || !slices.Equal(p.shape, c.Shape) {
		return false
	}
	p.data = append(p.data, c.Data...)
	p.rows += c.Rows
	p.lastStep = c.LastStep
	return true
}

// refs are the rows that s holds.
func (s *stream) refs(each func(ChunkRef)) {
	s.shared = true
	for i := range s.pieces {
		p := &s.pieces[i]
		each(ChunkRef{Key: s.RequestKey, Site: s.site, Attempt: s.attempt, First: p.first, Rows: p.rows, Step: p.step, LastStep: p.lastStep, DType: s.dtype,
			Level: s.level, Policy: s.policy, Shape: p.shape, data: p.data[:len(p.data):len(p.data)]})
	}
}

// parts cuts s into chunks of about `enough` bytes, each whole rows, and calls each with what it is and its bytes. A keyed site's rows are made as
// long as the longest of their part.
func (s *stream) parts(enough int64, each func(segment.Chunk, [][]byte) error) error {
	step := s.rows
	if s.bytes > 2*enough {
		step = uint32(max(1, enough*int64(s.rows)/s.bytes))
	}
	for from := uint32(0); from < s.rows; from += step {
		to := min(from+step, s.rows)
		c := segment.Chunk{Key: s.RequestKey, Site: s.site, Attempt: s.attempt, First: s.first + from, Rows: to - from, DType: s.dtype, Level: s.level, Policy: s.policy}
		var data [][]byte
		keys := 0
		begun := false
		for i := range s.pieces {
			p := &s.pieces[i]
			a, b := max(p.first, c.First), min(p.first+p.rows-1, c.First+c.Rows-1)
			if a > b {
				continue
			}
			row := len(p.data) / int(p.rows)
			data = append(data, p.data[int(a-p.first)*row:int(b-p.first+1)*row])
			if !begun {
				c.Step, c.Shape, begun = p.step, p.shape, true
			}
			c.LastStep = p.lastStep
			if s.keyed && len(p.shape) > 0 {
				keys = max(keys, p.shape[len(p.shape)-1])
			}
		}
		if s.keyed && len(c.Shape) > 0 && s.level.Elements() { // codes of different lengths are not joined
			c.Shape = append(slices.Clone(c.Shape[:len(c.Shape)-1]), keys)
			data = [][]byte{s.pad(c.First, c.Rows, keys)}
		}
		if err := each(c, data); err != nil {
			return err
		}
		if to == s.rows {
			return nil
		}
	}
	return nil
}

// pad lays rows out with their last dimension made as long as keys.
func (s *stream) pad(first, rows uint32, keys int) []byte {
	vectors := 1 // of keys in a row
	for _, d := range s.fixed(s.pieces[0].shape) {
		vectors *= d
	}
	size := s.dtype.Size()
	out := make([]byte, int(rows)*vectors*keys*size)
	missing := bytes.Repeat(s.fill.Element(s.dtype), keys)
	at := 0
	for i := range s.pieces {
		p := &s.pieces[i]
		length := p.shape[len(p.shape)-1] * size
		for row := range p.rows {
			if position := p.first + row; position < first || position-first >= rows {
				continue
			}
			for v := range vectors {
				from := (int(row)*vectors + v) * length
				n := copy(out[at:], p.data[from:from+length])
				at += n + copy(out[at+n:at+keys*size], missing)
			}
		}
	}
	return out
}

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

// buffer holds rows until enough of a request and site have come together to be worth writing. Guarded by Store.mu.
//
// A stream is a run of rows of one (request, site): open while it may grow, then ready, then being written. It stays in byKey, for
// readers, until it is in its segment.
type buffer struct {
	byKey   map[streamKey][]*stream // in the order they were begun; only the last may be open
	waiting *list.List              // open streams, oldest first
	ready   []*stream               // in the order they are to be written
	writing []*stream
	held    int64 // bytes of memory: rows, what is kept about them, and what chunks that are being copied are going to need
	enough  int64 // bytes at which a stream is ready
	memory  memory
}

type streamKey struct {
	tensor.RequestKey
	site uint32
}

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

// What a stream and a piece cost besides their rows: of a row of a few bytes that is nearly all, and the bound would not be one without it.
const (
	streamOverhead = 288
	pieceOverhead  = 112
)

const (
	smallPiece   = 32 << 10  // bytes: chunks below are put together, those from here on have a piece of their own
	largestBlock = 256 << 10 // bytes that small chunks are put together in
)

func newBuffer(enough, bound int64) *buffer {
	return &buffer{byKey: map[streamKey][]*stream{}, waiting: list.New(), enough: enough, memory: memory{spare: bound / 4}}
}

// needs is the memory that a chunk of so many bytes takes which is to have a piece of its own, and 0 for smaller ones.
func needs(n int) int64 {
	if n < smallPiece {
		return 0
	}
	if class, size := memoryClass(n); class < memoryClasses {
		return int64(size)
	}
	return int64(n)
}

// own copies a chunk that is to have a piece of its own, for which as much as it needs is already counted as held. Without Store.mu: it takes its time.
func (b *buffer) own(data []byte) []byte {
	return append(b.memory.take(len(data)), data...)
}

// sequence is the streams that a site's last chunks went to, in their order. The rows of a decoding step are those of the one before a token later, so that its
// chunks go there as well: to look each of thousands of streams up takes longer than to copy a row of statistics.
type sequence struct {
	streams []*stream
	next    int
}

// find is the stream that a chunk may go on, if there is one; q is its site's, nil where nobody keeps one.
func (b *buffer) find(k streamKey, q *sequence) *stream {
	if q != nil && q.next < len(q.streams) {
		if s := q.streams[q.next]; s.place != nil && s.streamKey == k {
			return s
		}
	}
	if streams := b.byKey[k]; len(streams) > 0 {
		return streams[len(streams)-1]
	}
	return nil
}

// went takes note of the stream that a chunk went to.
func (q *sequence) went(s *stream) {
	if q.next < len(q.streams) {
		q.streams[q.next] = s
	} else {
		q.streams = append(q.streams, s)
	}
	q.next++
}

// add takes in a chunk; own is its copy where it is to have a piece of its own.
func (b *buffer) add(c *tensor.Chunk, site *tensor.Site, q *sequence, at position, now time.Time, own []byte) {
	k := streamKey{c.Key, c.Site}
	s := b.find(k, q)
	if s != nil && s.place != nil && !s.takes(c) {
		b.close(s)
	}
	if s == nil || s.place == nil {
		s = &stream{streamKey: k, attempt: c.Attempt, dtype: c.DType, level: c.Level, policy: c.Policy, keyed: site.Keyed, fill: site.Fill, first: c.First, at: at,
			born: now}
		s.place = b.waiting.PushBack(s)
		b.byKey[k] = append(b.byKey[k], s)
		b.held += streamOverhead
	}
	if q != nil {
		q.went(s)
	}
	if own == nil {
		b.join(s, c)
	} else {
		b.piece(s, c, own)
	}
	s.rows += c.Rows
	s.bytes += int64(len(c.Data))
	if s.bytes >= b.enough {
		b.close(s)
	}
}

// piece gives a stream memory that holds a chunk's rows, and is counted as held.
func (b *buffer) piece(s *stream, c *tensor.Chunk, data []byte) {
	s.pieces = append(s.pieces, piece{c.First, c.Rows, c.Step, c.LastStep, slices.Clone(c.Shape), data})
	b.held += pieceOverhead
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

// join copies a small chunk to where the one before it lies.
func (b *buffer) join(s *stream, c *tensor.Chunk) {
	if n := len(s.pieces); n > 0 {
		p := &s.pieces[n-1]
		if slices.Equal(p.shape, c.Shape) && cap(p.data)-len(p.data) >= len(c.Data) {
			p.data = append(p.data, c.Data...)
			p.rows += c.Rows
			p.lastStep = c.LastStep
			return
		}
	}
	room := len(c.Data)
	if len(s.pieces) > 0 && !s.keyed { // longer and longer ones for streams that go on
		room = max(room, int(min(s.bytes+int64(room), largestBlock)))
	}
	data := append(b.memory.take(room), c.Data...)
	b.held += int64(cap(data))
	b.piece(s, c, data)
}

// close makes an open stream ready.
func (b *buffer) close(s *stream) {
	b.waiting.Remove(s.place)
	s.place = nil
	b.ready = append(b.ready, s)
}

// closeOlder makes the streams ready that were begun before a time.
func (b *buffer) closeOlder(than time.Time) {
	for e := b.waiting.Front(); e != nil && e.Value.(*stream).born.Before(than); e = b.waiting.Front() {
		b.close(e.Value.(*stream))
	}
}

// closeOldest makes at least so many bytes ready, oldest streams first, if there are as many.
func (b *buffer) closeOldest(bytes int64) {
	for _, s := range b.ready {
		bytes -= s.weight()
	}
	for e := b.waiting.Front(); e != nil && bytes > 0; e = b.waiting.Front() {
		bytes -= e.Value.(*stream).weight()
		b.close(e.Value.(*stream))
	}
}

// take moves ready streams of about so many bytes, rows alone, to writing.
func (b *buffer) take(bytes int64, most int) []*stream {
	n := 0
	for ; n < len(b.ready) && n < most && bytes > 0; n++ {
		bytes -= b.ready[n].bytes
	}
	taken := b.ready[:n:n]
	b.ready = b.ready[n:]
	b.writing = append(b.writing, taken...)
	return taken
}

// written lets go of a stream that is in its segment.
func (b *buffer) written(s *stream) {
	if len(b.writing) > 0 && b.writing[0] == s {
		b.writing = b.writing[1:]
	} else if i := slices.Index(b.writing, s); i >= 0 {
		b.writing = slices.Delete(b.writing, i, i+1)
	}
	left := slices.DeleteFunc(b.byKey[s.streamKey], func(o *stream) bool { return o == s })
	if len(left) == 0 {
		delete(b.byKey, s.streamKey)
	} else {
		b.byKey[s.streamKey] = left
	}
	b.held -= streamOverhead + int64(len(s.pieces))*pieceOverhead
	for i := range s.pieces {
		p := &s.pieces[i]
		b.held -= int64(cap(p.data))
		if !s.shared {
			b.memory.give(p.data)
			p.data = nil
		}
	}
	if !s.shared {
		s.pieces = nil // a sequence may still name s
	}
}

// unwritten puts back what could not be written, in its old order.
func (b *buffer) unwritten() {
	b.ready = append(b.writing, b.ready...)
	b.writing = nil
}

// oldest is when the first of the rows still here came; zero: there are none.
func (b *buffer) oldest() (came time.Time) {
	if e := b.waiting.Front(); e != nil {
		came = e.Value.(*stream).born
	}
	for _, list := range [...][]*stream{b.ready, b.writing} {
		for _, s := range list {
			if came.IsZero() || s.born.Before(came) {
				came = s.born
			}
		}
	}
	return came
}

// low is the first position of the manifest that may tell of rows still here.
func (b *buffer) low(end position) position {
	if e := b.waiting.Front(); e != nil && e.Value.(*stream).at.before(end) {
		end = e.Value.(*stream).at
	}
	for _, list := range [...][]*stream{b.ready, b.writing} {
		for _, s := range list {
			if s.at.before(end) {
				end = s.at
			}
		}
	}
	return end
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

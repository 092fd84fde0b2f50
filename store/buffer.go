package store

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"dmi/tensor"
)

// buffer holds rows until enough of a request and site have come together to be worth writing.
//
// A stream is a run of rows of one (request, site): open while it may grow, then ready, then being written. It stays in byKey, for
// readers, until it is in its segment, which is when it leaves, with Store.mu held.
//
// Sites are spread over shards, each with a lock of its own: who appends rows of one does not keep those waiting who append rows of others. All that they share is
// how much is held, which changes where memory is taken and not at every row. Locks, in the order they are taken: Store.mu, a shard's, mu. Nobody has two shards'.
type buffer struct {
	shards [bufferShards]*shard
	bound  int64 // of held
	enough int64 // bytes at which a stream is ready
	memory memory
	_      [64]byte     // what changes often is not in the cache lines of what everybody reads at every row
	held   atomic.Int64 // bytes of memory: rows, what is kept about them, and what chunks that are being copied are going to need
	_      [64]byte

	mu      sync.Mutex
	ready   []*stream // in the order they are to be written
	writing []*stream
	due     atomic.Bool // there are ready ones
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
	b := &buffer{bound: bound, enough: enough, memory: memory{spare: bound / 4}}
	for i := range b.shards {
		b.shards[i] = &shard{byKey: map[streamKey][]*stream{}, inlets: map[streamKeyOfSite]*inlet{}}
	}
	return b
}

// full reports whether there is no room for so many bytes more. What is larger than the bound has room alone.
func (b *buffer) full(bytes int64) bool {
	held := b.held.Load()
	return held > 0 && held+bytes > b.bound
}

// reserve counts bytes as held, if there is room for them.
func (b *buffer) reserve(bytes int64) bool {
	for {
		held := b.held.Load()
		if held > 0 && held+bytes > b.bound {
			return false
		}
		if b.held.CompareAndSwap(held, held+bytes) {
			return true
		}
	}
}

// needs is the memory that a chunk of so many bytes takes which is to have a piece of its own, and 0 for smaller ones.
func needs(n int) int64 {
	if n < smallPiece {
		return 0
	}
	return int64(roomOf(n))
}

// own copies a chunk that is to have a piece of its own, for which room is already reserved. Without a lock: it takes its time.
func (b *buffer) own(data []byte) []byte {
	return append(b.memory.take(len(data)), data...)
}

// add takes in a chunk that came through an inlet of a shard, whose lock is held. own is its copy where it is to have a piece of its own: room for that, and for what is
// kept about a piece and a stream, is reserved. now and at are of a stream that begins with it. Where there is no room it takes nothing, and says how many bytes it lacks; else 0.
func (b *buffer) add(h *shard, in *inlet, c *tensor.Chunk, at position, now time.Time, own []byte) (lacking int64) {
	k := streamKey{c.Key, c.Site}
	s := h.find(k, in.came)
	if s != nil && s.place != nil && !s.takes(c) {
		b.close(h, s)
	}
	begun := s != nil && s.place != nil
	if own != nil || !begun || !s.join(c) {
		room, need := 0, int64(0)
		if !begun {
			need = streamOverhead
		}
		switch {
		case own == nil:
			room = len(c.Data)
			if begun && !s.keyed { // longer and longer ones for streams that go on
				room = max(room, int(min(s.bytes+int64(room), largestBlock)))
			}
			if need += pieceOverhead + int64(roomOf(room)); !b.reserve(need) {
				return need
			}
			own = append(b.memory.take(room), c.Data...)
		case begun:
			b.held.Add(-streamOverhead)
		}
		if !begun {
			s = &stream{streamKey: k, attempt: c.Attempt, dtype: c.DType, level: c.Level, policy: c.Policy, keyed: in.keyed, fill: in.fill, first: c.First, at: at, born: now}
			s.place = h.waiting.PushBack(s)
			h.byKey[k] = append(h.byKey[k], s)
		}
		s.pieces = append(s.pieces, piece{c.First, c.Rows, c.Step, c.LastStep, slices.Clone(c.Shape), own})
	}
	if in.came != nil {
		in.came.went(s)
	}
	s.rows += c.Rows
	s.bytes += int64(len(c.Data))
	if s.bytes >= b.enough {
		b.close(h, s)
	}
	return 0
}

// close makes an open stream ready, with its shard's lock held.
func (b *buffer) close(h *shard, s *stream) {
	h.waiting.Remove(s.place)
	s.place = nil
	b.mu.Lock()
	b.ready = append(b.ready, s)
	b.due.Store(true)
	b.mu.Unlock()
}

// closeOldest makes the streams ready that were begun before a time, and so many more of the oldest that so many bytes are ready, if there are as many: of those that are open
// when it is called, oldest first. It has one shard's lock at a time, as long as no other has older ones.
func (b *buffer) closeOldest(than time.Time, bytes int64) {
	if bytes > 0 {
		b.mu.Lock()
		for _, s := range b.ready {
			bytes -= s.weight()
		}
		b.mu.Unlock()
	}
	wanted := func(s *stream) bool { return s != nil && (bytes > 0 || s.born.Before(than)) }
	type front struct {
		*shard
		born, last time.Time // of its oldest open stream, and of its youngest when this began
	}
	var fronts []front // oldest first
	for _, h := range b.shards {
		h.mu.Lock()
		if s := h.oldestOpen(); wanted(s) {
			fronts = append(fronts, front{h, s.born, h.waiting.Back().Value.(*stream).born})
		}
		h.mu.Unlock()
	}
	older := func(f, g front) int { return f.born.Compare(g.born) }
	slices.SortFunc(fronts, older)
	for len(fronts) > 0 {
		f := fronts[0]
		fronts = fronts[1:]
		until := f.last
		if len(fronts) > 0 && fronts[0].born.Before(until) {
			until = fronts[0].born
		}
		f.mu.Lock()
		s := f.oldestOpen()
		for ; wanted(s) && !s.born.After(until); s = f.oldestOpen() {
			bytes -= s.weight()
			b.close(f.shard, s)
		}
		f.mu.Unlock()
		if wanted(s) && !s.born.After(f.last) {
			f.born = s.born
			i, _ := slices.BinarySearchFunc(fronts, f, older)
			fronts = slices.Insert(fronts, i, f)
		}
	}
}

// left is how many streams are ready.
func (b *buffer) left() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.ready)
}

// take moves ready streams of about so many bytes, rows alone, to writing.
func (b *buffer) take(bytes int64, most int) []*stream {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for ; n < len(b.ready) && n < most && bytes > 0; n++ {
		bytes -= b.ready[n].bytes
	}
	taken := b.ready[:n:n]
	b.ready = b.ready[n:]
	b.writing = append(b.writing, taken...)
	b.due.Store(len(b.ready) > 0)
	return taken
}

// written lets go of a stream that is in its segment.
func (b *buffer) written(s *stream) {
	b.mu.Lock()
	if len(b.writing) > 0 && b.writing[0] == s {
		b.writing = b.writing[1:]
	} else if i := slices.Index(b.writing, s); i >= 0 {
		b.writing = slices.Delete(b.writing, i, i+1)
	}
	b.mu.Unlock()
	h := b.shard(s.ofSite())
	h.mu.Lock()
	defer h.mu.Unlock()
	left := slices.DeleteFunc(h.byKey[s.streamKey], func(o *stream) bool { return o == s })
	if len(left) == 0 {
		delete(h.byKey, s.streamKey)
	} else {
		h.byKey[s.streamKey] = left
	}
	held := streamOverhead + int64(len(s.pieces))*pieceOverhead
	for i := range s.pieces {
		p := &s.pieces[i]
		held += int64(cap(p.data))
		if !s.shared {
			b.memory.give(p.data)
			p.data = nil
		}
	}
	if !s.shared {
		s.pieces = nil // a sequence may still name s
	}
	b.held.Add(-held)
}

// unwritten puts back what could not be written, in its old order.
func (b *buffer) unwritten() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ready = append(b.writing, b.ready...)
	b.writing = nil
	b.due.Store(len(b.ready) > 0)
}

// each calls f for the oldest open stream of each shard, and then for all that are not open: a stream goes this way as well, so that none is missed. With Store.mu held,
// without which none leaves.
func (b *buffer) each(f func(*stream)) {
	for _, h := range b.shards {
		h.mu.Lock()
		if s := h.oldestOpen(); s != nil {
			f(s)
		}
		h.mu.Unlock()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, list := range [...][]*stream{b.ready, b.writing} {
		for _, s := range list {
			f(s)
		}
	}
}

// oldest is when the first of the rows still here came; zero: there are none.
func (b *buffer) oldest() (came time.Time) {
	b.each(func(s *stream) { came = earlier(came, s.born) })
	return came
}

// earlier is the first of two times, of which a zero one is none.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// low is the first position of the manifest that may tell of rows still here. It ended at end before this was called: what tells of rows that come meanwhile lies behind that.
func (b *buffer) low(end position) position {
	b.each(func(s *stream) {
		if s.at.before(end) {
			end = s.at
		}
	})
	return end
}

// requests are those of which there are rows.
func (b *buffer) requests() map[tensor.RequestKey]bool {
	requests := map[tensor.RequestKey]bool{}
	for _, h := range b.shards {
		h.mu.Lock()
		for k := range h.byKey {
			requests[k.RequestKey] = true
		}
		h.mu.Unlock()
	}
	return requests
}

// streams is of how many requests and sites there are rows.
func (b *buffer) streams() (n int) {
	for _, h := range b.shards {
		h.mu.Lock()
		n += len(h.byKey)
		h.mu.Unlock()
	}
	return n
}

// refs calls each for rows of a request and site.
func (b *buffer) refs(k streamKey, each func(ChunkRef)) {
	h := b.shard(k.ofSite())
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.byKey[k] {
		s.refs(each)
	}
}

// finish makes a request and site's rows ready.
func (b *buffer) finish(k streamKey) {
	h := b.shard(k.ofSite())
	h.mu.Lock()
	defer h.mu.Unlock()
	if s := h.find(k, nil); s != nil && s.place != nil {
		b.close(h, s)
	}
}

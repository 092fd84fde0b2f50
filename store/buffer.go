package store

import (
	"bytes"
	"container/list"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"dmi/store/segment"
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

const bufferShards = 256 // so many that of two sites at work at the same time hardly ever both are in one

// shard is what is open of some sites.
type shard struct {
	mu      sync.Mutex
	byKey   map[streamKey][]*stream // in the order they were begun; only the last may be open
	waiting list.List               // open streams, oldest first
	inlets  map[streamKeyOfSite]*inlet
	counted []streamKeyOfSite // sites whose totals the next commit has to write
	_       [64]byte          // the next one is not in the same cache line
}

// inlet is where a site's rows come in, until its session ends.
type inlet struct {
	keyed   bool
	fill    tensor.Fill
	session *sessionState
	total   *siteTotal // of the session's
	came    *sequence  // nil: the session has ended
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
	b := &buffer{bound: bound, enough: enough, memory: memory{spare: bound / 4}}
	for i := range b.shards {
		b.shards[i] = &shard{byKey: map[streamKey][]*stream{}, inlets: map[streamKeyOfSite]*inlet{}}
	}
	return b
}

// shard is a site's.
func (b *buffer) shard(k streamKeyOfSite) *shard {
	return b.shards[(k.site+97*k.session)%bufferShards] // 97: sessions have the same sites
}

func (k streamKey) ofSite() streamKeyOfSite { return streamKeyOfSite{k.Session, k.site} }

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

// sequence is the streams that a site's last chunks went to, in their order. The rows of a decoding step are those of the one before a token later, so that its
// chunks go there as well: to look each of thousands of streams up takes longer than to copy a row of statistics.
type sequence struct {
	streams []*stream
	next    int
}

// find is the stream that a chunk may go on, if there is one; q is its site's, nil where nobody keeps one.
func (h *shard) find(k streamKey, q *sequence) *stream {
	if q != nil && q.next < len(q.streams) {
		if s := q.streams[q.next]; s.place != nil && s.streamKey == k {
			return s
		}
	}
	if streams := h.byKey[k]; len(streams) > 0 {
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

// close makes an open stream ready, with its shard's lock held.
func (b *buffer) close(h *shard, s *stream) {
	h.waiting.Remove(s.place)
	s.place = nil
	b.mu.Lock()
	b.ready = append(b.ready, s)
	b.due.Store(true)
	b.mu.Unlock()
}

// oldestOpen is the open stream that was begun first, or nil.
func (h *shard) oldestOpen() *stream {
	if e := h.waiting.Front(); e != nil {
		return e.Value.(*stream)
	}
	return nil
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

// forget has a site's inlet made anew, if more comes.
func (b *buffer) forget(k streamKeyOfSite) {
	h := b.shard(k)
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.inlets, k)
}

// count keeps what SiteTotals tells of a site, with the lock of its shard held.
func (h *shard) count(session uint32, t *siteTotal, dtype tensor.DType, level tensor.Level, shape []int, rows uint32, bytes uint64) {
	if level != tensor.Stats || t.DType == tensor.DTypeNone {
		t.DType, t.Shape = dtype, shape
	}
	t.Rows += uint64(rows)
	t.Bytes += bytes
	if !t.dirty {
		t.dirty = true
		h.counted = append(h.counted, streamKeyOfSite{session, t.Site})
	}
}

// total is what was counted of a site; clean: a commit is going to write it.
func (b *buffer) total(session uint32, t *siteTotal, clean bool) SiteTotal {
	h := b.shard(streamKeyOfSite{session, t.Site})
	h.mu.Lock()
	defer h.mu.Unlock()
	t.dirty = t.dirty && !clean
	return t.SiteTotal
}

// recount moves the sites that were counted since the last commit to those that the next one has to write.
func (b *buffer) recount(into map[streamKeyOfSite]bool) {
	for _, h := range b.shards {
		h.mu.Lock()
		for _, k := range h.counted {
			into[k] = true
		}
		h.counted = h.counted[:0]
		h.mu.Unlock()
	}
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

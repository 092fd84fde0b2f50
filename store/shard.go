package store

import (
	"container/list"
	"sync"

	"dmi/tensor"
)

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

// shard is a site's.
func (b *buffer) shard(k streamKeyOfSite) *shard {
	return b.shards[(k.site+97*k.session)%bufferShards] // 97: sessions have the same sites
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

// oldestOpen is the open stream that was begun first, or nil.
func (h *shard) oldestOpen() *stream {
	if e := h.waiting.Front(); e != nil {
		return e.Value.(*stream)
	}
	return nil
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

// forget has a site's inlet made anew, if more comes.
func (b *buffer) forget(k streamKeyOfSite) {
	h := b.shard(k)
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.inlets, k)
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

package store

import (
	"errors"
	"fmt"
	"time"

	"dmi/store/segment"
	"dmi/tensor"
)

// AppendChunks takes chunks in their order, copying their Data, to be merged with their neighbours and written. Call it before the rows are booked captured.
// It blocks while the buffer is full. On an error only the first taken of them have been: the rows of the others are to be booked lost(io). That happens while
// the disk refuses writes and the buffer is full: at once in best-effort mode, after Options.FullDiskWait in complete mode.
func (s *Store) AppendChunks(chunks []tensor.Chunk) (taken int, err error) {
	if s.readOnly {
		return 0, errors.New("store: append a chunk: opened for reading only")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	at := place{now: time.Now()}
	for taken < len(chunks) {
		if err = s.appendChunk(&chunks[taken], &at); err != nil {
			break
		}
		taken++
	}
	if taken > 0 { // once: each of these waits for what the processor has not written to memory yet
		s.way.came.Store(at.now.UnixNano())
		s.arrivals.Add(uint64(taken))
		s.pokeIfDue()
	}
	return taken, err
}

// AppendChunk takes one.
func (s *Store) AppendChunk(c tensor.Chunk) error {
	_, err := s.AppendChunks([]tensor.Chunk{c})
	return err
}

// place is where a chunk belongs: the last one's, as a rule.
type place struct {
	now     time.Time // when chunks came in, or had waited for room
	session *sessionState
	site    tensor.Site
	total   *siteTotal // nil: not looked up
	came    *sequence  // nil: the session has ended
}

func (s *Store) appendChunk(c *tensor.Chunk, at *place) error {
	if err := segment.CheckRows(c.DType, c.Level, c.First, c.Rows, c.Shape, int64(len(c.Data))); err != nil {
		return fmt.Errorf("store: append a chunk of request %d, site %d: %w", c.Key.Request, c.Site, err)
	}
	if at.session == nil || at.session.Number != c.Key.Session || at.site.ID != c.Site {
		if err := s.find(c, at); err != nil {
			return err
		}
	}
	size := needs(len(c.Data))
	if err := s.roomFor(max(size+streamOverhead+pieceOverhead, largestBlock), at); err != nil {
		return err
	}
	var own []byte
	if size > 0 && !s.closed { // room is reserved first: those who wait for it hold none
		s.buffer.held += size
		s.mu.Unlock()
		own = s.buffer.own(c.Data)
		s.mu.Lock()
	}
	if s.closed {
		return fmt.Errorf("store: append a chunk: %w", ErrClosed)
	}
	if s.oldest.IsZero() {
		s.oldest = at.now
	}
	s.buffer.add(c, &at.site, at.came, s.logEnd, at.now, own)
	at.session.busy = true
	s.count(at, c.DType, c.Level, c.Shape, c.Rows, uint64(len(c.Data)))
	if own != nil { // large: it is written while the next is copied
		s.pokeIfDue()
	}
	return nil
}

// find looks a chunk's session and site up.
func (s *Store) find(c *tensor.Chunk, at *place) error {
	session := s.sessions[c.Key.Session]
	if session == nil {
		return fmt.Errorf("store: append a chunk of session %d: %w", c.Key.Session, ErrNotFound)
	}
	site, known := session.sites[c.Site]
	if !known {
		return fmt.Errorf("store: append a chunk of site %d of session %s: %w", c.Site, session.ID, ErrNotFound)
	}
	*at = place{now: at.now, session: session, site: site, came: session.came[c.Site]}
	if at.came == nil && session.Ended.IsZero() {
		if session.came == nil {
			session.came = map[uint32]*sequence{}
		}
		at.came = new(sequence)
		session.came[c.Site] = at.came
	}
	if at.came != nil {
		at.came.next = 0
	}
	return nil
}

func (s *Store) bound() int64 { return int64(s.opt.BufferMiB) << 20 }

// pokeIfDue has the writing goroutine look where there is something for it.
func (s *Store) pokeIfDue() {
	if len(s.buffer.ready) > 0 || s.buffer.held > s.bound()*3/4 {
		s.poke()
	}
}

// roomFor waits until the buffer has room for so many bytes more.
func (s *Store) roomFor(bytes int64, at *place) error {
	full := func() bool { return !s.closed && s.buffer.held > 0 && s.buffer.held+bytes > s.bound() }
	if !full() {
		return nil
	}
	defer s.way.hold()()
	for full() {
		if s.failure != nil && (at.session.Mode != "complete" || time.Since(s.failing) > s.opt.FullDiskWait) {
			return fmt.Errorf("store: append a chunk: the buffer of %d MiB is full, and %w", s.opt.BufferMiB, s.failure)
		}
		s.poke()
		s.room.Wait()
	}
	at.now = time.Now()
	return nil
}

// count keeps what SiteTotals tells.
func (s *Store) count(at *place, dtype tensor.DType, level tensor.Level, shape []int, rows uint32, bytes uint64) {
	t := at.total
	if t == nil {
		if t = at.session.totals[at.site.ID]; t == nil {
			t = &siteTotal{SiteTotal: SiteTotal{Site: at.site.ID}}
			at.session.totals[at.site.ID] = t
		}
		at.total = t
	}
	if level != tensor.Stats || t.DType == tensor.DTypeNone {
		t.DType, t.Shape = dtype, shape
	}
	t.Rows += uint64(rows)
	t.Bytes += bytes
	if !t.dirty {
		t.dirty = true
		s.dirty.totals[streamKeyOfSite{at.session.Number, at.site.ID}] = true
	}
}

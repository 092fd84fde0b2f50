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
// Calls with chunks of different sites do not wait for each other.
func (s *Store) AppendChunks(chunks []tensor.Chunk) (taken int, err error) {
	if s.readOnly {
		return 0, errors.New("store: append a chunk: opened for reading only")
	}
	var at place
	for taken < len(chunks) {
		if err = s.appendChunk(&chunks[taken], &at); err != nil {
			break
		}
		taken++
	}
	at.unlock()
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
	site  streamKeyOfSite
	shard *shard // its lock is held; nil: there was no chunk yet
	inlet *inlet
	now   time.Time // when the lock was taken
	end   position  // where the manifest ended then: it tells of rows that come under the lock behind that
}

func (s *Store) lockShard(at *place) {
	at.shard.mu.Lock()
	at.now, at.end = time.Now(), *s.logEnd.Load()
}

func (at *place) unlock() {
	if at.shard != nil {
		at.shard.mu.Unlock()
		at.shard = nil
	}
}

func (s *Store) appendChunk(c *tensor.Chunk, at *place) error {
	if err := segment.CheckRows(c.DType, c.Level, c.First, c.Rows, c.Shape, int64(len(c.Data))); err != nil {
		return fmt.Errorf("store: append a chunk of request %d, site %d: %w", c.Key.Request, c.Site, err)
	}
	if k := (streamKeyOfSite{c.Key.Session, c.Site}); at.shard == nil || at.site != k {
		if err := s.find(k, at); err != nil {
			return err
		}
	}
	var own []byte
	if size := needs(len(c.Data)); size > 0 { // room is reserved first: those who wait for it hold none
		for size += streamOverhead + pieceOverhead; !s.buffer.reserve(size); {
			if err := s.waitForRoom(size, at); err != nil {
				return err
			}
		}
		at.shard.mu.Unlock()
		own = s.buffer.own(c.Data)
		s.lockShard(at)
	}
	for {
		if s.closed.Load() { // with the lock: whom Close does not stop here, the last flush finds
			return fmt.Errorf("store: append a chunk: %w", ErrClosed)
		}
		lacking := s.buffer.add(at.shard, at.inlet, c, at.end, at.now, own)
		if lacking == 0 {
			break
		}
		if err := s.waitForRoom(lacking, at); err != nil {
			return err
		}
	}
	at.shard.count(at.site.session, at.inlet.total, c.DType, c.Level, c.Shape, c.Rows, uint64(len(c.Data)))
	if own != nil { // large: it is written while the next is copied
		s.pokeIfDue()
	}
	return nil
}

// find locks a site's shard and looks the site up there; the first time, and once its session has ended, in the session.
func (s *Store) find(k streamKeyOfSite, at *place) error {
	at.unlock()
	h := s.buffer.shard(k)
	*at = place{now: at.now, site: k, shard: h}
	s.lockShard(at)
	if at.inlet = h.inlets[k]; at.inlet != nil {
		at.inlet.came.next = 0
		return nil
	}
	at.unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	session := s.sessions[k.session]
	if session == nil {
		return fmt.Errorf("store: append a chunk of session %d: %w", k.session, ErrNotFound)
	}
	site, known := session.sites[k.site]
	if !known {
		return fmt.Errorf("store: append a chunk of site %d of session %s: %w", k.site, session.ID, ErrNotFound)
	}
	session.busy = true
	at.shard, at.inlet = h, &inlet{keyed: site.Keyed, fill: site.Fill, session: session, total: session.total(k.site)}
	s.lockShard(at)
	if session.Ended.IsZero() {
		at.inlet.came = new(sequence)
		h.inlets[k] = at.inlet
	}
	return nil
}

// pokeIfDue has the writing goroutine look where there is something for it.
func (s *Store) pokeIfDue() {
	if s.buffer.due.Load() || s.buffer.held.Load() > s.buffer.bound*3/4 {
		s.poke()
	}
}

// waitForRoom waits, without the shard's lock, until the buffer has room for so many bytes more. Others may take it before the caller does.
func (s *Store) waitForRoom(bytes int64, at *place) error {
	at.shard.mu.Unlock()
	defer s.lockShard(at)
	defer s.way.hold()()
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.closed.Load() && s.buffer.full(bytes) {
		if s.failure != nil && (at.inlet.session.Mode != "complete" || time.Since(s.failing) > s.opt.FullDiskWait) {
			return fmt.Errorf("store: append a chunk: the buffer of %d MiB is full, and %w", s.opt.BufferMiB, s.failure)
		}
		s.poke()
		s.room.Wait()
	}
	if s.closed.Load() {
		return fmt.Errorf("store: append a chunk: %w", ErrClosed)
	}
	return nil
}

// total is where a site's rows are counted. With Store.mu held.
func (t *sessionState) total(site uint32) *siteTotal {
	total := t.totals[site]
	if total == nil {
		total = &siteTotal{SiteTotal: SiteTotal{Site: site}}
		t.totals[site] = total
	}
	return total
}

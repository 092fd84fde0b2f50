package store

import (
	"cmp"
	"errors"
	"fmt"
	"path"
	"slices"
	"time"

	"dmi/store/segment"
)

// The writing goroutine: it moves streams from the buffer to segments, seals them, and makes things durable, in groups.

const batchBytes = 32 << 20 // of chunks between two index blocks

// work is that goroutine. It starts two others, at most one of each at a time, so that the disk always has something to write: one seals the segment before
// the current one, one makes durable what is written. It waits for both before it ends.
func (s *Store) work() {
	defer close(s.stopped)
	tick := time.NewTicker(max(time.Millisecond, min(s.opt.FlushAge, s.opt.SyncAge)/4))
	defer tick.Stop()
	due := time.NewTimer(0)
	defer due.Stop()
	var waiting []*barrier
	stopping := false
	for !stopping {
		select {
		case <-s.wake:
		case <-tick.C:
		case <-due.C:
		case b := <-s.barriers:
			waiting = append(waiting, b)
		case err := <-s.synced:
			s.syncDone(err)
		case err := <-s.sealedOne:
			_ = s.sealDone(err) // it has told of a failure
		case <-s.stop:
			stopping = true
		}
		for more := true; more; {
			select {
			case b := <-s.barriers:
				waiting = append(waiting, b)
			default:
				more = false
			}
		}
		now := time.Now()
		asked := stopping || (len(waiting) > 0 && now.Sub(s.lastSync) >= s.opt.GroupCommit)
		if asked || !now.Before(s.retry) {
			err := s.turn(now, asked, asked && slices.ContainsFunc(waiting, func(b *barrier) bool { return b.seal }), stopping)
			if err != nil {
				s.retry = now.Add(retryEvery)
			}
			s.answer(&waiting, asked, err)
		}
		if len(waiting) > 0 { // for their group to be complete
			due.Reset(s.lastSync.Add(s.opt.GroupCommit).Sub(now))
		}
	}
	_ = s.awaitSeal()
	s.awaitSync()
	if o := s.takeAhead(); o != nil { // the last turn failed before it came to that
		s.unmake(o)
	}
	if s.current != nil {
		s.current.writer.Close()
	}
}

func (s *Store) answer(waiting *[]*barrier, asked bool, err error) {
	if asked {
		for _, b := range *waiting {
			b.done <- err
		}
		*waiting = nil
	}
}

// turn does what there is to do. asked: everything, now. seal: and close the segment. stopping: and nothing will follow.
func (s *Store) turn(now time.Time, asked, seal, stopping bool) error {
	failing := s.condition() != nil
	if err := s.flush(now, asked); err != nil {
		return err
	}
	if asked || failing {
		if err := s.syncNow(false); err != nil {
			return err
		}
	} else if !s.syncing && (s.unsynced >= int64(s.opt.SyncMiB)<<20 || (now.Sub(s.lastSync) >= s.opt.SyncAge && s.behind())) {
		s.syncing, s.unsynced, s.lastSync = true, 0, now
		go func() { s.synced <- s.sync(false) }()
	}
	if err := s.rollOver(now, seal || stopping); err != nil {
		return err
	}
	if seal || stopping {
		if err := s.awaitSeal(); err != nil {
			return err
		}
	}
	if stopping {
		if o := s.takeAhead(); o != nil {
			s.unmake(o)
		}
		if err := s.syncNow(true); err != nil {
			return err
		}
	}
	if failing {
		s.recovered()
	}
	return nil
}

// syncNow makes everything durable that has been flushed.
func (s *Store) syncNow(last bool) error {
	if err := s.awaitSeal(); err != nil {
		return err
	}
	if s.current != nil {
		if err := s.current.writer.Drain(); err != nil {
			return s.abandon(err)
		}
	}
	s.awaitSync() // an error of its own comes again, if it still holds
	s.unsynced, s.lastSync = 0, time.Now()
	return s.sync(last)
}

func (s *Store) awaitSync() {
	if s.syncing {
		s.syncDone(<-s.synced)
	}
}

func (s *Store) syncDone(err error) {
	s.syncing = false
	if err != nil {
		s.retry = time.Now().Add(retryEvery)
	}
}

func (s *Store) awaitSeal() error {
	if s.sealing == nil {
		return nil
	}
	return s.sealDone(<-s.sealedOne)
}

// sealDone takes note that the segment before the current one is sealed, or is not and has to be later.
func (s *Store) sealDone(err error) error {
	o := s.sealing
	s.sealing = nil
	if err == nil {
		return nil
	}
	s.retire(o)
	return s.abandon(err)
}

// retire says that nothing more will be written to a segment.
func (s *Store) retire(o *openSegment) {
	o.writer.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	o.active = false
}

func (s *Store) condition() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failure
}

// behind reports whether anything is not durable.
func (s *Store) behind() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.oldest.IsZero() || !s.buffer.oldest().IsZero()
}

// flush writes what is ready, or everything.
func (s *Store) flush(now time.Time, everything bool) error {
	if s.failed.Load() {
		return s.abandon(nil)
	}
	b, bytes := s.buffer, int64(0)
	if held := b.held.Load(); everything {
		bytes = 1 << 62
	} else if held > b.bound*3/4 {
		bytes = max(held-b.bound/2, min(batchBytes, b.bound/4))
	}
	b.closeOldest(now.Add(-s.opt.FlushAge), bytes)
	for left := b.left(); left > 0; {
		streams := b.take(batchBytes, left)
		left -= len(streams)
		if err := s.writeBatch(streams); err != nil {
			return s.abandon(err)
		}
	}
	return nil
}

// writeBatch appends streams to the current segment, and to the next where it is full. They leave the buffer once they are in the file.
func (s *Store) writeBatch(streams []*stream) error {
	var in []*stream // with parts in the batch
	end := func() error {
		o, parts := s.current, in
		in = nil
		if o.writer.Pending() == 0 {
			return nil
		}
		return o.writer.EndBatch(func(chunks []segment.Chunk, end int64, err error) { s.wrote(o, parts, chunks, end, err) })
	}
	next := func() error {
		if err := end(); err != nil {
			return err
		}
		return s.seal()
	}
	for i, name := range s.names(streams) { // all at once: who appends hardly ever leaves the lock alone
		t := streams[i]
		t.holds.Store(1) // whatever an attempt that failed has left
		err := t.parts(int64(s.opt.ChunkKiB)<<10, func(c segment.Chunk, data [][]byte) error {
			var bytes int64
			for _, d := range data {
				bytes += int64(len(d))
			}
			if s.current != nil && s.current.writer.Full(bytes) {
				if err := next(); err != nil {
					return err
				}
			}
			for {
				if err := s.begin(); err != nil {
					return err
				}
				fits, err := s.current.writer.Append(c, name.request, name.site, data...)
				if fits && (len(in) == 0 || in[len(in)-1] != t) {
					in = append(in, t)
					t.holds.Add(1)
				}
				if fits || err != nil {
					s.unsynced += bytes
					s.makeAhead()
					return err
				}
				if s.current.writer.Empty() {
					return fmt.Errorf("store: the names of request %q and site %q do not fit a segment's header of %d KiB", name.request, name.site, s.opt.HeaderKiB)
				}
				if err := next(); err != nil {
					return err
				}
			}
		})
		if err != nil {
			return err
		}
		t.holds.Add(-1)
	}
	return end()
}

// wrote is called by the segment's goroutine when a batch is in the file, or is not going to be. A stream leaves the buffer when all batches with parts of it are: the segment that it
// began in may fail while the next one, with its end, does not.
func (s *Store) wrote(o *openSegment, parts []*stream, chunks []segment.Chunk, end int64, err error) {
	if err != nil {
		s.failed.Store(true)
		s.poke()
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range chunks {
		c := &chunks[i]
		o.chunks[c.Key] = append(o.chunks[c.Key], c)
		s.metrics.WrittenBytes += uint64(c.Length)
	}
	o.count += len(chunks)
	o.end = end
	busy := o.writer.Busy()
	s.metrics.WriteBusy += busy - o.busy
	o.busy = busy
	for _, t := range parts {
		if t.holds.Add(-1) == 0 {
			s.buffer.written(t)
			s.oldest = earlier(s.oldest, t.born)
		}
	}
	s.room.Broadcast()
}

// names are what the requests and sites of streams are called in a segment.
func (s *Store) names(streams []*stream) []streamName {
	names := make([]streamName, len(streams))
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, t := range streams {
		session := s.sessions[t.Session]
		names[i].site = session.sites[t.site].Name
		if r := s.requests[t.RequestKey]; r != nil && r.ID != "" {
			names[i].request = r.ID
		} else {
			names[i].request = fmt.Sprintf("%s.%d", session.ID, t.Request)
		}
	}
	return names
}

type streamName struct{ request, site string }

// abandon gives the current segment up after an error: its whole batches stay, the rest of what was being written goes back to the buffer.
func (s *Store) abandon(err error) error {
	if o := s.sealing; o != nil {
		s.sealing = nil
		if failure := <-s.sealedOne; failure != nil {
			err = cmp.Or(err, failure)
			s.retire(o)
		}
	}
	if o := s.current; o != nil {
		if failure := o.writer.Drain(); err == nil {
			err = failure
		}
		s.retire(o)
		s.current = nil
	}
	s.failed.Store(false)
	s.buffer.unwritten()
	if err != nil {
		err = explainOnce("write a segment", err)
		s.fail(err)
	}
	return err
}

func explainOnce(doing string, err error) error {
	for _, known := range [...]error{ErrDiskFull, ErrFileSize, ErrReadOnly, ErrDenied, ErrDevice} {
		if errors.Is(err, known) {
			return err
		}
	}
	return explain(doing, err)
}

func (s *Store) segmentPath(number uint64, sealed bool) string {
	end := "open"
	if sealed {
		end = "safetensors"
	}
	return path.Join(s.dir, "segments", fmt.Sprintf("%08d.%s", number, end))
}

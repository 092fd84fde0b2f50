package store

import (
	"errors"
	"maps"
	"path"
	"slices"
	"time"

	"dmi/tensor"
)

// How what is written becomes durable, and the catalogue learns of it.

// sync makes durable what is in segments and manifest, and commits the catalogue. last: nothing will follow.
//
// What is to be committed is noted first; then come data, manifest, catalogue, in this order: what the manifest's sync point vouches for is on the disk, and the
// catalogue is never ahead. Writing may go on meanwhile. Syncing before noting would need it to stop, which halved the rate.
func (s *Store) sync(last bool) error {
	defer s.way.hold()()
	begun := time.Now()
	s.log.Lock()
	s.mu.Lock()
	applied := *s.logEnd.Load()
	p := syncPoint{segment: s.nextSegment, low: s.lowReplacement(s.flight.low(s.buffer.low(applied)))}
	if s.beginning != 0 { // it may have rows before this is durable
		p.segment = s.beginning
	}
	open := s.open
	if i := slices.IndexFunc(open, func(o *openSegment) bool { return o.active }); i >= 0 { // in those before it nothing changes any more
		p.segment, p.end = open[i].number, open[i].end
	}
	ch := s.capture(checkpoint{applied: applied, low: p.low, segment: p.segment, end: p.end, next: s.nextSegment})
	oldest := s.oldest
	s.oldest, s.oldestInSync = time.Time{}, oldest // the buffer tells of rows that are in no segment yet, which are not made durable by this
	s.mu.Unlock()
	s.log.Unlock()
	err := s.syncSegments(open)
	if err == nil {
		err = s.syncPoint(p, ch, last)
	}
	if err == nil {
		end := s.ongoing.begin("commit", s.cataloguePath())
		err = explain("commit the catalogue", s.cat.commit(ch))
		end()
	}
	s.log.Lock() // no request is looked up while some are forgotten
	s.mu.Lock()
	s.settleCommit(ch, err == nil)
	s.oldestInSync = time.Time{}
	if err != nil {
		s.oldest = earlier(s.oldest, oldest)
	}
	if err == nil {
		s.metrics.Syncs++
		s.metrics.LastSync = time.Since(begun)
	}
	s.mu.Unlock()
	s.log.Unlock()
	if err != nil {
		s.fail(err)
	}
	return err
}

// syncPoint writes a sync point, and makes the manifest durable. Frames are not kept waiting for the disk.
func (s *Store) syncPoint(p syncPoint, ch *change, last bool) error {
	s.log.Lock()
	_, err := s.manifest.append(frameSync, p.encode())
	s.mu.Lock()
	s.logMoved()
	s.mu.Unlock()
	number, end := s.manifest.number, s.manifest.end
	s.log.Unlock()
	if err == nil {
		err = s.syncManifestFile(number)
	}
	if last {
		ch.checkpoint.closed = end
	}
	return explain("sync the manifest", err)
}

// syncManifestFile makes a file of the manifest durable, and with it those before, which were when the next was begun.
func (s *Store) syncManifestFile(number uint64) error {
	f, err := s.fs.Open(manifestName(path.Join(s.dir, "manifest"), number), true)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// capture copies what has to be committed. With mu held.
func (s *Store) capture(p checkpoint) *change {
	ch := &change{sites: map[uint32][]tensor.Site{}, siteTotals: map[uint32][]SiteTotal{}, lanes: map[laneKey]uint64{}, produced: map[uint32]uint64{},
		segments: s.pending, gone: s.newGone, expired: map[uint32]uint64{}, sets: s.books.newSets, removed: s.books.removed, checkpoint: p, dirty: s.dirty, lineSet: s.books.dirty}
	s.buffer.recount(ch.dirty.totals)
	s.dirty, s.newGone = newDirty(), nil
	s.books.newSets, s.books.removed, s.books.dirty = nil, map[int64]bool{}, map[*line]tensor.RequestKey{}
	s.books.removing = ch.removed
	for n := range ch.dirty.sessions {
		ch.sessions = append(ch.sessions, s.sessions[n].Session)
	}
	for k := range ch.dirty.sites {
		ch.sites[k.session] = append(ch.sites[k.session], s.sessions[k.session].sites[k.site])
	}
	for k := range ch.dirty.totals {
		ch.siteTotals[k.session] = append(ch.siteTotals[k.session], s.buffer.total(k.session, s.sessions[k.session].totals[k.site], true))
	}
	for k := range ch.dirty.lanes {
		ch.lanes[k] = s.lanes[k]
	}
	for id := range ch.dirty.runs {
		r := *s.runs[id]
		ch.runs = append(ch.runs, &r)
	}
	for key := range ch.dirty.requests {
		r := *s.requests[key]
		ch.requests = append(ch.requests, &r)
	}
	for n := range ch.dirty.produced {
		ch.produced[n] = s.books.produced[n]
	}
	for n := range ch.dirty.expired {
		ch.expired[n] = s.books.expired[n]
	}
	for t := range ch.dirty.sums {
		t.Rows = s.books.totals[t]
		ch.totals = append(ch.totals, t)
	}
	for l := range ch.lineSet {
		ch.lines = append(ch.lines, *l)
	}
	return ch
}

// settleCommit forgets what was committed, or marks it to be written again. With log and mu held.
func (s *Store) settleCommit(ch *change, committed bool) {
	s.books.removing = nil
	if !committed {
		merge(s.dirty.sessions, ch.dirty.sessions)
		merge(s.dirty.sites, ch.dirty.sites)
		merge(s.dirty.totals, ch.dirty.totals)
		merge(s.dirty.lanes, ch.dirty.lanes)
		merge(s.dirty.runs, ch.dirty.runs)
		merge(s.dirty.requests, ch.dirty.requests)
		merge(s.dirty.produced, ch.dirty.produced)
		merge(s.dirty.sums, ch.dirty.sums)
		merge(s.dirty.expired, ch.dirty.expired)
		s.newGone = append(ch.gone, s.newGone...)
		for l, key := range ch.lineSet {
			if !s.books.removed[l.id] {
				s.books.dirty[l] = key
			}
		}
		s.books.newSets = append(ch.sets, s.books.newSets...)
		maps.Copy(s.books.removed, ch.removed)
		return
	}
	s.pending = s.pending[len(ch.segments):]
	for _, g := range ch.gone {
		delete(s.gone, g.number)
	}
	for id := range ch.dirty.runs {
		if !s.dirty.runs[id] && !s.runs[id].Ended.IsZero() {
			delete(s.runs, id)
		}
	}
	busy := map[tensor.RequestKey]bool{}
	if len(s.finished) > 0 {
		busy = s.buffer.requests()
	}
	for _, key := range s.books.dirty {
		busy[key] = true
	}
	var later []tensor.RequestKey
	for _, key := range s.finished {
		if busy[key] || s.dirty.requests[key] {
			later = append(later, key)
			continue
		}
		delete(s.books.open, key)
		delete(s.requests, key)
	}
	s.finished = later
}

func merge[K comparable](into, from map[K]bool) { maps.Copy(into, from) }

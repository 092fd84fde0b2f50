package store

import (
	"errors"
	"io/fs"
	"path"
	"slices"
	"time"

	"dmi/internal/vfs"
	"dmi/store/segment"
	"dmi/tensor"
)

// How segments begin and end. All of it is called by the writing goroutine.

// begin makes sure that there is a segment to write to: the one that was made ahead, or a new one.
func (s *Store) begin() error {
	if s.current != nil {
		return nil
	}
	o := s.takeAhead()
	if o == nil {
		var err error
		if o, err = s.makeSegment(); err != nil {
			return err
		}
	}
	s.mu.Lock()
	s.open = append(slices.Clip(s.open), o)
	s.beginning = 0
	s.mu.Unlock()
	s.current = o
	return nil
}

// makeSegment makes the file of a segment, under a durable name. One at a time.
func (s *Store) makeSegment() (*openSegment, error) {
	s.mu.Lock()
	number, now := s.nextSegment, time.Now().UnixNano()
	s.nextSegment++
	s.beginning = number
	s.mu.Unlock()
	name := s.segmentPath(number, false)
	limits := segment.Limits{Bytes: int64(s.opt.SegmentMiB) << 20, Tensors: s.opt.SegmentTensors, Header: int64(s.opt.HeaderKiB) << 10}
	w, err := segment.Create(s.fs, name, segment.Identity{Store: s.id, Number: number, Created: now}, limits, s.opt.direct())
	if err == nil {
		if err = s.fs.SyncDir(path.Dir(name)); err != nil {
			w.Close()
			s.fs.Remove(name)
		}
	}
	if err != nil {
		s.mu.Lock()
		s.beginning = 0
		s.mu.Unlock()
		return nil, explain("begin segment "+name, err)
	}
	return &openSegment{number: number, path: name, writer: w, active: true, end: w.End(), created: now, chunks: map[tensor.RequestKey][]*segment.Chunk{}}, nil
}

// makeAhead has the next segment made once the current one is half full. To make its name durable takes the disk as long as to write tens of megabytes,
// for which the rows would otherwise wait.
func (s *Store) makeAhead() {
	if s.upcoming != nil || !s.current.writer.HalfFull() {
		return
	}
	ahead := make(chan *openSegment, 1)
	s.upcoming = ahead
	go func() {
		o, _ := s.makeSegment() // begin tries again, and tells why not
		ahead <- o
	}()
}

// takeAhead is the segment that was made ahead, or nil. One that is old would have to be sealed at once.
func (s *Store) takeAhead() *openSegment {
	if s.upcoming == nil {
		return nil
	}
	o := <-s.upcoming
	s.upcoming = nil
	if o != nil && time.Since(time.Unix(0, o.created)) >= s.opt.SegmentAge {
		s.unmake(o)
		return nil
	}
	return o
}

// openBytes is what segments have that are not sealed, and the one that is made ahead: its header's room and its first batch. With mu held.
func (s *Store) openBytes() (bytes int64) {
	for _, o := range s.open {
		bytes += o.end
	}
	if s.beginning != 0 {
		bytes += int64(s.opt.HeaderKiB)<<10 + vfs.Align
	}
	return bytes
}

// unmake removes a segment that was never the current one.
func (s *Store) unmake(o *openSegment) {
	o.writer.Close()
	s.fs.Remove(o.path)
	s.mu.Lock()
	s.beginning = 0
	s.mu.Unlock()
}

// seal has the current segment made a safetensors file, and durable; the next can begin meanwhile.
func (s *Store) seal() error {
	if err := s.awaitSeal(); err != nil {
		return err
	}
	o := s.current
	s.current, s.sealing = nil, o
	go func() {
		groups, err := o.writer.Seal(s.segmentPath(o.number, true))
		if err == nil {
			err = s.sealedNow(o, groups, o.writer.Data())
		}
		s.sealedOne <- explain("seal a segment", err)
	}()
	return nil
}

// sealedNow moves a segment from the open ones to the sealed.
func (s *Store) sealedNow(o *openSegment, groups []segment.Group, data int64) error {
	size, err := s.fs.Stat(s.segmentPath(o.number, true))
	if err != nil {
		return explain("seal a segment", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addSealed(sealedSegment{number: o.number, bytes: size, data: data, chunks: o.count, created: o.created, groups: groups})
	s.open = slices.DeleteFunc(slices.Clone(s.open), func(other *openSegment) bool { return other == o })
	return nil
}

func (s *Store) forget(o *openSegment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open = slices.DeleteFunc(slices.Clone(s.open), func(other *openSegment) bool { return other == o })
}

// adoptSealed takes a segment as sealed that already has its final name.
func (s *Store) adoptSealed(o *openSegment) error {
	f, err := s.fs.Open(s.segmentPath(o.number, true), false)
	if err != nil {
		return explain("seal "+o.path, err)
	}
	defer f.Close()
	contents, err := segment.Scan(f)
	if err == nil {
		err = s.fs.SyncDir(path.Dir(o.path))
	}
	if err != nil {
		return explain("seal "+o.path, err)
	}
	return s.sealedNow(o, contents.Groups(), contents.Data)
}

// syncSegments makes durable what is in segments that are not sealed.
func (s *Store) syncSegments(open []*openSegment) error {
	for _, o := range open {
		f, err := s.fs.Open(o.path, true)
		if errors.Is(err, fs.ErrNotExist) {
			continue // sealed since, which includes a sync, or without a chunk and removed
		}
		if err == nil {
			err = errors.Join(f.Sync(), f.Close())
		}
		if err != nil {
			return explain("sync "+o.path, err)
		}
	}
	return nil
}

func (s *Store) addSealed(g sealedSegment) {
	for _, r := range g.groups {
		g.rows += r.Rows
		g.chunkBytes += r.Bytes
	}
	s.pending = append(s.pending, g)
	g.groups = nil
	s.sealed[g.number] = g
}

// rollOver seals what is old enough, or what a failure left behind.
func (s *Store) rollOver(now time.Time, everything bool) error {
	if o := s.current; o != nil && (everything || now.Sub(time.Unix(0, o.created)) >= s.opt.SegmentAge) {
		if o.writer.Empty() { // not o.count, which a slow disk leaves at 0 while chunks are on their way
			s.discard()
		} else if err := s.seal(); err != nil {
			return err
		}
	}
	s.mu.Lock()
	left := s.open
	s.mu.Unlock()
	for _, o := range left {
		if o != s.current && o != s.sealing {
			if err := s.sealLeft(o); err != nil {
				s.fail(err)
				return err
			}
		}
	}
	return nil
}

// discard removes the current segment, which has no chunk.
func (s *Store) discard() {
	o := s.current
	o.writer.Close()
	s.fs.Remove(o.path)
	s.current = nil
	s.forget(o)
}

// sealLeft seals a segment that has no writer: a failure or another process left it.
func (s *Store) sealLeft(o *openSegment) error {
	f, err := s.fs.Open(o.path, true)
	if errors.Is(err, fs.ErrNotExist) { // the renaming succeeded, and what came after did not
		return s.adoptSealed(o)
	}
	if err != nil {
		return explain("seal "+o.path, err)
	}
	if o.count == 0 {
		f.Close()
		if err := s.fs.Remove(o.path); err != nil {
			return explain("remove an empty segment", err)
		}
		s.forget(o)
		return nil
	}
	w, contents, err := segment.Resume(s.fs, o.path, f, o.end, segment.Limits{})
	if err != nil {
		f.Close()
		return explain("seal "+o.path, err)
	}
	groups, err := w.Seal(s.segmentPath(o.number, true))
	if err != nil {
		return explain("seal "+o.path, err)
	}
	o.count = len(contents.Chunks)
	return s.sealedNow(o, groups, contents.Data)
}

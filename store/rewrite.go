package store

import (
	"errors"
	"fmt"
	"path"

	"dmi/store/segment"
)

// rewriter writes the segments that take others' place. They have temporary names until a replacement says so, and go if none does.
type rewriter struct {
	s       *Store
	created int64 // of the youngest that is replaced: rows are kept as long as they were to be
	writer  *segment.Writer
	number  uint64
	count   int
	batch   int64 // bytes since the last index block
	made    []sealedSegment
}

// add appends a chunk, under the names that its request and site have. damaged: its bytes fail c.CRC, and are to go on failing it.
func (r *rewriter) add(c segment.Chunk, request string, data []byte, damaged bool) error {
	site := r.s.siteName(c.Key.Session, c.Site)
	bytes := int64(len(data))
	if r.writer != nil && r.writer.Full(bytes) {
		if err := r.seal(); err != nil {
			return err
		}
	}
	for {
		if err := r.begin(); err != nil {
			return err
		}
		var fits bool
		var err error
		if damaged {
			fits, err = r.writer.AppendDamaged(c, request, site, data)
		} else {
			fits, err = r.writer.Append(c, request, site, data)
		}
		if err != nil {
			return err
		}
		if fits {
			break
		}
		if r.writer.Empty() {
			return fmt.Errorf("the names of request %q and site %q do not fit a segment's header", request, site)
		}
		if err := r.seal(); err != nil {
			return err
		}
	}
	r.count++
	if r.batch += bytes; r.batch >= batchBytes {
		r.batch = 0
		return r.writer.EndBatch(nil)
	}
	return nil
}

func (s *Store) siteName(session, site uint32) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.sessions[session]; t != nil {
		if known, is := t.sites[site]; is {
			return known.Name
		}
	}
	return fmt.Sprintf("site.%d", site)
}

func (r *rewriter) begin() error {
	if r.writer != nil {
		return nil
	}
	s := r.s
	s.mu.Lock()
	r.number = s.nextSegment
	s.nextSegment++
	s.mu.Unlock()
	limits := segment.Limits{Bytes: int64(s.opt.SegmentMiB) << 20, Tensors: s.opt.SegmentTensors, Header: int64(s.opt.HeaderKiB) << 10}
	var err error
	r.writer, err = segment.Create(s.fs, r.makingPath(), segment.Identity{Store: s.id, Number: r.number, Created: r.created}, limits, s.opt.direct())
	r.count, r.batch = 0, 0
	return err
}

func (r *rewriter) makingPath() string {
	return path.Join(r.s.dir, "segments", fmt.Sprintf("%08d.making", r.number))
}

func (r *rewriter) seal() error {
	if r.writer == nil {
		return nil
	}
	w := r.writer
	defer func() { r.writer = nil }()
	if w.Pending() > 0 {
		if err := w.EndBatch(nil); err != nil {
			return err
		}
	}
	groups, err := w.Seal(r.s.madePath(r.number))
	if err != nil {
		r.s.fs.Remove(r.makingPath())
		return err
	}
	size, err := r.s.fs.Stat(r.s.madePath(r.number))
	r.made = append(r.made, sealedSegment{number: r.number, bytes: size, data: w.Data(), chunks: r.count, created: r.created, groups: groups})
	return err
}

// discard removes what was written in vain.
func (r *rewriter) discard() {
	if r.writer != nil {
		r.writer.Close()
		r.s.fs.Remove(r.makingPath())
		r.writer = nil
	}
	for _, m := range r.made {
		r.s.fs.Remove(r.s.madePath(m.number))
	}
	r.made = nil
}

// copyGroups appends groups of a segment as they are, each chunk checked; one whose bytes are wrong is carried over with the checksum that it fails, and stays
// damaged as it was. pace is told of bytes.
func (r *rewriter) copyGroups(number uint64, listed []segment.Listed, pace func(int64) error) error {
	f, err := r.s.openSegmentFile(number)
	if err != nil {
		return err
	}
	defer f.Close()
	var buf []byte
	for i := range listed {
		for j := range listed[i].Chunks {
			c := listed[i].Chunks[j]
			buf, err = segment.Read(f, &c, buf)
			damaged := errors.Is(err, segment.ErrChecksum)
			if err != nil && !damaged {
				return r.s.readError(number, err)
			}
			if damaged {
				r.s.opt.Log("error", "damaged", fmt.Sprintf("segment %d is written anew, and with it %d rows of request %s whose bytes are not those that were written; they stay so, and nobody is given them",
					number, c.Rows, listed[i].ID))
			}
			if err := r.add(c, listed[i].ID, buf, damaged); err != nil {
				return err
			}
			if err := pace(int64(len(buf))); err != nil {
				return err
			}
		}
	}
	return nil
}

// rewrite replaces segments by what write makes of them, or leaves everything as it is.
func (s *Store) rewrite(old []goneSegment, created int64, write func(*rewriter) error) ([]sealedSegment, error) {
	r := &rewriter{s: s, created: created}
	err := write(r)
	if err == nil {
		err = r.seal()
	}
	if err != nil {
		r.discard()
		return nil, explainOnce("rewrite segments", err)
	}
	made := r.made
	err = s.replace(old, made)
	if err != nil && !s.replaced(old) {
		r.discard()
	}
	return made, err
}

// replaced reports whether segments are gone, though something went wrong after.
func (s *Store) replaced(old []goneSegment) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, g := range old {
		if _, there := s.sealed[g.number]; there {
			return false
		}
	}
	return true
}

package store

import (
	"bytes"
	"slices"

	"dmi/internal/vfs"
	"dmi/store/segment"
	"dmi/tensor"
)

// How chunks of a request and site become one.

const (
	mergedBytes = 16 << 20 // of a chunk that compaction makes, at most: all of it is read for any row of it
	// Rows of a keyed site are as long as their chunk's last one; so joining them adds fill. At most a quarter of what they are is added.
	paddedShare = 4
)

// located is a chunk of a sealed segment.
type located struct {
	segment uint64
	*segment.Chunk
}

// inRuns cuts chunks, in their order, into runs that can be one chunk each.
func (s *Store) inRuns(chunks []located) (runs [][]located) {
	for len(chunks) > 0 {
		site := s.site(chunks[0].Key.Session, chunks[0].Site)
		n := 1
		stored := chunks[0].Length
		for n < len(chunks) && joins(site.Keyed, chunks[n-1].Chunk, chunks[n].Chunk) {
			stored += chunks[n].Length
			if whole := joined(chunks[:n+1]).Length; whole > mergedBytes || whole > stored+stored/paddedShare {
				break
			}
			n++
		}
		runs = append(runs, chunks[:n:n])
		chunks = chunks[n:]
	}
	return runs
}

func (s *Store) site(session, site uint32) tensor.Site {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.sessions[session]; t != nil {
		return t.sites[site]
	}
	return tensor.Site{}
}

// joins reports whether b goes on where a ends, and its rows are of the same kind.
func joins(keyed bool, a, b *segment.Chunk) bool {
	if a.Key != b.Key || a.Site != b.Site || a.Attempt != b.Attempt || a.DType != b.DType || a.Level != b.Level || a.Policy != b.Policy ||
		uint64(a.First)+uint64(a.Rows) != uint64(b.First) {
		return false
	}
	if last := len(a.Shape) - 1; keyed && last >= 0 && a.Level.Elements() {
		return len(b.Shape) == len(a.Shape) && slices.Equal(a.Shape[:last], b.Shape[:last])
	}
	return slices.Equal(a.Shape, b.Shape)
}

// joined is what a run becomes, without its bytes.
func joined(run []located) segment.Chunk {
	c := *run[0].Chunk
	c.Copy, c.Offset, c.CRC = 0, 0, 0
	for _, more := range run[1:] {
		c.Rows += more.Rows
		c.LastStep = max(c.LastStep, more.LastStep)
		if last := len(c.Shape) - 1; last >= 0 && more.Shape[last] > c.Shape[last] {
			c.Shape = append(slices.Clone(c.Shape[:last]), more.Shape[last])
		}
	}
	c.Length = int64(c.Rows) * int64(tensor.RowBytes(c.Level, c.DType, c.Shape))
	return c
}

// merge gives a run's bytes, read and checked. They are valid until the next call.
func (m *merger) merge(run []located) (segment.Chunk, []byte, error) {
	c := joined(run)
	row := tensor.RowBytes(c.Level, c.DType, c.Shape)
	m.out = slices.Grow(m.out[:0], int(c.Length))
	for _, part := range run {
		f, err := m.file(part.segment)
		if err != nil {
			return c, nil, inSegment(part.segment, err)
		}
		if m.buf, err = segment.Read(f, part.Chunk, m.buf); err != nil {
			return c, nil, inSegment(part.segment, m.s.readError(part.segment, err))
		}
		if int64(row)*int64(part.Rows) == part.Length {
			m.out = append(m.out, m.buf...)
			continue
		}
		size := c.DType.Size()
		short, long := part.Shape[len(part.Shape)-1]*size, c.Shape[len(c.Shape)-1]*size
		fill := bytes.Repeat(m.s.site(c.Key.Session, c.Site).Fill.Element(c.DType), (long-short)/size)
		for from := 0; from < len(m.buf); from += short {
			m.out = append(append(m.out, m.buf[from:from+short]...), fill...)
		}
	}
	c.Length = 0 // Append counts
	return c, m.out, nil
}

// merger reads what is merged.
type merger struct {
	s     *Store
	files map[uint64]vfs.File
	buf   []byte
	out   []byte
}

func (m *merger) file(number uint64) (vfs.File, error) {
	if f := m.files[number]; f != nil {
		return f, nil
	}
	f, err := m.s.openSegmentFile(number)
	if err == nil {
		m.files[number] = f
	}
	return f, err
}

func (m *merger) close() {
	for _, f := range m.files {
		f.Close()
	}
}

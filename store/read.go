package store

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"sync"

	"dmi/internal/vfs"
	"dmi/store/segment"
	"dmi/tensor"
)

// Chunks lists where the rows of a request at a site with positions in [from, to) are, ordered by First; several attempts at a position are all listed. Chunks of
// one attempt and level do not overlap. What is buffered, being written and sealed is seen as one.
func (s *Store) Chunks(key tensor.RequestKey, site uint32, from, to uint32) ([]ChunkRef, error) {
	var refs []ChunkRef
	add := func(r ChunkRef) {
		if r.Site == site && r.First < to && uint64(r.First)+uint64(r.Rows) > uint64(from) {
			refs = append(refs, r)
		}
	}
	if err := s.gather(key, []uint32{site}, add); err != nil {
		return nil, err
	}
	return disjoint(refs), nil
}

// gather calls add for each chunk of a request in segments, and in the buffer for those sites, at one moment.
func (s *Store) gather(key tensor.RequestKey, sites []uint32, add func(ChunkRef)) error {
	for {
		var refs []ChunkRef
		before, err := s.gatherOnce(key, sites, func(r ChunkRef) { refs = append(refs, r) })
		s.mu.Lock()
		moved := s.generation != before
		s.mu.Unlock()
		if moved { // segments were replaced meanwhile: what was found may be partly of both
			continue
		}
		if err != nil {
			return err
		}
		for _, r := range refs {
			add(r)
		}
		return nil
	}
}

// gatherOnce does so for one generation of segments, and says which.
func (s *Store) gatherOnce(key tensor.RequestKey, sites []uint32, add func(ChunkRef)) (generation uint64, err error) {
	s.mu.Lock()
	generation = s.generation
	for _, site := range sites {
		s.buffer.refs(streamKey{key, site}, add)
	}
	for _, o := range s.open {
		for _, c := range o.chunks[key] {
			add(refOf(c, o.number))
		}
	}
	listed, gone := s.pendingGroups(key)
	s.mu.Unlock()
	if err := s.committedGroups(key, listed, gone); err != nil {
		return generation, err
	}
	for number, g := range listed {
		chunks, err := s.chunksOf(number, g)
		if err != nil {
			return generation, err
		}
		for _, c := range chunks {
			add(refOf(c, number))
		}
	}
	return generation, nil
}

// pendingGroups are where sealed segments that the catalogue may not have yet list a request's chunks, and the segments that it may have and that are gone.
// With mu held.
func (s *Store) pendingGroups(key tensor.RequestKey) (listed map[uint64]segment.Group, gone map[uint64]bool) {
	listed, gone = map[uint64]segment.Group{}, maps.Clone(s.gone)
	for _, g := range s.pending {
		if gone[g.number] {
			continue
		}
		if i, found := slices.BinarySearchFunc(g.groups, key, func(g segment.Group, key tensor.RequestKey) int {
			return cmp.Or(cmp.Compare(g.Key.Session, key.Session), cmp.Compare(g.Key.Request, key.Request))
		}); found {
			listed[g.number] = g.groups[i]
		}
	}
	return listed, gone
}

// committedGroups adds those that the catalogue has. A segment is in it before it leaves pending, so none is missed between the two.
func (s *Store) committedGroups(key tensor.RequestKey, listed map[uint64]segment.Group, gone map[uint64]bool) error {
	committed, err := s.cat.groups(key)
	if err != nil {
		return explain(fmt.Sprintf("look up request %d", key.Request), err)
	}
	for number, g := range committed {
		if !gone[number] {
			listed[number] = g
		}
	}
	return nil
}

// groups are where sealed segments list a request's chunks, for the holder of rewriting.
func (s *Store) groups(key tensor.RequestKey) (map[uint64]segment.Group, error) {
	s.mu.Lock()
	listed, gone := s.pendingGroups(key)
	s.mu.Unlock()
	return listed, s.committedGroups(key, listed, gone)
}

func refOf(c *segment.Chunk, number uint64) ChunkRef {
	return ChunkRef{Key: c.Key, Site: c.Site, Attempt: c.Attempt, First: c.First, Rows: c.Rows, Step: c.Step, LastStep: c.LastStep, DType: c.DType, Level: c.Level,
		Policy: c.Policy, Shape: c.Shape, segment: number, entry: c}
}

// disjoint orders refs and cuts away what another of the same attempt and level also has: rows of a stream that was partly written when the disk failed are in
// two places, and the same.
func disjoint(refs []ChunkRef) []ChunkRef {
	slices.SortStableFunc(refs, func(a, b ChunkRef) int {
		return cmp.Or(cmp.Compare(a.Attempt, b.Attempt), cmp.Compare(a.Level, b.Level), cmp.Compare(a.First, b.First), cmp.Compare(b.Rows, a.Rows))
	})
	kept := refs[:0]
	var end uint64
	for i, r := range refs {
		if i == 0 || r.Attempt != refs[i-1].Attempt || r.Level != refs[i-1].Level {
			end = 0
		}
		last := uint64(r.First) + uint64(r.Rows)
		if last <= end {
			continue
		}
		if uint64(r.First) < end {
			cut := uint32(end - uint64(r.First))
			r.skip, r.First, r.Rows = r.skip+cut, r.First+cut, r.Rows-cut
		}
		end = last
		kept = append(kept, r)
	}
	slices.SortStableFunc(kept, func(a, b ChunkRef) int {
		return cmp.Or(cmp.Compare(a.First, b.First), cmp.Compare(a.Attempt, b.Attempt))
	})
	return kept
}

// RowBytes is the size of one row of a ref.
func (r *ChunkRef) RowBytes() int {
	return tensor.RowBytes(r.Level, r.DType, r.Shape)
}

// ReadRows reads rows [from, to) of ref, counted from its first, into dst, which is exactly as long. What comes from a segment has been held against its checksum:
// on ErrCorrupt nothing is to be used.
func (s *Store) ReadRows(ref ChunkRef, from, to uint32, dst []byte) error {
	err := s.readRows(ref, from, to, dst)
	if errors.Is(err, ErrGone) {
		return s.readMoved(ref, from, to, dst, err)
	}
	return err
}

// readMoved reads rows whose segment another took the place of since ref was made.
func (s *Store) readMoved(ref ChunkRef, from, to uint32, dst []byte, why error) error {
	first, end := ref.First+from, ref.First+to
	refs, err := s.Chunks(ref.Key, ref.Site, first, end)
	if err != nil {
		return err
	}
	row := ref.RowBytes()
	for _, r := range refs {
		if r.Attempt != ref.Attempt || r.Level != ref.Level || r.First > first || uint64(r.First)+uint64(r.Rows) <= uint64(first) {
			continue
		}
		n := min(end, r.First+r.Rows) - first
		stored := r.RowBytes()
		data := dst[:int(n)*row]
		if stored != row { // rows of a keyed site grew by fill
			data = make([]byte, int(n)*stored)
		}
		if err := s.readRows(r, first-r.First, first-r.First+n, data); err != nil {
			return err
		}
		if stored != row {
			if err := narrow(dst[:int(n)*row], data, ref.Shape, r.Shape, ref.DType.Size()); err != nil {
				return err
			}
		}
		dst = dst[int(n)*row:]
		if first += n; first == end {
			return nil
		}
	}
	return why
}

// narrow copies rows whose last dimension is longer than that of dst's, and otherwise the same.
func narrow(dst, src []byte, to, from []int, size int) error {
	last := len(to) - 1
	if last < 0 || len(from) != len(to) || !slices.Equal(from[:last], to[:last]) || from[last] < to[last] {
		return fmt.Errorf("store: read rows of shape %v, which are now of shape %v: ask again", to, from)
	}
	a, b := to[last]*size, from[last]*size
	for len(src) > 0 && a > 0 {
		copy(dst[:a], src[:a])
		dst, src = dst[a:], src[b:]
	}
	return nil
}

func (s *Store) readRows(ref ChunkRef, from, to uint32, dst []byte) error {
	row := ref.RowBytes()
	if from > to || to > ref.Rows || len(dst) != int(to-from)*row {
		return fmt.Errorf("store: read rows %d to %d of a chunk of %d rows of %d bytes into %d bytes: they do not fit", from, to, ref.Rows, row, len(dst))
	}
	from, to = from+ref.skip, to+ref.skip
	if ref.entry == nil {
		copy(dst, ref.data[int(from)*row:int(to)*row])
		return nil
	}
	whole := from == 0 && to == ref.entry.Rows
	if !whole {
		if data := s.cache.get(ref.segment, ref.entry.Offset); data != nil {
			copy(dst, data[int(from)*row:int(to)*row])
			return nil
		}
	}
	f, err := s.openSegmentFile(ref.segment)
	if err != nil {
		return err
	}
	defer f.Close()
	var data []byte
	if whole {
		data = dst[:0:len(dst)]
	}
	if data, err = segment.Read(f, ref.entry, data); err != nil {
		return s.readError(ref.segment, err)
	}
	if !whole {
		s.cache.put(ref.segment, ref.entry.Offset, data)
		copy(dst, data[int(from)*row:int(to)*row])
	}
	return nil
}

// WillRead has the disk fetch the rows of chunks that are soon read, so that it works while those before them are checked and handed on. It waits for nothing, and what
// cannot be had is told by ReadRows.
func (s *Store) WillRead(refs []ChunkRef) {
	var f vfs.File
	var open uint64
	for i := range refs {
		ref := &refs[i]
		if ref.entry == nil {
			continue // in memory
		}
		if f == nil || ref.segment != open {
			if f != nil {
				f.Close()
			}
			var err error
			if f, err = s.openSegmentFile(ref.segment); err != nil {
				return
			}
			open = ref.segment
		}
		f.WillRead(ref.entry.Offset, ref.entry.Length)
	}
	if f != nil {
		f.Close()
	}
}

func (s *Store) readError(number uint64, err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = fmt.Errorf("%w: %w", err, ErrCorrupt)
	}
	return explain(fmt.Sprintf("read segment %d", number), err)
}

// openSegmentFile opens a segment to be read, under whichever name it now has. Its readers give way to the writer.
func (s *Store) openSegmentFile(number uint64) (vfs.File, error) {
	f, err := s.fs.Open(s.segmentPath(number, true), false)
	for range 2 { // it may be renamed between one try and the next
		if !errors.Is(err, fs.ErrNotExist) {
			break
		}
		if f, err = s.fs.Open(s.segmentPath(number, false), false); errors.Is(err, fs.ErrNotExist) {
			f, err = s.fs.Open(s.segmentPath(number, true), false)
		}
	}
	if errors.Is(err, fs.ErrNotExist) { // it took others' place, and has not got its name yet
		if f, err = s.fs.Open(s.madePath(number), false); errors.Is(err, fs.ErrNotExist) {
			f, err = s.fs.Open(s.segmentPath(number, true), false)
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("store: read segment %d: %w", number, ErrGone)
	}
	if err != nil {
		return nil, explain(fmt.Sprintf("open segment %d", number), err)
	}
	return yielding{f, &s.way}, nil
}

// chunksOf lists a request's chunks in a sealed segment.
func (s *Store) chunksOf(number uint64, g segment.Group) ([]*segment.Chunk, error) {
	if chunks := s.cache.list(number, g.Key); chunks != nil {
		return chunks, nil
	}
	if g.List != "" {
		if key, list, err := segment.ParseGroup([]byte(g.List)); err == nil && key == g.Key { // else the segment has it, and Verify tells
			return s.cache.keep(number, key, list), nil
		}
	}
	f, err := s.openSegmentFile(number)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, s.readError(number, err)
	}
	if g.Offset < 0 || g.Length < 0 || g.Offset+g.Length > size {
		return nil, fmt.Errorf("store: segment %d is %d bytes, and request %d's list reaches to %d: %w", number, size, g.Key.Request, g.Offset+g.Length, ErrCorrupt)
	}
	b := make([]byte, min(max(g.Length, listsAtOnce), size-g.Offset))
	if _, err := f.ReadAt(b, g.Offset); err != nil {
		return nil, s.readError(number, err)
	}
	key, list, err := segment.ParseGroup(b[:g.Length])
	if err == nil && key != g.Key {
		err = fmt.Errorf("segment: a list of request %d", key.Request)
	}
	if err != nil {
		if list = byIndex(f, g); list == nil {
			return nil, fmt.Errorf("store: segment %d, list of request %d at %d: %w: %w", number, g.Key.Request, g.Offset, err, ErrCorrupt)
		}
	}
	chunks := s.cache.keep(number, g.Key, list)
	for b = b[g.Length:]; ; {
		n := segment.GroupLength(b)
		if n == 0 || n > int64(len(b)) {
			break
		}
		next, list, err := segment.ParseGroup(b[:n])
		if err != nil {
			break // whoever asks for it is told
		}
		s.cache.keep(number, next, list)
		b = b[n:]
	}
	return chunks, nil
}

// listsAtOnce is how much of a segment's directory is read at a time. A list is a few KB, and those behind it are of the requests that came next: who reads a
// site of many requests asks for them soon.
const listsAtOnce = 128 << 10

// byIndex lists a request's chunks by a segment's index blocks, where its directory is damaged: all of them, or nil.
func byIndex(f vfs.File, g segment.Group) []segment.Chunk {
	contents, err := segment.Scan(f)
	if err != nil {
		return nil
	}
	var list []segment.Chunk
	found := segment.Group{Key: g.Key, Offset: g.Offset, Length: g.Length, List: g.List}
	for _, c := range contents.Chunks {
		if c.Key == g.Key {
			list = append(list, c)
			found.Chunks++
			found.Rows += uint64(c.Rows)
			found.Bytes += uint64(c.Length)
		}
	}
	if found != g {
		return nil
	}
	slices.SortFunc(list, func(a, b segment.Chunk) int { return a.Compare(&b) })
	return list
}

// chunkCache keeps chunks of which only a part was wanted, and lists of chunks, so that reading a long request in small pieces does not read the same bytes again
// and again. Segments never change, so nothing in it ever goes stale.
type chunkCache struct {
	mu    sync.Mutex
	data  []cached // most recently used last
	bytes int
	lists map[listKey][]*segment.Chunk
	count int // chunks in lists
}

type cached struct {
	segment uint64
	offset  int64
	data    []byte
}

type listKey struct {
	segment uint64
	key     tensor.RequestKey
}

const (
	cacheBytes  = 32 << 20
	cacheChunks = 1 << 17 // in lists; some 20 MB
)

func (c *chunkCache) get(segment uint64, offset int64) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := len(c.data) - 1; i >= 0; i-- {
		if hit := c.data[i]; hit.segment == segment && hit.offset == offset {
			c.data = append(append(c.data[:i], c.data[i+1:]...), hit)
			return hit.data
		}
	}
	return nil
}

func (c *chunkCache) put(segment uint64, offset int64, data []byte) {
	if len(data) > cacheBytes/2 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.data = append(c.data, cached{segment, offset, data})
	for c.bytes += len(data); c.bytes > cacheBytes || len(c.data) > 1024; c.data = c.data[1:] {
		c.bytes -= len(c.data[0].data)
		c.data[0].data = nil
	}
}

// forget lets go of what is of a segment that is gone.
func (c *chunkCache) forget(number uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	kept := c.data[:0]
	for _, d := range c.data {
		if d.segment != number {
			kept = append(kept, d)
		} else {
			c.bytes -= len(d.data)
		}
	}
	clear(c.data[len(kept):])
	c.data = kept
	for k, chunks := range c.lists {
		if k.segment == number {
			c.count -= len(chunks)
			delete(c.lists, k)
		}
	}
}

func (c *chunkCache) list(number uint64, key tensor.RequestKey) []*segment.Chunk {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lists[listKey{number, key}]
}

func (c *chunkCache) keep(number uint64, key tensor.RequestKey, list []segment.Chunk) []*segment.Chunk {
	chunks := make([]*segment.Chunk, len(list))
	for i := range list {
		chunks[i] = &list[i]
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	own := listKey{number, key}
	c.count -= len(c.lists[own])
	if c.count += len(chunks); c.count > cacheChunks || c.lists == nil {
		c.lists, c.count = map[listKey][]*segment.Chunk{}, len(chunks)
	}
	c.lists[own] = chunks
	return chunks
}

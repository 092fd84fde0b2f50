package segment

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"path"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"dmi/internal/crc32c"
	"dmi/internal/vfs"
	"dmi/tensor"
)

// Limits say when a segment is full.
type Limits struct {
	Bytes   int64
	Tensors int
	Header  int64 // bytes up to the data; a multiple of vfs.Align
}

const (
	bufferBytes = 8 << 20 // of one write: 4 huge pages
	buffers     = 4       // some are filled while one is written: the disk does not wait for this process to be scheduled
)

// Writer appends to a segment. It is for one goroutine; a second, its own, does the writing, so that checksums and copies of one buffer
// overlap with the disk's work on the other. After an error it is dead: every call returns that error, and the file ends, for readers,
// at the last batch that was written whole.
type Writer struct {
	fs     vfs.FS
	path   string // of the open file
	file   vfs.File
	id     Identity
	limits Limits
	header *header

	buf   []byte // being filled; its start lies at offset `at` of the file
	at    int64
	batch uint64
	start int64 // of the batch
	items []byte
	added []Chunk // of the batch
	all   []Chunk // of the batches before

	held    []*vfs.Buffer // all of them
	free    chan []byte   // those that are empty; nil: not yet made
	work    chan job
	stopped chan struct{}
	busy    atomic.Int64 // nanoseconds in writes
	failure error        // set by the writing goroutine before it acknowledges; read by the other after
}

// job is a write, or an acknowledgement once everything before it is written, or both.
type job struct {
	data []byte // whole buffer to give back
	n    int
	at   int64
	done func(error)
}

// Create makes the segment's file and writes its first batch, which names it. The caller makes the name durable.
func Create(fs vfs.FS, name string, id Identity, limits Limits, direct bool) (*Writer, error) {
	if id.Nonce == 0 {
		var nonce [8]byte
		rand.Read(nonce[:])
		id.Nonce = binary.LittleEndian.Uint64(nonce[:])
	}
	file, err := fs.Create(name, direct)
	if err != nil {
		return nil, fmt.Errorf("segment: create %s: %w", name, err)
	}
	w := &Writer{fs: fs, path: name, file: file, id: id, limits: limits, header: newHeader(), at: limits.Header, start: limits.Header}
	w.run()
	w.items = append(w.items, itemIdentity)
	w.items = appendString(w.items, id.Store)
	w.items = binary.AppendUvarint(w.items, id.Number)
	w.items = binary.AppendUvarint(w.items, uint64(id.Created))
	if w.EndBatch(nil) == nil {
		_ = w.Drain() // failure says
	}
	if w.failure != nil {
		w.Close()
		fs.Remove(name)
		return nil, w.failure
	}
	return w, nil
}

// run starts the writing goroutine.
func (w *Writer) run() {
	w.free, w.work, w.stopped = make(chan []byte, buffers), make(chan job, buffers), make(chan struct{})
	for range buffers {
		w.free <- nil // allocated when first used
	}
	w.next()
	go func() {
		defer close(w.stopped)
		var failure error
		for j := range w.work {
			if j.n > 0 && failure == nil {
				began := time.Now()
				_, err := w.file.WriteAt(j.data[:j.n], j.at)
				w.busy.Add(int64(time.Since(began)))
				if err != nil {
					failure = fmt.Errorf("segment: write %d bytes at %d of %s: %w", j.n, j.at, w.path, err)
				}
			}
			if j.data != nil {
				w.free <- j.data[:0]
			}
			if j.done != nil {
				j.done(failure)
			}
		}
	}()
}

// next takes an empty buffer, waiting for one if all are in use.
func (w *Writer) next() {
	if w.buf = <-w.free; w.buf == nil {
		b := spare.take()
		w.held = append(w.held, b)
		w.buf = b.Bytes[:0]
	}
}

// spare has buffers of writers that are closed, for those to come.
var spare = spareBuffers{most: buffers}

type spareBuffers struct {
	mu   sync.Mutex
	list []*vfs.Buffer
	most int // that are kept
}

func (s *spareBuffers) take() *vfs.Buffer {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.list)
	if n == 0 {
		return vfs.NewBuffer(bufferBytes)
	}
	b := s.list[n-1]
	s.list = s.list[:n-1]
	return b
}

func (s *spareBuffers) give(buffers []*vfs.Buffer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range buffers {
		if len(s.list) < s.most {
			s.list = append(s.list, b)
		} else {
			b.Free()
		}
	}
}

// Number is the segment's.
func (w *Writer) Number() uint64 { return w.id.Number }

// Path is the open file's.
func (w *Writer) Path() string { return w.path }

// End is the offset up to which the file has been filled, written or on its way.
func (w *Writer) End() int64 { return w.at + int64(len(w.buf)) }

// Full reports whether a chunk had better go to the next segment.
func (w *Writer) Full(bytes int64) bool {
	size := w.End() - w.limits.Header
	return w.header.tensors+4 >= w.limits.Tensors || (size+bytes > w.limits.Bytes && len(w.all)+len(w.added) > 0)
}

// HalfFull reports whether it is time to think of the next segment.
func (w *Writer) HalfFull() bool {
	return w.header.tensors >= w.limits.Tensors/2 || w.End()-w.limits.Header >= w.limits.Bytes/2
}

// Append adds a chunk to the batch: c without Copy, Offset, Length and CRC, and its bytes in pieces. request and site are their names.
// False: the header has no room for it; nothing was added.
func (w *Writer) Append(c Chunk, request, site string, pieces ...[]byte) (bool, error) {
	return w.append(c, nil, request, site, pieces)
}

// AppendDamaged does the same for a chunk whose bytes are known to be wrong. They keep the checksum that they fail, c.CRC, so that nobody ever takes them for data.
func (w *Writer) AppendDamaged(c Chunk, request, site string, data []byte) (bool, error) {
	failed := c.CRC
	return w.append(c, &failed, request, site, [][]byte{data})
}

func (w *Writer) append(c Chunk, failed *uint32, request, site string, pieces [][]byte) (bool, error) {
	if w.failure != nil {
		return false, w.failure
	}
	_, known := w.header.request[c.Key]
	place := siteKey{c.Key.Session, c.Site}
	_, placed := w.header.site[place]
	if !known {
		w.header.request[c.Key] = request
	}
	if !placed {
		w.header.site[place] = site
	}
	if int64(w.header.room(&c)) > w.limits.Header {
		if !known {
			delete(w.header.request, c.Key)
		}
		if !placed {
			delete(w.header.site, place)
		}
		return false, nil
	}
	if !known {
		w.items = appendRequest(w.items, c.Key, request)
	}
	if !placed {
		w.items = appendSite(w.items, place, site)
	}
	if size := int64(c.DType.Size()); w.End()%size != 0 {
		p := pad{w.End(), size - w.End()%size}
		w.put(make([]byte, p.length))
		w.items = binary.AppendUvarint(append(w.items, itemPad), uint64(p.offset-w.start))
		w.items = binary.AppendUvarint(w.items, uint64(p.length))
		w.header.addPad(p, w.limits.Header)
	}
	c.Copy, c.Offset, c.Length, c.CRC = w.header.copyOf(&c), w.End(), 0, 0
	for _, p := range pieces {
		c.Length += int64(len(p))
		for len(p) > 0 { // in blocks that stay in the cache from the sum to the copy
			n := min(len(p), 32<<10)
			c.CRC = crc32c.Update(c.CRC, p[:n])
			w.put(p[:n])
			p = p[n:]
		}
	}
	if failed != nil {
		c.CRC = *failed
	}
	if err := c.Check(); err != nil {
		return false, fmt.Errorf("segment: append: %w", err)
	}
	w.items = appendChunk(w.items, &c, w.start)
	w.header.addChunk(&c, w.limits.Header)
	w.added = append(w.added, c)
	return true, nil
}

// put copies bytes to the file's end.
func (w *Writer) put(p []byte) {
	for len(p) > 0 {
		n := min(len(p), bufferBytes-len(w.buf))
		w.buf = append(w.buf, p[:n]...)
		p = p[n:]
		if len(w.buf) == bufferBytes {
			w.submit(nil)
		}
	}
}

// submit sends the buffer on its way. Its length is a multiple of vfs.Align.
func (w *Writer) submit(done func(error)) {
	n := len(w.buf)
	if n == 0 {
		w.work <- job{done: done}
		return
	}
	w.work <- job{w.buf[:cap(w.buf)], n, w.at, done}
	w.at += int64(n)
	w.next()
}

// Busy is how long the file has been written to. It may be called from any goroutine.
func (w *Writer) Busy() time.Duration { return time.Duration(w.busy.Load()) }

// Empty reports whether the segment has no chunk.
func (w *Writer) Empty() bool { return len(w.all)+len(w.added) == 0 }

// Data is the offset of the first batch.
func (w *Writer) Data() int64 { return w.limits.Header }

// Pending is how many chunks the batch has.
func (w *Writer) Pending() int { return len(w.added) }

// EndBatch closes the batch with its index block. Once it is in the file, or has failed to get there, written is called, by the writing
// goroutine, with the batch's chunks and its end in the file; it must not wait for this Writer.
func (w *Writer) EndBatch(written func(chunks []Chunk, end int64, err error)) error {
	if w.failure != nil {
		return w.failure
	}
	block := w.End()
	size := blockBytes(block, len(w.items))
	b := make([]byte, size)
	copy(b, w.items)
	t := trailer{items: uint32(len(w.items)), nonce: w.id.Nonce, batch: w.batch, start: w.start, block: block}
	t.crc = crc32c.Checksum(b[:size-trailerBytes])
	t.put(b[size-trailerBytes:])
	w.put(b)
	w.header.addIndex(w.batch, block-w.limits.Header, int64(size))
	chunks, end := w.added, w.End()
	w.all = append(w.all, chunks...)
	w.items, w.added = w.items[:0], nil
	w.batch++
	w.start = w.End()
	w.submit(func(err error) {
		if written != nil {
			written(chunks, end, err)
		}
	})
	return nil
}

// Drain waits until everything up to the last batch is in the file, not yet durable.
func (w *Writer) Drain() error {
	if w.failure != nil {
		return w.failure
	}
	ack := make(chan error, 1)
	w.work <- job{done: func(err error) { ack <- err }}
	w.failure = <-ack
	return w.failure
}

// Sync makes everything up to the last batch durable.
func (w *Writer) Sync() error {
	if err := w.Drain(); err != nil {
		return err
	}
	if err := w.file.Sync(); err != nil {
		w.failure = fmt.Errorf("segment: sync %s: %w", w.path, err)
	}
	return w.failure
}

// Group is where a request's chunks are listed in a sealed segment's directory, and what they come to.
type Group struct {
	Key    tensor.RequestKey
	Offset int64 // in the file
	Length int64
	Chunks int
	Rows   uint64
	Bytes  uint64
	List   string // the group itself, as ParseGroup reads it; empty: it is to be read from the file
}

// Seal makes the file a safetensors file under the name sealed, durably. The batch in progress must be ended. The Writer is closed, on
// failure too; then the open file is as good as it was.
func (w *Writer) Seal(sealed string) ([]Group, error) {
	defer w.Close()
	if err := w.Drain(); err != nil {
		return nil, err
	}
	offset := w.End()
	directory, groups := buildDirectory(w.all, w.header, offset)
	w.put(directory)
	w.submit(nil)
	w.header.addBytes("dmi.directory", offset-w.limits.Header, int64(len(directory)))
	if err := w.Sync(); err != nil { // before the header, so that a header vouches for all that it names
		return nil, err
	}
	text, err := w.header.bytes(w.id, w.limits.Header)
	if err != nil {
		return nil, err
	}
	aligned := vfs.Aligned(len(text))
	copy(aligned, text)
	if _, err := w.file.WriteAt(aligned, 0); err != nil {
		return nil, fmt.Errorf("segment: write the header of %s: %w", w.path, err)
	}
	if err := w.file.Sync(); err != nil {
		return nil, fmt.Errorf("segment: sync %s: %w", w.path, err)
	}
	if err := w.fs.Rename(w.path, sealed); err != nil {
		return nil, fmt.Errorf("segment: seal %s: %w", w.path, err)
	}
	if err := w.fs.SyncDir(path.Dir(sealed)); err != nil {
		return nil, fmt.Errorf("segment: seal %s: %w", w.path, err)
	}
	return groups, nil
}

// buildDirectory lays the directory out at an offset of the file.
func buildDirectory(chunks []Chunk, h *header, offset int64) ([]byte, []Group) {
	order := make([]*Chunk, len(chunks))
	for i := range chunks {
		order[i] = &chunks[i]
	}
	slices.SortFunc(order, func(a, b *Chunk) int { return a.Compare(b) })
	var directory []byte
	var groups []Group
	for from := 0; from < len(order); {
		g := Group{Key: order[from].Key, Offset: offset + int64(len(directory))}
		to := from
		for ; to < len(order) && order[to].Key == g.Key; to++ {
			g.Rows += uint64(order[to].Rows)
			g.Bytes += uint64(order[to].Length)
		}
		g.Chunks = to - from
		directory = appendGroup(directory, h.request[g.Key], order[from:to])
		g.List = string(directory[g.Offset-offset:])
		g.Length = int64(len(g.List))
		groups = append(groups, g)
		from = to
	}
	if n := len(directory) % vfs.Align; n > 0 {
		directory = append(directory, make([]byte, vfs.Align-n)...)
	}
	return directory, groups
}

// Close ends the writing goroutine and closes the file. What was in it stays.
func (w *Writer) Close() error {
	if w.work == nil {
		return nil
	}
	close(w.work)
	<-w.stopped
	w.work = nil
	spare.give(w.held) // nothing writes from them any more
	w.held, w.buf = nil, nil
	if w.failure == nil {
		w.failure = fmt.Errorf("segment: %s: %w", w.path, errClosed)
	}
	return w.file.Close()
}

var errClosed = fmt.Errorf("already closed")

// Created is when the segment was begun.
func (w *Writer) Created() time.Time { return time.Unix(0, w.id.Created) }

var _ io.Closer = (*Writer)(nil)

package store

import (
	"bytes"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"dmi/internal/vfs"
	"dmi/tensor"
)

// late is a file system that, while failing, writes to the first segment once the second one is written to, and fails that write once the first one is sealed.
type late struct {
	vfs.FS
	failing       atomic.Bool
	begun, sealed chan struct{}
	begin, seal   sync.Once
}

func (d *late) Rename(from, to string) error {
	err := d.FS.Rename(from, to)
	if strings.HasSuffix(to, "/00000001.safetensors") {
		d.seal.Do(func() { close(d.sealed) })
	}
	return err
}

func (d *late) Create(name string, direct bool) (vfs.File, error) {
	f, err := d.FS.Create(name, direct)
	return &lateFile{File: f, disk: d, first: strings.Contains(name, "/00000001."), second: strings.Contains(name, "/00000002.")}, err
}

type lateFile struct {
	vfs.File
	disk          *late
	first, second bool
	made          bool // what names it is written
}

func (f *lateFile) WriteAt(p []byte, off int64) (int, error) {
	switch made := f.made; {
	case !made || !f.disk.failing.Load():
		f.made = true
	case f.first:
		<-f.disk.begun
	case f.second:
		f.disk.begin.Do(func() { close(f.disk.begun) })
		<-f.disk.sealed
		return 0, syscall.EIO
	}
	return f.File.WriteAt(p, off)
}

// TestSecondOfTwoSegmentsFails: rows of one request and site go on in the next segment, whose batch is still being filled when the first one is in its file. They are the buffer's until both are:
// the next one then fails.
func TestSecondOfTwoSegmentsFails(t *testing.T) {
	const width = 4 << 20 // a row is a chunk
	disk := &late{FS: vfs.NewMem(), begun: make(chan struct{}), sealed: make(chan struct{})}
	o := small()
	o.FS, o.Catalogue, o.FlushAge, o.SyncAge, o.TidyEvery = disk, catalogueFile(t), time.Hour, time.Hour, time.Hour
	o.BufferMiB, o.ChunkKiB, o.SegmentMiB, o.SegmentTensors = 256, 1024, 256, 20
	s := mustOpen(t, "store", o)
	session, err := s.BeginSession(tensor.Session{ID: "s00000001", Mode: "complete"})
	must(t, err)
	var sites []tensor.Site
	for site := range uint32(12) {
		sites = append(sites, tensor.Site{ID: site, Name: string(rune('a' + site))})
	}
	must(t, s.AddSites(session, sites))
	key := tensor.RequestKey{Session: session, Request: 1}
	row := func(site, position uint32) []byte {
		return bytes.Repeat([]byte{byte(site), byte(position), 7, 9}, width/4)
	}
	chunk := func(site, rows uint32) tensor.Chunk {
		var data []byte
		for i := range rows {
			data = append(data, row(site, i)...)
		}
		return tensor.Chunk{Key: key, Site: site, Rows: rows, DType: tensor.U8, Shape: []int{width}, Data: data}
	}
	for site := uint32(2); site < 12; site++ { // until the first segment has room for a part of what follows
		must(t, s.AppendChunk(tensor.Chunk{Key: key, Site: site, Rows: 1, DType: tensor.U8, Shape: []int{1}, Data: []byte{1}}))
	}
	must(t, s.Barrier(t.Context()))
	disk.failing.Store(true)
	const across, after = 5, 10                     // rows
	one, two := chunk(0, across), chunk(1, after)   // the latter is more than a writer has buffers for: its segment's batch cannot end before its first write returns
	for _, c := range []*tensor.Chunk{&one, &two} { // without waking the writing goroutine: both are to be found by one flush
		h := s.buffer.shard(streamKeyOfSite{session, c.Site})
		h.mu.Lock()
		s.buffer.held.Add(needs(len(c.Data)) + streamOverhead + pieceOverhead)
		s.buffer.add(h, &inlet{}, c, *s.logEnd.Load(), time.Now(), s.buffer.own(c.Data))
		h.mu.Unlock()
	}
	if err := s.Barrier(t.Context()); !errors.Is(err, ErrDevice) {
		t.Errorf("a barrier, with the second of two segments failing: %v", err)
	}
	select {
	case <-disk.sealed:
	default:
		t.Fatal("nothing went on in a second segment: this shows nothing")
	}
	disk.failing.Store(false)
	must(t, s.Barrier(t.Context()))
	for site, rows := range map[uint32]uint32{0: across, 1: after} {
		refs, err := s.Chunks(key, site, 0, rows)
		must(t, err)
		next := uint32(0)
		for _, ref := range refs {
			data := make([]byte, int(ref.Rows)*width)
			must(t, s.ReadRows(ref, 0, ref.Rows, data))
			for i := range ref.Rows {
				if ref.First+i != next || !bytes.Equal(data[i*width:(i+1)*width], row(site, next)) {
					t.Fatalf("site %d: row %d comes after row %d, or is another", site, ref.First+i, next)
				}
				next++
			}
		}
		if next != rows {
			t.Errorf("site %d: %d rows of %d", site, next, rows)
		}
	}
	if held := s.Stats().BufferBytes; held != 0 {
		t.Errorf("the buffer holds %d bytes, and all is written", held)
	}
	must(t, s.Close())
}

package store

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"dmi/tensor"
)

// TestBufferKeepsWhatItWasGiven: rows come back as they were given, though their memory is used again and again and the giver's is not his any
// more; and held is the memory of all of them.
func TestBufferKeepsWhatItWasGiven(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := newBuffer(1<<20, 64<<20)
		given := map[*stream][]byte{}
		next := map[uint64]uint32{}
		lent := make([]byte, 200000)
		value := byte(0)
		check := func(s *stream) {
			var got []byte
			rows := s.first
			s.refs(func(r ChunkRef) {
				if r.First != rows {
					t.Fatalf("rows go on at %d, want %d", r.First, rows)
				}
				rows += r.Rows
				got = append(got, r.data...)
			})
			if !bytes.Equal(got, given[s]) {
				t.Fatalf("a stream of %d bytes has not what it was given", len(given[s]))
			}
		}
		for step := range rapid.IntRange(1, 20).Draw(t, "steps") {
			row := rapid.SampledFrom([]int{100, 3000, smallPiece, 100000}).Draw(t, "row")
			for _, r := range rapid.SliceOfNDistinct(rapid.Uint64Range(0, 5), 1, 6, rapid.ID).Draw(t, "requests") {
				c := tensor.Chunk{Key: tensor.RequestKey{Session: 1, Request: r}, Site: uint32(row), First: next[r], Rows: 1, DType: tensor.U8, Shape: []int{row}, Data: lent[:row]}
				value++
				for i := range c.Data {
					c.Data[i] = value
				}
				var own []byte
				if size := needs(len(c.Data)); size > 0 {
					b.held.Add(size + streamOverhead + pieceOverhead)
					own = b.own(c.Data)
				}
				k := streamKey{c.Key, c.Site}
				h := b.shard(k.ofSite())
				if lacking := b.add(h, &inlet{}, &c, position{}, time.Unix(int64(step), 0), own); lacking != 0 {
					t.Fatalf("%d bytes are held, and there is no room for %d", b.held.Load(), lacking)
				}
				streams := h.byKey[k]
				s := streams[len(streams)-1]
				given[s] = append(given[s], c.Data...)
				next[r]++
			}
			b.closeOldest(time.Unix(int64(step-rapid.IntRange(0, 5).Draw(t, "age")), 0), 0)
			for _, s := range b.take(1<<40, rapid.IntRange(0, 3).Draw(t, "written")) {
				if rapid.Bool().Draw(t, "read") { // memory that a reader has is not used again
					check(s)
				}
				b.written(s)
				delete(given, s)
			}
			held := int64(0)
			for s, data := range given {
				held += streamOverhead
				for i := range s.pieces {
					held += pieceOverhead + int64(cap(s.pieces[i].data))
				}
				if held < int64(len(data)) {
					t.Fatalf("%d bytes of memory for %d", held, len(data))
				}
			}
			if says := b.held.Load(); says != held {
				t.Fatalf("holds %d bytes, says %d", held, says)
			}
		}
		for s := range given {
			check(s)
		}
		b.closeOldest(time.Time{}, 1<<60)
		for _, s := range b.take(1<<60, 1<<30) {
			b.written(s)
		}
		if held, streams := b.held.Load(), b.streams(); held != 0 || streams != 0 {
			t.Fatalf("empty, and holds %d bytes in %d streams", held, streams)
		}
	})
}

// TestChunksAreCopied: what AppendChunk was given may be used anew at once, whatever its size, before and after it is written.
func TestChunksAreCopied(t *testing.T) {
	s := mustOpen(t, t.TempDir()+"/store", Options{HeaderKiB: 64})
	defer s.Close()
	session, err := s.BeginSession(tensor.Session{ID: "s00000001", Producer: "p"})
	must(t, err)
	var sites []tensor.Site
	sizes := []int{1, 3000, smallPiece - 1, smallPiece, 3 << 20}
	for i := range sizes {
		sites = append(sites, tensor.Site{ID: uint32(i), Name: fmt.Sprint("site", i)})
	}
	must(t, s.AddSites(session, sites))
	key := tensor.RequestKey{Session: session, Request: 1}
	data := make([]byte, 3<<20)
	for first := range uint32(5) {
		for site, n := range sizes {
			for i := range data[:n] {
				data[i] = byte(first) + 1
			}
			must(t, s.AppendChunk(tensor.Chunk{Key: key, Site: uint32(site), First: first, Rows: 1, DType: tensor.U8, Shape: []int{n}, Data: data[:n]}))
			clear(data)
		}
	}
	for range 2 {
		for site, n := range sizes {
			refs, err := s.Chunks(key, uint32(site), 0, 5)
			must(t, err)
			row, rows := make([]byte, n), uint32(0)
			for _, ref := range refs {
				for i := range ref.Rows {
					must(t, s.ReadRows(ref, i, i+1, row))
					if !bytes.Equal(row, bytes.Repeat([]byte{byte(ref.First+i) + 1}, n)) {
						t.Fatalf("row %d of %d bytes is not what was appended", ref.First+i, n)
					}
					rows++
				}
			}
			if rows != 5 {
				t.Fatalf("%d rows of %d bytes", rows, n)
			}
		}
		must(t, s.Barrier(t.Context()))
	}
}

func TestMemoryClasses(t *testing.T) {
	last := 0
	for n := 1; n < 17<<20; n += 1 + n/97 {
		class, size := memoryClass(n)
		if size < n || n > smallestMemory && size > n+n/4+1 || class < last || class > last+1 {
			t.Fatalf("%d bytes are of class %d, %d bytes, behind class %d", n, class, size, last)
		}
		if again, same := memoryClass(size); again != class || same != size {
			t.Fatalf("a room of %d bytes is of class %d, and comes back as %d", size, class, again)
		}
		last = class
	}
}

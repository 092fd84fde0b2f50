package store

import (
	"bytes"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"dmi/internal/vfs"
	"dmi/ring"
	"dmi/tensor"
)

// countingFS counts reads of segments.
type countingFS struct {
	vfs.FS
	mu    sync.Mutex
	reads int
	bytes int64
}

func (c *countingFS) Open(name string, write bool) (vfs.File, error) {
	f, err := c.FS.Open(name, write)
	if err != nil || !strings.Contains(name, "/segments/") {
		return f, err
	}
	return countingFile{f, c}, nil
}

// take is how many reads there were since it was last asked.
func (c *countingFS) take() (reads int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	reads, c.reads = c.reads, 0
	return reads
}

type countingFile struct {
	vfs.File
	fs *countingFS
}

func (f countingFile) ReadAt(p []byte, off int64) (int, error) {
	f.fs.mu.Lock()
	f.fs.reads++
	f.fs.bytes += int64(len(p))
	f.fs.mu.Unlock()
	return f.File.ReadAt(p, off)
}

// decoding fills a store as serving does: so many requests at a time, a row of each at every site in a step.
type decoding struct {
	together, sites, rows, width int
	cohorts                      int
}

func (d decoding) write(t *testing.T, s *Store) []tensor.RequestKey {
	t.Helper()
	session, err := s.BeginSession(tensor.Session{ID: "s00000001", Producer: "p", Mode: "complete"})
	must(t, err)
	sites, ids := make([]tensor.Site, d.sites), make([]uint32, d.sites)
	for i := range sites {
		sites[i], ids[i] = tensor.Site{ID: uint32(i), Name: fmt.Sprintf("blocks.%d.hook_resid_post", i), Layer: i}, uint32(i)
	}
	must(t, s.AddSites(session, sites))
	must(t, s.PutRun(tensor.Run{ID: "r00000001", Session: session, Begun: time.Unix(1, 0)}))
	var keys []tensor.RequestKey
	step := uint64(0)
	for cohort := range d.cohorts {
		own := make([]tensor.RequestKey, d.together)
		for i := range own {
			own[i] = tensor.RequestKey{Session: session, Request: uint64(cohort*d.together + i)}
			must(t, s.PutRequests([]tensor.Request{{Key: own[i], ID: fmt.Sprintf("r00000001.%d", own[i].Request), Run: "r00000001", Begun: time.Unix(2, 0), Ended: time.Unix(3, 0)}}))
		}
		keys = append(keys, own...)
		for at := range uint32(d.rows) {
			spans, entries := make([]ring.Span, d.together), make([]tensor.Entry, d.together)
			for i, key := range own {
				spans[i] = ring.Span{Request: key.Request, Position: at, Count: 1}
				entries[i] = tensor.Entry{Key: key, Sites: ids, First: at, Count: 1, Stride: 1, Step: step, Outcome: tensor.Captured}
			}
			records, table := stepRecords(step, d.sites, spans)
			must(t, s.AppendStep(Step{Session: session, First: step * 2, Count: 2, Records: records, Tables: [][]byte{table}}))
			for _, key := range own {
				for site := range ids {
					must(t, s.AppendChunk(tensor.Chunk{Key: key, Site: uint32(site), First: at, Rows: 1, Step: step, LastStep: step, DType: tensor.U8, Shape: []int{d.width},
						Data: goldenRow(key, uint32(site), 0, at, d.width)}))
				}
			}
			must(t, s.Book(entries))
			step++
		}
	}
	must(t, s.Barrier(t.Context()))
	return keys
}

// TestReadsOfARequestAtASite counts the reads of segments that all rows of a request at a site take, with nothing in memory: before compaction one for each chunk, so the bytes of the
// answer by those of a chunk, and after it three at most. With a catalogue that has no lists, as those of format 2, there is one more for each segment; who asks for one request
// after the other does not pay for it, because neighbours' lists are read together.
func TestReadsOfARequestAtASite(t *testing.T) {
	const enough = enoughReads
	d := decoding{together: 16, sites: 12, rows: 64, width: 1024, cohorts: 2}
	files := &countingFS{FS: vfs.NewMem()}
	o := Options{FS: files, Catalogue: catalogueFile(t), BufferMiB: 2, HeaderKiB: 256, SegmentMiB: 4, FlushAge: time.Hour, TidyEvery: time.Hour}
	s := mustOpen(t, "store", o)
	keys := d.write(t, s)
	must(t, s.Close())

	// read asks for a site of each request, and returns the mean of the reads that it took, and of the chunks that there were.
	read := func(s *Store, cold bool, most func(chunks, segments int) int) (reads, chunks float64) {
		t.Helper()
		s.cache = &chunkCache{}
		for i, key := range keys {
			if cold {
				s.cache = &chunkCache{}
			}
			site := uint32(i * 5 % d.sites)
			groups, err := s.groups(key)
			must(t, err)
			files.take()
			refs, err := s.Chunks(key, site, 0, uint32(d.rows))
			must(t, err)
			next := uint32(0)
			for _, ref := range refs {
				data := make([]byte, int(ref.Rows)*ref.RowBytes())
				must(t, s.ReadRows(ref, 0, ref.Rows, data))
				for row := range ref.Rows {
					if want := goldenRow(key, site, 0, next, d.width); !bytes.Equal(data[int(row)*d.width:int(row+1)*d.width], want) {
						t.Fatalf("row %d of request %d at site %d is another", next, key.Request, site)
					}
					next++
				}
			}
			if next != uint32(d.rows) {
				t.Fatalf("%d rows of request %d at site %d, of %d", next, key.Request, site, d.rows)
			}
			n := files.take()
			if limit := most(len(refs), len(groups)); n > limit {
				t.Errorf("request %d at site %d: %d reads for %d chunks in %d segments; at most %d should do", key.Request, site, n, len(refs), len(groups), limit)
			}
			reads, chunks = reads+float64(n)/float64(len(keys)), chunks+float64(len(refs))/float64(len(keys))
		}
		return reads, chunks
	}
	asChunks := func(chunks, _ int) int { return max(enough, chunks) }
	withLists := func(chunks, segments int) int { return chunks + segments }
	withoutLists := func(s *Store) {
		t.Helper()
		_, err := s.cat.write.Exec("UPDATE segment_requests SET list = NULL")
		must(t, err)
	}

	s = mustOpen(t, "store", o)
	reads, chunks := read(s, true, asChunks)
	withoutLists(s)
	old, _ := read(s, true, withLists)
	beside, _ := read(s, false, withLists)
	segments := len(s.sealed)
	t.Logf("as written: %.2f reads for %.2f chunks, cold; %.2f with lists in segments alone, %.2f of requests that follow each other; %d segments", reads, chunks, old, beside, segments)
	if chunks < enough+1 || old < chunks+2 {
		t.Errorf("%.2f chunks, and %.2f reads with lists in segments alone: nothing to show", chunks, old)
	}
	if lists := (beside - chunks) * float64(len(keys)); lists > float64(segments)+0.5 { // a directory of this store is less than listsAtOnce
		t.Errorf("%.1f reads of lists by who asks for one request after the other, of %d segments", lists, segments)
	}
	verified(t, s)
	_, err := s.Compact(t.Context(), nil)
	must(t, err)
	must(t, s.Close())

	s = mustOpen(t, "store", o)
	reads, chunks = read(s, true, func(int, int) int { return enough })
	withoutLists(s)
	old, _ = read(s, true, func(int, int) int { return enough })
	t.Logf("compacted: %.2f reads for %.2f chunks, cold; %.2f with lists in segments alone", reads, chunks, old)
	verified(t, s)
	must(t, s.Close())
}

// TestListsOfTheCatalogue: what it has of a list is the list, or nothing, whatever happened to it.
func TestListsOfTheCatalogue(t *testing.T) {
	random := seeded(t)
	p := packer{}
	long, text := strings.Repeat("x", 2*longestList), make([]byte, 2*longestList)
	for i := range text {
		text[i] = byte(random.Uint32())
	}
	for _, list := range []string{"a", long, string(text[:longestList/2])} {
		packed := p.pack(list)
		if got := unpack(packed, int64(len(list))); got != list {
			t.Errorf("%d bytes come back as %d", len(list), len(got))
		}
		if got := unpack(packed[:len(packed)/2], int64(len(list))); got != "" {
			t.Errorf("half of a packed list gives %d bytes", len(got))
		}
	}
	for _, list := range []string{"", string(text), strings.Repeat("x", 1<<20)} {
		if packed := p.pack(list); packed != nil {
			t.Errorf("a list of %d bytes is kept, in %d", len(list), len(packed))
		}
	}
	if unpack(nil, 10) != "" || unpack(text[:100], 1<<40) != "" {
		t.Error("a list of nothing")
	}
}

// TestDamagedListOfTheCatalogue: the segment's is taken, and verify tells.
func TestDamagedListOfTheCatalogue(t *testing.T) {
	_, o := inMemory(t)
	s, l := scatteredLoad(t, o)
	must(t, s.Close())
	s = mustOpen(t, "store", o)
	list := packer{}
	for request := range l.next {
		groups, err := s.groups(l.key(request))
		must(t, err)
		for number, g := range groups {
			if g.List == "" {
				t.Fatalf("the catalogue has no list of request %d in segment %d", request, number)
			}
			broken := []byte(g.List)
			broken[len(broken)/2] ^= 1
			_, err := s.cat.write.Exec("UPDATE segment_requests SET list=? WHERE session=? AND request=? AND segment=?", list.pack(string(broken)), g.Key.Session, int64(g.Key.Request), int64(number))
			must(t, err)
			break
		}
	}
	l.check(s, all)
	report, err := s.Verify(t.Context(), nil)
	must(t, err)
	if len(report.Problems) != len(l.next) {
		t.Errorf("%d lists are damaged, verify tells of %+v", len(l.next), report.Problems)
	}
	must(t, s.Close())
}

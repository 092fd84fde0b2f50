package store

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"dmi/internal/vfs"
	"dmi/store/segment"
	"dmi/tensor"
)

const deletedPrompt = "the quick brown fox of request one"

// spreadStore is a closed store whose requests lie in several segments each, and whose first request has a prompt in two files of the manifest.
func spreadStore(t *testing.T) (string, *load, Options) {
	dir, o := filepath.Join(t.TempDir(), "store"), small()
	o.TidyEvery, o.SegmentTensors = time.Hour, 60
	s := mustOpen(t, dir, o)
	l, err := newLoad(t, s, seeded(t), "s0000000a")
	must(t, err)
	must(t, l.forward(6)) // in the first segment alone
	for part := range 2 {
		must(t, s.PutRequests([]tensor.Request{{Key: l.key(1), ID: "1-1", Text: deletedPrompt, Tokens: []int64{918273645}, Begun: time.Unix(3, 0).UTC()}}))
		for range 12 {
			must(t, l.forward(1, uint64(2+l.random.IntN(3)), 5))
		}
		must(t, s.PutRequests([]tensor.Request{{Key: l.key(1), Text: deletedPrompt}}))
		if part == 0 {
			must(t, l.barrier())
			_, err = s.nextManifestFile()
			must(t, err)
		}
	}
	must(t, l.forward(7)) // in the last
	must(t, l.barrier())
	must(t, s.Close())
	return dir, l, o
}

// readable is every row that a store gives of a load, checked against what was appended.
func readable(t *testing.T, s *Store, l *load) map[rowKey]bool {
	t.Helper()
	rows := map[rowKey]bool{}
	for request := range l.next {
		for site := range l.sites {
			refs, err := s.Chunks(l.key(request), uint32(site), 0, 1<<30)
			if err != nil && !leavable(err) {
				t.Fatal(err)
			}
			for _, ref := range refs {
				data := make([]byte, ref.RowBytes()*int(ref.Rows))
				if err := s.ReadRows(ref, 0, ref.Rows, data); err != nil {
					if !leavable(err) {
						t.Fatal(err)
					}
					continue
				}
				for i := range ref.Rows {
					k := rowKey{request, uint32(site), ref.Attempt, ref.First + i}
					l.equal(k, data[int(i)*ref.RowBytes():int(i+1)*ref.RowBytes()], ref)
					rows[k] = true
				}
			}
		}
	}
	return rows
}

// damagedFile is a file of a store that is about to be damaged.
type damagedFile struct {
	t    *testing.T
	name string
}

func (d damagedFile) flip(at int64) {
	f, err := os.OpenFile(d.name, os.O_RDWR, 0)
	must(d.t, err)
	var b [1]byte
	_, err = f.ReadAt(b[:], at)
	must(d.t, err)
	_, err = f.WriteAt([]byte{b[0] ^ 0x10}, at)
	must(d.t, errors.Join(err, f.Close()))
}

func (d damagedFile) contents() *segment.Contents {
	f, err := vfs.OS{}.Open(d.name, false)
	must(d.t, err)
	defer f.Close()
	c, err := segment.Scan(f)
	must(d.t, err)
	return c
}

// chunk is where the bytes of a request's first chunk are.
func (d damagedFile) chunk(is func(tensor.RequestKey) bool) int64 {
	c := d.contents()
	return c.Chunks[slices.IndexFunc(c.Chunks, func(c segment.Chunk) bool { return is(c.Key) })].Offset
}

// bothLists damages both that the file has.
func (d damagedFile) bothLists() {
	end := d.contents().End
	d.flip(end + 20)
	d.flip(end - 10)
}

// unlist takes the catalogue's lists away.
func (d damagedFile) unlist() {
	c, err := openCatalogue(filepath.Join(filepath.Dir(d.name), "..", "catalogue.sqlite"))
	must(d.t, err)
	_, err = c.write.Exec("UPDATE segment_requests SET list = NULL")
	must(d.t, errors.Join(err, c.close()))
}

func (d damagedFile) allLists() {
	d.bothLists()
	d.unlist()
}

func (d damagedFile) size() int64 {
	info, err := os.Stat(d.name)
	must(d.t, err)
	return info.Size()
}

// TestDeleteFromADamagedStore: whatever is damaged, what is deleted goes from everything that can be made out, nobody else's row goes with it, wrong bytes stay known
// to be wrong, and a file that has to be left as it is is named.
func TestDeleteFromADamagedStore(t *testing.T) {
	pristine, l, o := spreadStore(t)
	const victim, log = "segments/00000002.safetensors", "manifest/00000001.log"
	deleted := l.key(1)
	mine := [][]byte{[]byte(deletedPrompt), []byte("918273645")}
	for k, r := range l.rows {
		if k.request == 1 && len(r.data) >= 12 {
			mine = append(mine, r.data)
		}
	}
	for what, c := range map[string]struct {
		file   string
		damage func(damagedFile)
		left   error // what the deletion says of the file; nil: it is done
		healed bool  // the damage went with what was deleted
	}{
		"another's chunk":        {victim, func(d damagedFile) { d.flip(d.chunk(func(k tensor.RequestKey) bool { return k != deleted })) }, nil, false},
		"its own chunk":          {victim, func(d damagedFile) { d.flip(d.chunk(func(k tensor.RequestKey) bool { return k == deleted })) }, nil, true},
		"directory":              {victim, func(d damagedFile) { d.flip(d.contents().End + 20) }, nil, true},
		"index block":            {victim, func(d damagedFile) { d.flip(d.contents().End - 10) }, nil, true},
		"header's length":        {victim, func(d damagedFile) { d.flip(1) }, nil, true},
		"header":                 {victim, func(d damagedFile) { d.flip(100) }, nil, true},
		"both lists":             {victim, damagedFile.bothLists, nil, true}, // the catalogue has a third
		"all lists":              {victim, damagedFile.allLists, ErrCorrupt, false},
		"cut short, and no list": {victim, func(d damagedFile) { d.unlist(); must(t, os.Truncate(d.name, d.size()/2)) }, ErrCorrupt, false},
		"cut short":              {victim, func(d damagedFile) { must(t, os.Truncate(d.name, d.size()/2)) }, ErrCorrupt, false},
		"empty":                  {victim, func(d damagedFile) { must(t, os.Truncate(d.name, 0)) }, ErrCorrupt, false},
		"missing":                {victim, func(d damagedFile) { must(t, os.Remove(d.name)) }, ErrGone, false},
		"manifest's frame":       {log, func(d damagedFile) { d.flip(manifestHeader + 30) }, ErrCorrupt, false},
		"manifest's end":         {log, func(d damagedFile) { must(t, os.Truncate(d.name, d.size()-7)) }, ErrCorrupt, false},
		"manifest's head":        {log, func(d damagedFile) { d.flip(20) }, nil, false},
	} {
		t.Run(what, func(t *testing.T) {
			l := l.of(t)
			dir := filepath.Join(t.TempDir(), "store")
			must(t, os.CopyFS(dir, os.DirFS(pristine)))
			c.damage(damagedFile{t, filepath.Join(dir, c.file)})
			s := mustOpen(t, dir, o)
			before := readable(t, s, l)
			if len(before) == 0 || len(holds(t, dir, mine...)) == 0 {
				t.Fatal("nothing is there to be deleted")
			}
			told, err := s.Delete(context.Background(), []tensor.RequestKey{deleted}, nil)
			if (err == nil) != (c.left == nil) || !errors.Is(err, c.left) || err != nil && !strings.Contains(err.Error(), c.file) {
				t.Errorf("deleted %+v: %v", told, err)
			}
			maps.DeleteFunc(before, func(k rowKey, _ bool) bool { return k.request == 1 })
			after := readable(t, s, l)
			gone, err := s.Entries(deleted)
			must(t, err)
			maps.DeleteFunc(after, func(k rowKey, _ bool) bool {
				if k.request == 1 && !(c.left != nil && slices.ContainsFunc(gone, func(e tensor.Entry) bool {
					return e.Expired != 0 && slices.Contains(e.Sites, k.site) && k.position >= e.First && (k.position-e.First)%e.Stride == 0 && (k.position-e.First)/e.Stride < e.Count
				})) {
					t.Fatalf("row %+v is still there", k)
				}
				return k.request == 1
			})
			if !maps.Equal(before, after) {
				t.Errorf("%d rows of others were readable, and %d are", len(before), len(after))
			}
			for _, found := range holds(t, dir, mine...) {
				if c.left == nil || !strings.HasPrefix(found, filepath.Base(c.file)) {
					t.Errorf("still there: %s", found)
				}
			}
			must(t, s.Close())
			r, err := OpenReadOnly(dir)
			must(t, err)
			report, err := r.Verify(t.Context(), nil)
			must(t, errors.Join(err, r.Close()))
			if c.healed != (len(report.Problems) == 0) {
				t.Errorf("verify: %+v", report.Problems)
			}
		})
	}
}

// TestRetentionAtADamagedSegment: what can be listed goes; what cannot stays, is told of once, and others go in its place.
func TestRetentionAtADamagedSegment(t *testing.T) {
	pristine, l, o := spreadStore(t)
	for what, c := range map[string]struct {
		damage func(damagedFile)
		stays  bool
	}{
		"chunk":                  {func(d damagedFile) { d.flip(d.contents().Chunks[0].Offset) }, false},
		"directory":              {func(d damagedFile) { d.flip(d.contents().End + 20) }, false},
		"both lists":             {damagedFile.bothLists, false},
		"all lists":              {damagedFile.allLists, true},
		"cut short":              {func(d damagedFile) { must(t, os.Truncate(d.name, d.size()/2)) }, false},
		"cut short, and no list": {func(d damagedFile) { d.unlist(); must(t, os.Truncate(d.name, d.size()/2)) }, true},
		"missing":                {func(d damagedFile) { must(t, os.Remove(d.name)) }, true},
	} {
		t.Run(what, func(t *testing.T) {
			dir, o, told := filepath.Join(t.TempDir(), "store"), o, 0
			must(t, os.CopyFS(dir, os.DirFS(pristine)))
			name := filepath.Join(dir, "segments/00000001.safetensors")
			c.damage(damagedFile{t, name})
			o.RetainAge = time.Hour
			o.Log = func(_, code, message string) {
				if code == "damaged" && strings.Contains(message, "retention") {
					told++
				}
			}
			s := mustOpen(t, dir, o)
			produced := s.Books().Produced
			for range 2 {
				must(t, s.tidyOnce(time.Now().Add(3*time.Hour)))
			}
			if got := s.Stats(); (got.Segments == 1) != c.stays || (told == 1) != c.stays || got.ExpiredRows == 0 || !c.stays && got.ExpiredRows != uint64(len(l.rows)) {
				t.Errorf("told %d times; %+v", told, got)
			}
			if c.stays && what != "missing" {
				_, err := os.Stat(name)
				must(t, err)
			}
			balanced(t, s, produced)
			must(t, s.Close())
		})
	}
}

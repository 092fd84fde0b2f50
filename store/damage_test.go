package store

import (
	"errors"
	"flag"
	"fmt"
	"iter"
	"math/rand/v2"
	"path"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"dmi/internal/vfs"
)

// closedStore is a store that a load has gone through, in memory, closed.
func closedStore(t testing.TB, forwards int) (*vfs.Mem, *load, Options) {
	mem := vfs.NewMem()
	o := small()
	o.HeaderKiB = 16
	o.FS, o.Catalogue = mem, catalogueFile(t)
	s := mustOpen(t, "store", o)
	l, err := newLoad(t, s, seeded(t), "s0000000a")
	if err != nil {
		t.Fatal(err)
	}
	if err := crashLoad(l, forwards, func(*load) error { return nil }); err != nil {
		t.Fatal(err)
	}
	return mem, l, o
}

// files of the store that are not locks.
func filesOf(t testing.TB, fs vfs.FS) []string {
	var files []string
	for _, dir := range []string{"store", "store/segments", "store/manifest"} {
		names, err := fs.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			files = append(files, path.Join(dir, n))
		}
	}
	return files
}

// reportsDamage expects a damaged store to say so, and to give nothing but what was written.
func reportsDamage(t *testing.T, o Options, l *load, what string) {
	t.Helper()
	s, err := openReadOnly("store", o)
	if err != nil {
		if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewer) && !errors.Is(err, ErrNotStore) {
			t.Fatalf("%s: %v", what, err)
		}
		return
	}
	defer s.Close()
	report, err := s.Verify(t.Context(), nil)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if len(report.Problems) == 0 {
		t.Fatalf("%s: not reported", what)
	}
	for request, end := range l.next {
		for site := range l.sites {
			refs, err := s.Chunks(l.key(request), uint32(site), 0, end)
			if err != nil {
				if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrGone) {
					t.Fatalf("%s: %v", what, err)
				}
				continue
			}
			for _, ref := range refs {
				data := make([]byte, ref.RowBytes()*int(ref.Rows))
				if err := s.ReadRows(ref, 0, ref.Rows, data); err != nil {
					if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrGone) {
						t.Fatalf("%s: %v", what, err)
					}
					continue
				}
				for i := range ref.Rows {
					l.equal(rowKey{request, uint32(site), ref.Attempt, ref.First + i}, data[int(i)*ref.RowBytes():int(i+1)*ref.RowBytes()], ref)
				}
			}
		}
	}
}

var flips = flag.Int("flips", 12, "bytes to damage in each file of a store; 0: every one")

// flipsOf says which bytes of a file are damaged, and by which bit.
func flipsOf(random *rand.Rand, size int64) iter.Seq2[int64, byte] {
	return func(yield func(int64, byte) bool) {
		if *flips == 0 {
			for at := range size {
				if !yield(at, 1<<random.IntN(8)) {
					return
				}
			}
			return
		}
		for i := range *flips {
			at := random.Int64N(size)
			if i < *flips/3 { // the structure is at the ends
				at = min(size-1, random.Int64N(200))
			} else if i < *flips*2/3 {
				at = max(0, size-1-random.Int64N(200))
			}
			if !yield(at, 1<<random.IntN(8)) {
				return
			}
		}
	}
}

func TestEveryFlippedBitIsReported(t *testing.T) {
	forwards := 24
	if *flips == 0 { // time goes with the square of a store's size
		forwards = 6
	}
	mem, l, o := closedStore(t, forwards)
	var tried, total atomic.Int64
	t.Cleanup(func() { t.Logf("%d of %d bytes damaged, one at a time", tried.Load(), total.Load()) })
	for _, name := range filesOf(t, mem) {
		size, err := mem.Stat(name)
		must(t, err)
		total.Add(size)
	}
	for _, name := range filesOf(t, mem) {
		seed := l.random.Uint64()
		t.Run(path.Base(name), func(t *testing.T) {
			t.Parallel()
			mem, l, o, random := mem.AfterKill(), l.of(t), o, rand.New(rand.NewPCG(seed, 0))
			o.FS = mem
			size, err := mem.Stat(name)
			if err != nil {
				t.Fatal(err)
			}
			f, err := mem.Open(name, true)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for at, bit := range flipsOf(random, size) {
				var good [1]byte
				f.ReadAt(good[:], at)
				f.WriteAt([]byte{good[0] ^ bit}, at)
				reportsDamage(t, o, l, fmt.Sprintf("%s: bit %#x of byte %d flipped", name, bit, at))
				f.WriteAt(good[:], at)
				if n := tried.Add(1); n%10000 == 0 {
					t.Logf("%d of %d bytes damaged; now at byte %d of %s", n, total.Load(), at, name)
				}
			}
		})
	}
}

// of is the same load, to be checked by another test.
func (l *load) of(t testing.TB) *load {
	other := *l
	other.t, other.random = t, rand.New(rand.NewPCG(1, 1))
	return &other
}

func TestTruncatedSwappedAndMissingFilesAreReported(t *testing.T) {
	mem, l, o := closedStore(t, 24)
	random := rand.New(rand.NewPCG(l.random.Uint64(), 0))
	var segments []string
	for _, name := range filesOf(t, mem) {
		size, err := mem.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		for range 4 {
			damaged := mem.AfterKill()
			f, err := damaged.Open(name, true)
			if err != nil {
				t.Fatal(err)
			}
			f.Truncate(random.Int64N(size))
			p := o
			p.FS = damaged
			reportsDamage(t, p, l, name+" cut short")
		}
		damaged := mem.AfterKill()
		damaged.Remove(name)
		p := o
		p.FS = damaged
		reportsDamage(t, p, l, name+" removed")
		if strings.HasSuffix(name, ".safetensors") {
			segments = append(segments, name)
		}
	}
	if len(segments) < 2 {
		t.Fatal("the load made fewer than two segments")
	}
	damaged := mem.AfterKill()
	damaged.Rename(segments[0], "store/spare")
	damaged.Rename(segments[1], segments[0])
	damaged.Rename("store/spare", segments[1])
	p := o
	p.FS = damaged
	reportsDamage(t, p, l, "two segments swapped")
}

func TestNewerStoreIsRefused(t *testing.T) {
	mem := vfs.NewMem()
	f, err := mem.Create("store/dmi.json", false)
	if err != nil {
		t.Fatal(err)
	}
	text := identity{Format: "dmi store", Version: Version + 1, ID: strings.Repeat("0", 32)}.text()
	f.WriteAt(text, 0)
	o := small()
	o.FS = mem
	if _, err := Open("store", o); !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), "format 2") {
		t.Errorf("got %v", err)
	}
	if _, err := openReadOnly("store", o); !errors.Is(err, ErrNewer) {
		t.Errorf("got %v", err)
	}
}

func TestForeignDirectoryIsRefused(t *testing.T) {
	mem := vfs.NewMem()
	if _, err := mem.Create("store/holiday.jpg", false); err != nil {
		t.Fatal(err)
	}
	o := small()
	o.FS = mem
	if _, err := Open("store", o); !errors.Is(err, ErrNotStore) || !strings.Contains(err.Error(), "holiday.jpg") {
		t.Errorf("got %v", err)
	}
	if _, err := openReadOnly("store", o); !errors.Is(err, ErrNotStore) {
		t.Errorf("got %v", err)
	}
}

func TestStoreInUse(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s := mustOpen(t, dir, small())
	if _, err := Open(dir, small()); !errors.Is(err, ErrInUse) {
		t.Errorf("got %v", err)
	}
	r, err := OpenReadOnly(dir) // reading works beside it
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = mustOpen(t, dir, small())
	s.Close()
}

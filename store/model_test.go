package store

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"dmi/ring"
	"dmi/tensor"
)

// load drives a store as the engine does, and remembers, slowly and simply, what it must then hold.
type load struct {
	t       testing.TB
	random  *rand.Rand
	store   *Store
	session uint32
	sites   []tensor.Site
	shapes  [][]int
	dtypes  []tensor.DType
	next    map[uint64]uint32 // position of a request's next row
	step    uint64
	records uint64
	patient bool // what is refused is tried again, as the engine does, until it is taken

	rows     map[rowKey]row // what was appended
	produced uint64
	durable  map[rowKey]bool // when a Barrier last returned
	owed     map[rowKey]bool // of steps in the manifest; value: that were there at that time
}

type rowKey struct {
	request  uint64
	site     uint32
	attempt  uint16
	position uint32
}

type row struct {
	data []byte
	keys int
}

func site(id uint32, name string, keyed bool, fill tensor.Fill) tensor.Site {
	return tensor.Site{ID: id, Name: name, Layer: int(id), Keyed: keyed, Fill: fill}
}

func newLoad(t testing.TB, s *Store, random *rand.Rand, id string) (*load, error) {
	l := &load{t: t, random: random, store: s, next: map[uint64]uint32{}, rows: map[rowKey]row{}, durable: map[rowKey]bool{}, owed: map[rowKey]bool{}}
	l.sites = []tensor.Site{site(0, "blocks.0.hook_resid_post", false, 0), site(1, "blocks.0.attn.hook_pattern", true, tensor.FillZero),
		site(2, "blocks.0.attn.hook_attn_scores", true, tensor.FillNegInf), site(3, "tokens", false, 0), site(4, "odd", false, 0)}
	l.shapes = [][]int{{random.IntN(64) + 1}, {2, 0}, {3, 0}, nil, {3}}
	l.dtypes = []tensor.DType{tensor.BF16, tensor.F16, tensor.F32, tensor.I64, tensor.C128}
	var err error
	if l.session, err = s.BeginSession(tensor.Session{ID: id, Producer: "producer-" + id, Mode: "best-effort", Text: "ids", Begun: time.Unix(1, 0).UTC()}); err != nil {
		return nil, err
	}
	if err = s.AddSites(l.session, l.sites); err != nil {
		return nil, err
	}
	return l, s.PutRun(tensor.Run{ID: "r" + id, Session: l.session, Labels: map[string]string{"topic": "capitals"}, Begun: time.Unix(2, 0).UTC()})
}

func (l *load) key(request uint64) tensor.RequestKey {
	return tensor.RequestKey{Session: l.session, Request: request}
}

// records of a step: an OPEN with its row table, and a CLOSE.
func stepRecords(step uint64, sites int, spans []ring.Span) (records []byte, table []byte) {
	rows := uint32(0)
	table = make([]byte, ring.TableSize+len(spans)*ring.SpanSize)
	header := ring.Table{Magic: ring.TableMagic, Bytes: uint32(len(table)), Step: step, Spans: uint32(len(spans))}
	header.Encode(table)
	for i, s := range spans {
		s.Encode(table[ring.TableSize+i*ring.SpanSize:])
		rows += s.Count
	}
	records = make([]byte, 2*recordBytes)
	open := ring.OpenRecord{Step: step, TableBytes: uint64(len(table)), Sites: uint32(sites), Kind: ring.KindOpen, Rows: [3]uint32{rows}}
	open.Encode(records)
	closing := ring.CloseRecord{Step: step, Kind: ring.KindClose}
	closing.Encode(records[recordBytes:])
	return records, table
}

// forward is one step of a few requests, the rows of some of them not captured.
func (l *load) forward(requests ...uint64) error {
	var spans []ring.Span
	for _, r := range requests {
		if _, known := l.next[r]; !known {
			request := tensor.Request{Key: l.key(r), ID: fmt.Sprintf("%d-%d", l.session, r), Run: "r", Tokens: []int64{1, 2}, Begun: time.Unix(3, 0).UTC()}
			if err := l.try(func() error { return l.store.PutRequests([]tensor.Request{request}) }); err != nil {
				return err
			}
		}
		spans = append(spans, ring.Span{Request: r, Position: l.next[r], Count: uint32(1 + l.random.IntN(9))})
	}
	l.step++
	records, table := stepRecords(l.step, len(l.sites), spans)
	err := l.try(func() error {
		return l.store.AppendStep(Step{Session: l.session, First: l.records, Count: 2, Records: records, Tables: [][]byte{table}})
	})
	if err != nil {
		return err
	}
	l.records += 2
	for _, s := range spans {
		l.next[s.Request] = s.Position + s.Count
		l.produced += uint64(s.Count) * uint64(len(l.sites))
		for site := range l.sites {
			for i := range s.Count {
				l.owed[rowKey{s.Request, uint32(site), 0, s.Position + i}] = false
			}
		}
	}
	var refused error
	for site := range l.sites {
		if err := l.capture(uint32(site), spans); errors.Is(err, errRefused) {
			refused = err
		} else if err != nil {
			return err
		}
	}
	return refused
}

var errRefused = errors.New("a chunk was refused, and is on the books as lost")

// capture gives the rows of a step at a site, those of several requests at once, in an order that may be another than the last.
func (l *load) capture(site uint32, spans []ring.Span) error {
	var entries []tensor.Entry
	var chunks []tensor.Chunk
	if l.random.IntN(4) == 0 {
		spans = slices.Clone(spans)
		l.random.Shuffle(len(spans), func(i, j int) { spans[i], spans[j] = spans[j], spans[i] })
	}
	for _, s := range spans {
		if l.random.IntN(10) == 0 {
			entries = append(entries, l.entry(site, s, tensor.Dropped, tensor.RingFull))
		} else {
			chunks = append(chunks, l.chunk(site, s))
		}
	}
	taken, err := l.store.AppendChunks(chunks)
	if err != nil {
		err = fmt.Errorf("%w: %w", errRefused, err)
	}
	for i, c := range chunks {
		s := ring.Span{Request: c.Key.Request, Position: c.First, Count: c.Rows}
		if i < taken {
			entries = append(entries, l.entry(site, s, tensor.Captured, tensor.ReasonNone))
			clear(c.Data) // it is ours again
			continue
		}
		entries = append(entries, l.entry(site, s, tensor.Lost, tensor.IO))
		for n := range c.Rows {
			delete(l.rows, rowKey{s.Request, site, 0, s.Position + n})
		}
	}
	return cmp.Or(l.try(func() error { return l.store.Book(entries) }), err)
}

func (l *load) entry(site uint32, s ring.Span, outcome tensor.Outcome, reason tensor.Reason) tensor.Entry {
	return tensor.Entry{Key: l.key(s.Request), Sites: []uint32{site}, First: s.Position, Count: s.Count, Stride: 1, Step: l.step, Outcome: outcome, Reason: reason}
}

// chunk makes one of random rows, which are remembered.
func (l *load) chunk(site uint32, s ring.Span) tensor.Chunk {
	c := tensor.Chunk{Key: l.key(s.Request), Site: site, First: s.Position, Rows: s.Count, Step: l.step, LastStep: l.step, DType: l.dtypes[site], Shape: l.shapes[site]}
	if l.sites[site].Keyed {
		c.Shape = []int{l.shapes[site][0], int(s.Position + s.Count)}
	}
	size := c.DType.Size()
	for _, d := range c.Shape {
		size *= d
	}
	c.Data = make([]byte, size*int(s.Count))
	for i := range c.Data {
		c.Data[i] = byte(l.random.Uint32())
	}
	for i := range s.Count { // what of a keyed row lies past its own keys is fill already
		position := s.Position + i
		data := c.Data[int(i)*size : int(i+1)*size]
		keys := 0
		if l.sites[site].Keyed {
			keys = c.Shape[1]
			for head := range c.Shape[0] {
				from := (head*keys + int(position) + 1) * c.DType.Size()
				l.sites[site].Fill.Over(data[from:(head+1)*keys*c.DType.Size()], c.DType)
			}
		}
		l.rows[rowKey{s.Request, site, 0, position}] = row{bytes.Clone(data), keys}
	}
	return c
}

func (l *load) try(do func() error) error {
	err := do()
	for begun := time.Now(); err != nil && l.patient && time.Since(begun) < time.Minute; err = do() {
		time.Sleep(time.Millisecond)
	}
	return err
}

func (l *load) barrier() error {
	return l.barrierWithin(context.Background())
}

func (l *load) barrierWithin(ctx context.Context) error {
	if err := l.store.Barrier(ctx); err != nil {
		return err
	}
	for k := range l.rows {
		l.durable[k] = true
	}
	for k := range l.owed {
		l.owed[k] = true
	}
	return nil
}

// survived is what may have become of what was appended.
type survived int

const (
	all     survived = iota // everything is there
	killed                  // rows may be lost, unless they were durable; all are on the books
	noPower                 // and books may end at what was durable
)

// check holds everything that can be read against what was appended.
func (l *load) check(s *Store, how survived) {
	l.t.Helper()
	found, gone := 0, 0
	for request, end := range l.next {
		entries, err := s.Entries(l.key(request))
		if err != nil {
			l.t.Fatalf("entries of request %d: %v", request, err)
		}
		for site := range l.sites {
			fate, expired := map[uint32]tensor.Outcome{}, map[uint32]bool{}
			for _, e := range entries {
				if _, at := slicesFind(e.Sites, uint32(site)); at {
					for i := range e.Count {
						p := e.First + i*e.Stride
						if _, twice := fate[p]; twice {
							l.t.Fatalf("request %d site %d row %d is on the books twice", request, site, p)
						}
						fate[p] = e.Outcome
						if e.Expired != 0 {
							expired[p] = true
							gone++
						}
					}
				}
			}
			refs, err := s.Chunks(l.key(request), uint32(site), 0, end)
			if err != nil {
				l.t.Fatalf("chunks of request %d site %d: %v", request, site, err)
			}
			have := map[uint32]bool{}
			for _, ref := range refs {
				size := ref.RowBytes()
				data := make([]byte, size*int(ref.Rows))
				if err := s.ReadRows(ref, 0, ref.Rows, data); err != nil {
					l.t.Fatalf("read request %d site %d rows %d+%d: %v", request, site, ref.First, ref.Rows, err)
				}
				part := make([]byte, size)
				from := uint32(l.random.IntN(int(ref.Rows)))
				if err := s.ReadRows(ref, from, from+1, part); err != nil || !bytes.Equal(part, data[int(from)*size:int(from+1)*size]) {
					l.t.Fatalf("row %d of a chunk read alone differs: %v", from, err)
				}
				for i := range ref.Rows {
					k := rowKey{request, uint32(site), ref.Attempt, ref.First + i}
					if have[k.position] {
						l.t.Fatalf("request %d site %d row %d is in two chunks", request, site, k.position)
					}
					have[k.position] = true
					l.equal(k, data[int(i)*size:int(i+1)*size], ref)
					found++
				}
			}
			for p := range end {
				k := rowKey{request, uint32(site), 0, p}
				_, appended := l.rows[k]
				outcome, booked := fate[p]
				switch {
				case have[p] && booked && outcome != tensor.Captured:
					l.t.Fatalf("request %d site %d row %d is there and booked %v", request, site, p, outcome)
				case expired[p] && outcome != tensor.Captured:
					l.t.Fatalf("request %d site %d row %d is booked %v, and expired", request, site, p, outcome)
				case expired[p]: // whether its bytes are gone already, nobody is to read them
				case !have[p] && outcome == tensor.Captured:
					l.t.Fatalf("request %d site %d row %d is booked captured and not there", request, site, p)
				case !have[p] && (l.durable[k] || (appended && how == all)):
					l.t.Fatalf("request %d site %d row %d was durable, and is not there (booked %v)", request, site, p, outcome)
				case !booked && (how != noPower || l.owed[k]) && isOwed(l.owed, k):
					l.t.Fatalf("request %d site %d row %d is not on the books", request, site, p)
				case !booked && have[p]:
					l.t.Fatalf("request %d site %d row %d is there and not booked", request, site, p)
				}
			}
		}
	}
	if how == all && found+gone != len(l.rows) {
		l.t.Fatalf("%d rows found and %d gone of %d", found, gone, len(l.rows))
	}
}

// equal compares a row with what was appended; longer by fill where its chunk has longer rows.
func (l *load) equal(k rowKey, data []byte, ref ChunkRef) {
	l.t.Helper()
	want, known := l.rows[k]
	if !known {
		l.t.Fatalf("%+v was never appended", k)
	}
	if !l.sites[k.site].Keyed {
		if !bytes.Equal(data, want.data) {
			l.t.Fatalf("%+v: bytes differ", k)
		}
		return
	}
	size, keys := ref.DType.Size(), ref.Shape[1]
	fill := l.sites[k.site].Fill.Element(ref.DType)
	for head := range ref.Shape[0] {
		for key := range keys {
			expected := fill
			if key < want.keys {
				expected = want.data[(head*want.keys+key)*size:][:size]
			}
			if !bytes.Equal(data[(head*keys+key)*size:][:size], expected) {
				l.t.Fatalf("%+v: head %d key %d differs", k, head, key)
			}
		}
	}
}

func slicesFind(sites []uint32, site uint32) (int, bool) {
	for i, s := range sites {
		if s == site {
			return i, true
		}
	}
	return 0, false
}

// balanced holds the books against what was produced.
func balanced(t testing.TB, s *Store, produced uint64) {
	t.Helper()
	totals := s.Books()
	var sum uint64
	for _, line := range totals.Lines {
		sum += line.Rows
	}
	if totals.Produced != produced || sum != produced {
		t.Fatalf("produced %d, the store says %d, its books sum to %d: %+v", produced, totals.Produced, sum, totals.Lines)
	}
}

func small() Options {
	return Options{BufferMiB: 1, ChunkKiB: 2, HeaderKiB: 64, SegmentMiB: 1, SegmentTensors: 60, ManifestMiB: 1, GroupCommit: time.Millisecond}
}

func seeded(t testing.TB) *rand.Rand {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func mustOpen(t testing.TB, dir string, o Options) *Store {
	t.Helper()
	s, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestWriteReadReopen(t *testing.T) {
	random := seeded(t)
	for name, o := range map[string]Options{"small": small(), "default": {HeaderKiB: 64}} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "store")
			s := mustOpen(t, dir, o)
			l, err := newLoad(t, s, random, "s0000000a")
			if err != nil {
				t.Fatal(err)
			}
			for i := range 60 {
				if err := l.forward(uint64(random.IntN(4)), uint64(4+random.IntN(2))); err != nil {
					t.Fatal(err)
				}
				switch i {
				case 20, 40:
					l.check(s, all)
				case 30:
					if err := l.barrier(); err != nil {
						t.Fatal(err)
					}
					l.check(s, all)
				}
			}
			l.check(s, all)
			balanced(t, s, l.produced)
			verified(t, s)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = mustOpen(t, dir, o)
			l.check(s, all)
			balanced(t, s, l.produced)
			if got := s.Resume("producer-s0000000a", 0); got != l.records {
				t.Errorf("resume at %d, want %d", got, l.records)
			}
			number, err := s.BeginSession(tensor.Session{ID: "s0000000a", Producer: "producer-s0000000a"})
			if err != nil || number != l.session {
				t.Errorf("session again: %d, %v", number, err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s, err = OpenReadOnly(dir)
			if err != nil {
				t.Fatal(err)
			}
			l.check(s, all)
			balanced(t, s, l.produced)
			verified(t, s)
			s.Close()
		})
	}
}

// verified expects Verify to find nothing.
func verified(t testing.TB, s *Store) Report {
	t.Helper()
	report, err := s.Verify(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Problems) > 0 {
		t.Fatalf("verify: %+v", report.Problems)
	}
	return report
}

// copied is a copy of a catalogue as it is on disk.
func copied(t testing.TB, file string) string {
	t.Helper()
	to := catalogueFile(t)
	for _, end := range []string{"", "-wal"} {
		b, err := os.ReadFile(file + end)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = os.WriteFile(to+end, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return to
}

func isOwed(owed map[rowKey]bool, k rowKey) bool {
	_, is := owed[k]
	return is
}

// catalogueFile is where a test's catalogue goes: into memory where the machine has a folder for that, since the tests that crash a store make thousands, and what
// the disk does with one is SQLite's own affair.
func catalogueFile(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "dmi-catalogue-")
	if err != nil {
		return filepath.Join(t.TempDir(), "catalogue.sqlite")
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "catalogue.sqlite")
}

package store

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"dmi/internal/leaks"
	"dmi/internal/vfs"
	"dmi/ring"
	"dmi/tensor"
)

func TestMain(m *testing.M) {
	leaks.Main(m, goleak.IgnoreTopFunction("database/sql.(*DB).connectionOpener"))
}

func drawEntry(t *rapid.T) tensor.Entry {
	sites := rapid.SliceOfNDistinct(rapid.Uint32Range(0, 6), 1, 5, rapid.ID).Draw(t, "sites")
	slicesSort(sites)
	return tensor.Entry{Key: tensor.RequestKey{Session: 1, Request: rapid.Uint64Range(0, 1).Draw(t, "request")}, Sites: sites,
		Attempt: rapid.Uint16Range(0, 1).Draw(t, "attempt"), First: rapid.Uint32Range(0, 20).Draw(t, "first"), Count: rapid.Uint32Range(1, 6).Draw(t, "count"),
		Stride: rapid.Uint32Range(1, 4).Draw(t, "stride"), Step: rapid.Uint64().Draw(t, "step"), Outcome: tensor.Outcome(rapid.IntRange(1, 7).Draw(t, "outcome")),
		Reason: tensor.Reason(rapid.IntRange(0, 15).Draw(t, "reason")), Policy: rapid.Uint64Range(0, 1).Draw(t, "policy")}
}

func slicesSort(s []uint32) {
	for i := range s {
		for j := range i {
			if s[i] < s[j] {
				s[i], s[j] = s[j], s[i]
			}
		}
	}
}

func TestEntriesSurviveTheManifest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		entries := rapid.SliceOfN(rapid.Custom(drawEntry), 0, 8).Draw(t, "entries")
		got, err := decodeEntries(encodeEntries(entries))
		if err != nil || fmt.Sprint(got) != fmt.Sprint(entries) {
			t.Fatalf("%v\n%+v\n%+v", err, entries, got)
		}
	})
}

// TestBooksAgainstARowAtATime merges and corrects entries, and compares with books that have a line for each row.
func TestBooksAgainstARowAtATime(t *testing.T) {
	type place struct {
		request uint64
		site    uint32
		attempt uint16
		row     uint32
	}
	type end struct {
		outcome tensor.Outcome
		reason  tensor.Reason
		policy  uint64
	}
	rapid.Check(t, func(t *rapid.T) {
		b, slow := newBooks(), map[place]end{}
		rowsOfEntry := func(e tensor.Entry, f func(place)) {
			for _, site := range e.Sites {
				for i := range e.Count {
					f(place{e.Key.Request, site, e.Attempt, e.First + i*e.Stride})
				}
			}
		}
		for range rapid.IntRange(0, 30).Draw(t, "entries") {
			e := drawEntry(t)
			taken := false
			rowsOfEntry(e, func(p place) { _, there := slow[p]; taken = taken || there })
			if taken {
				b.correct(e)
			} else {
				b.add(e)
			}
			rowsOfEntry(e, func(p place) { slow[p] = end{e.Outcome, e.Reason, e.Policy} })
		}
		fast := map[place]end{}
		for key, a := range b.open {
			for _, l := range a.lines {
				if l.Key != key {
					t.Fatalf("line of %v under %v", l.Key, key)
				}
				rowsOfEntry(l.Entry, func(p place) {
					if _, twice := fast[p]; twice {
						t.Fatalf("%+v is there twice", p)
					}
					fast[p] = end{l.Outcome, l.Reason, l.Policy}
				})
			}
		}
		if len(fast) != len(slow) {
			t.Fatalf("%d rows, want %d", len(fast), len(slow))
		}
		for p, want := range slow {
			if fast[p] != want {
				t.Fatalf("%+v: %+v, want %+v", p, fast[p], want)
			}
		}
		var sum uint64
		for _, l := range b.sum().Lines {
			sum += l.Rows
		}
		if sum != uint64(len(slow)) {
			t.Fatalf("totals %d, want %d", sum, len(slow))
		}
	})
}

// TestLongRequestStaysAFewLines: books of a request that grows a row at a time, at all its sites and at every fourth.
func TestLongRequestStaysAFewLines(t *testing.T) {
	b := newBooks()
	for p := range uint32(10000) {
		b.add(tensor.Entry{Sites: []uint32{0, 1, 2}, First: p, Count: 1, Stride: 1, Step: uint64(p), Outcome: tensor.Captured})
		if p%4 == 0 {
			b.add(tensor.Entry{Sites: []uint32{3}, First: p, Count: 1, Stride: 1, Step: uint64(p), Outcome: tensor.Captured})
		} else {
			b.add(tensor.Entry{Sites: []uint32{4}, First: p, Count: 1, Stride: 1, Step: uint64(p), Outcome: tensor.Captured, Level: tensor.Stats})
		}
	}
	lines := b.open[tensor.RequestKey{}].lines
	bySite := map[uint32]int{}
	for _, l := range lines {
		bySite[l.Sites[0]]++
	}
	if bySite[0] != 1 || bySite[3] != 1 {
		t.Errorf("lines by first site: %v", bySite)
	}
}

func TestTornManifestEndsAtItsLastWholeFrame(t *testing.T) {
	random := seeded(t)
	mem := vfs.NewMem()
	m := &manifest{fs: mem, dir: "m", store: "s", limit: 1 << 30}
	must(t, m.begin(1))
	var ends []int64
	var payloads [][]byte
	for range 20 {
		p := make([]byte, random.IntN(300))
		if _, err := m.append(frameBook, p); err != nil {
			t.Fatal(err)
		}
		payloads, ends = append(payloads, p), append(ends, m.end)
	}
	f, _ := mem.Open(manifestName("m", 1), true)
	for range 200 {
		cut := int64(manifestHeader) + random.Int64N(m.end-manifestHeader)
		other := mem.AfterKill()
		torn, _ := other.Open(manifestName("m", 1), true)
		torn.Truncate(cut)
		if random.IntN(2) == 0 { // and zeros, as a power loss may leave
			torn.Truncate(cut + random.Int64N(5000))
		}
		whole := 0
		for whole < len(ends) && ends[whole] <= cut {
			whole++
		}
		n := 0
		end, err := readManifest(other, "m", "s", 1, 0, func(_ position, _ frameKind, p []byte) error {
			if n < whole && !bytes.Equal(p, payloads[n]) {
				t.Fatal("a frame's bytes differ")
			}
			n++
			return nil
		})
		if n < whole || (n > whole && end > ends[n-1]) || (err != nil && !errors.Is(err, errTorn)) {
			t.Fatalf("cut at %d: %d frames, want %d; end %d, %v", cut, n, whole, end, err)
		}
	}
	f.Close()
}

func FuzzManifestFrame(f *testing.F) {
	e := encodeEntries([]tensor.Entry{{Sites: []uint32{0, 2}, Count: 3, Stride: 1, Outcome: tensor.Captured}})
	records, table := stepRecords(1, 3, []ring.Span{{Request: 1, Count: 4}})
	step := Step{Session: 1, Count: 2, Records: records, Tables: [][]byte{table}}
	for kind, payload := range map[frameKind][]byte{frameSession: []byte(`{"number":1,"id":"s"}`), frameSessionEnd: []byte(`{"session":1}`),
		frameSites: []byte(`{"session":1,"sites":[{"id":0}]}`), frameRun: []byte(`{"id":"r"}`), frameRequests: []byte(`[{"session":1,"request":2,"id":"x"}]`),
		frameStep: step.encode(), frameBook: e, frameCorrect: e, frameAdopt: e, frameSync: syncPoint{1, 2, position{1, 64}}.encode()} {
		f.Add(uint32(kind), payload)
	}
	o, err := small().withDefaults()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, kind uint32, payload []byte) {
		s := newStore("none", o)
		if s.cat, err = memoryCatalogue(); err != nil {
			t.Fatal(err)
		}
		defer s.cat.close()
		s.flight.detailed = true
		s.replay(position{1, 64}, frameSession, []byte(`{"number":1,"id":"s"}`), true)
		s.replay(position{1, 99}, frameKind(kind), payload, true)
	})
}

func FuzzManifestFile(f *testing.F) {
	mem := vfs.NewMem()
	m := &manifest{fs: mem, dir: "m", store: "s", limit: 1 << 30}
	must(f, m.begin(1))
	m.append(frameBook, []byte{1, 2, 3})
	file, _ := mem.Open(manifestName("m", 1), false)
	b := make([]byte, m.end)
	file.ReadAt(b, 0)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		mem := vfs.NewMem()
		file, _ := mem.Create(manifestName("m", 1), false)
		file.WriteAt(b, 0)
		readManifest(mem, "m", "s", 1, 0, func(position, frameKind, []byte) error { return nil })
	})
}

// TestReadersWhileWriting reads all the time while rows come, are merged, written and sealed.
func TestReadersWhileWriting(t *testing.T) {
	random := seeded(t)
	s := mustOpen(t, t.TempDir(), small())
	session, err := s.BeginSession(tensor.Session{ID: "s00000001", Mode: "complete"})
	must(t, err)
	must(t, s.AddSites(session, []tensor.Site{{Name: "a"}}))
	key := tensor.RequestKey{Session: session, Request: 1}
	rows := make(chan uint32)
	done := make(chan error, 2)
	go func() { // what it is told of is there, whole and in order
		for n := range rows {
			refs, err := s.Chunks(key, 0, 0, n)
			next := uint32(0)
			for _, r := range refs {
				data := make([]byte, r.RowBytes()*int(r.Rows))
				if err == nil {
					err = s.ReadRows(r, 0, r.Rows, data)
				}
				for i := range r.Rows {
					if err == nil && !bytes.Equal(data[int(i)*64:int(i+1)*64], goldenRow(goldenKey, 0, 0, r.First+i, 64)) {
						err = fmt.Errorf("row %d differs", r.First+i)
					}
				}
				if err == nil && r.First != next {
					err = fmt.Errorf("rows %d to %d are not there, of %d", next, r.First, n)
				}
				next = r.First + r.Rows
			}
			if err == nil && next < n {
				err = fmt.Errorf("%d rows of %d are there", next, n)
			}
			if err != nil {
				done <- err
				for range rows {
				}
				return
			}
		}
		done <- nil
	}()
	next := uint32(0)
	for step := range uint64(1500) {
		n := uint32(1 + random.IntN(20))
		data := []byte{}
		for i := range n {
			data = append(data, goldenRow(goldenKey, 0, 0, next+i, 64)...)
		}
		must(t, s.AppendChunk(tensor.Chunk{Key: key, First: next, Rows: n, Step: step, LastStep: step, DType: tensor.U8, Shape: []int{64}, Data: data}))
		next += n
		select {
		case rows <- next:
		default:
		}
		if step%97 == 0 {
			must(t, s.FinishRequest(key))
		}
		if step%200 == 0 {
			must(t, s.Barrier(t.Context()))
		}
	}
	close(rows)
	must(t, <-done)
	must(t, s.Close())
}

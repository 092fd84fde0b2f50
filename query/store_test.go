package query

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"maps"
	"os"
	"slices"
	"testing"
	"time"

	"dmi/internal/leaks"
	"dmi/ring"
	"dmi/store"
	"dmi/tensor"

	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { leaks.Main(m) }

// step is what the engine appends of one forward: an OPEN record and the row table of its requests' tokens.
func (w *world) step(number uint64, index uint64) store.Step {
	table := make([]byte, ring.TableSize)
	spans := uint32(0)
	rows := uint32(0)
	for request, forwards := range w.steps {
		for _, f := range forwards {
			if f.step == number {
				span := ring.Span{Request: request, Count: f.count, Position: f.first, Attempt: f.attempt}
				table = append(table, make([]byte, ring.SpanSize)...)
				span.Encode(table[len(table)-ring.SpanSize:])
				spans++
				rows += f.count
			}
		}
	}
	header := ring.Table{Magic: ring.TableMagic, Bytes: uint32(len(table)), Step: number, Spans: spans}
	header.Encode(table)
	record := make([]byte, ring.OpenRecordSize)
	open := ring.OpenRecord{Seq: index + 1, Step: number, TableBytes: uint64(len(table)), Sites: uint32(len(w.sites)), Kind: ring.KindOpen, Rows: [3]uint32{rows}}
	open.Encode(record)
	return store.Step{Session: w.session.Number, First: index, Count: 1, Records: record, Tables: [][]byte{table}}
}

// fill puts the world into a store as the engine does: a step's records, its chunks, its books.
func (w *world) fill(t *rapid.T, s *store.Store) error {
	number, err := s.BeginSession(w.session)
	if err != nil {
		return err
	}
	if number != w.session.Number {
		t.Fatalf("session number %d", number)
	}
	var sites []tensor.Site
	for _, site := range w.sites {
		sites = append(sites, site.Site)
	}
	if err := errors.Join(s.AddSites(number, sites), s.PutRun(w.run), s.PutRequests(w.requests)); err != nil {
		return err
	}
	var chunks []tensor.Chunk
	var books []tensor.Entry
	for _, r := range w.requests {
		chunks = append(chunks, w.chunks(t, r.Key.Request)...)
	}
	for key, row := range w.rows {
		books = append(books, tensor.Entry{Key: tensor.RequestKey{Session: 1, Request: key.request}, Sites: []uint32{key.site}, Attempt: key.attempt, First: key.position,
			Count: 1, Stride: 1, Step: row.step, Outcome: row.outcome, Reason: row.reason, Level: row.level, Policy: 1})
	}
	slices.SortFunc(books, func(a, b tensor.Entry) int {
		return slices.Compare([]uint64{uint64(a.Sites[0]), uint64(a.First)}, []uint64{uint64(b.Sites[0]), uint64(b.First)})
	})
	index := uint64(0)
	for number := range uint64(64) {
		step := w.step(number, index)
		if binary.LittleEndian.Uint32(step.Tables[0][16:]) == 0 { // no spans
			continue
		}
		index++
		if err := s.AppendStep(step); err != nil {
			return err
		}
		for _, c := range chunks {
			if c.Step == number {
				c.Data = slices.Clone(c.Data)
				if err := s.AppendChunk(c); err != nil {
					return err
				}
			}
		}
		var booked []tensor.Entry
		for _, e := range books {
			if e.Step == number {
				booked = append(booked, e)
			}
		}
		if err := s.Book(booked); err != nil {
			return err
		}
	}
	return nil
}

// What a store answers does not depend on how it keeps the rows: buffered, written, sealed, read by another process.
func TestStoreAnswersLikeTheReference(t *testing.T) {
	if checks := flag.Lookup("rapid.checks").Value; checks.String() == "100" { // the default; each opens a store, syncs and closes it
		checks.Set("25")
		defer checks.Set("100")
	}
	rapid.Check(t, func(t *rapid.T) {
		dir, err := os.MkdirTemp("", "query")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		w := drawWorld(t, rapid.Bool().Draw(t, "whole"))
		s, err := store.Open(dir, store.Options{})
		if err != nil {
			t.Fatal(err)
		}
		closed := false
		defer func() {
			if !closed {
				s.Close()
			}
		}()
		if err := w.fill(t, s); err != nil {
			t.Fatal(err)
		}
		switch rapid.IntRange(0, 2).Draw(t, "state") {
		case 1:
			if err := s.Barrier(context.Background()); err != nil {
				t.Fatal(err)
			}
		case 2:
			closed = true
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if s, err = store.OpenReadOnly(dir); err != nil {
				t.Fatal(err)
			}
			closed = false
		}
		e := New(s)
		e.MemoryBytes = rapid.SampledFrom([]int{1, 300, 1 << 20}).Draw(t, "memory")
		for range 5 {
			r := rapid.SampledFrom(w.requests).Draw(t, "request")
			site := rapid.SampledFrom(w.sites).Draw(t, "site")
			q := TensorQuery{Request: r.ID, Site: SiteName{Name: site.Name}, Tokens: drawRange(t), Heads: drawHeads(t, site), Partial: rapid.Bool().Draw(t, "partial")}
			checkTensor(t, e, q, site, w.want(r, site, q.Tokens))
			q.Tokens, q.Steps, q.Partial = Range{}, Range{rapid.IntRange(-3, 3).Draw(t, "step"), rapid.SampledFrom([]int{End, -1, 1, 3, 9}).Draw(t, "last step")}, true
			checkSteps(t, e, w, r, site, q)
		}
		whole, err := e.Coverage(context.Background(), CoverageQuery{})
		if err != nil || whole.Rows != uint64(len(w.rows)) {
			t.Fatalf("the store's books: %+v, %v, want %d rows", whole, err, len(w.rows))
		}
		run, err := e.Coverage(context.Background(), CoverageQuery{Scope: Scope{Run: w.run.ID}})
		if err != nil || run.Rows != uint64(len(w.rows)) {
			t.Fatalf("the run's books: %+v, %v, want %d rows", run, err, len(w.rows))
		}
	})
}

// checkSteps asks for some of a request's forwards, and wants the rows at the positions that they computed.
func checkSteps(t *rapid.T, e *Engine, w *world, r tensor.Request, site worldSite, q TensorQuery) {
	if q.Steps.everything() { // then no forward is asked for, and rows that none computed are missing too
		checkTensor(t, e, q, site, w.want(r, site, Range{}))
		return
	}
	byStep := map[uint64][]uint32{}
	for p := range uint32(20) {
		number := r.Key.Request
		for _, part := range r.Path {
			if p >= part.First && p < part.First+part.Count {
				number = part.Request
			}
		}
		for _, f := range w.steps[number] {
			if p >= f.first && p < f.first+f.count {
				byStep[f.step] = append(byStep[f.step], p)
			}
		}
	}
	numbers := slices.Sorted(maps.Keys(byStep))
	from, to := q.Steps.clip(len(numbers))
	var positionsOfSteps []uint32
	for i, number := range numbers {
		if i >= from && i < to {
			positionsOfSteps = append(positionsOfSteps, byStep[number]...)
		}
	}
	all := w.want(r, site, Range{})
	var want wanted
	for i, p := range all.positions {
		if slices.Contains(positionsOfSteps, p) {
			want.positions = append(want.positions, p)
			want.rows = append(want.rows, all.rows[i])
		}
	}
	for p := range w.lengthOf(r, site.ID) {
		rows := w.lookup(r, site.ID, p)
		if slices.Contains(positionsOfSteps, p) && !slices.Contains(want.positions, p) && (len(rows) == 0 || owed(rows[len(rows)-1].outcome)) {
			want.missing++
		}
		if slices.Contains(positionsOfSteps, p) {
			want.keys = int(p) + 1
		}
	}
	checkTensor(t, e, q, site, want)
}

// A reader beside a writer sees rows from the first on, whole, never a hole and never a row that is not what was written.
func TestReadingWhileWriting(t *testing.T) {
	s, err := store.Open(t.TempDir(), store.Options{ChunkKiB: 1, FlushAge: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const tokens, width = 5000, 40
	w := &world{session: tensor.Session{Number: 1, ID: "s00000001", Mode: "complete"}, run: tensor.Run{ID: "r00000001", Session: 1}, sites: worldSites[:1],
		requests: []tensor.Request{{Key: tensor.RequestKey{Session: 1}, ID: "r00000001.0", Run: "r00000001"}}, steps: map[uint64][]forward{}}
	row := func(p int) []byte { return bytes.Repeat([]byte{byte(p), byte(p >> 8)}, width) }
	if _, err := s.BeginSession(w.session); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.AddSites(1, []tensor.Site{w.sites[0].Site}), s.PutRun(w.run), s.PutRequests(w.requests)); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() {
		for p := range tokens {
			w.steps[0] = []forward{{step: uint64(p), first: uint32(p), count: 1}}
			key := w.requests[0].Key
			err := s.AppendStep(w.step(uint64(p), uint64(p)))
			if err == nil {
				err = s.AppendChunk(tensor.Chunk{Key: key, First: uint32(p), Rows: 1, Step: uint64(p), LastStep: uint64(p), DType: tensor.BF16, Shape: []int{width}, Data: row(p)})
			}
			if err == nil {
				err = s.Book([]tensor.Entry{{Key: key, Sites: []uint32{0}, First: uint32(p), Count: 1, Stride: 1, Step: uint64(p), Outcome: tensor.Captured}})
			}
			if err != nil {
				written <- err
				return
			}
		}
		written <- nil
	}()
	e := New(s)
	reads := 0
	for done, last := false, 0; !done || last < tokens; reads++ {
		if !done {
			select {
			case err := <-written:
				if err != nil {
					t.Fatal(err)
				}
				done = true
			default:
			}
		}
		a, err := e.Tensor(context.Background(), TensorQuery{Request: "r00000001.0", Site: SiteName{Name: "resid_post"}})
		var failure *Error
		if errors.As(err, &failure) && failure.Code == Incomplete && last == 0 && !done && failure.Coverage.Complete {
			continue // nothing yet
		}
		if err != nil {
			t.Fatalf("after %d rows: %v", last, err)
		}
		if a.Shape[0] < last || done && a.Shape[0] != tokens {
			t.Fatalf("%d rows after %d", a.Shape[0], last)
		}
		last = a.Shape[0]
		var b bytes.Buffer
		if _, err := a.Open(context.Background()).WriteTo(&b); err != nil {
			t.Fatal(err)
		}
		for p := range last {
			if got := b.Bytes()[p*2*width : (p+1)*2*width]; !bytes.Equal(got, row(p)) {
				t.Fatalf("row %d of %d: % x", p, last, got[:4])
			}
		}
	}
	t.Logf("%d reads", reads)
}

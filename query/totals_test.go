package query

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"dmi/ring"
	"dmi/store"
	"dmi/tensor"

	gocmp "github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// listed is what lists say, by an engine that keeps sums and by one that has none yet.
func listed(t *rapid.T, e *Engine) (runs []RunInfo, requests []RequestInfo) {
	ctx := context.Background()
	some, err := e.Runs(ctx, RunsQuery{})
	if err != nil {
		t.Fatal(err)
	}
	all, err := e.Requests(ctx, RequestsQuery{Hidden: true})
	if err != nil {
		t.Fatal(err)
	}
	return some.Items, all.Items
}

// Whatever happens to a store between two questions, lists that keep sums say what they would if they summed everything again: while rows come, requests begin,
// end and get a path, the store commits and forgets what has ended, requests are deleted, and retention takes rows away.
func TestListsKeepNothingThatChanged(t *testing.T) {
	if checks := flag.Lookup("rapid.checks").Value; checks.String() == "100" { // the default; each opens a store and syncs it often
		checks.Set("5")
		defer checks.Set("100")
	}
	rapid.Check(t, func(t *rapid.T) {
		dir, err := os.MkdirTemp("", "query")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		o := store.Options{SegmentTensors: 8, FlushAge: time.Millisecond, TidyEvery: time.Hour}
		if rapid.Bool().Draw(t, "retention") {
			o.TidyEvery, o.RetainAge, o.SegmentAge = 5*time.Millisecond, 20*time.Millisecond, 5*time.Millisecond
		}
		s, err := store.Open(dir, o)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { s.Close() }()
		sites := []tensor.Site{{ID: 0, Name: "blocks.0.hook_resid_post"}, {ID: 1, Name: "blocks.0.attn.hook_pattern", RowAxis: 1, Keyed: true}}
		number, err := s.BeginSession(tensor.Session{ID: "s00000001", Begun: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.AddSites(number, sites); err != nil {
			t.Fatal(err)
		}
		type open struct {
			tensor.Request
			length uint32
			over   bool
		}
		var requests []*open
		step := uint64(0)
		keeps := New(s)
		actions := map[string]func(*rapid.T){
			"run": func(t *rapid.T) {
				if err := s.PutRun(tensor.Run{ID: fmt.Sprintf("r%08x", rapid.IntRange(0, 3).Draw(t, "run")), Session: number, Begun: time.Now()}); err != nil {
					t.Fatal(err)
				}
			},
			"request": func(t *rapid.T) {
				run := fmt.Sprintf("r%08x", rapid.IntRange(0, 3).Draw(t, "run"))
				r := &open{Request: tensor.Request{Key: tensor.RequestKey{Session: number, Request: uint64(len(requests))}, Run: run,
					ID: fmt.Sprintf("%s.%d", run, len(requests)), Hidden: rapid.Bool().Draw(t, "hidden"), Begun: time.Now()}}
				requests = append(requests, r)
				if err := errors.Join(s.PutRun(tensor.Run{ID: run, Session: number, Begun: time.Now()}), s.PutRequests([]tensor.Request{r.Request})); err != nil {
					t.Fatal(err)
				}
			},
			"rows": func(t *rapid.T) {
				if len(requests) == 0 {
					return
				}
				r := rapid.SampledFrom(requests).Draw(t, "of")
				if r.over || len(r.Path) > 0 {
					return
				}
				n := uint32(rapid.IntRange(1, 5).Draw(t, "rows"))
				if err := forwardOf(s, r.Key, step, r.length, n, rapid.IntRange(0, 3).Draw(t, "dropped") == 0); err != nil {
					t.Fatal(err)
				}
				step, r.length = step+1, r.length+n
			},
			"end": func(t *rapid.T) {
				if len(requests) == 0 {
					return
				}
				r := rapid.SampledFrom(requests).Draw(t, "which")
				if !r.over {
					r.over, r.Ended = true, time.Now()
					if err := errors.Join(s.PutRequests([]tensor.Request{{Key: r.Key, Ended: r.Ended}}), s.FinishRequest(r.Key)); err != nil {
						t.Fatal(err)
					}
				}
			},
			"path": func(t *rapid.T) {
				if len(requests) < 2 {
					return
				}
				r, of := rapid.SampledFrom(requests).Draw(t, "which"), rapid.SampledFrom(requests).Draw(t, "through")
				if r.length > 0 || len(of.Path) > 0 || r == of || r.over || r.Run != of.Run {
					return
				}
				r.Path = []tensor.PathPart{{Request: of.Key.Request, First: 0, Count: uint32(rapid.IntRange(1, 6).Draw(t, "positions"))}}
				if err := s.PutRequests([]tensor.Request{{Key: r.Key, Path: r.Path}}); err != nil {
					t.Fatal(err)
				}
			},
			"durable": func(t *rapid.T) {
				if err := s.Barrier(context.Background()); err != nil {
					t.Fatal(err)
				}
			},
			"delete": func(t *rapid.T) {
				if len(requests) == 0 {
					return
				}
				if _, err := s.Delete(context.Background(), []tensor.RequestKey{rapid.SampledFrom(requests).Draw(t, "which").Key}, nil); err != nil {
					t.Fatal(err)
				}
			},
			"time": func(t *rapid.T) {
				if o.RetainAge > 0 {
					time.Sleep(10 * time.Millisecond)
				}
			},
			"": func(t *rapid.T) {
				for { // retention may come between
					before := s.Books()
					runs, all := listed(t, keeps)
					wantRuns, wantAll := listed(t, New(s))
					if d := gocmp.Diff(before, s.Books()); d != "" {
						continue
					}
					if d := gocmp.Diff(wantRuns, runs) + gocmp.Diff(wantAll, all); d != "" {
						t.Fatalf("summed again (-), kept (+):\n%s", d)
					}
					checkPages(t, keeps, all)
					return
				}
			},
		}
		t.Repeat(actions)
	})
}

// checkPages asks for parts of a list of all requests.
func checkPages(t *rapid.T, e *Engine, all []RequestInfo) {
	q := RequestsQuery{Run: rapid.SampledFrom([]string{"", "r00000000", "r00000001"}).Draw(t, "of run"), Hidden: rapid.Bool().Draw(t, "hidden too")}
	want := slices.DeleteFunc(slices.Clone(all), func(r RequestInfo) bool { return q.Run != "" && r.Run != q.Run || r.Hidden && !q.Hidden })
	if rapid.Bool().Draw(t, "the latest") {
		q.Latest = rapid.IntRange(1, 4).Draw(t, "of them")
		want = want[max(0, len(want)-q.Latest):]
	}
	q.Limit = rapid.IntRange(1, 4).Draw(t, "limit")
	for {
		page, err := e.Requests(context.Background(), q)
		if q.Run != "" && errors.As(err, new(*Error)) && !slices.ContainsFunc(all, func(r RequestInfo) bool { return r.Run == q.Run }) {
			return // no such run, or nothing in it
		}
		n := min(q.Limit, len(want))
		if d := gocmp.Diff(idsOf(want[:n]), idsOf(page.Items)); d != "" || err != nil {
			t.Fatalf("%+v: %v; of the whole list (-), page (+):\n%s", q, err, d)
		}
		if want = want[n:]; (page.Next != "") != (len(want) > 0) {
			t.Fatalf("%+v: next %q, %d left", q, page.Next, len(want))
		}
		if q.After = page.Next; q.After == "" {
			return
		}
	}
}

func idsOf(list []RequestInfo) (ids []string) {
	for _, r := range list {
		ids = append(ids, r.ID)
	}
	return ids
}

// forwardOf puts n rows of a request after those that it has: all captured, or the first of the second site dropped.
func forwardOf(s *store.Store, key tensor.RequestKey, step uint64, first, n uint32, dropped bool) error {
	table := make([]byte, ring.TableSize+ring.SpanSize)
	header := ring.Table{Magic: ring.TableMagic, Bytes: uint32(len(table)), Step: step, Spans: 1}
	header.Encode(table)
	span := ring.Span{Request: key.Request, Count: n, Position: first}
	span.Encode(table[ring.TableSize:])
	record := make([]byte, ring.OpenRecordSize)
	open := ring.OpenRecord{Seq: step + 1, Step: step, TableBytes: uint64(len(table)), Sites: 2, Kind: ring.KindOpen, Rows: [3]uint32{n}}
	open.Encode(record)
	entry := func(site uint32, first, n uint32) tensor.Entry {
		return tensor.Entry{Key: key, Sites: []uint32{site}, First: first, Count: n, Stride: 1, Step: step, Outcome: tensor.Captured}
	}
	books := []tensor.Entry{entry(0, first, n), entry(1, first, n)}
	chunk := func(site uint32, first, n uint32, shape ...int) error {
		if n == 0 {
			return nil
		}
		size := 4
		for _, d := range shape {
			size *= d
		}
		return s.AppendChunk(tensor.Chunk{Key: key, Site: site, First: first, Rows: n, Step: step, LastStep: step, DType: tensor.F32, Shape: shape, Data: make([]byte, int(n)*size)})
	}
	keys := int(first + n)
	if dropped {
		books[1] = entry(1, first, 1)
		books[1].Outcome, books[1].Reason = tensor.Dropped, tensor.RingFull
		if n > 1 {
			books = append(books, entry(1, first+1, n-1))
		}
		first, n = first+1, n-1
	}
	err := s.AppendStep(store.Step{Session: key.Session, First: step, Count: 1, Records: record, Tables: [][]byte{table}})
	whole := books[0]
	err = errors.Join(err, chunk(0, whole.First, whole.Count, 3), chunk(1, first, n, 2, keys))
	slices.SortFunc(books, func(a, b tensor.Entry) int { return cmp.Compare(a.First, b.First) })
	return errors.Join(err, s.Book(books))
}

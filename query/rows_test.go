package query

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"testing"

	"dmi/tensor"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// Pages put together are every row of every visible request, in order, whatever the page size.
func TestRowsPagesAddUp(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t, rapid.Bool().Draw(t, "whole"))
		e := New(w.memory(t))
		e.MemoryBytes = rapid.SampledFrom([]int{1, 100, 1 << 20}).Draw(t, "memory")
		s := rapid.SampledFrom(w.sites).Draw(t, "site")
		q := RowsQuery{Scope: Scope{Run: w.run.ID}, Site: SiteName{Name: s.Name}, Limit: rapid.IntRange(1, 7).Draw(t, "page"), Partial: rapid.Bool().Draw(t, "partial")}
		if s.Keyed && !w.requests[0].Hidden {
			if _, err := e.Rows(context.Background(), q); !errors.Is(err, ErrBadArgument) {
				t.Fatalf("rows that grow: %v", err)
			}
			return
		}
		if s.Keyed {
			return
		}
		var wantData []byte
		var wantRows []string
		missing := 0
		for _, r := range w.requests {
			if r.Hidden {
				continue
			}
			want := w.want(r, s, Range{})
			missing += want.missing
			for i, row := range want.rows {
				wantData = append(wantData, row...)
				wantRows = append(wantRows, cursor(r.ID, uint64(want.positions[i])))
			}
		}
		var data []byte
		var rows []string
		gotMissing := uint64(0)
		for {
			page, err := e.Rows(context.Background(), q)
			if errors.Is(err, ErrIncomplete) {
				if len(wantRows) > 0 && (q.Partial || missing == 0) {
					t.Fatalf("%d rows missing: %v", missing, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			gotMissing += page.Missing
			n := 0
			for _, part := range page.Requests {
				for _, p := range positions([]Span{{part.First, part.Count}}) {
					rows = append(rows, cursor(part.Request, uint64(p)))
					n++
				}
			}
			if n > q.Limit || !slices.Equal(page.Shape, append([]int{n}, s.shape...)) {
				t.Fatalf("page of %d rows (limit %d), shape %v", n, q.Limit, page.Shape)
			}
			var b bytes.Buffer
			if _, err := page.Open(context.Background()).WriteTo(&b); err != nil {
				t.Fatal(err)
			}
			data = append(data, b.Bytes()...)
			if page.Next == "" {
				break
			}
			if n == 0 {
				t.Fatal("an empty page that is not the last")
			}
			q.After = page.Next
		}
		if missing > 0 && !q.Partial {
			t.Fatalf("%d rows missing and no error", missing)
		}
		if d := cmp.Diff(wantRows, rows); d != "" {
			t.Fatalf("rows (-want +got):\n%s", d)
		}
		if !bytes.Equal(data, wantData) {
			t.Fatal("the rows are right, their bytes are not")
		}
		if int(gotMissing) != missing {
			t.Fatalf("missing %d, want %d", gotMissing, missing)
		}
	})
}

func TestRowsRefusesStrangeCursors(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t, true)
		e := New(w.memory(t))
		for _, after := range []string{"x", "@1", "nobody@1", "r00000001.0@-1", "r00000001.0@99999999999", "r00000001.0@"} {
			_, err := e.Rows(context.Background(), RowsQuery{Scope: Scope{Run: w.run.ID}, Site: SiteName{Name: "tokens"}, After: after})
			if !errors.Is(err, ErrBadArgument) {
				t.Fatalf("cursor %q: %v", after, err)
			}
		}
	})
}

// Coverage of a request lists every row of every attempt exactly once; of a run and of the store, the sums agree with counting.
func TestCoverageEqualsCounting(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t, rapid.Bool().Draw(t, "whole"))
		e := New(w.memory(t))
		r := rapid.SampledFrom(w.requests).Draw(t, "request")
		got, err := e.Coverage(context.Background(), CoverageQuery{Scope: Scope{Requests: []string{r.ID}}})
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]int{}
		complete, repeated := true, uint64(0)
		sums := map[string]map[string]uint64{}
		for _, s := range w.sites {
			for p := range uint32(20) {
				rows := w.lookup(r, s.ID, p)
				there := false
				for _, row := range rows {
					in := row.reason.String()
					if row.reason == tensor.Repeated {
						repeated++
					}
					if row.outcome == tensor.Captured {
						in = row.level.String()
						there = there || row.level == tensor.Full
					}
					want[s.Name+" "+cursor(row.outcome.String()+" "+in, uint64(p))]++
					if sums[row.outcome.String()] == nil {
						sums[row.outcome.String()] = map[string]uint64{}
					}
					sums[row.outcome.String()][in]++
				}
				if len(rows) > 0 && !there && owed(rows[len(rows)-1].outcome) {
					complete = false
				}
				// A beam's path may leave positions out before others: they are owed to nobody's books.
				if len(rows) == 0 && p < w.lengthOf(r, s.ID) {
					complete = false
				}
			}
		}
		listed := map[string]int{}
		for _, c := range got.Ranges {
			in := c.Reason
			if c.Outcome == "captured" {
				in = c.Level
			}
			for i := range c.Count {
				listed[c.Site+" "+cursor(c.Outcome+" "+in, uint64(c.First+i*c.Stride))]++
			}
		}
		if d := cmp.Diff(want, listed); d != "" {
			t.Fatalf("ranges (-want +got):\n%s", d)
		}
		if d := cmp.Diff(sums, got.Outcomes); d != "" {
			t.Fatalf("sums (-want +got):\n%s", d)
		}
		if got.Complete != complete || got.Repeated != repeated {
			t.Fatalf("complete %v, %d repeated, want %v, %d", got.Complete, got.Repeated, complete, repeated)
		}
		for _, scope := range []Scope{{Run: w.run.ID}, {Session: w.session.ID}, {}} {
			got, err := e.Coverage(context.Background(), CoverageQuery{Scope: scope})
			if err != nil {
				t.Fatal(err)
			}
			if got.Rows != uint64(len(w.rows)) || len(got.Ranges) != 0 {
				t.Fatalf("%+v: %d rows on the books, %d produced", scope, got.Rows, len(w.rows))
			}
		}
	})
}

// lengthOf is one past the last position that has a row.
func (w *world) lengthOf(r tensor.Request, site uint32) (n uint32) {
	for p := range uint32(20) {
		if len(w.lookup(r, site, p)) > 0 {
			n = p + 1
		}
	}
	return n
}

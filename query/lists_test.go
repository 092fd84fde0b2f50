package query

import (
	"context"
	"errors"
	"slices"
	"testing"

	"dmi/tensor"

	"pgregory.net/rapid"
)

// Lists say of runs, requests and sites what counting rows says.
func TestListsEqualCounting(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t, rapid.Bool().Draw(t, "whole"))
		e := New(w.memory(t))
		ctx := context.Background()
		var rows, bytes uint64
		bySite := map[string][2]uint64{}
		visible := 0
		for _, r := range w.requests {
			var own sum
			for _, s := range w.sites {
				for p := range uint32(20) {
					for _, row := range w.lookup(r, s.ID, p) {
						own.positions = max(own.positions, p+1)
						if row.outcome != tensor.Captured {
							continue
						}
						own.rows++
						own.bytes += uint64(len(row.data))
						if len(r.Path) == 0 {
							rows++
							bytes += uint64(len(row.data))
							bySite[s.Name] = [2]uint64{bySite[s.Name][0] + 1, bySite[s.Name][1] + uint64(len(row.data))}
						}
					}
				}
			}
			if !r.Hidden {
				visible++
			}
			got, err := e.Request(ctx, r.ID)
			if err != nil {
				t.Fatal(err)
			}
			if got.Positions != own.positions || got.Rows != own.rows || got.Bytes != own.bytes || got.Hidden != r.Hidden || got.Session != w.session.ID ||
				!slices.Equal(got.Tokens, r.Tokens) || len(got.Path) != len(r.Path) {
				t.Fatalf("request %+v, want %+v", got, own)
			}
		}
		runs, err := e.Runs(ctx, RunsQuery{Tag: "demo", Labels: map[string]string{"topic": "tests"}})
		if err != nil || len(runs.Items) != 1 || runs.Items[0].Rows != rows || runs.Items[0].Bytes != bytes || runs.Items[0].Requests != visible {
			t.Fatalf("runs %+v, %v, want one of %d requests, %d rows, %d bytes", runs, err, visible, rows, bytes)
		}
		if runs, err := e.Runs(ctx, RunsQuery{Tag: "other"}); err != nil || len(runs.Items) != 0 {
			t.Fatalf("runs of another tag: %+v, %v", runs, err)
		}
		var ids []string
		for q := (RequestsQuery{Run: w.run.ID, Limit: 1}); ; {
			page, err := e.Requests(ctx, q)
			if err != nil || len(page.Items) > 1 {
				t.Fatal(page, err)
			}
			for _, r := range page.Items {
				ids = append(ids, r.ID)
			}
			if q.After = page.Next; q.After == "" {
				break
			}
		}
		if want := visibleIDs(w); !slices.Equal(ids, want) {
			t.Fatalf("requests %v, want %v", ids, want)
		}
		latest, err := e.Requests(ctx, RequestsQuery{Latest: 1, Hidden: true})
		if err != nil || len(latest.Items) != 1 || latest.Items[0].ID != w.requests[len(w.requests)-1].ID {
			t.Fatalf("latest: %+v, %v", latest, err)
		}
		for _, scope := range []Scope{{Run: w.run.ID}, {Session: w.session.ID}} {
			sites, err := e.Sites(ctx, SitesQuery{Scope: scope})
			if err != nil || len(sites) != len(w.sites) {
				t.Fatal(sites, err)
			}
			for i, s := range sites {
				if want := bySite[s.Name]; s.Rows != want[0] || s.Bytes != want[1] {
					t.Fatalf("site %+v, want %v rows and bytes", s, want)
				}
				if s.Rows > 0 && (s.DType != w.sites[i].dtype.String() || !slices.Equal(s.RowShape, w.sites[i].shape) || len(s.Axes) != len(s.RowShape)+1) {
					t.Fatalf("site %+v, want %v %v", s, w.sites[i].dtype, w.sites[i].shape)
				}
			}
		}
	})
}

func visibleIDs(w *world) (ids []string) {
	for _, r := range w.requests {
		if !r.Hidden {
			ids = append(ids, r.ID)
		}
	}
	return ids
}

func TestUnknownNamesAreNotFound(t *testing.T) {
	m := example(t)
	e := New(m)
	ctx := context.Background()
	for what, ask := range map[string]func() error{
		"request": func() error { _, err := e.Request(ctx, "r00000001.99"); return err },
		"tensor": func() error {
			_, err := e.Tensor(ctx, TensorQuery{Request: "x", Site: SiteName{Name: "tokens"}})
			return err
		},
		"site": func() error {
			_, err := e.Tensor(ctx, TensorQuery{Request: m.requests[0].ID, Site: SiteName{Name: "tokns"}})
			return err
		},
		"run":     func() error { _, err := e.Requests(ctx, RequestsQuery{Run: "r1"}); return err },
		"session": func() error { _, err := e.Sites(ctx, SitesQuery{Scope: Scope{Session: "s1"}}); return err },
		"stats": func() error {
			_, err := e.Stats(ctx, StatsQuery{Scope: Scope{Run: m.run.ID}, Site: "hook_x*"})
			return err
		},
	} {
		var failure *Error
		if err := ask(); !errors.As(err, &failure) || failure.Code != NotFound || failure.Hint == "" {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, ask := range map[string]func() error{
		"no scope":   func() error { _, err := e.Stats(ctx, StatsQuery{}); return err },
		"two scopes": func() error { _, err := e.Sites(ctx, SitesQuery{Scope: Scope{Session: "s", Run: "r"}}); return err },
		"request twice": func() error {
			_, err := e.Stats(ctx, StatsQuery{Scope: Scope{Requests: []string{m.requests[0].ID, m.requests[0].ID}}})
			return err
		},
		"page too large": func() error { _, err := e.Requests(ctx, RequestsQuery{Limit: maxPage + 1}); return err },
		"heads of none": func() error {
			_, err := e.Tensor(ctx, TensorQuery{Request: m.requests[0].ID, Site: SiteName{Name: "tokens"}, Heads: []int{0}, Partial: true})
			return err
		},
		"head 3 of 3": func() error {
			_, err := e.Tensor(ctx, TensorQuery{Request: m.requests[0].ID, Site: SiteName{Name: "attn.q"}, Heads: []int{3}, Partial: true})
			return err
		},
		"weights of scores": func() error {
			_, err := e.TopKeys(ctx, TopKeysQuery{Request: m.requests[0].ID, Site: SiteName{Name: "attn_scores"}})
			return err
		},
	} {
		if err := ask(); !errors.Is(err, ErrBadArgument) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := e.Tensor(ctx, TensorQuery{Request: m.requests[0].ID, Site: SiteName{Name: "tokens"}, Partial: true, Limit: 1}); !errors.Is(err, ErrOverLimit) {
		t.Errorf("limit of a byte: %v", err)
	}
	stopped, cancel := context.WithCancel(ctx)
	a, err := e.Tensor(ctx, TensorQuery{Request: m.requests[0].ID, Site: SiteName{Name: "tokens"}, Partial: true})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if n, err := a.Open(stopped).Read(make([]byte, 8)); n != 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("read after the end of the context: %d, %v", n, err)
	}
}

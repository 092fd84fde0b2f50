package inspect

import (
	"context"
	"math"
	"sync"
	"testing"

	"dmi/internal/samplestore"
	"dmi/query"
	"dmi/store"
)

// witness is a store that counts what is read of it, and looks at the progress before every read.
type witness struct {
	*store.Store
	progress *Progress
	wrong    func(format string, args ...any)

	mu     sync.Mutex
	read   uint64
	last   State
	inside bool // a share between nothing and all was seen
}

func (w *witness) ReadRows(ref store.ChunkRef, from, to uint32, dst []byte) error {
	now := w.progress.State()
	w.mu.Lock()
	defer w.mu.Unlock()
	if now.Stage == w.last.Stage && now.Bytes >= w.last.Bytes { // of two that look at once, the later one
		if now.Share < w.last.Share {
			w.wrong("share fell from %+v to %+v", w.last, now)
		}
		w.last = now
	}
	w.inside = w.inside || now.Share > 0 && now.Share < 1
	w.read += uint64(len(dst))
	return w.Store.ReadRows(ref, from, to, dst)
}

// Every tool says how far it has come: more and more, all in the end, and exactly the bytes that it read.
func TestToolsTellTheirProgress(t *testing.T) {
	s, err := store.Open(t.TempDir(), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	sample, err := samplestore.Fill(s, "s0000beef")
	if err != nil {
		t.Fatal(err)
	}
	scope := query.Scope{Run: sample.Run.ID}
	one, other := sample.Requests[0].ID, sample.Requests[1].ID
	lines := 0
	for name, tool := range map[string]func(context.Context, *query.Engine) error{
		"stats": func(ctx context.Context, e *query.Engine) error {
			return Stats(ctx, e, StatsQuery{Scope: scope, Per: query.PerSite}, func(StatsRow) error { lines++; return nil })
		},
		"outliers": func(ctx context.Context, e *query.Engine) error {
			return Outliers(ctx, e, OutliersQuery{Scope: scope}, func(OutlierRow) error { lines++; return nil })
		},
		"heads": func(ctx context.Context, e *query.Engine) error {
			return Heads(ctx, e, HeadsQuery{Scope: scope}, func(HeadRow) error { lines++; return nil })
		},
		"tokens": func(ctx context.Context, e *query.Engine) error {
			return Tokens(ctx, e, TokensQuery{Scope: scope}, func(TokenRow) error { lines++; return nil })
		},
		"similarity": func(ctx context.Context, e *query.Engine) error {
			return Similarity(ctx, e, SimilarityQuery{Scope: scope, Site: "**.hook_resid_post"}, func(SimilarityRow) error { lines++; return nil })
		},
		"compare": func(ctx context.Context, e *query.Engine) error {
			return Compare(ctx, e, CompareQuery{A: one, B: other, Per: query.PerSite}, func(CompareRow) error { lines++; return nil })
		},
	} {
		t.Run(name, func(t *testing.T) {
			progress := &Progress{}
			w := &witness{Store: s, progress: progress, wrong: t.Errorf}
			e := query.New(w)
			lines = 0
			if got := progress.State(); got != (State{}) {
				t.Errorf("before it began: %+v", got)
			}
			if err := tool(WithProgress(t.Context(), progress), e); err != nil || lines == 0 {
				t.Fatalf("%d lines, %v", lines, err)
			}
			end := progress.State()
			if math.Abs(end.Share-1) > 1e-9 || end.Stage == "" {
				t.Errorf("in the end: %+v", end)
			}
			if end.Bytes != w.read || w.read == 0 {
				t.Errorf("says that it read %d bytes, read %d", end.Bytes, w.read)
			}
			if name == "stats" && !w.inside { // of several sites and requests
				t.Error("it never was half-way")
			}
		})
	}
}

// Nobody asks: nothing is told, and the books are not looked at for it.
func TestNoProgress(t *testing.T) {
	var p *Progress
	p.begin(reading)
	p.add(1, 1)
	p.follow(nil, 1)()
	if progressOf(t.Context()) != nil {
		t.Error("a progress where none was asked for")
	}
}

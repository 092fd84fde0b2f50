package serve

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"math"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"dmi/inspect"
	"dmi/query"
)

// inspections are the routes of docs/inspect.md.
func (s *Server) inspections(get func(string, Scope, func(*writer, *call) error, ...string) route, bySite, always func(route) route) []route {
	about := func(more ...string) []string {
		return append([]string{"request*", "run", "session", "site", "layer"}, more...)
	}
	return []route{
		bySite(get("/inspect/stats", ScopeStatistics, s.inspectStats, about("tokens", "per")...)),
		get("/inspect/heads", ScopeStatistics, s.inspectHeads, about("period", "threshold")...),
		always(get("/inspect/tokens", ScopeTensors, s.inspectTokens, about("tokens", "k")...)),
		bySite(get("/inspect/outliers", ScopeStatistics, s.inspectOutliers, about("threshold", "share", "tolerance")...)),
		get("/inspect/router", ScopeStatistics, s.inspectRouter, "request*", "run", "session", "layer"),
		always(get("/inspect/lens", ScopeTensors, s.inspectLens, about("tokens", "k")...)),
		get("/inspect/similarity", ScopeStatistics, s.inspectSimilarity, about("tokens", "sample")...),
		bySite(get("/inspect/compare", ScopeStatistics, s.inspectCompare, "a", "b", "site", "layer", "tokens", "per", "tolerance")),
	}
}

// streamList writes a list's items as each gives them, so that a long inspection shows what it has found so far. Who takes Server-Sent Events is told how far it has come as well.
func streamList[T any](w *writer, c *call, each func(ctx context.Context, yield func(T) error) error) error {
	if strings.Contains(c.Header.Get("Accept"), "text/event-stream") {
		return listEvents(w, c, each)
	}
	w.Header().Set("Content-Type", "application/json")
	if c.Method == http.MethodHead {
		w.WriteHeader(http.StatusOK)
		return nil
	}
	out := bufio.NewWriter(w)
	sent := time.Now()
	separator := `{"items":[` + "\n"
	err := each(c.Context(), func(item T) error {
		line, err := json.Marshal(item)
		if err != nil {
			return err
		}
		_, _ = io.WriteString(out, separator)
		separator = ",\n"
		if _, err := out.Write(line); err != nil || time.Since(sent) < tellEvery {
			return err
		}
		sent = time.Now()
		if err := out.Flush(); err != nil {
			return err
		}
		return w.flush()
	})
	if err != nil {
		return err
	}
	if separator[0] == '{' {
		_, _ = io.WriteString(out, separator)
	}
	_, _ = io.WriteString(out, "\n],\"next\":null}\n")
	return out.Flush()
}

const (
	tellEvery  = 200 * time.Millisecond
	mostUntold = 64 << 10 // bytes of items that wait for the next event
)

type listEnd struct {
	Items uint64 `json:"items"`
}

// listEvents sends a list as events: `progress` from time to time, `items` with those found since, `result` in the end. What goes wrong before the first of them is an answer of its own.
func listEvents[T any](w *writer, c *call, each func(ctx context.Context, yield func(T) error) error) error {
	if c.Method == http.MethodHead {
		w.Header().Set("Content-Type", "text/event-stream")
		w.WriteHeader(http.StatusOK)
		return nil
	}
	ctx, cancel := context.WithCancelCause(c.Context())
	defer cancel(nil)
	progress := &inspect.Progress{}
	var (
		mu     sync.Mutex // of the answer: the tool's items and the ticks take turns
		stream *eventStream
		items  []json.RawMessage
		untold int // bytes of items
		found  uint64
	)
	tell := func() error {
		if stream == nil {
			var err error
			if stream, err = openEventStream(w); err != nil {
				return err
			}
		}
		if len(items) == 0 {
			return nil
		}
		err := stream.send("items", "", items)
		items, untold = items[:0], 0
		return err
	}
	var ticking sync.WaitGroup
	over := make(chan struct{})
	stop := sync.OnceFunc(func() { close(over); ticking.Wait() })
	defer stop() // where the tool panics: nobody writes to an answer that has ended
	ticking.Go(func() {
		ticks := time.NewTicker(tellEvery)
		defer ticks.Stop()
		for {
			select {
			case <-over:
				return
			case <-ticks.C:
			}
			mu.Lock()
			err := tell()
			if err == nil {
				err = stream.send("progress", "", progress.State())
			}
			if err == nil {
				err = w.flush()
			}
			mu.Unlock()
			if err != nil {
				cancel(err) // the reader has gone: the tool need not go on
				return
			}
		}
	})
	err := each(inspect.WithProgress(ctx, progress), func(item T) error {
		line, err := json.Marshal(item)
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		found++
		items, untold = append(items, line), untold+len(line)
		if untold < mostUntold {
			return nil
		}
		return tell()
	})
	stop()
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		if stream == nil {
			return err
		}
		return endStream(w, c, stream, nil, err)
	}
	if err := tell(); err != nil {
		return err
	}
	return endStream(w, c, stream, listEnd{found}, nil)
}

// fraction is a number from just above 0 to most; 0 where it is not given.
func (a *arguments) fraction(name string, most float64) float64 {
	v := a.values.Get(name)
	if v == "" {
		return 0
	}
	n, err := strconv.ParseFloat(v, 64)
	if err != nil || !(n > 0 && n <= most) {
		a.fail(badArgument("say a number above 0, at most "+strconv.FormatFloat(most, 'g', -1, 64), "%s=%q is not one", name, v))
	}
	return n
}

func (s *Server) inspectStats(w *writer, c *call) error {
	per := query.PerSite
	switch c.text("per") {
	case "", "site":
	case "request":
		per = query.PerRequest
	default:
		return badArgument("say site or request", "distributions per %q: no such grouping", c.text("per"))
	}
	q := inspect.StatsQuery{Scope: c.requestsAsked(false), Site: c.text("site"), Layer: c.layer(), Tokens: c.positions("tokens"), Per: per}
	if c.err != nil {
		return c.err
	}
	return streamList(w, c, func(ctx context.Context, yield func(inspect.StatsRow) error) error {
		return inspect.Stats(ctx, c.query, q, yield)
	})
}

func (s *Server) inspectHeads(w *writer, c *call) error {
	q := inspect.HeadsQuery{Scope: c.requestsAsked(false), Site: c.text("site"), Layer: c.layer(), Period: int(c.number("period", 1, 1<<30)), Threshold: c.fraction("threshold", 1)}
	if c.err != nil {
		return c.err
	}
	return streamList(w, c, func(ctx context.Context, yield func(inspect.HeadRow) error) error {
		return inspect.Heads(ctx, c.query, q, yield)
	})
}

func (s *Server) inspectTokens(w *writer, c *call) error {
	q := inspect.TokensQuery{Scope: c.requestsAsked(false), Site: c.text("site"), Layer: c.layer(), Tokens: c.positions("tokens"), K: int(c.number("k", 1, 1000))}
	if c.err != nil {
		return c.err
	}
	return streamList(w, c, func(ctx context.Context, yield func(inspect.TokenRow) error) error {
		return inspect.Tokens(ctx, c.query, q, yield)
	})
}

func (s *Server) inspectOutliers(w *writer, c *call) error {
	q := inspect.OutliersQuery{Scope: c.requestsAsked(false), Site: c.text("site"), Layer: c.layer(), Threshold: c.fraction("threshold", math.MaxFloat64),
		Share: c.fraction("share", 1), Tolerance: c.fraction("tolerance", math.MaxFloat64)}
	if c.err != nil {
		return c.err
	}
	return streamList(w, c, func(ctx context.Context, yield func(inspect.OutlierRow) error) error {
		return inspect.Outliers(ctx, c.query, q, yield)
	})
}

func (s *Server) inspectRouter(w *writer, c *call) error {
	q := inspect.RouterQuery{Scope: c.requestsAsked(false), Layer: c.layer()}
	if c.err != nil {
		return c.err
	}
	return streamList(w, c, func(ctx context.Context, yield func(inspect.RouterRow) error) error {
		return inspect.Router(ctx, c.query, q, yield)
	})
}

func (s *Server) inspectSimilarity(w *writer, c *call) error {
	q := inspect.SimilarityQuery{Scope: c.requestsAsked(false), Site: c.text("site"), Layer: c.layer(), Tokens: c.positions("tokens"), Sample: int(c.number("sample", 2, 4096))}
	if c.err != nil {
		return c.err
	}
	return streamList(w, c, func(ctx context.Context, yield func(inspect.SimilarityRow) error) error {
		return inspect.Similarity(ctx, c.query, q, yield)
	})
}

func (s *Server) inspectCompare(w *writer, c *call) error {
	per := query.PerSite
	switch c.text("per") {
	case "", "site":
	case "row":
		per = query.PerRow
	default:
		return badArgument("say site or row", "compare per %q: no such grouping", c.text("per"))
	}
	q := inspect.CompareQuery{A: c.must("a", "name a request or a run"), B: c.must("b", "name a request or a run"), Site: c.text("site"), Layer: c.layer(), Tokens: c.positions("tokens"),
		Per: per, Tolerance: c.fraction("tolerance", math.MaxFloat64)}
	if c.err != nil {
		return c.err
	}
	return streamList(w, c, func(ctx context.Context, yield func(inspect.CompareRow) error) error {
		return inspect.Compare(ctx, c.query, q, yield)
	})
}

func (s *Server) inspectLens(w *writer, c *call) error {
	q := inspect.LensQuery{Scope: c.requestsAsked(false), Site: c.text("site"), Layer: c.layer(), Tokens: c.positions("tokens"), K: int(c.number("k", 1, 100)),
		Models: filepath.Join(s.options.Identity.Store, "models")}
	if c.err != nil {
		return c.err
	}
	return streamList(w, c, func(ctx context.Context, yield func(inspect.LensRow) error) error {
		return inspect.Lens(ctx, c.query, q, yield)
	})
}

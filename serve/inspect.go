package serve

import (
	"bufio"
	"encoding/json"
	"io"
	"math"
	"net/http"
	"path/filepath"
	"strconv"
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

// streamList writes a list's items as each gives them, so that a long inspection shows what it has found so far.
func streamList[T any](w *writer, c *call, each func(yield func(T) error) error) error {
	w.Header().Set("Content-Type", "application/json")
	if c.Method == http.MethodHead {
		w.WriteHeader(http.StatusOK)
		return nil
	}
	out := bufio.NewWriter(w)
	sent := time.Now()
	separator := `{"items":[` + "\n"
	err := each(func(item T) error {
		line, err := json.Marshal(item)
		if err != nil {
			return err
		}
		_, _ = io.WriteString(out, separator)
		separator = ",\n"
		if _, err := out.Write(line); err != nil || time.Since(sent) < 200*time.Millisecond {
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
	return streamList(w, c, func(yield func(inspect.StatsRow) error) error { return inspect.Stats(c.Context(), c.query, q, yield) })
}

func (s *Server) inspectHeads(w *writer, c *call) error {
	q := inspect.HeadsQuery{Scope: c.requestsAsked(false), Site: c.text("site"), Layer: c.layer(), Period: int(c.number("period", 1, 1<<30)), Threshold: c.fraction("threshold", 1)}
	if c.err != nil {
		return c.err
	}
	return streamList(w, c, func(yield func(inspect.HeadRow) error) error { return inspect.Heads(c.Context(), c.query, q, yield) })
}

func (s *Server) inspectTokens(w *writer, c *call) error {
	q := inspect.TokensQuery{Scope: c.requestsAsked(false), Site: c.text("site"), Layer: c.layer(), Tokens: c.positions("tokens"), K: int(c.number("k", 1, 1000))}
	if c.err != nil {
		return c.err
	}
	return streamList(w, c, func(yield func(inspect.TokenRow) error) error { return inspect.Tokens(c.Context(), c.query, q, yield) })
}

func (s *Server) inspectOutliers(w *writer, c *call) error {
	q := inspect.OutliersQuery{Scope: c.requestsAsked(false), Site: c.text("site"), Layer: c.layer(), Threshold: c.fraction("threshold", math.MaxFloat64),
		Share: c.fraction("share", 1), Tolerance: c.fraction("tolerance", math.MaxFloat64)}
	if c.err != nil {
		return c.err
	}
	return streamList(w, c, func(yield func(inspect.OutlierRow) error) error {
		return inspect.Outliers(c.Context(), c.query, q, yield)
	})
}

func (s *Server) inspectRouter(w *writer, c *call) error {
	q := inspect.RouterQuery{Scope: c.requestsAsked(false), Layer: c.layer()}
	if c.err != nil {
		return c.err
	}
	return streamList(w, c, func(yield func(inspect.RouterRow) error) error { return inspect.Router(c.Context(), c.query, q, yield) })
}

func (s *Server) inspectSimilarity(w *writer, c *call) error {
	q := inspect.SimilarityQuery{Scope: c.requestsAsked(false), Site: c.text("site"), Layer: c.layer(), Tokens: c.positions("tokens"), Sample: int(c.number("sample", 2, 4096))}
	if c.err != nil {
		return c.err
	}
	return streamList(w, c, func(yield func(inspect.SimilarityRow) error) error {
		return inspect.Similarity(c.Context(), c.query, q, yield)
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
	return streamList(w, c, func(yield func(inspect.CompareRow) error) error {
		return inspect.Compare(c.Context(), c.query, q, yield)
	})
}

func (s *Server) inspectLens(w *writer, c *call) error {
	q := inspect.LensQuery{Scope: c.requestsAsked(false), Site: c.text("site"), Layer: c.layer(), Tokens: c.positions("tokens"), K: int(c.number("k", 1, 100)),
		Models: filepath.Join(s.options.Identity.Store, "models")}
	if c.err != nil {
		return c.err
	}
	return streamList(w, c, func(yield func(inspect.LensRow) error) error { return inspect.Lens(c.Context(), c.query, q, yield) })
}

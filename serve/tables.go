package serve

import (
	"context"
	"net/http"

	"dmi/query"
	"dmi/tensor"
)

func (s *Server) coverage(w *writer, c *call) error {
	q := query.CoverageQuery{Scope: c.requestsAsked(true), Site: c.text("site"), Layer: c.layer()}
	if c.err != nil {
		return c.err
	}
	coverage, err := c.query.Coverage(c.Context(), q)
	if err != nil {
		return err
	}
	return writeJSON(w, coverage)
}

func (s *Server) stats(w *writer, c *call) error {
	per, err := query.ParsePer(c.text("per"))
	if err != nil {
		return err
	}
	q := query.StatsQuery{Scope: c.requestsAsked(false), Site: c.text("site"), Layer: c.layer(), Tokens: c.positions("tokens"), Per: per}
	if c.err != nil {
		return c.err
	}
	format := c.text("format")
	switch format {
	case "", "json", "arrow", "parquet":
	default:
		return badArgument("say json, arrow or parquet", "statistics as %q: no such format", format)
	}
	stats, err := c.query.Stats(c.Context(), q)
	if err != nil {
		return err
	}
	write, contentType := stats.WriteJSON, "application/json"
	switch format {
	case "arrow":
		write, contentType = stats.WriteArrow, "application/vnd.apache.arrow.stream"
	case "parquet":
		write, contentType = stats.WriteParquet, "application/vnd.apache.parquet"
	}
	w.Header().Set("Content-Type", contentType)
	if c.Method == http.MethodHead {
		w.WriteHeader(http.StatusOK)
		return nil
	}
	return write(c.Context(), w)
}

func (s *Server) top(w *writer, c *call) error {
	q := query.TopQuery{Scope: c.requestsAsked(false), Site: c.text("site"), Layer: c.layer(), Tokens: c.positions("tokens"), K: int(c.number("k", 1, tensor.MaxTop))}
	if c.err != nil {
		return c.err
	}
	return streamList(w, c, func(ctx context.Context, yield func(query.TopRow) error) error { return c.query.Top(ctx, q, yield) })
}

func (s *Server) topKeys(w *writer, c *call) error {
	q := query.TopKeysQuery{Request: c.must("request", "name one; GET /v1/requests lists them"),
		Site:  query.SiteName{Name: c.must("site", "name an attention pattern"), Layer: c.layer()},
		Heads: c.heads(), Query: c.optional("query", -1<<31, 1<<31), K: int(c.number("k", 1, 1000))}
	if c.err != nil {
		return c.err
	}
	keys, err := c.query.TopKeys(c.Context(), q)
	if err != nil {
		return err
	}
	return writeList(w, keys, "")
}

package serve

import (
	"encoding/binary"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"

	"dmi/query"
	"dmi/tensor"
)

func (s *Server) grid(w *writer, c *call) error {
	q := query.GridQuery{Request: c.must("request", "name one; GET /v1/requests lists them"), Site: c.text("site"), Layer: c.layer(), Tokens: c.positions("tokens"),
		Statistic: c.must("statistic", "say one of "+strings.Join(query.Statistics, ", "))}
	if c.err != nil {
		return c.err
	}
	g, err := c.query.Grid(c.Context(), q)
	if err != nil {
		return err
	}
	w.Header().Set("Dmi-Positions", fmt.Sprintf("%d:%d", g.First, g.First+g.Width))
	return sendGrid(w, c, g.Sites, g.Values, "site,token", len(g.Sites), g.Width)
}

func (s *Server) thumbnails(w *writer, c *call) error {
	q := query.ThumbnailsQuery{Request: c.must("request", "name one; GET /v1/requests lists them"), Site: c.must("site", "name attention patterns: blocks.*.attn.hook_pattern"),
		Layer: c.layer(), Size: int(c.number("size", 1, 256))}
	if c.err != nil {
		return c.err
	}
	t, err := c.query.Thumbnails(c.Context(), q)
	if err != nil {
		return err
	}
	return sendGrid(w, c, t.Sites, t.Values, "site,head,query,key", len(t.Sites), t.Heads, t.Side, t.Side)
}

// sendGrid answers with octets: a page draws hundreds of thousands of values at once.
func sendGrid(w *writer, c *call, sites []tensor.Site, values []float32, axes string, shape ...int) error {
	names := make([]string, len(sites))
	for i, site := range sites {
		names[i] = headerSafe(site.Name)
	}
	list := strings.Join(names, ",")
	if len(list) > maxHeaderBytes {
		return &failure{http.StatusRequestEntityTooLarge, string(query.OverLimit), fmt.Sprintf("a grid of %d sites: their names do not fit a header", len(names)), "ask for fewer sites", nil}
	}
	dims := make([]string, len(shape))
	for i, n := range shape {
		dims[i] = strconv.Itoa(n)
	}
	h := w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Dmi-Dtype", tensor.F32.String())
	h.Set("Dmi-Shape", strings.Join(dims, ","))
	h.Set("Dmi-Axes", axes)
	h.Set("Dmi-Sites", list)
	h.Set("Content-Length", strconv.Itoa(4*len(values)))
	w.WriteHeader(http.StatusOK)
	if c.Method == http.MethodHead {
		return nil
	}
	body := make([]byte, 0, 4*len(values))
	for _, v := range values {
		body = binary.LittleEndian.AppendUint32(body, math.Float32bits(v))
	}
	_, err := w.Write(body)
	return err
}

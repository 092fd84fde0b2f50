package serve

import (
	"context"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"

	"dmi/query"
)

// maxHeaderBytes is what one header of an answer may hold: common clients refuse lines of 64 KiB.
const maxHeaderBytes = 32 << 10

func (s *Server) tensor(w *writer, c *call) error {
	q := query.TensorQuery{Request: c.must("request", "name one; GET /v1/requests lists them"), Tokens: c.positions("tokens"), Steps: c.positions("steps"),
		Site:  query.SiteName{Name: c.must("site", "name one; GET /v1/sites lists them"), Layer: c.layer()},
		Heads: c.heads(), Level: c.level(), Partial: c.flag("partial"), As: c.dtype(), Limit: c.number("limit", 1, 1<<62)}
	if c.err != nil {
		return c.err
	}
	t, err := c.query.Tensor(c.Context(), q)
	if err != nil {
		return err
	}
	if len(query.FormatSpans(t.Positions)) > maxHeaderBytes {
		return &failure{http.StatusRequestEntityTooLarge, string(query.OverLimit), fmt.Sprintf("read request %s at site %s: its rows lie in %d pieces, too many for a header",
			t.Request, t.Site.Name, len(t.Positions)), "ask for fewer tokens at a time", nil}
	}
	describe(w.Header(), t)
	c.rows = rowsIn(t.Positions)
	return sendTensor(w, c, t)
}

func rowsIn(spans []query.Span) (rows uint64) {
	for _, s := range spans {
		rows += uint64(s.Count)
	}
	return rows
}

// describe writes what the bytes of an answer are.
func describe(h http.Header, t *query.Tensor) {
	h.Set("Dmi-Dtype", t.DType.String())
	dims := make([]string, len(t.Shape))
	for i, n := range t.Shape {
		dims[i] = strconv.Itoa(n)
	}
	h.Set("Dmi-Shape", strings.Join(dims, ","))
	h.Set("Dmi-Axes", strings.Join(t.Axes, ","))
	h.Set("Dmi-Site", t.Site.Name)
	h.Set("Dmi-Complete", strconv.FormatBool(t.Complete))
	h.Set("Dmi-Missing", strconv.FormatUint(t.Missing, 10))
	if t.Request != "" {
		h.Set("Dmi-Positions", query.FormatSpans(t.Positions))
	}
	var levels []string
	for _, l := range t.Levels {
		levels = append(levels, fmt.Sprintf("%s:%d", l.Level, l.Count))
	}
	if text := strings.Join(levels, ","); len(text) <= maxHeaderBytes {
		h.Set("Dmi-Levels", text)
	}
	h.Set("Content-Type", "application/octet-stream")
}

// sendTensor streams an answer, or the ranges of it that are asked for.
func sendTensor(w *writer, c *call, t *query.Tensor) error {
	if c.Header.Get("Range") != "" && t.Size() > 0 {
		content := &remembering{ReadSeeker: t.Open(c.Context())}
		http.ServeContent(w, c.Request, "", time.Time{}, content)
		return content.err
	}
	w.Header().Set("Accept-Ranges", "bytes")
	w.Header().Set("Content-Length", strconv.FormatInt(t.Size(), 10))
	w.WriteHeader(http.StatusOK)
	if c.Method == http.MethodHead {
		return nil
	}
	_, err := t.Open(c.Context()).WriteTo(w)
	return err
}

// remembering keeps the read error that http.ServeContent does not tell.
type remembering struct {
	io.ReadSeeker
	err error
}

func (r *remembering) Read(p []byte) (int, error) {
	n, err := r.ReadSeeker.Read(p)
	if err != nil && err != io.EOF {
		r.err = err
	}
	return n, err
}

func (s *Server) rows(w *writer, c *call) error {
	q := query.RowsQuery{Scope: c.requestsAsked(false), Site: query.SiteName{Name: c.must("site", "name one; GET /v1/sites lists them"), Layer: c.layer()},
		After: c.text("after"), Limit: int(c.number("limit", 1, 1<<20)), Partial: c.flag("partial"), As: c.dtype()}
	if c.err != nil {
		return c.err
	}
	page, whose, err := rowsPage(c.Context(), c.query, q)
	if err != nil {
		return err
	}
	describe(w.Header(), &page.Tensor)
	for _, r := range page.Requests {
		c.rows += uint64(r.Count)
	}
	w.Header().Set("Dmi-Requests", whose)
	w.Header().Set("Dmi-Next", page.Next)
	return sendTensor(w, c, &page.Tensor)
}

// rowsPage plans a page short enough that a header can say whose rows it holds; the cursor goes on where it ends.
func rowsPage(ctx context.Context, engine *query.Engine, q query.RowsQuery) (*query.Rows, string, error) {
	for {
		page, err := engine.Rows(ctx, q)
		if err != nil {
			return nil, "", err
		}
		var whose strings.Builder
		rows := 0
		for _, r := range page.Requests {
			if whose.Len() > 0 {
				whose.WriteByte(',')
			}
			fmt.Fprintf(&whose, "%s:%d:%d", headerSafe(r.Request), r.First, r.Count)
			if whose.Len() > maxHeaderBytes {
				break
			}
			rows += int(r.Count)
		}
		if whose.Len() <= maxHeaderBytes || rows == 0 {
			return page, whose.String(), nil
		}
		q.Limit = rows
	}
}

// headerSafe percent-encodes what would end a field of Dmi-Requests.
func headerSafe(id string) string {
	var safe strings.Builder
	for i := range len(id) {
		if b := id[i]; b <= ' ' || b > '~' || b == ',' || b == ':' || b == '%' {
			fmt.Fprintf(&safe, "%%%02X", b)
		} else {
			safe.WriteByte(b)
		}
	}
	return safe.String()
}

func (s *Server) export(w *writer, c *call) error {
	q := query.ExportQuery{Scope: c.requestsAsked(false), Site: c.text("site"), Layer: c.layer(), Format: c.text("format"), As: c.dtype(), Partial: c.flag("partial")}
	if c.err != nil {
		return c.err
	}
	file, err := c.query.Export(c.Context(), q)
	if err != nil {
		return err
	}
	c.rows = file.Rows
	w.Header().Set("Content-Type", file.ContentType)
	w.Header().Set("Content-Disposition", mime.FormatMediaType("attachment", map[string]string{"filename": file.Filename}))
	if file.Size >= 0 {
		w.Header().Set("Content-Length", strconv.FormatInt(file.Size, 10))
	}
	if c.Method == http.MethodHead {
		w.WriteHeader(http.StatusOK)
		return nil
	}
	return file.WriteTo(c.Context(), w)
}

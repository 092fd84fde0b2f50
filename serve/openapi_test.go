package serve

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"dmi/live"
	"dmi/tensor"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/legacy"
)

func loadDocument(t *testing.T) *openapi3.T {
	t.Helper()
	document, err := openapi3.NewLoader().LoadFromData(openapiYAML)
	if err != nil {
		t.Fatal(err)
	}
	return document
}

// Every route is in the document with exactly its parameters and scope, and the document has no other.
func TestRoutesAreTheDocuments(t *testing.T) {
	document := loadDocument(t)
	var have, want []string
	for _, r := range new(Server).routes() {
		takes := slices.Sorted(slices.Values(r.takes))
		scope := r.scope.String()
		if r.open {
			scope = "open"
		}
		have = append(have, fmt.Sprintf("%s %s %s %v", r.method, r.path, scope, takes))
	}
	for path, item := range document.Paths.Map() {
		for method, operation := range item.Operations() {
			takes := []string(nil)
			for _, p := range operation.Parameters {
				if p.Value.In != openapi3.ParameterInQuery {
					continue
				}
				name := p.Value.Name
				if p.Value.Schema.Value.Type.Is("array") {
					name += "*"
				}
				takes = append(takes, name)
			}
			slices.Sort(takes)
			scope, _ := operation.Extensions["x-scope"].(string)
			if operation.Security != nil && len(*operation.Security) == 0 {
				scope = "open"
			}
			want = append(want, fmt.Sprintf("%s %s %s %v", method, path, scope, takes))
		}
	}
	slices.Sort(have)
	slices.Sort(want)
	if !slices.Equal(have, want) {
		t.Errorf("routes:\n%s\ndocument:\n%s", strings.Join(have, "\n"), strings.Join(want, "\n"))
	}
}

// conformance asks a real server, and holds question and answer against the document.
type conformance struct {
	*testing.T
	document *openapi3.T
	router   routers.Router
	base     string
	client   *http.Client
	seen     map[string]bool        // "GET /v1/status 200"
	enough   func(came []byte) bool // of a live stream; nil: what comes in a moment
}

func newConformance(t *testing.T, w *served) *conformance {
	for _, kind := range []string{"text/event-stream", "application/vnd.apache.arrow.stream", "application/vnd.apache.parquet", "multipart/byteranges"} {
		openapi3filter.RegisterBodyDecoder(kind, openapi3filter.FileBodyDecoder)
	}
	document := loadDocument(t)
	document.Servers = nil // "/": wherever it is served
	router, err := legacy.NewRouter(document, openapi3.IsOpenAPI31OrLater())
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(w.server.Local())
	t.Cleanup(server.Close)
	return &conformance{t, document, router, server.URL, server.Client(), map[string]bool{}, nil}
}

// ask sends a request; where legal, it must conform to the document. Streams are read for a moment.
func (c *conformance) ask(method, path string, header http.Header, want int, legal bool) (http.Header, []byte) {
	c.Helper()
	return c.send(method, path, header, nil, want, legal)
}

// listen reads a live stream, and leaves.
func (c *conformance) listen(stream io.Reader, leave func()) (came []byte, err error) {
	if c.enough == nil {
		time.AfterFunc(300*time.Millisecond, leave)
		return io.ReadAll(stream)
	}
	defer time.AfterFunc(time.Minute, leave).Stop()
	for block := make([]byte, 4096); err == nil && !c.enough(came); {
		var n int
		n, err = stream.Read(block)
		came = append(came, block[:n]...)
	}
	leave()
	return came, err
}

func (c *conformance) send(method, path string, header http.Header, content []byte, want int, legal bool) (http.Header, []byte) {
	c.Helper()
	ctx, cancel := context.WithCancel(c.Context())
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(content))
	if err != nil {
		c.Fatal(err)
	}
	for name, values := range header {
		request.Header[name] = values
	}
	route, arguments, err := c.router.FindRoute(request)
	if err != nil {
		c.Fatalf("%s %s: %v", method, path, err)
	}
	options := &openapi3filter.Options{AuthenticationFunc: openapi3filter.NoopAuthenticationFunc, IncludeResponseStatus: true}
	input := &openapi3filter.RequestValidationInput{Request: request, PathParams: arguments, Route: route, Options: options}
	if err := openapi3filter.ValidateRequest(ctx, input); (err == nil) != legal {
		c.Errorf("%s %s: the document finds the request legal: %v (%v)", method, path, err == nil, err)
	}
	answer, err := c.client.Do(request)
	if err != nil {
		c.Fatalf("%s %s: %v", method, path, err)
	}
	defer answer.Body.Close()
	var body []byte
	if strings.Contains(path, "/live/") && answer.StatusCode == 200 {
		body, err = c.listen(answer.Body, cancel)
	} else {
		body, err = io.ReadAll(answer.Body)
	}
	if err != nil && ctx.Err() == nil {
		c.Errorf("%s %s: %v", method, path, err)
	}
	if answer.StatusCode != want {
		c.Errorf("%s %s: status %d, want %d: %.300s", method, path, answer.StatusCode, want, body)
		return answer.Header, body
	}
	err = openapi3filter.ValidateResponse(ctx, &openapi3filter.ResponseValidationInput{RequestValidationInput: input, Status: answer.StatusCode, Header: answer.Header,
		Body: io.NopCloser(bytes.NewReader(body)), Options: options})
	if err != nil {
		c.Errorf("%s %s: the answer is not the document's: %v\n%.500s", method, path, err, body)
	}
	if want >= 400 {
		var failed struct {
			Error struct{ Code, Message, Hint string }
		}
		if json.Unmarshal(body, &failed) != nil || failed.Error.Code == "" || failed.Error.Message == "" {
			c.Errorf("%s %s: an error without code and message: %s", method, path, body)
		}
	}
	c.seen[fmt.Sprintf("%s %s %d", method, route.Path, want)] = true
	return answer.Header, body
}

func (c *conformance) get(path string, want int) (http.Header, []byte) {
	c.Helper()
	return c.ask("GET", path, nil, want, true)
}

// matches holds JSON within a stream against a schema of the document.
func (c *conformance) matches(schema string, text []byte) {
	c.Helper()
	var value any
	if err := json.Unmarshal(text, &value); err != nil {
		c.Fatalf("%s: %v: %s", schema, err, text)
	}
	if err := c.document.Components.Schemas[schema].Value.VisitJSON(value, openapi3.EnableJSONSchema2020()); err != nil {
		c.Errorf("%s: %v", schema, err)
	}
}

func TestHandlersAreTheDocuments(t *testing.T) {
	w := newWorld(t)
	c := newConformance(t, w)
	id, second, run, session := w.requests[0].ID, w.requests[1].ID, w.Run.ID, w.Session.ID

	for _, path := range []string{"/healthz", "/readyz", "/metrics", "/v1/healthz", "/v1/readyz", "/v1/metrics", "/v1/status", "/v1/config", "/v1/openapi.json", "/v1/sessions",
		"/v1/sessions/" + session, "/v1/runs", "/v1/runs?tag=demo&label=topic%3Dcapitals&session=" + session, "/v1/runs?tag=none", "/v1/requests", "/v1/requests?limit=1",
		"/v1/requests?run=" + run + "&latest=1&hidden=true", "/v1/requests/" + id, "/v1/sites?request=" + id, "/v1/sites?run=" + run + "&site=**&layer=0", "/v1/sites?session=" + session,
		"/v1/coverage", "/v1/coverage?request=" + id + "&request=" + second, "/v1/coverage?run=" + run + "&site=resid_post", "/v1/coverage?session=" + session,
		"/v1/stats?request=" + id, "/v1/stats?run=" + run + "&per=site", "/v1/stats?session=" + session + "&per=request&site=logits", "/v1/stats?request=" + id + "&tokens=1:3&site=resid_post",
		"/v1/topk?request=" + id + "&site=resid_post&tokens=0:2", "/v1/topk?run=" + run + "&site=logits&k=3", "/v1/stats?format=arrow&request=" + id, "/v1/stats?format=parquet&request=" + id, "/v1/topkeys?request=" + id + "&site=pattern&heads=1&k=2&query=-1",
		"/v1/grid?statistic=l2&site=resid_post&request=" + id, "/v1/thumbnails?site=pattern&size=4&request=" + id, "/v1/thumbnails?site=**.hook_pattern&layer=-1&request=" + id, "/v1/grid?statistic=absmax&layer=0&tokens=1:3&site=**&request=" + id,
		"/v1/export?request=" + id, "/v1/export?format=npy&site=resid_post&request=" + id, "/v1/export?format=parquet&run=" + run,
		"/v1/tensor?request=" + id + "&site=blocks.0.hook_resid_post&tokens=1:4", "/v1/tensor?request=" + id + "&site=pattern&layer=-1&heads=1&steps=0:1&level=any&as=F32",
		"/v1/tensor?partial=true&limit=1000000&site=resid_post&request=" + second, "/v1/rows?site=resid_post&partial=true&run=" + run, "/v1/rows?site=tokens&limit=2&session=" + session,
		"/v1/live/events", "/v1/live/events?after=1", "/v1/live/stats", "/v1/live/map", "/v1/live/map?site=**.hook_resid_post&session=" + session, "/v1/live/stats?site=**&session=" + session + "&request=" + id, "/v1/live/tensors", "/v1/live/tensors?site=resid_post",
	} {
		c.get(path, 200)
	}
	c.inspections(id, second, run, session)
	c.ask("POST", "/v1/flush", nil, 200, true)
	_, verified := c.ask("POST", "/v1/verify", nil, 200, true)
	events := sse(t, verified)
	if last := events[len(events)-1]; last.name != "result" {
		t.Errorf("verify ended with %s %s", last.name, last.data)
	} else {
		c.matches("VerifyResult", last.data)
		var result struct {
			OK               bool
			Produced, Booked uint64
		}
		if json.Unmarshal(last.data, &result); !result.OK || result.Produced != w.Rows || result.Booked != w.Rows {
			t.Errorf("verify: %s, want %d rows", last.data, w.Rows)
		}
	}

	c.policies(id)

	// Ranges.
	_, whole := c.get("/v1/tensor?site=resid_post&request="+id, 200)
	header, part := c.ask("GET", "/v1/tensor?site=resid_post&request="+id, http.Header{"Range": {"bytes=8-23"}}, 206, true)
	if !bytes.Equal(part, whole[8:24]) || header.Get("Content-Range") != fmt.Sprintf("bytes 8-23/%d", len(whole)) {
		t.Errorf("range: %v %s", part, header.Get("Content-Range"))
	}
	c.ask("GET", "/v1/tensor?site=resid_post&request="+id, http.Header{"Range": {"bytes=0-3,8-11"}}, 206, true)
	if _, tail := c.ask("GET", "/v1/rows?site=logits&run="+run, http.Header{"Range": {"bytes=-6"}}, 206, true); len(tail) != 6 {
		t.Errorf("the last 6 bytes: %v", tail)
	}

	// What can go wrong. Those that the document forbids are refused too.
	for path, want := range map[string]int{
		"/v1/sessions/none": 404, "/v1/requests/none": 404, "/v1/runs?session=none": 404, "/v1/requests?run=none": 404, "/v1/sites?request=none": 404, "/v1/coverage?run=none": 404,
		"/v1/tensor?site=resid_post&request=none": 404, "/v1/tensor?site=resid_past&request=" + id: 404, "/v1/rows?site=none&run=" + run: 404, "/v1/stats?request=none": 404,
		"/v1/topkeys?site=pattern&request=none": 404, "/v1/topk?request=none": 404, "/v1/topk?tokens=x&request=" + id: 400, "/v1/grid?statistic=l2&request=none": 404, "/v1/thumbnails?site=pattern&request=none": 404, "/v1/thumbnails?site=resid_post&request=" + id: 400, "/v1/grid?statistic=l2&tokens=x&request=" + id: 400, "/v1/export?run=none": 404,
		"/v1/tensor?site=resid_post&request=" + second: 409, "/v1/rows?site=resid_post&request=" + second: 409, "/v1/export?request=" + second: 409,
		"/v1/tensor?limit=1&site=resid_post&request=" + id: 413,
		"/v1/sites": 400, "/v1/stats": 400, "/v1/export": 400, "/v1/coverage?site=logits": 400, "/v1/tensor?site=resid_post&tokens=x&request=" + id: 400,
		"/v1/tensor?site=resid_post&heads=9&request=" + id: 400, "/v1/topkeys?site=resid_post&request=" + id: 400, "/v1/rows?site=pattern&run=" + run: 400,
		"/v1/runs?label=x": 400, "/v1/live/stats?site=a..b": 400, "/v1/live/map?site=a..b": 400, "/v1/live/tensors?site=a..b": 400, "/v1/tensor?as=F7&site=resid_post&request=" + id: 400,
		"/v1/requests?after=none": 400, "/v1/export?format=npy&request=" + id: 400,
	} {
		c.get(path, want)
	}
	for _, path := range []string{"/v1/status?verbose=1", "/v1/requests?limit=0", "/v1/requests?limit=10001", "/v1/requests?latest=x", "/v1/requests?hidden=perhaps", "/v1/runs?limit=-1",
		"/v1/tensor?site=resid_post", "/v1/tensor?request=" + id, "/v1/tensor?request=a&request=b&site=x", "/v1/tensor?level=half&site=resid_post&request=" + id,
		"/v1/tensor?layer=zero&site=resid_post&request=" + id, "/v1/stats?per=head&request=" + id, "/v1/grid?statistic=median&request=" + id, "/v1/grid?request=" + id, "/v1/thumbnails?site=pattern&size=0&request=" + id, "/v1/thumbnails?request=" + id, "/v1/stats?format=xml&request=" + id, "/v1/export?format=zip&request=" + id,
		"/v1/topk?k=65&request=" + id, "/v1/topkeys?k=0&site=pattern&request=" + id, "/v1/live/events?after=-1", "/v1/rows?site=resid_post&limit=0&run=" + run} {
		extra := strings.Contains(path, "verbose=") || strings.Contains(path, "request=a&request=b") // OpenAPI cannot forbid these
		c.ask("GET", path, nil, 400, extra)
	}
	c.ask("GET", "/v1/live/events", http.Header{"Last-Event-Id": {"x"}}, 400, true)
	for _, stray := range []struct {
		method, path string
		status       int
		code, allow  string
	}{{"POST", "/v1/status", 405, "method", "GET"}, {"GET", "/v1/flush", 405, "method", "POST"}, {"GET", "/v2/status", 404, "not_found", ""}} {
		answer := httptest.NewRecorder()
		w.server.Local().ServeHTTP(answer, httptest.NewRequest(stray.method, stray.path, nil))
		if code := errorCode(answer.Body); answer.Code != stray.status || code != stray.code || answer.Header().Get("Allow") != stray.allow {
			t.Errorf("%s %s: %d %s %v", stray.method, stray.path, answer.Code, code, answer.Header())
		}
	}

	c.deletions(w)

	w.server.Stop()
	c.get("/v1/status", 503)
	c.get("/readyz", 503)

	for path, item := range c.document.Paths.Map() {
		for method, operation := range item.Operations() {
			for status := range operation.Responses.Map() {
				if slices.Contains([]string{"401", "403", "416", "500", "503"}, status) { // of access_test, of the standard library, of damaged stores
					continue
				}
				if name := fmt.Sprintf("%s %s %s", method, path, status); !c.seen[name] && !slices.Contains(unseen, name) {
					t.Errorf("no case gives %s", name)
				}
			}
		}
	}
}

// unseen are answers that the document allows and the sample cannot provoke; or that need no argument to go wrong.
var unseen = []string{"GET /v1/coverage 413", "GET /v1/rows 413", "GET /v1/export 413", "GET /v1/grid 413", "GET /v1/thumbnails 413", "GET /v1/topkeys 409", "GET /v1/live/stats 404", "GET /v1/live/map 404", "GET /v1/live/events 404",
	"GET /v1/live/tensors 404", "GET /v1/sessions/{id} 400", "GET /v1/sessions 400", "GET /v1/requests/{id} 400", "GET /v1/config 400", "GET /v1/openapi.json 400",
	"GET /metrics 400", "GET /v1/metrics 400", "POST /v1/flush 400", "POST /v1/policy/off 400", "POST /v1/policy/on 400", "POST /v1/verify 400", "GET /v1/inspect/router 200", "GET /v1/inspect/similarity 413", "GET /v1/inspect/lens 200", "GET /v1/inspect/lens 413"}

type event struct {
	name string
	data []byte
}

// sse is the events of a text, but for one that is cut off.
func sse(t *testing.T, text []byte) (events []event) {
	t.Helper()
	name := ""
	lines := bufio.NewScanner(bytes.NewReader(text[:bytes.LastIndex(text, []byte("\n\n"))+1]))
	lines.Buffer(nil, 1<<24)
	for lines.Scan() {
		field, value, _ := strings.Cut(lines.Text(), ": ")
		switch field {
		case "event":
			name = value
		case "data":
			events = append(events, event{name, []byte(value)})
		}
	}
	return events
}

// framesOf is the heads of a stream's whole frames, but for signs of life.
func framesOf(stream []byte) (heads [][]byte) {
	for len(stream) >= 8 {
		head, body := binary.LittleEndian.Uint32(stream), binary.LittleEndian.Uint32(stream[4:])
		if uint64(len(stream)) < 8+uint64(head)+uint64(body) || body == streamEnd {
			break // cut off by us
		}
		if head > 0 {
			heads = append(heads, stream[8:8+head])
		}
		stream = stream[8+head+body:]
	}
	return heads
}

// What live streams carry is the document's too, and slow readers are told what they lost.
func TestStreamsAreTheDocuments(t *testing.T) {
	w := newWorld(t)
	c := newConformance(t, w)
	chunk := func(first uint32) tensor.Chunk {
		return tensor.Chunk{Key: w.requests[0].Key, Site: 1, First: first, Rows: 1, DType: tensor.F32, Shape: []int{4}, Data: make([]byte, 16)}
	}
	publish := func(stop <-chan struct{}) {
		for i := uint32(0); ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
				w.hub.Publish(w.Session.Number, []tensor.Chunk{chunk(i)})
				w.hub.Event(live.Event{Level: "warning", Code: "dropped", Session: w.Session.ID, Message: "rows were dropped", Count: 3})
			}
		}
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() { publish(stop); close(stopped) }()
	defer func() { close(stop); <-stopped }()

	c.enough = func(came []byte) bool { return len(sse(t, came)) >= 3 }
	_, text := c.get("/v1/live/stats?site=resid_post", 200)
	seen := 0
	for _, e := range sse(t, text) {
		var lines []json.RawMessage
		if err := json.Unmarshal(e.data, &lines); err != nil {
			t.Fatal(err)
		}
		for _, l := range lines {
			c.matches("StatsRow", l)
			seen++
		}
	}
	if seen < 3 {
		t.Errorf("%d lines of statistics", seen)
	}
	begun := time.Now()
	_, text = c.get("/v1/live/map?site=resid_post", 200)
	most := 2 + int(time.Since(begun)/(100*time.Millisecond)) // a map each 100 ms
	maps, rows := 0, uint64(0)
	for _, e := range sse(t, text) {
		c.matches("LiveMap", e.data)
		var answer struct {
			Session string
			Tokens  uint64
			Sites   []struct {
				Site string
				Rows uint64
				Max  float64
			}
		}
		if err := json.Unmarshal(e.data, &answer); err != nil {
			t.Fatal(err)
		}
		if answer.Session != w.Session.ID || len(answer.Sites) != 1 || answer.Sites[0].Site != "blocks.0.hook_resid_post" || answer.Sites[0].Rows != answer.Tokens || answer.Sites[0].Max != 0 {
			t.Errorf("map: %s", e.data)
		}
		maps++
		rows += answer.Tokens
	}
	if maps < 3 || maps > most || rows < 3 {
		t.Errorf("%d maps of %d rows, in the time of %d", maps, rows, most)
	}
	_, text = c.get("/v1/live/events", 200)
	events := sse(t, text)
	for _, e := range events {
		c.matches("Event", e.data)
	}
	if len(events) < 3 {
		t.Errorf("%d events", len(events))
	}
	c.enough = func(came []byte) bool { return len(framesOf(came)) >= 3 }
	_, frames := c.get("/v1/live/tensors?site=resid_post", 200)
	heads := framesOf(frames)
	for _, head := range heads {
		c.matches("FrameHeader", head)
	}
	if len(heads) < 3 {
		t.Errorf("%d frames", len(heads))
	}
}

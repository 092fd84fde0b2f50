package serve

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"dmi/query"
)

// inspections asks every inspection, rightly and wrongly, of requests of the sample.
func (c *conformance) inspections(id, second, run, session string) {
	c.Helper()
	for _, path := range []string{
		"stats?request=" + id, "stats?run=" + run + "&per=request&site=resid_post&layer=0&tokens=1:3", "stats?session=" + session,
		"heads?run=" + run, "heads?request=" + id + "&site=pattern&layer=0&period=2&threshold=0.3",
		"tokens?run=" + run, "tokens?site=resid_post&layer=0&tokens=1:4&k=2&request=" + id,
		"outliers?run=" + run, "outliers?site=resid_post&layer=0&threshold=10&share=0.5&tolerance=0.1&session=" + session,
		"similarity?site=**.hook_resid_post&run=" + run, "similarity?site=resid_post&layer=0&tokens=1:4&sample=3&request=" + id,
		"compare?a=" + id + "&b=" + second, "compare?per=row&site=pattern&layer=0&tokens=0:2&tolerance=0.5&b=" + run + "&a=" + run,
	} {
		_, list := c.get("/v1/inspect/"+path, 200)
		c.sameAsEvents(path, list)
		answer, err := c.client.Head(c.base + "/v1/inspect/" + path)
		if err != nil {
			c.Fatal(err)
		}
		answer.Body.Close()
		if answer.StatusCode != http.StatusOK {
			c.Errorf("HEAD %s: %s", path, answer.Status)
		}
	}
	for path, want := range map[string]int{
		"stats?run=none": 404, "stats?per=site": 400, "heads?request=none": 404, "heads?site=resid_post&request=" + id: 400,
		"tokens?request=none": 404, "tokens?tokens=x&request=" + id: 400, "outliers?run=none": 404, "outliers?site=pattern&run=" + run: 400, "router?run=" + run: 404, "router": 400,
		"similarity?request=none": 404, "similarity?site=pattern&run=" + run: 400, "similarity?sample=4096&site=**&run=" + run: 400, "compare?b=none&a=" + id: 404,
		"compare?b=" + run + "&a=" + id: 400, "compare?site=none&b=" + id + "&a=" + id: 404,
		"lens?request=" + id: 404, "lens": 400,
	} {
		c.get("/v1/inspect/"+path, want)
	}
	for _, path := range []string{"stats?per=row&request=" + id, "heads?threshold=2&request=" + id, "heads?period=0&request=" + id,
		"tokens?k=0&request=" + id, "outliers?share=2&request=" + id, "similarity?sample=1&request=" + id, "lens?k=0&request=" + id, "compare?a=" + id,
		"compare?per=site&tolerance=-1&b=" + id + "&a=" + id} {
		c.ask("GET", "/v1/inspect/"+path, nil, 400, false)
	}
}

var events = http.Header{"Accept": {"text/event-stream"}}

// sameAsEvents asks for a list as events: they hold what the list does, and end with how much that was.
func (c *conformance) sameAsEvents(path string, list []byte) {
	c.Helper()
	var want struct{ Items []json.RawMessage }
	if err := json.Unmarshal(list, &want); err != nil {
		c.Fatal(err)
	}
	header, body := c.ask("GET", "/v1/inspect/"+path, events, 200, true)
	if kind := header.Get("Content-Type"); kind != "text/event-stream" {
		c.Errorf("%s: asked for events, got %s", path, kind)
	}
	var got []json.RawMessage
	total := -1
	each(c.T, body, func(name string, data []byte) {
		var into any
		switch name {
		case "items":
			var some []json.RawMessage
			into = &some
			defer func() { got = append(got, some...) }()
		case "result":
			var end listEnd
			into = &end
			defer func() { total = int(end.Items) }()
		case "progress":
			c.matches("InspectProgress", data)
			return
		default:
			c.Errorf("%s: event %q: %s", path, name, data)
			return
		}
		if err := json.Unmarshal(data, into); err != nil {
			c.Errorf("%s: %s: %v", path, name, err)
		}
	})
	if len(got) != len(want.Items) || total != len(got) {
		c.Fatalf("%s: %d items in events that end with %d, %d in the list", path, len(got), total, len(want.Items))
	}
	for i := range got {
		if !bytes.Equal(got[i], want.Items[i]) {
			c.Errorf("%s: item %d is %s in events, %s in the list", path, i, got[i], want.Items[i])
		}
	}
}

func each(t *testing.T, stream []byte, yield func(name string, data []byte)) {
	t.Helper()
	name := ""
	lines := bufio.NewScanner(bytes.NewReader(stream))
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		field, value, _ := bytes.Cut(lines.Bytes(), []byte(": "))
		switch string(field) {
		case "event":
			name = string(value)
		case "data":
			yield(name, value)
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
}

// flushes holds one where an answer was sent on its way since somebody looked.
type flushes chan struct{}

type flushing struct {
	*httptest.ResponseRecorder
	flushed flushes
}

func (f flushing) Flush() {
	select {
	case f.flushed <- struct{}{}:
	default:
	}
}

// A tool that takes long says so meanwhile; one that fails half-way says why, and one whose reader leaves is stopped.
func TestListAsEvents(t *testing.T) {
	flushed := make(flushes, 1)
	ask := func(tool func(ctx context.Context, yield func(int) error) error) (names []string, last string) {
		t.Helper()
		answer := httptest.NewRecorder()
		w := &writer{ResponseWriter: answer, control: http.NewResponseController(flushing{answer, flushed}), timeout: time.Minute}
		r := httptest.NewRequest(http.MethodGet, "/v1/inspect/x", nil)
		r.Header = events
		if err := listEvents(w, &call{Request: r}, tool); err != nil {
			return nil, err.Error()
		}
		each(t, answer.Body.Bytes(), func(name string, data []byte) {
			if len(names) == 0 || names[len(names)-1] != name {
				names = append(names, name)
			}
			last = string(data)
		})
		return names, last
	}
	told := func(context.Context) { // until two ticks have passed, of which the second began after the call
		for len(flushed) > 0 {
			<-flushed
		}
		<-flushed
		<-flushed
	}
	names, last := ask(func(ctx context.Context, yield func(int) error) error {
		told(ctx)
		err := yield(1)
		told(ctx)
		return errors.Join(err, yield(2))
	})
	if got := strings.Join(names, " "); got != "progress items progress items result" || last != `{"items":2}` {
		t.Errorf("%s; in the end %s", got, last)
	}
	bad := &query.Error{Code: query.OverLimit, Message: "too much", Hint: "ask for less"}
	if names, last = ask(func(context.Context, func(int) error) error { return bad }); names != nil || last != bad.Error() {
		t.Errorf("wrong from the beginning: %v, %s", names, last)
	}
	names, last = ask(func(ctx context.Context, yield func(int) error) error {
		told(ctx)
		return bad
	})
	if got := strings.Join(names, " "); got != "progress error" || last != `{"code":"over_limit","hint":"ask for less","message":"too much"}` {
		t.Errorf("%s; in the end %s", got, last)
	}

	stopped := make(chan error, 1)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = listEvents(&writer{ResponseWriter: w, control: http.NewResponseController(w), timeout: time.Minute}, &call{Request: r}, func(ctx context.Context, _ func(int) error) error {
			<-ctx.Done()
			stopped <- ctx.Err()
			return ctx.Err()
		})
	}))
	defer server.Close()
	ctx, leave := context.WithCancel(t.Context())
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, server.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := server.Client().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := answer.Body.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	leave()
	answer.Body.Close()
	select {
	case err := <-stopped:
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	case <-time.After(30 * time.Second):
		t.Error("the tool goes on though nobody reads")
	}
}

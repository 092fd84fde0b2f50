package serve

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"dmi/internal/vfs"
	"dmi/serve/audit"
)

// recorded returns the lines of reads so far, opening lines left out.
func recorded(t *testing.T, dir string) (all []audit.Entry) {
	t.Helper()
	names, _ := filepath.Glob(filepath.Join(dir, "*.jsonl"))
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			var e audit.Entry
			if err := json.Unmarshal([]byte(line), &e); err != nil {
				t.Fatalf("%s: %q: %v", name, line, err)
			}
			if e.Event != "open" {
				all = append(all, e)
			}
		}
	}
	return all
}

// waitRecorded waits for so many lines: the end of a read is recorded after its last byte is on its way.
func waitRecorded(t *testing.T, dir string, lines int) []audit.Entry {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		all := recorded(t, dir)
		if len(all) >= lines {
			return all
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d lines, want %d: %+v", len(all), lines, all)
		}
	}
}

func remoteServer(t *testing.T, w *served) *httptest.Server {
	server := httptest.NewServer(w.server.Remote(gate(t)))
	t.Cleanup(server.Close)
	return server
}

func askAs(t *testing.T, server *httptest.Server, scope Scope, method, path string) (int, []byte) {
	t.Helper()
	request, err := http.NewRequest(method, server.URL+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if scope != NoScope {
		request.Header.Set("Authorization", "Bearer "+tokenOf(scope))
	}
	answer, err := server.Client().Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, body
}

// Who, from where, what, when, how much and how it ended, over a real connection.
func TestReadsAreRecorded(t *testing.T) {
	w := newWorld(t)
	server := remoteServer(t, w)
	id := w.requests[0].ID
	partial := w.requests[1].ID // one of its rows was dropped
	for _, c := range []struct {
		what, path, route, kind string
		scope                   Scope
		outcome                 string
		status                  int
		code                    string
		rows                    uint64
	}{
		{"a tensor", "/v1/tensor?site=resid_post&tokens=2:5&request=" + id, "GET /v1/tensor", "tensors", ScopeTensors, "answered", 200, "", 3},
		{"a tensor, by one who may see prompts", "/v1/tensor?site=resid_post&request=" + id, "GET /v1/tensor", "tensors", ScopeText, "answered", 200, "", 6},
		{"a prompt as a tensor", "/v1/tensor?site=tokens&request=" + id, "GET /v1/tensor", "text", ScopeText, "answered", 200, "", 6},
		{"a prompt by a glob", "/v1/stats?site=*&request=" + id, "GET /v1/stats", "text", ScopeAdmin, "answered", 200, "", 0},
		{"a prompt as text", "/v1/requests/" + id, "GET /v1/requests/{id}", "text", ScopeText, "answered", 200, "", 0},
		{"rows", "/v1/rows?site=resid_post&partial=true&request=" + id + "&request=" + partial, "GET /v1/rows", "tensors", ScopeTensors, "answered", 200, "", 8},
		{"an export", "/v1/export?format=npy&site=resid_post&request=" + id, "GET /v1/export", "tensors", ScopeTensors, "answered", 200, "", 6},
		{"rows that are not there", "/v1/tensor?site=resid_post&request=" + partial, "GET /v1/tensor", "tensors", ScopeTensors, "refused", 409, "incomplete", 0},
		{"a request that is not there", "/v1/tensor?site=resid_post&request=none", "GET /v1/tensor", "tensors", ScopeTensors, "refused", 404, "not_found", 0},
		{"an operator's doing", "/v1/config", "GET /v1/config", "admin", ScopeAdmin, "answered", 200, "", 0},
	} {
		before := len(recorded(t, w.auditDir))
		began := time.Now()
		status, body := askAs(t, server, c.scope, "GET", c.path)
		all := waitRecorded(t, w.auditDir, before+2)[before:]
		if status != c.status || len(all) != 2 || all[0].Event != "begin" || all[1].Event != "end" || all[0].Read == "" || all[0].Read != all[1].Read {
			t.Errorf("%s: %d %s %+v", c.what, status, body, all)
			continue
		}
		b, r := all[0], all[1].Result
		asked, _ := url.Parse(c.path)
		if b.Route != c.route || b.Kind != c.kind || b.Who.Token != "reader-"+c.scope.String() || b.Who.Scope != c.scope.String() || !strings.HasPrefix(b.Who.Peer, "127.0.0.1:") ||
			b.Time.Before(began.Add(-time.Second)) || b.Time.After(time.Now().Add(time.Second)) || fmt.Sprint(b.Args) != fmt.Sprint(map[string][]string(asked.Query())) {
			t.Errorf("%s: begin %+v by %+v", c.what, b, b.Who)
		}
		if strings.Contains(c.route, "{") && b.Path != asked.Path {
			t.Errorf("%s: path %q", c.what, b.Path)
		}
		bytes := uint64(len(body))
		if c.outcome == "refused" {
			bytes = 0 // the error's text is no one's data
		}
		if r.Outcome != c.outcome || r.Status != c.status || r.Code != c.code || r.Rows != c.rows || r.Bytes != bytes {
			t.Errorf("%s: end %+v, want %d bytes", c.what, r, bytes)
		}
	}
}

// Statistics are recorded where that is configured, and only there; a prompt's are always.
func TestStatisticsAreRecordedByConfiguration(t *testing.T) {
	w := newWorld(t)
	server := remoteServer(t, w)
	id := w.requests[0].ID
	for _, path := range []string{"/v1/status", "/v1/stats?site=*&request=" + id, "/v1/requests", "/metrics", "/healthz"} {
		if status, body := askAs(t, server, ScopeStatistics, "GET", path); status != 200 {
			t.Fatalf("%s: %d %s", path, status, body)
		}
	}
	if status, _ := askAs(t, server, ScopeText, "GET", "/v1/stats?site=resid_post&request="+id); status != 200 {
		t.Fatal(status)
	}
	if all := recorded(t, w.auditDir); len(all) != 0 {
		t.Errorf("recorded: %+v", all)
	}
	w.server.options.AuditStatistics = true
	askAs(t, server, ScopeStatistics, "GET", "/v1/stats?site=*&request="+id)
	if all := waitRecorded(t, w.auditDir, 2); all[0].Kind != "statistics" || all[0].Who.Token != "reader-statistics" || all[1].Result.Bytes == 0 {
		t.Errorf("recorded: %+v", all)
	}
	askAs(t, server, NoScope, "GET", "/healthz")
	if all := recorded(t, w.auditDir); len(all) != 2 {
		t.Errorf("a supervisor's question is a read: %+v", all)
	}
}

// Every route that needs more than statistics leaves a line, whoever adds it.
func TestNoRouteReadsUnrecorded(t *testing.T) {
	w := newWorld(t)
	server := remoteServer(t, w)
	for _, r := range w.server.routes() {
		if r.scope < ScopeTensors || r.open || r.stream {
			continue
		}
		before := len(recorded(t, w.auditDir))
		askAs(t, server, ScopeAdmin, r.method, strings.ReplaceAll(r.path, "{id}", "none"))
		if all := waitRecorded(t, w.auditDir, before+2)[before:]; all[0].Route != r.method+" "+r.path || all[1].Event != "end" {
			t.Errorf("%s %s: %+v", r.method, r.path, all)
		}
	}
}

// Whoever is not let in is on the record, and cannot fill it.
func TestRefusalsAreRecordedUpToABound(t *testing.T) {
	w := newWorld(t)
	server := remoteServer(t, w)
	askAs(t, server, NoScope, "GET", "/v1/status")
	askAs(t, server, ScopeStatistics, "GET", "/v1/tensor?request=x&site=y")
	all := recorded(t, w.auditDir)
	if len(all) != 2 || all[0].Result.Status != 401 || all[0].Who.Token != "" || all[0].Who.Scope != "none" ||
		all[1].Result.Status != 403 || all[1].Result.Code != "scope" || all[1].Who.Token != "reader-statistics" || all[1].Kind != "tensors" {
		t.Fatalf("%+v", all)
	}
	const tries = 60
	began := time.Now()
	for range tries {
		askAs(t, server, NoScope, "GET", "/v1/status")
	}
	took := time.Since(began)
	time.Sleep(1100 * time.Millisecond) // into a second that has its own lines
	askAs(t, server, NoScope, "GET", "/v1/status")
	all = recorded(t, w.auditDir)
	if most := 2 + mostRefusals*(int(took/time.Second)+2) + 1; len(all) > most {
		t.Errorf("%d lines of %d refusals in %v", len(all), tries, took)
	}
	var counted uint64
	for _, e := range all {
		counted += 1 + e.Result.Further
	}
	if counted != 2+tries+1 {
		t.Errorf("lines account for %d refusals, there were %d", counted, 2+tries+1)
	}
}

// A stream is on the record as soon as it begins, and ends there with what it carried.
func TestStreamsAreRecorded(t *testing.T) {
	w := newWorld(t)
	server := remoteServer(t, w)
	request, _ := http.NewRequest("GET", server.URL+"/v1/live/tensors?site=tokens", nil)
	request.Header.Set("Authorization", "Bearer "+tokenOf(ScopeText))
	answer, err := server.Client().Do(request)
	if err != nil {
		t.Fatal(err)
	}
	if all := recorded(t, w.auditDir); len(all) != 1 || all[0].Event != "begin" || all[0].Kind != "text" {
		t.Errorf("while it goes on: %+v", all)
	}
	if _, err := io.ReadFull(answer.Body, make([]byte, 8)); err != nil { // a sign of life
		t.Fatal(err)
	}
	answer.Body.Close()
	if all := waitRecorded(t, w.auditDir, 2); all[1].Result.Outcome != "left" || all[1].Result.Bytes < 8 {
		t.Errorf("after the reader left: %+v", all[1].Result)
	}
}

// Where the record cannot be written, reads go on unless it is required; then they are refused before anything is read.
func TestFailingRecord(t *testing.T) {
	w := newWorld(t)
	fs := vfs.NewMem()
	var failing atomic.Bool
	fs.Fault = func(op, name string) error {
		if failing.Load() {
			return errors.New("read-only file system")
		}
		return nil
	}
	var told []string
	log, err := audit.Open(fs, "a", audit.Options{Tell: func(level, code, message string) { told = append(told, level+" "+code) }})
	if err != nil {
		t.Fatal(err)
	}
	w.server.options.Audit = log
	server := remoteServer(t, w)
	failing.Store(true)
	path := "/v1/tensor?site=resid_post&request=" + w.requests[0].ID
	if status, body := askAs(t, server, ScopeTensors, "GET", path); status != 200 {
		t.Errorf("not required: %d %s", status, body)
	}
	w.server.options.AuditRequired = true
	status, body := askAs(t, server, ScopeTensors, "GET", path)
	if status != 503 || !strings.Contains(string(body), "read-only file system") || !strings.Contains(string(body), "audit.required") || errorCode(strings.NewReader(string(body))) != "audit" {
		t.Errorf("required: %d %s", status, body)
	}
	if status, _ := askAs(t, server, ScopeStatistics, "GET", "/v1/status"); status != 200 {
		t.Errorf("statistics, which are not recorded: %d", status)
	}
	_, text := askAs(t, server, ScopeStatistics, "GET", "/metrics")
	for _, line := range []string{"dmi_audit_failing 1", "dmi_audit_lost_lines_total 3"} {
		if !strings.Contains(string(text), line+"\n") {
			t.Errorf("no line %q", line)
		}
	}
	failing.Store(false)
	if status, _ := askAs(t, server, ScopeTensors, "GET", path); status != 200 {
		t.Errorf("once it can be written again: %d", status)
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(told, []string{"error audit", "info audit"}) {
		t.Errorf("the operator was told %q", told)
	}
}

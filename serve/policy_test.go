package serve

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"dmi/internal/vfs"
	"dmi/policy"
	"dmi/steer"
	"dmi/tensor"
)

var textBody = http.Header{"Content-Type": {"text/plain"}}

// policies asks everything that can be asked of a policy, the document looking on.
func (c *conformance) policies(request string) {
	c.Helper()
	status := func(body []byte) (s steer.Status) {
		c.Helper()
		if err := json.Unmarshal(body, &s); err != nil {
			c.Fatal(err)
		}
		return s
	}
	_, body := c.get("/v1/policy", 200)
	if s := status(body); s.Revision.Number != 0 || s.Default != "full" || !s.Current {
		c.Errorf("before anybody said anything: %s", body)
	}
	const text = "default: off\nrules:\n- {name: stream, hooks: resid_post, level: full}\n"
	_, body = c.send("PUT", "/v1/policy", textBody, []byte(text), 200, true)
	if s := status(body); s.Revision.Number != 1 || s.Revision.Text != text || s.Revision.Why != "set by local" || len(s.Rules) != 2 || s.Rules[1].Level != "off" {
		c.Errorf("set: %s", body)
	}
	crowded := "budgets: {copied_bytes_per_s: 1}\nrules:\n"
	for i := range tensor.MaxGroups + 1 {
		crowded += fmt.Sprintf("- {name: r%d, level: full, requests: {tags: [t%d]}, degrade: [stats]}\n", i, i)
	}
	for document, said := range map[string]string{
		"rules: [{level: half}]": "line 1, column 17",
		crowded:                  "stats does not hold copied_bytes_per_s",
		" \n":                    "the body is empty",
		"triggers: [{when: {probe: p, above: 0}}]": "line 1: trigger 1: probe",
		"triggers: [{promote: '**', when: {}}]":    "say nonfinite: true",
	} {
		_, body := c.send("PUT", "/v1/policy", textBody, []byte(document), 400, true)
		if !strings.Contains(string(body), said) {
			c.Errorf("%s: %s", document, body)
		}
	}
	c.send("PUT", "/v1/policy", textBody, []byte(strings.Repeat("# long\n", policy.MaxBytes/7+1)), 413, false)
	_, body = c.ask("POST", "/v1/policy/off", nil, 200, true)
	if s := status(body); s.Revision.Number != 2 || !s.Revision.Off || s.Rules[0].InForce != "off" || s.Rules[0].Level != "full" {
		c.Errorf("the brake: %s", body)
	}
	_, body = c.get("/v1/policy/explain?position=3&phase=decode&request="+request, 200)
	if !strings.Contains(string(body), "the brake is on") {
		c.Errorf("explained under the brake: %s", body)
	}
	c.ask("POST", "/v1/policy/on", nil, 200, true)
	c.ask("POST", "/v1/policy/on", nil, 200, true) // once more changes nothing
	_, body = c.get("/v1/policy/revisions", 200)
	var list struct{ Items []policy.Revision }
	if err := json.Unmarshal(body, &list); err != nil || len(list.Items) != 3 {
		c.Errorf("revisions: %s", body)
	}
	_, body = c.get("/v1/policy?revision=1", 200)
	if s := status(body); s.Current || s.Revision.Text != text || s.Revision.Off {
		c.Errorf("revision 1: %s", body)
	}
	_, body = c.get("/v1/policy/explain?phase=prefill&request="+request, 200)
	var verdicts struct{ Items []steer.Verdict }
	if err := json.Unmarshal(body, &verdicts); err != nil || len(verdicts.Items) < 3 {
		c.Fatalf("explain: %s", body)
	}
	for _, v := range verdicts.Items {
		stream := strings.HasSuffix(v.Site, "hook_resid_post")
		if v.Captured != stream || (v.Rule == "stream") != stream || (v.Line == 3) != stream {
			c.Errorf("explain: %+v", v)
		}
	}
	c.get("/v1/policy/revisions?after=1&limit=1", 200)
	c.get("/v1/policy?revision=99", 404)
	c.ask("GET", "/v1/policy?revision=x", nil, 400, false)
	c.ask("GET", "/v1/policy/revisions?limit=0", nil, 400, false)
	c.ask("GET", "/v1/policy/explain?request="+request+"&phase=both", nil, 400, false)
	c.ask("GET", "/v1/policy/explain", nil, 400, false)
	c.get("/v1/policy/explain?request=none", 404)
	c.get("/v1/policy/explain?site=nowhere&request="+request, 404)
	for _, path := range []string{"/v1/policy PUT", "/v1/policy/off POST", "/v1/policy/on POST"} { // of engines that only read: TestReadOnlyPolicies
		name, method, _ := strings.Cut(path, " ")
		c.seen[method+" "+name+" 409"] = true
	}
}

func TestReadOnlyPolicies(t *testing.T) {
	w := newWorld(t)
	if _, err := w.server.options.Policy.Set([]byte("default: off"), "test"); err != nil {
		t.Fatal(err)
	}
	ledger, err := policy.OpenLedger(vfs.OS{}, w.store.Dir(), false)
	if err != nil {
		t.Fatal(err)
	}
	helm, err := steer.New(steer.Options{Ledger: ledger, Store: w.store, ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	server := New(Options{Store: w.store, Policy: helm})
	defer server.Stop()
	for _, ask := range []struct {
		method, path, body string
		want               int
	}{{"PUT", "/v1/policy", "default: full", 409}, {"POST", "/v1/policy/off", "", 409}, {"POST", "/v1/policy/on", "", 409}, {"GET", "/v1/policy", "", 200}} {
		answer := httptest.NewRecorder()
		server.Local().ServeHTTP(answer, httptest.NewRequest(ask.method, ask.path, strings.NewReader(ask.body)))
		if answer.Code != ask.want || ask.want == 200 && !strings.Contains(answer.Body.String(), `"default":"off"`) {
			t.Errorf("%s %s: %d %s", ask.method, ask.path, answer.Code, answer.Body)
		}
	}
}

//go:build linux

package main

import (
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"dmi/ring"
	"dmi/steer"
)

func policyOf(t testing.TB, dir string) steer.Status {
	t.Helper()
	return jsonOf[steer.Status](t, mustDMI(t, "policy", "get", "--json", "--store", dir))
}

// TestPolicyOfAStartingEngine: a change is for the engine that has the store, also where that does not answer yet.
func TestPolicyOfAStartingEngine(t *testing.T) {
	dir := storeDir(t)
	mustStart(t, dir)
	announced := filepath.Join(dir, announcementName)
	if err := os.Rename(announced, announced+".late"); err != nil { // as it is until an engine is ready
		t.Fatal(err)
	}
	late := time.AfterFunc(1200*time.Millisecond, func() { _ = os.Rename(announced+".late", announced) })
	defer late.Stop()
	out, complaints, code := dmi(t, "policy", "off", "--store", dir)
	if code != 0 || !strings.Contains(out, "the brake is on") || !strings.Contains(complaints, "does not answer yet") {
		t.Errorf("exit %d: %s%s", code, out, complaints)
	}
}

func TestPolicyCommands(t *testing.T) {
	dir := storeDir(t)
	e := mustStart(t, dir)
	p := newProducer(t, "s00000001", ring.ModeBestEffort)
	p.must(p.attach(e.Control, "", false))
	p.must(p.forward(3))
	file := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(file, []byte("# nothing at all\ndefault: off\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := mustDMI(t, "policy", "set", file, "--store", dir); !strings.Contains(out, "revision 1") {
		t.Error(out)
	}
	p.must(p.forward(2))
	if err := os.WriteFile(file, []byte("default: full"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := mustDMI(t, "policy", "set", file, "--store", dir); !strings.Contains(out, "revision 2") {
		t.Error(out)
	}
	p.must(p.forward(1))
	mustDMI(t, "policy", "off", "--store", dir)
	p.must(p.forward(4))
	if out := mustDMI(t, "policy", "explain", "--request", p.request(), "--store", dir); !strings.Contains(out, "the brake is on") {
		t.Error(out)
	}
	mustDMI(t, "policy", "on", "--store", dir)
	p.must(p.forward(1))
	p.bye()
	if out := mustDMI(t, "policy", "get", "--text", "--revision", "1", "--store", dir); out != "# nothing at all\ndefault: off\n" {
		t.Errorf("%q", out)
	}
	if out := mustDMI(t, "policy", "watch", "--count", "4", "--store", dir); strings.Count(out, "policy") < 4 || strings.Contains(out, "attach") {
		t.Error(out)
	}
	coverage := jsonOf[struct {
		Outcomes map[string]map[string]uint64
		Ranges   []struct {
			First, Count, Policy uint64
			Outcome              string
		}
	}](t, mustDMI(t, "coverage", "--json", "--request", p.request(), "--store", dir))
	if coverage.Outcomes["skipped"]["policy"] != 6 || coverage.Outcomes["captured"]["full"] != 5 {
		t.Errorf("%+v", coverage)
	}
	for _, r := range coverage.Ranges { // which revision decided, by the row's position
		want := map[uint64]uint64{0: 0, 3: 1, 5: 2, 6: 3, 10: 4}
		if revision, known := want[r.First]; !known || r.Policy != revision || (r.Outcome == "skipped") != (revision == 1 || revision == 3) {
			t.Errorf("%+v", r)
		}
	}
	if out := mustDMI(t, "coverage", "--request", p.request(), "--store", dir); !regexp.MustCompile(`3:5 +skipped\(policy\) +1 `).MatchString(out) {
		t.Error(out)
	}
	for _, wrong := range []struct {
		arguments []string
		code      int
		said      string
	}{
		{[]string{"policy", "set", "/nowhere"}, exitUsage, "no such file"},
		{[]string{"policy", "set"}, exitUsage, "accepts 1 arg"},
		{[]string{"policy", "explain", "--request", "none"}, exitNotFound, "none"},
		{[]string{"policy", "get", "--revision", "77"}, exitNotFound, "revision 77"},
	} {
		if _, complaints, code := dmi(t, append(wrong.arguments, "--store", dir)...); code != wrong.code || !strings.Contains(complaints, wrong.said) {
			t.Errorf("%v: %d %s", wrong.arguments, code, complaints)
		}
	}
	e.end(t)
	if out := mustDMI(t, "policy", "get", "--store", dir); !strings.Contains(out, "revision 4") { // read by this process
		t.Error(out)
	}
	if _, complaints, code := dmi(t, "policy", "off", "--store", dir); code == 0 || !strings.Contains(complaints, "only reads") {
		t.Errorf("%d %s", code, complaints)
	}
}

// A trigger is told of at every door: its counts, its events, the log, whom it posts to, though not at the first try, and the request that it promotes.
func TestTriggerCommands(t *testing.T) {
	posted := make(chan string, 8)
	var asked atomic.Int32
	door := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) == 1 {
			http.Error(w, "not now", http.StatusServiceUnavailable)
			return
		}
		text, _ := io.ReadAll(r.Body)
		posted <- string(text)
	}))
	defer door.Close()
	dir := storeDir(t)
	e := mustStart(t, dir, "admin.address", "127.0.0.1:0")
	p := newProducer(t, "s00000001", ring.ModeBestEffort)
	p.must(p.attach(e.Control, "", false))
	file := filepath.Join(t.TempDir(), "policy.yaml")
	// The mean of a row is 4 * position + 1.75: above 41.5 from position 10 on.
	if err := os.WriteFile(file, []byte("triggers:\n- {name: late, hooks: resid_post, cooldown: 1h, when: {statistic: mean, above: 41.5}, promote: '**', webhook: '"+door.URL+"'}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	mustDMI(t, "policy", "set", file, "--store", dir)
	p.must(p.forward(10))
	p.must(p.forward(5))
	waitFor(t, func() bool {
		now := policyOf(t, dir)
		return len(now.Revision.Promoted) == 1 && now.Triggers[0].Rows >= 5 // it is promoted with its first row
	})
	if now := policyOf(t, dir); now.Triggers[0].Rows != 5 || now.Triggers[0].Fired != 1 || now.Revision.Promoted[0].ID != p.request() {
		t.Errorf("%+v %+v", now.Triggers, now.Revision)
	}
	if out := mustDMI(t, "policy", "get", "--store", dir); !strings.Contains(out, "statistic: mean, above: 41.5") || !strings.Contains(out, "request "+p.request()+" is promoted by late") {
		t.Error(out)
	}
	if out := mustDMI(t, "policy", "watch", "--count", "3", "--store", dir); !strings.Contains(out, "late: request "+p.request()+", position 10") || !strings.Contains(out, "promoted: late") {
		t.Error(out)
	}
	firing := jsonOf[map[string]any](t, <-posted)
	if firing["trigger"] != "late" || firing["request"] != p.request() || firing["position"] != 10.0 || firing["value"] != 41.75 || asked.Load() != 2 {
		t.Errorf("%d tries: %v", asked.Load(), firing)
	}
	waitFor(t, func() bool { return measured(t, e, `dmi_webhook_deliveries_total{outcome="delivered"}`) == "1" })
	for metric, want := range map[string]string{`dmi_trigger_rows_total{trigger="late"}`: "5", `dmi_trigger_firings_total{trigger="late"}`: "1", `dmi_webhook_deliveries_total{outcome="failed"}`: "0"} {
		if got := measured(t, e, metric); got != want {
			t.Errorf("%s is %q, want %s", metric, got, want)
		}
	}
	p.bye()
	e.end(t)
	if log := e.log.String(); !strings.Contains(log, "late: request "+p.request()+", position 10") {
		t.Errorf("the log does not tell of the firing:\n%s", log)
	}
}

// measured is a metric's value, as its text says; "" where there is none.
func measured(t testing.TB, e *running, metric string) string {
	t.Helper()
	answer, err := http.Get(e.Admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, is := strings.CutPrefix(line, metric+" "); is {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// The governor lowers what exceeds a budget, says so, and restores it when the traffic has become less; a session in complete mode is left alone.
func TestGovernorHoldsBudgets(t *testing.T) {
	for budget, want := range map[string]struct {
		level    string // that the rule ends at; "": any below its own
		restores bool
	}{
		"copied_bytes_per_s: 60 kB": {"", true},
		"disk_bytes_per_s: 60 kB":   {"", true},
		"disk_bytes_per_s: 3 kB":    {"off", false},
		"engine_bytes: 10 kB":       {"", true}, // a step of 1000 rows is more, and what waits of the small ones is a fifth
		"disk_free_bytes: 1000 TB":  {"off", false},
	} {
		t.Run(budget, func(t *testing.T) {
			t.Parallel()
			testBudget(t, budget, want.level, want.restores)
		})
	}
}

func testBudget(t *testing.T, budget, level string, restores bool) {
	dir := storeDir(t)
	e := mustStart(t, dir, "store.flush_age_ms", "50", "admin.address", "127.0.0.1:0")
	p, patient := newProducer(t, "s00000001", ring.ModeBestEffort), newProducer(t, "s00000002", ring.ModeComplete)
	p.must(p.attach(e.Control, "", false))
	patient.must(patient.attach(e.Control, "", false))
	var rows atomic.Uint32 // a step
	rows.Store(1000)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() { // up to 100 steps a second: 1.6 MB a second at first, and far more than the budgets on a busy machine too
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
				if p.forward(rows.Load()) != nil || patient.forward(1) != nil {
					t.Error("a step could not be published")
					return
				}
			}
		}
	}()
	defer func() { close(stop); <-stopped }()
	file := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(file, []byte("budgets: {"+budget+"}\nrules: [{name: stream, hooks: resid_post, level: full}]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	mustDMI(t, "policy", "set", file, "--store", dir)
	waitFor(t, func() bool {
		now := policyOf(t, dir).Rules[0].InForce
		return now == level || level == "" && now != "full"
	})
	lowered := policyOf(t, dir)
	if lowered.Revision.Lowered["stream"] != lowered.Rules[0].InForce || !strings.Contains(lowered.Revision.Why, "stream goes from") {
		t.Errorf("%+v", lowered.Revision)
	}
	if out := mustDMI(t, "policy", "watch", "--count", "2", "--store", dir); !strings.Contains(out, "governor") {
		t.Error(out)
	}
	if level == "off" { // it stays there
		if n := measured(t, e, "dmi_policy_lowered_rules"); n == "" || n == "0" {
			t.Errorf("dmi_policy_lowered_rules is %q", n)
		}
	}
	if gate := patient.Mem[patient.Header.GatesOffset]; gate != ring.LevelFull {
		t.Errorf("a session in complete mode has its gate at %d", gate)
	}
	if !restores {
		return
	}
	rows.Store(5) // 8 kB a second at most
	waitFor(t, func() bool { return policyOf(t, dir).Rules[0].InForce == "full" })
	if why := policyOf(t, dir).Revision.Why; !strings.Contains(why, " to full: ") {
		t.Error(why)
	}
}

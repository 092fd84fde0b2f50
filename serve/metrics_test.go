package serve

import (
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Every metric of ours is on docs/metrics.md with its kind and labels, and the page has no other.
func TestMetricsAreThePages(t *testing.T) {
	w := newWorld(t)
	if _, err := w.server.options.Policy.Set([]byte("triggers: [{name: broken, when: {nonfinite: true}}]"), "test"); err != nil {
		t.Fatal(err)
	}
	answer := httptest.NewRecorder()
	w.server.Metrics().ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
	if answer.Code != 200 {
		t.Fatalf("%d %s", answer.Code, answer.Body)
	}
	text := answer.Body.String()
	kinds, labels := map[string]string{}, map[string][]string{}
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (dmi_\w+) (\w+)$`).FindAllStringSubmatch(text, -1) {
		kinds[m[1]] = m[2]
	}
	for _, m := range regexp.MustCompile(`(?m)^(dmi_\w+)\{(.*)\} `).FindAllStringSubmatch(text, -1) {
		labels[m[1]] = nil
		for _, l := range regexp.MustCompile(`(\w+)="`).FindAllStringSubmatch(m[2], -1) {
			labels[m[1]] = append(labels[m[1]], l[1])
		}
	}
	var have, want []string
	for name, kind := range kinds {
		slices.Sort(labels[name])
		have = append(have, name+" "+kind+" "+strings.Join(labels[name], ","))
	}
	page, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile("(?m)^\\| `(dmi_\\w+)` \\| (\\w+) \\| (.*?) \\|").FindAllStringSubmatch(string(page), -1) {
		names := strings.FieldsFunc(m[3], func(c rune) bool { return strings.ContainsRune("`, ", c) })
		slices.Sort(names)
		want = append(want, m[1]+" "+m[2]+" "+strings.Join(names, ","))
	}
	slices.Sort(have)
	slices.Sort(want)
	if !slices.Equal(have, want) {
		t.Errorf("metrics:\n%s\npage:\n%s", strings.Join(have, "\n"), strings.Join(want, "\n"))
	}
	for _, line := range []string{`dmi_rows_total{level="full",outcome="dropped",reason="ring_full"} 1`, "dmi_rows_produced_total 36", `dmi_queue_used{queue="staging_bytes"} 1`,
		`dmi_queue_capacity{queue="staging_bytes"} 4096`, `dmi_producer_other_rows{mode="complete",reason="ring_full"} 1`, "dmi_producers 1", "dmi_engine_stopped_seconds_total 5", "dmi_producers_refused_total 2",
		"dmi_producers_expelled_total 1"} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("no line %q", line)
		}
	}
	if strings.Contains(text, w.requests[0].ID) || strings.Contains(text, w.Session.ID) {
		t.Error("a metric names a request or a session")
	}
}

// Alerts and dashboard look at metrics that exist, by labels that they have; and every alert has its paragraph in the runbook. What the expressions give is promtool's to try.
func TestAlertsAndDashboard(t *testing.T) {
	read := func(path string) string {
		text, err := os.ReadFile(filepath.Join("..", path))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	labels := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `(dmi_\\w+)` \\| \\w+ \\| (.*?) \\|").FindAllStringSubmatch(read("docs/metrics.md"), -1) {
		labels[m[1]] = m[2] + "`instance` `job`"
	}
	rules, runbook := read("deploy/prometheus/dmi.rules.yaml"), read("docs/operation.md")
	used := 0
	for _, text := range []string{rules, read("deploy/prometheus/dmi.rules.test.yaml"), strings.ReplaceAll(read("deploy/grafana/dmi.json"), `\"`, `"`)} {
		for _, m := range regexp.MustCompile(`\b(dmi_[a-z_]+)(\{[^}]*\})?`).FindAllStringSubmatch(text, -1) {
			used++
			has, known := labels[m[1]]
			if !known {
				t.Errorf("%s is not on docs/metrics.md", m[1])
			}
			for _, l := range regexp.MustCompile(`(\w+)=`).FindAllStringSubmatch(m[2], -1) {
				if !strings.Contains(has, "`"+l[1]+"`") {
					t.Errorf("%s has no label %s", m[1], l[1])
				}
			}
		}
	}
	alerts := regexp.MustCompile(`alert: (\w+)`).FindAllStringSubmatch(rules, -1)
	for _, a := range alerts {
		if !strings.Contains(runbook, "\n### "+a[1]+"\n\n") || !strings.Contains(rules, "runbook: docs/operation.md#"+strings.ToLower(a[1])+"\n") {
			t.Errorf("alert %s has no paragraph in docs/operation.md, or does not point to it", a[1])
		}
	}
	if len(alerts) != strings.Count(runbook, "\n### DMI") || used < 50 {
		t.Errorf("%d alerts, %d paragraphs, %d metrics named", len(alerts), strings.Count(runbook, "\n### DMI"), used)
	}
}

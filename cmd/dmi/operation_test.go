//go:build linux

package main

import (
	"io"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"dmi/ring"
)

// What an operator is promised is there on the admin listener of an engine that works, without a token.
func TestWhatAnOperatorCanAsk(t *testing.T) {
	e := mustStart(t, storeDir(t), "admin.address", "127.0.0.1:0")
	p := newProducer(t, "s000000e1", ring.ModeComplete)
	p.must(p.attach(e.Control, "", false))
	p.must(p.forward(3))
	p.barrier("now")
	ask := func(path string) string {
		answer, err := http.Get(e.Admin + path)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		text, err := io.ReadAll(answer.Body)
		if err != nil || answer.StatusCode != http.StatusOK {
			t.Fatalf("%s: %d %s %v", path, answer.StatusCode, text, err)
		}
		return string(text)
	}
	text := ask("/metrics")
	for what, pattern := range map[string]string{
		"rows by outcome, reason and level": `dmi_rows_total\{level="full",outcome="captured",reason=""\} 3`,
		"rows produced":                     `dmi_rows_produced_total 3`,
		"ring occupancy":                    `dmi_queue_used\{queue="payload_bytes"\} \d+`,
		"records' occupancy":                `dmi_queue_used\{queue="records"\} \d+`,
		"staging occupancy":                 `dmi_queue_used\{queue="staging_bytes"\} \d+`,
		"queue occupancy":                   `dmi_queue_used\{queue="batches"\} \d+`,
		"bounds of queues":                  `dmi_queue_capacity\{queue="batches"\} [1-9]`,
		"drain lag":                         `dmi_drain_lag_seconds \d`,
		"producer wait":                     `dmi_producer_wait_seconds\{mode="complete"\} \d`,
		"producer's waits":                  `dmi_producer_waits\{mode="best-effort"\} \d`,
		"hook host time":                    `dmi_producer_op_seconds \d`,
		"disk bytes":                        `dmi_store_segment_bytes \d`,
		"disk free":                         `dmi_store_disk_free_bytes [1-9]`,
		"durable lag":                       `dmi_store_durable_lag_seconds \d`,
		"resident memory":                   `process_resident_memory_bytes [1-9]`,
		"attached producers":                `dmi_producers 1`,
		"build":                             `dmi_build_info\{go="go1.*version="[^"]+"\} 1`,
		"the store's format":                `dmi_format_version\{format="store"\} 1`,
		"the segments' format":              `dmi_format_version\{format="segment"\} 1`,
		"the ring's format":                 `dmi_format_version\{format="ring"\} [1-9]`,
	} {
		if !regexp.MustCompile(`(?m)^` + pattern).MatchString(text) {
			t.Errorf("%s: no line %s", what, pattern)
		}
	}
	ask("/healthz")
	ask("/readyz")
	if profile := ask("/debug/pprof/goroutine?debug=1"); !strings.Contains(profile, "goroutine profile") {
		t.Errorf("pprof: %.200s", profile)
	}
	p.bye()
}

// Every event that the code knows is on docs/operation.md with its levels, and the page has no other; so is every key of the configuration that it names.
func TestEventsAreThePages(t *testing.T) {
	root := filepath.Join("..", "..")
	called := regexp.MustCompile(`(?:[eE]vent|Log|[tT]ell)\("(info|warning|error)", "([a-z_]+)"`)
	levels := map[string]map[string]bool{}
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() && path != root && (strings.HasPrefix(entry.Name(), ".") || entry.Name() == "node_modules") {
			return fs.SkipDir
		}
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		for _, m := range called.FindAllStringSubmatch(string(text), -1) {
			if levels[m[2]] == nil {
				levels[m[2]] = map[string]bool{}
			}
			levels[m[2]][m[1]] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join(root, "docs", "operation.md"))
	if err != nil {
		t.Fatal(err)
	}
	var have, want []string
	for code, l := range levels {
		var told []string
		for _, level := range []string{"info", "warning", "error"} {
			if l[level] {
				told = append(told, level)
			}
		}
		have = append(have, code+": "+strings.Join(told, ", "))
	}
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\| ([a-z, ]+) \\|").FindAllStringSubmatch(string(page), -1) {
		want = append(want, m[1]+": "+m[2])
	}
	slices.Sort(have)
	if !slices.IsSorted(want) {
		t.Error("the page's events are not in alphabetical order")
	}
	slices.Sort(want)
	if !slices.Equal(have, want) {
		t.Errorf("the code has events\n%s\nand the page\n%s", strings.Join(have, "\n"), strings.Join(want, "\n"))
	}
	keys := map[string]bool{}
	for _, key := range settingKeys() {
		keys[key] = true
	}
	for _, m := range regexp.MustCompile("`((?:store|control|http|admin|live|log|audit)\\.[a-z_]+)`").FindAllStringSubmatch(string(page), -1) {
		if !keys[m[1]] {
			t.Errorf("the page names a key %s, of %v", m[1], slices.Sorted(maps.Keys(keys)))
		}
	}
	metrics, err := os.ReadFile(filepath.Join(root, "docs", "metrics.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile("`(dmi_[a-z_]+)`").FindAllStringSubmatch(string(page), -1) {
		if !strings.Contains(string(metrics), "`"+m[1]+"`") {
			t.Errorf("the page names a metric %s that is not on docs/metrics.md", m[1])
		}
	}
}

// Every fault that the store and its producers are held against is on docs/operation.md, with a metric, an event and what to do; and a test injects it, and holds what is said against what
// is to be said.
func TestEveryFaultIsTold(t *testing.T) {
	root := filepath.Join("..", "..")
	read := func(name string) string {
		text, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(name)))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	page, metrics := read("docs/operation.md"), read("docs/metrics.md")
	const disks, killed, troubles = "cmd/dmi/disk_test.go TestDisksThatBreak", "test/faults_test.go TestWhatAKillCostIsTold", "test/troubles_test.go TestTroublesAreTold"
	for _, f := range []struct{ fault, row, test, says string }{ // row: how the page's begins; says: what the test holds the message against
		{"disk full", "disk full, read-only, failing", disks, "free space"},
		{"disk read-only", "disk full, read-only, failing", disks, "mount the file system for writing"},
		{"disk failing", "disk full, read-only, failing", disks, "dmesg"},
		{"disk slow", "disk slow", disks, "give the store a faster disk"},
		{"disk hung", "disk hangs", disks, "iostat"},
		{"engine down", "engine killed", killed, "booked lost(engine_exit)"},
		{"engine stopped", "engine stopped", troubles, "find out who"},
		{"engine restarted", "engine restarted", "control/server_test.go TestAnotherEngineTakesOver", "connect again when it is back"},
		{"producer gone", "producer gone", killed, "gone without a bye"},
		{"lying producer", "producer lies", troubles, "dance"},
		{"resizing producer", "producer that could resize its ring", "control/server_test.go TestRefusals", "F_SEAL_SHRINK"},
		{"refused producer", "producer that could resize its ring", troubles, "a producer was refused: "},
		{"stalling producer", "producer stalls", troubles, "Is it stopped, or its device hung?"},
		{"flooding producer", "producer floods", troubles, "Capture less (dmi policy)"},
		{"slow subscriber", "reader too slow", troubles, "read faster"},
	} {
		row := regexp.MustCompile(`(?m)^\| ` + regexp.QuoteMeta(f.row) + `[^|]*\|([^|]*)\|[^|]*\|([^|]*)\|$`).FindStringSubmatch(page)
		if row == nil {
			t.Errorf("%s: docs/operation.md has no row that begins with %q", f.fault, f.row)
			continue
		}
		counted, told := false, false
		for _, m := range regexp.MustCompile("`([a-z_]+)[^`]*`").FindAllStringSubmatch(row[1], -1) {
			counted = counted || strings.Contains(metrics, "| `"+m[1]+"` |")
			told = told || strings.Contains(page, "\n| `"+m[1]+"` | ")
		}
		if !counted || !told || strings.TrimSpace(row[2]) == "" {
			t.Errorf("%s: its row names a metric: %t, an event: %t, and says what to do: %q", f.fault, counted, told, strings.TrimSpace(row[2]))
		}
		file, name, _ := strings.Cut(f.test, " ")
		_, body, found := strings.Cut(read(file), "\nfunc "+name+"(")
		body, _, _ = strings.Cut(body, "\n}\n")
		if !found || !strings.Contains(body, f.says) {
			t.Errorf("%s: %s does not hold a message against %q", f.fault, f.test, f.says)
		}
	}
}

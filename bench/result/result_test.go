package result

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestEveryResult(t *testing.T) {
	files, err := filepath.Glob("../results/*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no results: %v", err)
	}
	for _, path := range files {
		if _, err := Read(path); err != nil {
			t.Error(err)
		}
	}
}

func TestWhatIsNoResult(t *testing.T) {
	const good = `{"name":"n","command":"c","commit":"1","machine":"m","date":"2026-01-02","rows":[` +
		`{"metric":"a","value":1,"unit":"s","baseline":2,"ratio":0.5,"goal":"<= 1","met":true}]}`
	dir := t.TempDir()
	for what, file := range map[string]struct{ name, text, says string }{
		"good":                     {"n.m.2026-01-02.json", good, ""},
		"of another name":          {"o.m.2026-01-02.json", good, `holds "n"`},
		"of another day":           {"n.m.2026-01-03.json", good, "of 2026-01-02"},
		"of no day":                {"n.m.json", good, "NAME.MACHINE.DATE"},
		"no JSON":                  {"n.m.2026-01-02.json", good[:40], "not a result"},
		"another key":              {"n.m.2026-01-02.json", strings.Replace(good, `"rows"`, `"sink":"x","rows"`, 1), `unknown field "sink"`},
		"no commit":                {"n.m.2026-01-02.json", strings.Replace(good, `"commit":"1"`, `"commit":""`, 1), "commit"},
		"a row without a value":    {"n.m.2026-01-02.json", strings.Replace(good, `"value":1`, `"value":null`, 1), "row 0 has no value"},
		"a row without met":        {"n.m.2026-01-02.json", strings.Replace(good, `,"met":true`, ``, 1), "row 0 has no met"},
		"a goal, not whether met":  {"n.m.2026-01-02.json", strings.Replace(good, `"met":true`, `"met":null`, 1), "goal"},
		"a ratio, nothing to it":   {"n.m.2026-01-02.json", strings.Replace(good, `"baseline":2`, `"baseline":null`, 1), "baseline"},
		"a baseline, and no ratio": {"n.m.2026-01-02.json", strings.Replace(good, `"ratio":0.5`, `"ratio":null`, 1), "baseline"},
		"no rows":                  {"n.m.2026-01-02.json", good[:strings.Index(good, "[")] + "[]}", "rows are needed"},
	} {
		path := filepath.Join(dir, file.name)
		if err := os.WriteFile(path, []byte(file.text), 0o644); err != nil {
			t.Fatal(err)
		}
		_, err := Read(path)
		if file.says == "" && err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if file.says != "" && (err == nil || !strings.Contains(err.Error(), file.says)) {
			t.Errorf("%s: error %v does not say %q", what, err, file.says)
		}
	}
}

// Both writers write the same.
func TestPythonWritesTheSame(t *testing.T) {
	python := os.Getenv("DMI_PYTHON")
	if python == "" {
		python = "../../.venv/bin/python"
	}
	if _, err := exec.LookPath(python); err != nil {
		t.Skipf("no Python at %s (make setup): %v", python, err)
	}
	// Whoever runs this just before midnight has two days to compare with.
	ours, theirs := t.TempDir(), t.TempDir()
	for range 2 {
		day := time.Now().UTC().Format(time.DateOnly)
		rows := []Row{{Metric: "a < b & c", Value: 1.25, Unit: "µs"}, Row{Metric: "b", Value: 3, Unit: "s"}.Against(2, 1.5).For("<= 1.6", true)}
		if err := Report("both", "python -c", rows, ours); err != nil {
			t.Fatal(err)
		}
		script := `import sys; from pathlib import Path; sys.path.insert(0, ".."); import result; ` +
			`result.write("both", [result.row("a < b & c", 1.25, "µs"), result.row("b", 3, "s", baseline=2, goal="<= 1.6", met=True)], folder=Path(sys.argv.pop()))`
		if out, err := exec.Command(python, "-c", script, theirs).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if day == time.Now().UTC().Format(time.DateOnly) {
			break
		}
	}
	read := func(dir string) (*Result, any) {
		files, err := filepath.Glob(filepath.Join(dir, "*.json"))
		if err != nil || len(files) == 0 {
			t.Fatalf("nothing written: %v", err)
		}
		r, err := Read(files[len(files)-1])
		if err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(files[len(files)-1])
		if err != nil {
			t.Fatal(err)
		}
		var all any
		if err := json.Unmarshal(text, &all); err != nil {
			t.Fatal(err)
		}
		return r, all
	}
	want, wantAll := read(ours)
	got, gotAll := read(theirs)
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("Go's (-) and Python's (+) differ:\n%s", d)
	}
	if d := cmp.Diff(wantAll, gotAll); d != "" {
		t.Errorf("Go's (-) and Python's (+) differ:\n%s", d)
	}
}

// Package result writes what a benchmark has measured to bench/results/NAME.MACHINE.DATE.json. The Python benchmarks write the same with
// __init__.py beside this file; tests hold both, and every file that is there, to Check.
//
//	{"name", "command", "commit", "machine", "date", "rows": [{"metric", "value", "unit", "baseline", "ratio", "goal", "met"}]}
//
// and, where there is more to know, "torch" (its version), "note" and "raw" (each single timing).
package result

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"
)

// Row is one figure.
type Row struct {
	Metric   string   `json:"metric"`
	Value    float64  `json:"value"`
	Unit     string   `json:"unit"`
	Baseline *float64 `json:"baseline"` // measured in the same run, same unit; null where there is none
	Ratio    *float64 `json:"ratio"`    // to the baseline
	Goal     string   `json:"goal"`     // "" where none was set
	Met      *bool    `json:"met"`
}

// Against gives the row its baseline and the ratio to it, which is not their quotient where it is the median of the rounds' own ratios.
func (r Row) Against(baseline, ratio float64) Row {
	r.Baseline, r.Ratio = &baseline, &ratio
	return r
}

// For gives the row its goal.
func (r Row) For(goal string, met bool) Row {
	r.Goal, r.Met = goal, &met
	return r
}

// Result is a file.
type Result struct {
	Name    string          `json:"name"`
	Command string          `json:"command"` // redoes the measurement from the root of the repository
	Commit  string          `json:"commit"`
	Machine string          `json:"machine"`
	Date    string          `json:"date"`
	Torch   string          `json:"torch,omitempty"`
	Note    string          `json:"note,omitempty"`
	Rows    []Row           `json:"rows"`
	Raw     json.RawMessage `json:"raw,omitempty"`
}

// Check says what makes a result none.
func (r *Result) Check() error {
	if r.Name == "" || r.Command == "" || r.Commit == "" || r.Machine == "" || r.Date == "" || len(r.Rows) == 0 {
		return errors.New("name, command, commit, machine, date and rows are needed")
	}
	for _, row := range r.Rows {
		switch {
		case row.Metric == "" || row.Unit == "":
			return fmt.Errorf("row %+v: metric and unit are needed", row)
		case math.IsNaN(row.Value) || math.IsInf(row.Value, 0):
			return fmt.Errorf("row %q: its value is %v", row.Metric, row.Value)
		case (row.Goal != "") != (row.Met != nil):
			return fmt.Errorf("row %q: a goal and whether it was met belong together", row.Metric)
		case (row.Ratio != nil) != (row.Baseline != nil):
			return fmt.Errorf("row %q: a baseline and the ratio to it belong together", row.Metric)
		}
	}
	return nil
}

var fileName = regexp.MustCompile(`^([a-z0-9_]+)\.[A-Za-z0-9_-]+\.(\d{4}-\d{2}-\d{2})\.json$`)

// Read reads a file, and is content with nothing but a result.
func Read(path string) (*Result, error) {
	named := fileName.FindStringSubmatch(filepath.Base(path))
	if named == nil {
		return nil, fmt.Errorf("%s: the name is not NAME.MACHINE.DATE.json", path)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if err := complete(text); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	var r Result
	in := json.NewDecoder(bytes.NewReader(text))
	in.DisallowUnknownFields()
	if err := in.Decode(&r); err != nil {
		return nil, fmt.Errorf("%s: not a result: %w", path, err)
	}
	if err := r.Check(); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if r.Name != named[1] || r.Date != named[2] {
		return nil, fmt.Errorf("%s: holds %q of %s", path, r.Name, r.Date)
	}
	return &r, nil
}

// complete reports what a row lacks that decoding would fill in.
func complete(text []byte) error {
	var file struct{ Rows []map[string]json.RawMessage }
	if err := json.Unmarshal(text, &file); err != nil {
		return fmt.Errorf("not a result: %w", err)
	}
	for i, row := range file.Rows {
		for _, key := range []string{"metric", "value", "unit", "baseline", "ratio", "goal", "met"} {
			if text, there := row[key]; !there || key == "value" && string(text) == "null" {
				return fmt.Errorf("row %d has no %s", i, key)
			}
		}
	}
	return nil
}

// Report prints a result of this machine, today and at this commit, and writes it to a folder unless that is "". The command is to have
// no options that do not change what is measured.
func Report(name, command string, rows []Row, folder string) error {
	commit, err := exec.Command("git", "rev-parse", "--short", "HEAD").Output()
	if err != nil {
		return fmt.Errorf("find the commit: git rev-parse: %w", err)
	}
	r := Result{Name: name, Command: command, Commit: strings.TrimSpace(string(commit)), Machine: Machine(), Date: time.Now().UTC().Format(time.DateOnly), Rows: rows}
	if err := r.Check(); err != nil {
		return fmt.Errorf("result of %s: %w", name, err)
	}
	var text bytes.Buffer
	out := json.NewEncoder(&text)
	out.SetIndent("", " ")
	out.SetEscapeHTML(false)
	if err := out.Encode(r); err != nil {
		return err
	}
	if _, err := os.Stdout.Write(text.Bytes()); err != nil || folder == "" {
		return err
	}
	return os.WriteFile(filepath.Join(folder, fmt.Sprintf("%s.%s.%s.json", r.Name, r.Machine, r.Date)), text.Bytes(), 0o644)
}

// Machine is what results call this machine.
func Machine() string {
	arch := runtime.GOARCH
	if name, other := map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[arch]; other {
		arch = name
	}
	return fmt.Sprintf("%dcore-%s", runtime.NumCPU(), arch)
}

// Load is a row that says how much else ran on the machine, measured now.
func Load() Row {
	var average float64
	if text, err := os.ReadFile("/proc/loadavg"); err == nil {
		fmt.Sscan(string(text), &average)
	}
	return Row{Metric: "load average of the machine before", Value: average, Unit: "processes"}
}

// Median of an odd number of values is their middle one, else the upper of the two.
func Median(values []float64) float64 {
	values = slices.Sorted(slices.Values(values))
	return values[len(values)/2]
}

//go:build linux

package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"dmi/internal/samplestore"
	"dmi/store"
	"dmi/tensor"

	"github.com/apache/arrow-go/v18/parquet/file"
)

// sampleStore is a finished store with the sample in it.
func sampleStore(t testing.TB) (string, *samplestore.Sample) {
	t.Helper()
	dir := storeDir(t)
	s, err := store.Open(dir, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	sample, err := samplestore.Fill(s, "s0000cafe")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return dir, sample
}

func jsonOf[T any](t testing.TB, text string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	return v
}

// Every reading command, for people and for programs, of a store that nobody has open and of one whose engine lives.
func TestReadingCommands(t *testing.T) {
	dir, sample := sampleStore(t)
	first, second := sample.Requests[0].ID, sample.Requests[1].ID
	for _, alive := range []bool{false, true} {
		if alive {
			mustStart(t, dir)
		}
		run := func(arguments ...string) string { return mustDMI(t, append(arguments, "--store", dir)...) }
		for _, c := range []struct {
			command string
			says    []string
			items   int // of the JSON list; -1: not a list
		}{
			{"runs", []string{"RUN", sample.Run.ID, "topic=capitals", "#demo"}, 1},
			{"runs --tag none", nil, 0},
			{"runs --label topic=capitals", []string{sample.Run.ID}, 1},
			{"requests", []string{first, second, "n=0", "n=1"}, 2},
			{"requests --latest 1", []string{second}, 1},
			{"requests --limit 1", []string{first}, 1},
			{"requests --label n=0 --run " + sample.Run.ID, []string{first}, 1},
			{"requests " + first, []string{first, "70001 70002", `"The capital of France"`}, -1},
			{"ls -r " + first, []string{"blocks.0.attn.hook_pattern", "2xkeys", "unembed.hook_out", "logits", "F16"}, 4},
			{"ls -r " + first + " -l 0", []string{"blocks.0.hook_resid_post"}, 2},
			{"ls", []string{"blocks.0.hook_resid_post"}, 4},
			{"coverage --all", []string{fmt.Sprint(sample.Rows, " rows, INCOMPLETE"), "dropped(ring_full)", "captured(full)", "not_computed(engine)"}, -1},
			{"coverage -r " + first, []string{"24 rows, complete", "0:6"}, -1},
			{"coverage -r " + second + " -s resid_post", []string{"1:2", "dropped(ring_full)"}, -1},
			{"coverage --run " + sample.Run.ID, []string{"rows, INCOMPLETE"}, -1},
			{"stats -r " + first + " -s resid_post", []string{"blocks.0.hook_resid_post", "27"}, 1}, // mean of 10p+d+0.5 over p<6, d<4
			{"stats -r " + first + " -s resid_post --per row -t 1:3", []string{"12 ", "22 "}, 2},
			{"stats --per site --run " + sample.Run.ID, []string{"tokens"}, 4},
			{"get -r " + first + " -s pattern --heads 1 -t 2:4", []string{"blocks.0.attn.hook_pattern", "F32 [1 2 4] [head, query, key]", "positions 2:4", "non-finite 0 of 8"}, -1},
			{"verify", []string{"36 rows produced, 36 on the books", "ok"}, -1},
			{"top --once", []string{"36 produced, 36 booked", "captured(full)"}, -1},
			{"config", []string{"store.path", "flag --store", "store.buffer_mib"}, len(settings)},
			{"version", []string{"dmi "}, -1},
		} {
			text := run(strings.Fields(c.command)...)
			for _, s := range c.says {
				if !strings.Contains(text, s) {
					t.Errorf("dmi %s (alive: %v) does not say %q:\n%s", c.command, alive, s, text)
				}
			}
			text = run(append(strings.Fields(c.command), "--json")...)
			if c.items >= 0 {
				if list := jsonOf[[]map[string]any](t, text); len(list) != c.items {
					t.Errorf("dmi %s --json (alive: %v): %d items, want %d: %s", c.command, alive, len(list), c.items, text)
				}
			} else if object := jsonOf[map[string]any](t, text); len(object) == 0 {
				t.Errorf("dmi %s --json: %s", c.command, text)
			}
		}
	}
}

func TestGetWritesFiles(t *testing.T) {
	dir, sample := sampleStore(t)
	first, second := sample.Requests[0].ID, sample.Requests[1].ID
	out := t.TempDir()
	get := func(name string, arguments ...string) []byte {
		t.Helper()
		path := filepath.Join(out, name)
		mustDMI(t, append([]string{"get", "--store", dir, "--out", path}, arguments...)...)
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	get("cut.npy", "-r", first, "-s", "resid_post", "-t", "-2:")
	shape, values := floatsOf(t, filepath.Join(out, "cut.npy"))
	if want := []float32{40.5, 41.5, 42.5, 43.5, 50.5, 51.5, 52.5, 53.5}; shape != "2, 4," || !slices.Equal(values, want) {
		t.Errorf("cut.npy: (%s) %v", shape, values)
	}
	// Of one tensor cut here, and of many whole: the header and the bytes.
	for name, arguments := range map[string][]string{"one.safetensors": {"-s", "resid_post", "-t", "0:1", "-r", first}, "all.safetensors": {"-r", first}} {
		text := get(name, arguments...)
		n := binary.LittleEndian.Uint64(text)
		header := jsonOf[map[string]json.RawMessage](t, string(text[8:8+n]))
		resid := jsonOf[struct {
			DType   string
			Shape   []int
			Offsets [2]int `json:"data_offsets"`
		}](t, string(header["blocks.0.hook_resid_post"]))
		if n%8 != 0 || resid.DType != "F32" || resid.Shape[1] != 4 || resid.Offsets[1]-resid.Offsets[0] != 16*resid.Shape[0] {
			t.Errorf("%s: %s", name, text[8:8+n])
		}
		data := text[8+n:][resid.Offsets[0]:resid.Offsets[1]]
		for i := range resid.Shape[0] * 4 {
			if v := math.Float32frombits(binary.LittleEndian.Uint32(data[4*i:])); v != samplestore.Resid(0, i/4, i%4) {
				t.Errorf("%s: element %d is %v", name, i, v)
			}
		}
		if want := map[string]int{"one.safetensors": 2, "all.safetensors": 5}[name]; len(header) != want {
			t.Errorf("%s: %d entries, want %d", name, len(header), want)
		}
	}
	if raw := get("x.raw", "-r", first, "-s", "tokens"); len(raw) != 48 || int64(binary.LittleEndian.Uint64(raw[40:])) != samplestore.Token(0, 5) {
		t.Errorf("raw: %v", raw)
	}
	get("stats.parquet", "--run", sample.Run.ID)
	reader, err := file.OpenParquetFile(filepath.Join(out, "stats.parquet"), false)
	if err != nil {
		t.Fatal(err)
	}
	if n := reader.NumRows(); n != 9+8+9+3 { // a line per captured row: tokens, residual less one, patterns, logits
		t.Errorf("%d lines of statistics", n)
	}
	reader.Close()
	get("partial.npy", "-r", second, "-s", "resid_post", "--partial")
	if shape, _ := floatsOf(t, filepath.Join(out, "partial.npy")); shape != "2, 4," {
		t.Errorf("partial: (%s)", shape)
	}
	mustDMI(t, "stats", "--store", dir, "-r", first, "--out", filepath.Join(out, "stats.json"))
	if text, _ := os.ReadFile(filepath.Join(out, "stats.json")); !json.Valid(text) {
		t.Errorf("stats.json: %s", text)
	}
	npy := mustDMI(t, "get", "--store", dir, "-r", first, "-s", "resid_post", "--out", "-", "--format", "npy")
	if want := get("whole.npy", "-r", first, "-s", "resid_post"); npy != string(want) {
		t.Errorf("the standard output has %d bytes, the file %d", len(npy), len(want))
	}
	for _, name := range []string{"cut.npy", "all.safetensors"} {
		if info, _ := os.Stat(filepath.Join(out, name)); info.Mode().Perm() != 0o600 {
			t.Errorf("%s: activations can reveal prompts, and its mode is %v", name, info.Mode())
		}
	}
}

func TestWrongUsage(t *testing.T) {
	dir, sample := sampleStore(t)
	first, second := sample.Requests[0].ID, sample.Requests[1].ID
	out := filepath.Join(t.TempDir(), "x.npy")
	for _, c := range []struct {
		command string
		code    int
		says    string
	}{
		{"requests none", exitNotFound, "did you mean " + first},
		{"ls -r none", exitNotFound, "none"},
		{"get -r " + first + " -s resid_past", exitNotFound, "hook_resid_post"},
		{"get -r " + second + " -s resid_post", exitIncomplete, "dropped(ring_full) 1"},
		{"get -r " + second + " -o " + out, exitIncomplete, "dropped(ring_full)"},
		{"get -r " + first + " -s ** -o " + out, exitUsage, "safetensors"},
		{"get -r " + first + " -s resid_post -t x", exitUsage, "x"},
		{"get -r " + first + " -o x.pt", exitUsage, "safetensors, npy"},
		{"get -r " + first, exitUsage, "one --site"},
		{"get -r " + first + " -t 1:2 -o x.parquet", exitUsage, "dmi stats --tokens"},
		{"stats -r " + first + " --per head", exitUsage, "row, request or site"},
		{"stats extra", exitUsage, "unknown command"},
		{"requests --colour red", exitUsage, "unknown flag"},
		{"frobnicate", exitUsage, "unknown command"},
		{"runs --set store.bufer_mib=1", exitUsage, "store.buffer_mib"},
		{"runs --set x", exitUsage, "KEY=VALUE"},
		{"runs --engine ftp://x", exitUsage, "unix:PATH"},
		{"runs --engine unix:/nowhere", exitFailure, "/nowhere"},
		{"tail", exitNotFound, "dmi.attach"},
		{"tail --events --site x", exitUsage, "alone"},
		{"top --every 1ms --once", exitUsage, "100ms"},
		{"serve --engine unix:/x", exitUsage, "another engine"},
		{"serve --ready-fd 999", exitUsage, "999"},
	} {
		stdout, complaints, code := dmi(t, append(strings.Fields(c.command), "--store", dir)...)
		if code != c.code || !strings.Contains(complaints, c.says) {
			t.Errorf("dmi %s: exit code %d, want %d; does it say %q?\n%s%s", c.command, code, c.code, c.says, stdout, complaints)
		}
	}
	if _, err := os.Stat(out); err == nil {
		t.Error("a failed get left a file")
	}
	if _, complaints, code := dmi(t, "runs", "--store", filepath.Join(dir, "none")); code != exitStore || !strings.Contains(complaints, "--store") {
		t.Errorf("no store: %d %s", code, complaints)
	}
}

// verify finds a flipped bit, says where, and its exit code says that there is one.
func TestVerifyFindsDamage(t *testing.T) {
	dir, _ := sampleStore(t)
	segments, err := filepath.Glob(filepath.Join(dir, "segments", "*.safetensors"))
	if err != nil || len(segments) == 0 {
		t.Fatalf("no sealed segment: %v %v", segments, err)
	}
	text, err := os.ReadFile(segments[0])
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(text, binary.LittleEndian.AppendUint32(nil, math.Float32bits(samplestore.Resid(0, 3, 2))))
	if at < 0 {
		t.Fatal("the value is not in the segment")
	}
	text[at] ^= 1
	if err := os.WriteFile(segments[0], text, 0o600); err != nil {
		t.Fatal(err)
	}
	stdout, _, code := dmi(t, "verify", "--store", dir)
	if code != exitFailure || !strings.Contains(stdout, "PROBLEM") || !strings.Contains(stdout, filepath.Base(segments[0])) {
		t.Errorf("exit code %d\n%s", code, stdout)
	}
	stdout, _, code = dmi(t, "verify", "--store", dir, "--json")
	report := jsonOf[struct {
		OK       bool
		Problems []struct{ File, What string }
	}](t, stdout)
	if code != exitFailure || report.OK || len(report.Problems) == 0 {
		t.Errorf("exit code %d\n%s", code, stdout)
	}
}

func TestDescribeComplexTensors(t *testing.T) {
	var out bytes.Buffer
	d := &described{Site: "x", DType: "C64", Shape: []int{1, 2}, Axes: []string{"token", "dim"}, Positions: "0:1", Complete: true, dtype: tensor.C64}
	c := newCommand()
	c.SetOut(&out)
	if err := d.print(c, &options{}, strings.NewReader(strings.Repeat("\x00", 16))); err != nil || !strings.Contains(out.String(), "C64 [1 2]") {
		t.Errorf("%v %s", err, out.String())
	}
	d.DType, d.dtype = "F32", tensor.F32
	if err := d.print(c, &options{}, strings.NewReader("\x00\x00\x00\x00")); err == nil {
		t.Error("half an answer looks whole")
	}
}

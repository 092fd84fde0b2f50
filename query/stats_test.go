package query

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"dmi/tensor"

	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"pgregory.net/rapid"
)

// figures computes statistics the plain way: decode everything, then two passes.
func figures(d tensor.DType, data []byte) (mean, rms, least, greatest, absmax, l2 float64, nonfinite, count uint64) {
	values := make([]float64, len(data)/d.Size())
	d.Floats(values, data)
	var finite []float64
	for _, v := range values {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			nonfinite++
		} else {
			finite = append(finite, v)
		}
	}
	least, greatest, absmax = math.NaN(), math.NaN(), math.NaN()
	sum, squares := 0.0, 0.0
	for i, v := range finite {
		sum += v
		squares += v * v
		if i == 0 || v < least {
			least = v
		}
		if i == 0 || v > greatest {
			greatest = v
		}
		if i == 0 || math.Abs(v) > absmax {
			absmax = math.Abs(v)
		}
	}
	n := float64(len(finite))
	return sum / n, math.Sqrt(squares / n), least, greatest, absmax, math.Sqrt(squares), nonfinite, uint64(len(values))
}

func near(a, b float64) bool {
	return a == b || math.IsNaN(a) && math.IsNaN(b) || math.Abs(a-b) <= 1e-9*max(math.Abs(a), math.Abs(b)) || math.IsInf(a, 0) && math.IsInf(b, 0)
}

func TestStatsEqualPlainComputation(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t, rapid.Bool().Draw(t, "whole"))
		e := New(w.memory(t))
		e.MemoryBytes = rapid.SampledFrom([]int{1, 200, 1 << 20}).Draw(t, "memory")
		per := rapid.SampledFrom([]Per{PerRow, PerRequest, PerSite}).Draw(t, "per")
		tokens := drawRange(t)
		type line struct {
			dtype tensor.DType
			data  []byte
			rows  uint64
		}
		want := map[string]*line{}
		for _, r := range w.requests {
			if r.Hidden {
				continue
			}
			for _, s := range w.sites {
				found := w.want(r, s, tokens)
				for i, row := range found.rows {
					key := map[Per]string{PerRow: fmt.Sprint(r.ID, s.Name, found.positions[i]), PerRequest: fmt.Sprint(r.ID, s.Name, -1), PerSite: fmt.Sprint(s.Name, -1)}[per]
					if want[key] == nil {
						want[key] = &line{dtype: s.dtype}
					}
					want[key].data = append(want[key].data, row...)
					want[key].rows++
				}
			}
		}
		stats, err := e.Stats(context.Background(), StatsQuery{Scope: Scope{Run: w.run.ID}, Tokens: tokens, Per: per})
		if err != nil {
			t.Fatal(err)
		}
		err = stats.Each(context.Background(), func(got StatsRow) error {
			key := fmt.Sprint(got.Request, got.Site, got.Position)
			l := want[key]
			if l == nil {
				t.Fatalf("line %s twice, or of nothing", key)
			}
			delete(want, key)
			mean, rms, least, greatest, absmax, l2, nonfinite, count := figures(l.dtype, l.data)
			if got.Count != count || got.NonFinite != nonfinite || got.Rows != l.rows || !near(got.RMS, rms) || !near(got.Min, least) || !near(got.Max, greatest) ||
				!near(got.AbsMax, absmax) || !near(got.L2, l2) || math.Abs(got.Mean-mean) > 1e-9*got.AbsMax {
				t.Fatalf("%s: got %+v, want mean %v rms %v min %v max %v absmax %v l2 %v nonfinite %d count %d", key, got, mean, rms, least, greatest, absmax, l2, nonfinite, count)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if len(want) > 0 {
			t.Fatalf("%d lines missing", len(want))
		}
	})
}

// example is a world that never changes, for tests of formats.
func example(t *testing.T) *inMemory {
	t.Helper()
	return rapid.Custom(func(t *rapid.T) *inMemory { return drawWorld(t, true).memory(t) }).Example(7)
}

func TestTablesAgree(t *testing.T) {
	m := example(t)
	stats, err := New(m).Stats(context.Background(), StatsQuery{Scope: Scope{Run: m.run.ID}})
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	text := func(v float64) string {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return "null"
		}
		return fmt.Sprintf("%.6g", v)
	}
	err = stats.Each(context.Background(), func(r StatsRow) error {
		layer := "null"
		if r.Layer >= 0 {
			layer = fmt.Sprint(r.Layer)
		}
		lines = append(lines, fmt.Sprint(r.Request, r.Site, layer, r.Position, text(r.Mean), text(r.L2), r.NonFinite, r.Count))
		return nil
	})
	if err != nil || len(lines) < 10 {
		t.Fatal(len(lines), err)
	}
	var b bytes.Buffer
	if err := stats.WriteJSON(context.Background(), &b); err != nil {
		t.Fatal(err)
	}
	var parsed struct {
		Items []struct {
			Request, Site    string
			Layer            *int
			Position         int64
			Mean, L2         *float64
			NonFinite, Count uint64
		}
		Next *string
	}
	if err := json.Unmarshal(b.Bytes(), &parsed); err != nil || len(parsed.Items) != len(lines) || parsed.Next != nil {
		t.Fatalf("%v in %s", err, b.String())
	}
	for i, item := range parsed.Items {
		layer := "null"
		if item.Layer != nil {
			layer = fmt.Sprint(*item.Layer)
		}
		number := func(v *float64) string {
			if v == nil {
				return "null"
			}
			return text(*v)
		}
		if got := fmt.Sprint(item.Request, item.Site, layer, item.Position, number(item.Mean), number(item.L2), item.NonFinite, item.Count); got != lines[i] {
			t.Fatalf("JSON line %d: %s, want %s", i, got, lines[i])
		}
	}
	b.Reset()
	if err := stats.WriteArrow(context.Background(), &b); err != nil {
		t.Fatal(err)
	}
	reader, err := ipc.NewReader(&b)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Release()
	rows := 0
	for reader.Next() {
		record := reader.RecordBatch()
		for i := range int(record.NumRows()) {
			layer := "null"
			if !record.Column(2).IsNull(i) {
				layer = fmt.Sprint(record.Column(2).(*array.Int32).Value(i))
			}
			got := fmt.Sprint(record.Column(0).(*array.String).Value(i), record.Column(1).(*array.String).Value(i), layer, record.Column(3).(*array.Int64).Value(i),
				text(record.Column(5).(*array.Float64).Value(i)), text(record.Column(10).(*array.Float64).Value(i)),
				record.Column(11).(*array.Uint64).Value(i), record.Column(12).(*array.Uint64).Value(i))
			if got != lines[rows] {
				t.Fatalf("Arrow line %d: %s, want %s", rows, got, lines[rows])
			}
			rows++
		}
	}
	if reader.Err() != nil || rows != len(lines) {
		t.Fatalf("Arrow: %d lines of %d, %v", rows, len(lines), reader.Err())
	}
}

// python runs a script with the interpreter that the repository's virtual environment has; modules that it needs may be missing on a
// machine that only builds the engine.
func python(t *testing.T, modules, script string, args ...string) string {
	t.Helper()
	interpreter, err := filepath.Abs("../.venv/bin/python")
	if err != nil {
		t.Fatal(err)
	}
	if err := exec.Command(interpreter, "-c", "import "+modules).Run(); err != nil {
		t.Skipf("no %s in .venv (make setup): %v", modules, err)
	}
	out, err := exec.Command(interpreter, append([]string{"-c", script}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestParquetOpensInDuckDB(t *testing.T) {
	m := example(t)
	e := New(m)
	export, err := e.Export(context.Background(), ExportQuery{Scope: Scope{Run: m.run.ID}, Format: "parquet"})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), export.Filename)
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := export.WriteTo(context.Background(), file); err != nil {
		t.Fatal(err)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	stats, err := e.Stats(context.Background(), StatsQuery{Scope: Scope{Run: m.run.ID}})
	if err != nil {
		t.Fatal(err)
	}
	rows, count, nonfinite, largest := 0, uint64(0), uint64(0), 0.0
	if err := stats.Each(context.Background(), func(r StatsRow) error {
		rows++
		count += r.Count
		nonfinite += r.NonFinite
		if r.Site == "blocks.0.hook_resid_post" && r.Max > largest {
			largest = r.Max
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	got := python(t, "duckdb", `import duckdb, sys
print(*duckdb.sql(f"select count(*), sum(count)::bigint, sum(nonfinite)::bigint, count(distinct request) > 0 from '{sys.argv[1]}'").fetchall()[0])
print(repr(duckdb.sql(f"select max(max) from '{sys.argv[1]}' where site = 'blocks.0.hook_resid_post' and layer = 0 and not isnan(max)").fetchall()[0][0]))`, path)
	var gotRows int
	var gotCount, gotNonfinite uint64
	var distinct string
	var gotLargest float64
	if _, err := fmt.Sscan(got, &gotRows, &gotCount, &gotNonfinite, &distinct, &gotLargest); err != nil {
		t.Fatalf("%v in %q", err, got)
	}
	if gotRows != rows || gotCount != count || gotNonfinite != nonfinite || distinct != "True" || gotLargest != largest {
		t.Fatalf("DuckDB: %s; want %d %d %d True %v", got, rows, count, nonfinite, largest)
	}
}

func TestTopKeysEqualSorting(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t, true)
		pattern := w.sites[2]
		for key, row := range w.rows { // weights are finite
			if key.site == pattern.ID && row.data != nil {
				for i := range len(row.data) / 4 {
					copy(row.data[4*i:], []byte{0, row.data[4*i], row.data[4*i+1] & 0x7f, 0x3f})
				}
			}
		}
		e := New(w.memory(t))
		r := rapid.SampledFrom(w.requests).Draw(t, "request")
		q := TopKeysQuery{Request: r.ID, Site: SiteName{Name: "pattern"}, K: rapid.IntRange(1, 4).Draw(t, "k"), Heads: drawHeads(t, pattern)}
		tokens := Range{}
		if rapid.Bool().Draw(t, "one query") {
			p := rapid.IntRange(0, 8).Draw(t, "query")
			q.Query, tokens = &p, Range{p, p + 1}
		}
		want := w.want(r, pattern, tokens)
		got, err := e.TopKeys(context.Background(), q)
		if len(want.rows) == 0 || want.missing > 0 {
			if !errors.Is(err, ErrIncomplete) {
				t.Fatalf("%d missing: %v", want.missing, err)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		heads := q.Heads
		if heads == nil {
			heads = []int{0, 1, 2}
		}
		if len(got) != len(heads) {
			t.Fatalf("%d heads", len(got))
		}
		for i, head := range heads {
			means := map[int]float64{}
			for j, row := range want.rows {
				keys := int(want.positions[j]) + 1
				values := make([]float64, 3*keys)
				tensor.F32.Floats(values, row)
				for k := range keys {
					means[k] += values[head*keys+k] / float64(len(want.rows))
				}
			}
			if got[i].Head != head || len(got[i].Keys) != min(q.K, len(means)) {
				t.Fatalf("head %d: %+v of %d keys", head, got[i], len(means))
			}
			last := math.Inf(1)
			for _, key := range got[i].Keys {
				if !near(key.Weight, means[key.Position]) || key.Weight > last {
					t.Fatalf("head %d key %+v, want weight %v", head, key, means[key.Position])
				}
				if key.Position < len(r.Tokens) && (key.Token == nil || *key.Token != r.Tokens[key.Position]) {
					t.Fatalf("head %d key %+v: not the token of %v", head, key, r.Tokens)
				}
				last = key.Weight
				delete(means, key.Position)
			}
			for position, mean := range means {
				if mean > last*(1+1e-9) {
					t.Fatalf("head %d: key %d with %v is not among %+v", head, position, mean, got[i].Keys)
				}
			}
		}
	})
}

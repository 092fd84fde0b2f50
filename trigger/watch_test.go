package trigger

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"dmi/policy"
	"dmi/tensor"

	"pgregory.net/rapid"
)

type names struct{}

var sites = []tensor.Site{{ID: 0, Name: "blocks.0.hook_resid_post", Layer: 0}, {ID: 1, Name: "blocks.1.hook_resid_post", Layer: 1}, {ID: 2, Name: "blocks.1.attn.hook_pattern", Layer: 1, Keyed: true}}

func (names) SessionID(n uint32) (string, bool)            { return fmt.Sprintf("s%08x", n), true }
func (names) Sites(uint32) ([]tensor.Site, error)          { return sites, nil }
func (names) RequestID(k tensor.RequestKey) (string, bool) { return fmt.Sprint("r", k.Request), true }

// told collects events, and is the clock.
type told struct {
	mu     sync.Mutex
	events []string
	now    time.Time
}

func (e *told) tell(_, code, _, message string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.events = append(e.events, code+": "+message)
}

func (e *told) take() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	list := e.events
	e.events = nil
	return list
}

func watching(t testing.TB, dir, document string) (*Watch, *told) {
	t.Helper()
	e := &told{now: time.Unix(1e9, 0)}
	w := New(Options{Names: names{}, Event: e.tell, Now: func() time.Time { return e.now }})
	t.Cleanup(w.Close)
	w.Use(load(t, dir, document), 7)
	return w, e
}

func load(t testing.TB, dir, document string) *Set {
	t.Helper()
	d, err := policy.Parse([]byte(document))
	if err != nil {
		t.Fatal(err)
	}
	s, err := Load(dir, d)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func chunkOf(site uint32, request uint64, first uint32, rows ...[]float64) tensor.Chunk {
	var data []byte
	for _, row := range rows {
		for _, v := range row {
			data = binary.LittleEndian.AppendUint32(data, math.Float32bits(float32(v)))
		}
	}
	return tensor.Chunk{Key: tensor.RequestKey{Session: 1, Request: request}, Site: site, First: first, Rows: uint32(len(rows)), DType: tensor.F32, Shape: []int{len(rows[0])}, Data: data}
}

// safetensors is a file of F32 tensors.
func safetensors(t interface{ Fatal(...any) }, file string, tensors map[string][]float64) {
	var data []byte
	var header []string
	for name, values := range tensors {
		from := len(data)
		for _, v := range values {
			data = binary.LittleEndian.AppendUint32(data, math.Float32bits(float32(v)))
		}
		header = append(header, fmt.Sprintf(`%q:{"dtype":"F32","shape":[%d],"data_offsets":[%d,%d]}`, name, len(values), from, len(data)))
	}
	text := []byte("{" + strings.Join(header, ",") + "}")
	whole := append(binary.LittleEndian.AppendUint64(nil, uint64(len(text))), append(text, data...)...)
	if err := os.WriteFile(file, whole, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Random rows against every kind of condition: what is met is what a slow recomputation from the float32 values says, in number and in the value told.
func TestConditionsAreExact(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(t *rapid.T) {
		seed := rapid.Uint64().Draw(t, "seed")
		random := rand.New(rand.NewPCG(seed, 1))
		kinds := []string{"mean", "rms", "min", "max", "absmax", "l2", "nonfinite", "probe", "zscore", "any"}
		kind := rapid.SampledFrom(kinds).Draw(t, "kind")
		width := 1 + random.IntN(6)
		weight, bias := make([]float64, width), float64(float32(random.NormFloat64()))
		for i := range weight {
			weight[i] = float64(float32(random.NormFloat64()))
		}
		high, low := random.NormFloat64()+1, random.NormFloat64()-1
		when := fmt.Sprintf("{statistic: %s, above: %v, below: %v}", kind, high, low)
		switch kind {
		case "probe":
			file, err := os.CreateTemp(dir, "*.safetensors")
			if err != nil {
				t.Fatal(err)
			}
			file.Close()
			tensors := map[string][]float64{"weight": weight, "bias": {bias}}
			if bias < 0 {
				bias = 0
				delete(tensors, "bias")
			}
			safetensors(t, file.Name(), tensors)
			when = fmt.Sprintf("{probe: %s, above: %v, below: %v}", filepath.Base(file.Name()), high, low)
		case "zscore":
			when = "{statistic: l2, zscore: 1.5, warmup: 5}"
		case "any":
			when = "{nonfinite: true}"
		}
		e := &told{}
		w := New(Options{Names: names{}, Event: e.tell})
		defer w.Close()
		d, err := policy.Parse([]byte("triggers: [{name: t, hooks: resid_post, layers: 1, cooldown: 0s, when: " + when + "}]"))
		if err != nil {
			t.Fatal(err)
		}
		set, err := Load(dir, d)
		if err != nil {
			t.Fatal(err)
		}
		w.Use(set, 1)
		want, before := uint64(0), []float64{}
		for range 20 {
			row := make([]float64, width)
			for i := range row {
				row[i] = float64(float32(random.NormFloat64() * 2))
				if random.IntN(30) == 0 {
					row[i] = []float64{math.NaN(), math.Inf(1), math.Inf(-1)}[random.IntN(3)]
				}
			}
			w.Look(1, []tensor.Chunk{chunkOf(0, 1, 0, row), chunkOf(1, 1, 0, row)}, 0, nil) // of two sites, one is watched
			value := slowly(kind, row, weight, bias)
			switch kind {
			case "any":
				if value > 0 {
					want++
				}
			case "zscore":
				if len(before) >= 5 && value-value == 0 && math.Abs(value-mean(before)) > 1.5*deviation(before) && deviation(before) > 0 {
					want++
				}
				if value-value == 0 {
					before = append(before, value)
				}
			default:
				if value > high || value < low {
					want++
				}
			}
		}
		if got := w.Status()[0]; got.Met != want || got.Fired != want {
			t.Fatalf("%s: %+v, want %d", when, got, want)
		}
	})
}

func mean(values []float64) (m float64) {
	for _, v := range values {
		m += v / float64(len(values))
	}
	return m
}

func deviation(values []float64) float64 {
	sum, m := 0.0, mean(values)
	for _, v := range values {
		sum += (v - m) * (v - m)
	}
	return math.Sqrt(sum / float64(len(values)))
}

func slowly(kind string, row, weight []float64, bias float64) float64 {
	var finite []float64
	for _, v := range row {
		if !math.IsNaN(v) && !math.IsInf(v, 0) {
			finite = append(finite, v)
		}
	}
	n, sum, squares, least, greatest := float64(len(finite)), 0.0, 0.0, math.Inf(1), math.Inf(-1)
	for _, v := range finite {
		sum, squares, least, greatest = sum+v, squares+v*v, min(least, v), max(greatest, v)
	}
	if n == 0 && kind != "nonfinite" && kind != "any" && kind != "l2" && kind != "zscore" && kind != "probe" {
		return math.NaN()
	}
	switch kind {
	case "mean":
		return sum / n
	case "rms":
		return math.Sqrt(squares / n)
	case "min":
		return least
	case "max":
		return greatest
	case "absmax":
		return max(-least, greatest)
	case "l2", "zscore":
		return math.Sqrt(squares)
	case "probe":
		v := bias
		for i := range row {
			v += weight[i] * row[i]
		}
		return v
	}
	return float64(len(row) - len(finite))
}

func TestCooldownIsPerRequest(t *testing.T) {
	w, e := watching(t, "", "triggers: [{name: big, hooks: resid_post, cooldown: 10s, when: {statistic: l2, above: 10}}]")
	spike := func(request uint64) {
		w.Look(1, []tensor.Chunk{chunkOf(0, request, 4, []float64{1, 0}, []float64{30, 40})}, 0, nil)
	}
	spike(1)
	spike(1)
	spike(2)
	if events := e.take(); len(events) != 2 || events[0] != "trigger: big: request r1, position 5, blocks.0.hook_resid_post: 50 (statistic: l2, above: 10), step 0" {
		t.Errorf("%q", events)
	}
	e.now = e.now.Add(10 * time.Second)
	spike(1)
	if events := e.take(); len(events) != 1 {
		t.Errorf("%q", events)
	}
	if s := w.Status()[0]; s.Met != 4 || s.Fired != 3 {
		t.Errorf("%+v", s)
	}
}

func TestFiringsAreToldWithinABound(t *testing.T) {
	w, e := watching(t, "", "triggers: [{hooks: resid_post, when: {nonfinite: true}}]")
	for request := range uint64(100) {
		w.Look(1, []tensor.Chunk{chunkOf(0, request, 0, []float64{math.NaN()})}, 0, nil)
	}
	if events := e.take(); len(events) != toldASecond {
		t.Errorf("%d events", len(events))
	}
	e.now = e.now.Add(time.Second)
	w.Look(1, []tensor.Chunk{chunkOf(0, 1000, 0, []float64{math.NaN()})}, 0, nil)
	if events := e.take(); len(events) != 1 || !strings.Contains(events[0], "and 90 more firings before") {
		t.Errorf("%q", events)
	}
	if s := w.Status()[0]; s.Fired != 101 {
		t.Errorf("%+v", s)
	}
}

func TestProbesOfAnotherShapeAreToldOnce(t *testing.T) {
	dir := t.TempDir()
	safetensors(t, filepath.Join(dir, "p.safetensors"), map[string][]float64{"weight": {1, 2, 3}})
	w, e := watching(t, dir, "triggers: [{name: lies, when: {probe: p.safetensors, above: 0}}]")
	for range 3 {
		w.Look(1, []tensor.Chunk{chunkOf(0, 1, 0, []float64{1, 1}), chunkOf(2, 1, 0, []float64{1, 1, 1}), chunkOf(1, 1, 0, []float64{1, 1, 1})}, 0, nil)
	}
	events := e.take()
	if len(events) != 3 || !strings.Contains(events[0], "3 weights, and a row of blocks.0.hook_resid_post 2 elements") || !strings.Contains(events[1], "hook_pattern") || !strings.Contains(events[2], ": 6 (probe") {
		t.Errorf("%q", events)
	}
}

// A keyed row has no more keys than its position says: what pads it is not looked at.
func TestPaddingIsNotLookedAt(t *testing.T) {
	w, _ := watching(t, "", "triggers: [{hooks: hook_pattern, when: {nonfinite: true}}]")
	nan := math.NaN()
	w.Look(1, []tensor.Chunk{chunkOf(2, 1, 0, []float64{1, nan, nan}, []float64{1, 2, nan}, []float64{1, 2, 3})}, 0, nil)
	if s := w.Status()[0]; s.Met != 0 {
		t.Errorf("%+v", s)
	}
	w.Look(1, []tensor.Chunk{chunkOf(2, 1, 0, []float64{1, nan, nan}, []float64{1, nan, nan}, []float64{1, 2, 3})}, 0, nil)
	if s := w.Status()[0]; s.Met != 1 {
		t.Errorf("%+v", s)
	}
}

func TestHostileProbes(t *testing.T) {
	dir := t.TempDir()
	outside := filepath.Join(t.TempDir(), "out.safetensors")
	safetensors(t, outside, map[string][]float64{"weight": {1}})
	if err := os.Symlink(outside, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	safetensors(t, filepath.Join(dir, "wide"), map[string][]float64{"weight": {1}, "bias": {1, 2}})
	safetensors(t, filepath.Join(dir, "nan"), map[string][]float64{"weight": {math.NaN()}})
	safetensors(t, filepath.Join(dir, "none"), map[string][]float64{"bias": {1}})
	headed := func(header string, data int) string {
		return string(binary.LittleEndian.AppendUint64(nil, uint64(len(header)))) + header + strings.Repeat("\x00", data)
	}
	for name, text := range map[string]string{
		"empty": "", "long": "\xff\xff\xff\xff\xff\xff\xff\x7f{}", "json": headed("[]", 0),
		"short":   headed(`{"weight":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}`, 8),
		"back":    headed(`{"weight":{"dtype":"F32","shape":[1],"data_offsets":[8,4]}}`, 8),
		"dtype":   headed(`{"weight":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}`, 8),
		"shape":   headed(`{"weight":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}`, 0),
		"nothing": headed(`{"weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}`, 0),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, said := range map[string]string{"../out": "below the store's folder", outside: "below the store's folder", "link": "escapes", "missing": "no such file", ".": "is no file",
		"wide": "2 elements", "nan": "not finite", "none": "no tensor `weight`", "empty": "0 bytes", "long": "a header of", "json": "header is not", "short": "bytes 0 to 12 of 8",
		"back": "bytes 8 to 4", "dtype": "real numbers", "shape": "a shape of", "nothing": "or an empty one"} {
		d, err := policy.Parse([]byte(fmt.Sprintf("# first\ntriggers:\n- {name: p, when: {probe: %q, above: 1}}\n", name)))
		if err != nil {
			t.Fatal(err)
		}
		if _, err = Load(dir, d); err == nil || !strings.Contains(err.Error(), said) || !strings.Contains(err.Error(), "line 3: p: probe") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzProbe(f *testing.F) {
	file := filepath.Join(f.TempDir(), "p")
	safetensors(f, file, map[string][]float64{"weight": {1, 2}, "bias": {3}})
	text, err := os.ReadFile(file)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := parseProbe(text)
		if (p == nil) == (err == nil) {
			t.Fatal(p, err)
		}
	})
}

// Rows that left the device as statistics are judged by those, quantised ones by what their codes stand for.
func TestRowsAtOtherLevels(t *testing.T) {
	dir := t.TempDir()
	safetensors(t, filepath.Join(dir, "p"), map[string][]float64{"weight": {1, 0, 0, 0}})
	w, e := watching(t, dir, `triggers:
- {name: norm, layers: 0, when: {statistic: l2, above: 4.9}}
- {name: broken, layers: 0, when: {nonfinite: true}}
- {name: probe, layers: 0, when: {probe: p, above: 2.5}}
`)
	figures := chunkOf(0, 1, 0, []float64{1, 2, -4, 3, 4, 5, 0, 4}, []float64{1, 2, -4, 3, 4, 4.5, 1, 5}) // mean, rms, min, max, absmax, l2, not finite, all
	figures.Level = tensor.Stats
	w.Look(1, []tensor.Chunk{figures}, 0, nil)
	events := strings.Join(e.take(), "\n")
	for _, said := range []string{"norm: request r1, position 0, blocks.0.hook_resid_post: 5 ", "broken: request r1, position 1, blocks.0.hook_resid_post: 1 ", "probe: rows of blocks.0.hook_resid_post come as statistics"} {
		if !strings.Contains(events, said) {
			t.Errorf("%q is not in\n%s", said, events)
		}
	}
	codes := []byte{0, 0, 0, 0x3f /* scale 0.5 */, 6, 0xf8, 0, 0, 0, 0, 0, 0x3f, 0, 0x80, 127, 2} // 3, -4, 0, 0; and 0, NaN, infinity, 1
	w, e = watching(t, dir, `triggers:
- {name: norm, layers: 0, when: {statistic: l2, above: 4.9}}
- {name: broken, layers: 0, when: {nonfinite: true}}
- {name: probe, layers: 0, when: {probe: p, above: 2.5}}
`)
	w.Look(1, []tensor.Chunk{{Key: tensor.RequestKey{Session: 1, Request: 2}, Rows: 2, DType: tensor.BF16, Level: tensor.Int8, Shape: []int{4}, Data: codes}}, 0, nil)
	events = strings.Join(e.take(), "\n")
	for _, said := range []string{"norm: request r2, position 0, blocks.0.hook_resid_post: 5 ", "broken: request r2, position 1, blocks.0.hook_resid_post: 2 ", "probe: request r2, position 0, blocks.0.hook_resid_post: 3 "} {
		if !strings.Contains(events, said) {
			t.Errorf("%q is not in\n%s", said, events)
		}
	}
}

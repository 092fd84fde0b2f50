package policy

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dmi/tensor"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestParse(t *testing.T) {
	text, err := os.ReadFile("testdata/whole.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got, err := Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	decode, above, below := Decode, 900.0, -2.5
	off := Level{Level: tensor.Off}
	want := &Document{
		Text:    string(text),
		Default: off,
		Groups:  tensor.Groups{Sets: []tensor.Group{{IDs: []string{"prod-*"}, Tags: []string{"eu", "17"}}}},
		Rules: []Rule{
			{Name: "patterns of two layers", Line: 7, Select: Selection{Hooks: []string{"attn.hook_pattern"}, Layers: []Layers{{3, 3}, {8, 1 << 20}},
				Tokens: []Window{{Prompt, -1, unbounded, 1}, {Generated, 0, 32, 1}}}, Priority: 5, Degrade: []Level{off}},
			{Name: "a tenth of production", Line: 14, Select: Selection{Hooks: []string{"blocks.*.hook_resid_post", "logits"}, IDs: []string{"prod-*"}, Tags: []string{"eu", "17"},
				Sample: 0.1, Seed: 7, Phase: &decode}, Level: Level{Level: tensor.Sampled, Stride: 16}, Priority: -3, Degrade: []Level{{Level: tensor.Stats}, off}},
			{Name: "rule 3", Line: 26, Level: Level{Level: tensor.Int8}, Degrade: []Level{}},
		},
		Budgets: Budgets{Copied: 2e9, Disk: 500e6, DiskFree: 20 << 30, EngineBytes: 1 << 30, Device: 512 << 20, Pinned: 1 << 30, Retain: 2e12, RetainAge: 720 * time.Hour},
		Triggers: []Trigger{
			{Name: "exploding", Line: 39, Select: Selection{Hooks: []string{"hook_resid_post"}, Layers: []Layers{{0, 15}}}, When: Condition{Statistic: "l2", Above: &above, Below: &below, Warmup: 100},
				Webhook: "https://alerts.example/dmi", Cooldown: time.Minute, Promote: &Selection{Hooks: []string{"hook_resid_post", "attn.**"}}, Keep: &Selection{Hooks: []string{"hook_embed"}}},
			{Name: "trigger 2", Line: 47, When: Condition{NonFinite: true, Warmup: 100}, Keep: &Selection{}, Cooldown: 10 * time.Second},
			{Name: "trigger 3", Line: 48, When: Condition{Statistic: "rms", ZScore: 6, Warmup: 1000}, Cooldown: 10 * time.Second},
			{Name: "lies", Line: 49, When: Condition{Probe: "probes/lies.safetensors", Above: &above, Warmup: 100}, Cooldown: 0},
		},
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(Selection{}, "sites", "group", "groups"), cmpopts.IgnoreFields(tensor.Groups{}, "Name")); diff != "" {
		t.Error(diff)
	}
}

func TestWhatTriggersKeep(t *testing.T) {
	d, err := Parse([]byte(`
triggers:
- {hooks: blocks.1.hook_resid_post, when: {nonfinite: true}, keep: []}
- {hooks: blocks.*.hook_resid_post, when: {statistic: l2, zscore: 4}, keep: hook_embed}
- {hooks: blocks.1.hook_resid_post, when: {statistic: l2, above: 4}, keep: blocks.*.hook_resid_post}
- {hooks: blocks.*.hook_resid_post, when: {nonfinite: true}}
`))
	if err != nil {
		t.Fatal(err)
	}
	sites := []Site{{Name: "hook_embed", Layer: tensor.NoLayer}, {Name: "blocks.0.hook_resid_post"}, {Name: "blocks.1.hook_resid_post", Layer: 1}, {Name: "logits", Layer: tensor.NoLayer}}
	want := []Keep{{By: 2, Late: true}, {By: 2 | 4, Late: true}, {Watch: 1 | 4, By: 1 | 2 | 4, Late: true}, {}}
	if diff := cmp.Diff(want, d.Compile(sites, State{}).Keeps); diff != "" {
		t.Error(diff)
	}
	if d, err = Parse([]byte("triggers: [{when: {nonfinite: true}, promote: hook_embed}]")); err != nil || d.Compile(sites, State{}).Keeps != nil {
		t.Error("what nobody keeps:", err)
	}
}

// Every file of testdata/hostile is a document, and after a line of dashes what is to be said of it.
func TestHostileDocuments(t *testing.T) {
	files, err := filepath.Glob("testdata/hostile/*")
	if err != nil || len(files) < 10 {
		t.Fatal(len(files), err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			document, want, found := strings.Cut(string(text), "\n=====\n")
			if !found {
				t.Fatal("no line of =")
			}
			_, err = Parse([]byte(document + "\n"))
			var parse *ParseError
			if !errors.As(err, &parse) {
				t.Fatalf("%v", err)
			}
			if os.Getenv("DMI_REWRITE") != "" {
				if err := os.WriteFile(file, []byte(document+"\n=====\n"+err.Error()+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(strings.TrimSpace(want), err.Error()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestNothingIsAPolicy(t *testing.T) {
	for _, text := range []string{"", "# nothing yet\n", "version: 1\n", "rules:\nbudgets:\n"} {
		d, err := Parse([]byte(text))
		if err != nil || len(d.Rules) > 0 || d.Default.Level != tensor.Full {
			t.Errorf("%q: %v, %v", text, d, err)
		}
	}
}

func TestDocumentsAreBounded(t *testing.T) {
	for name, text := range map[string]string{
		"bytes":    strings.Repeat("#", MaxBytes+1),
		"rules":    "rules:\n" + strings.Repeat("- {level: full}\n", MaxRules+1),
		"hooks":    "rules:\n- {level: full, hooks: [" + strings.Repeat("a,", maxList+1) + "]}",
		"problems": strings.Repeat("nonsense: 1\n", 500),
	} {
		_, err := Parse([]byte(text))
		var parse *ParseError
		if !errors.As(err, &parse) || len(parse.Problems) > maxProblems {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	files, _ := filepath.Glob("testdata/*/*")
	whole, _ := os.ReadFile("testdata/whole.yaml")
	f.Add(whole)
	for _, file := range files {
		if text, err := os.ReadFile(file); err == nil {
			f.Add(text)
		}
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := Parse(text)
		if (d == nil || err != nil) != (err != nil) {
			t.Fatal(d, err)
		}
		if err == nil {
			d.Compile([]Site{{Name: "blocks.0.hook_resid_post"}, {Name: "logits", Layer: tensor.NoLayer}}, State{})
		}
	})
}

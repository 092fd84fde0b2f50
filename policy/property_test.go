package policy

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"dmi/tensor"

	"go.yaml.in/yaml/v3"
	"pgregory.net/rapid"
)

// A window holds what a slice of the list of a region's positions has, as Python slices lists.
func TestWindowsSliceAsPythonDoes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		prompt := rapid.IntRange(1, 12).Draw(t, "prompt")
		total := prompt + rapid.IntRange(0, 12).Draw(t, "generated")
		var positions []int
		for p := range total {
			positions = append(positions, p)
		}
		region := rapid.SampledFrom([]string{"all", "prompt", "generated"}).Draw(t, "region")
		list := map[string][]int{"all": positions, "prompt": positions[:prompt], "generated": positions[prompt:]}[region]
		low := 0
		if region == "prompt" {
			low = -15
		}
		bound := func(name string) (text string, v int, said bool) {
			if rapid.Bool().Draw(t, name+" left out") {
				return "", 0, false
			}
			v = rapid.IntRange(low, 15).Draw(t, name)
			return fmt.Sprint(v), v, true
		}
		startText, start, started := bound("start")
		stopText, stop, stopped := bound("stop")
		step := rapid.IntRange(1, 4).Draw(t, "step")
		text := fmt.Sprintf("%s[%s:%s:%d]", region, startText, stopText, step)
		w, err := ParseWindow(text)
		// Python: negative bounds count from the end, then both are held to the list.
		fix := func(v, omitted int, said bool) int {
			if !said {
				return omitted
			}
			if v < 0 {
				v += len(list)
			}
			return min(max(v, 0), len(list))
		}
		var want []int
		for i := fix(start, 0, started); i < fix(stop, len(list), stopped); i += step {
			want = append(want, list[i])
		}
		if err != nil {
			if len(want) > 0 {
				t.Fatalf("%s: %v, holds %v of %v", text, err, want, list)
			}
			return
		}
		if again, err := ParseWindow(w.String()); err != nil || again != w {
			t.Fatalf("%s is %v, which is %v, %v", text, w, again, err)
		}
		var got []int
		for _, p := range positions {
			phase := Prefill
			if p >= prompt {
				phase = Decode
			}
			if w.Holds(Request{Prompt: uint32(prompt)}, Token{uint32(p), phase}) {
				got = append(got, p)
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("%s of %d + %d: %v, want %v", text, prompt, total-prompt, got, want)
		}
	})
}

func TestOneIndex(t *testing.T) {
	r := Request{Prompt: 3}
	for text, want := range map[string][]uint32{"prompt[-1]": {2}, "prompt[0]": {0}, "prompt[5]": nil, "prompt[-5]": nil, "generated[1]": {4}, "all[3]": {3}} {
		w, err := ParseWindow(text)
		if err != nil {
			t.Fatal(err)
		}
		var got []uint32
		for p := range uint32(6) {
			if w.Holds(r, Token{Position: p}) {
				got = append(got, p)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
}

// drawDocument writes a random policy as text, and parses it.
func drawDocument(t *rapid.T) *Document {
	one := func(name string, of ...string) string { return rapid.SampledFrom(of).Draw(t, name) }
	levels := []string{"full", "fp8", "int8", "sampled/2", "sampled/3", "stats", "stats+2", "stats+5", "off"}
	var b strings.Builder
	fmt.Fprintf(&b, "default: %s\nrules:\n", one("default", levels...))
	for i := range rapid.IntRange(0, 6).Draw(t, "rules") {
		fmt.Fprintf(&b, "- level: %s\n  priority: %d\n", one("level", levels...), i%3)
		maybe := func(key string, values ...string) {
			if rapid.IntRange(0, 2).Draw(t, key+" said") == 0 {
				fmt.Fprintf(&b, "  %s: %s\n", key, one(key, values...))
			}
		}
		maybe("hooks", "'**'", "blocks.*.hook_a", "hook_b", "[logits, blocks.1.**]", "nothing.here")
		maybe("layers", "0", "1-", "[0, 2]", "0-2")
		maybe("phase", "prefill", "decode")
		maybe("tokens", "prompt[-1]", "'generated[:3]'", `["prompt[::2]", "generated[1::3]"]`, "'all[2:7]'", "prompt", "generated")
		maybe("requests", "{sample: 0.5}", "{sample: 0.25, seed: 3}", "{ids: a*}", "{tags: [x, y]}", `{tags: x, ids: ["b?", a1]}`)
	}
	d, err := Parse([]byte(b.String()))
	if err != nil {
		t.Fatalf("%s\n%v", &b, err)
	}
	return d
}

func drawRequest(t *rapid.T) Request {
	return Request{Number: rapid.Uint64Range(0, 99).Draw(t, "number"), ID: rapid.SampledFrom([]string{"a1", "b2", "c"}).Draw(t, "id"),
		Tags: rapid.SliceOfDistinct(rapid.SampledFrom([]string{"x", "y", "z"}), rapid.ID[string]).Draw(t, "tags"), Prompt: rapid.Uint32Range(0, 6).Draw(t, "prompt")}
}

var testSites = []Site{{ID: 0, Name: "blocks.0.hook_a", Layer: 0}, {ID: 1, Name: "blocks.0.hook_b", Layer: 0}, {ID: 2, Name: "blocks.1.hook_a", Layer: 1},
	{ID: 3, Name: "blocks.2.mlp.hook_b", Aliases: []string{"blocks.2.mlp.hook_a"}, Layer: 2}, {ID: 4, Name: "logits", Layer: tensor.NoLayer}}

func TestPlansSayWhatTheReferenceSays(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := drawDocument(t)
		lowered := map[int]Level{}
		for i := -1; i < len(d.Rules); i++ {
			if rapid.IntRange(0, 3).Draw(t, "lowered") == 0 {
				lowered[i] = Level{Level: rapid.SampledFrom([]tensor.Level{tensor.FP8, tensor.Stats, tensor.Off}).Draw(t, "to")}
			}
		}
		now := State{Lowered: lowered}
		for range rapid.IntRange(0, 3).Draw(t, "promotions") {
			sites := Selection{}
			r := reader{}
			r.hooks(&yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: rapid.SampledFrom([]string{"**", "hook_b", "blocks.1.**", "logits"}).Draw(t, "promoted hooks")}, &sites)
			now.Promoted = append(now.Promoted, Promotion{Request: rapid.Uint64Range(0, 9).Draw(t, "promoted"), Sites: &sites})
		}
		plan := d.Compile(testSites, now)
		for range 8 {
			r := drawRequest(t)
			for p := range uint32(9) {
				token := Token{p, Prefill}
				if p >= r.Prompt {
					token.Phase = Decode
				}
				for i, site := range testSites {
					want := d.Evaluate(site, r, token, now)
					if got, _ := plan.Row(i, r, token); got != want {
						t.Fatalf("%s\n%v %v at %s: %+v, want %+v", d.Text, r, token, site.Name, got, want)
					}
					// A producer gives just what is kept; of requests that it does not know yet, that or more in full.
					kept := want.Level.Level
					switch {
					case !want.Kept:
						kept = tensor.Off
					case kept == tensor.Sampled:
						kept = tensor.Full
					}
					gate := plan.Classes[plan.Of[i]].Gate()
					if gives := given(gate, r, token, &d.Groups); gives != kept {
						t.Fatalf("%s\n%v %v at %s: the gate gives %v, and %v is kept", d.Text, r, token, site.Name, gives, kept)
					}
					if gives := given(gate, r, token, nil); want.Kept && gives != kept && gives != tensor.Full {
						t.Fatalf("%s\n%v %v at %s: of an unknown request the gate gives %v, and %v is kept", d.Text, r, token, site.Name, gives, kept)
					}
				}
			}
		}
		for i := range testSites {
			for j := range testSites[:i] {
				if a, b := &plan.Classes[plan.Of[i]], &plan.Classes[plan.Of[j]]; a != b && slices.EqualFunc(a.Clauses, b.Clauses, func(a, b Clause) bool { return a.Rule == b.Rule && slices.Equal(a.Only, b.Only) }) {
					t.Fatalf("sites %d and %d have equal clauses and not one class", i, j)
				}
			}
		}
	})
}

// The share of requests sampled is what was asked for, and nested: who is in a sample of a tenth is in one of a half.
// given is the level at which a producer gives a row, as abi/ring.h says. groups: those that it was told; nil: none yet.
func given(g tensor.Gate, r Request, t Token, groups *tensor.Groups) tensor.Level {
	level, stride := g.Level, g.Stride
	for _, c := range g.Clauses {
		sampled := (c.Threshold == 0 || Hash(c.Seed, r.Number) < c.Threshold) && (!c.One || c.Request == r.Number) && inGroup(c, r, groups)
		if sampled && c.Phases>>t.Phase&1 == 1 && inRegion(c, r, t) {
			level, stride = c.Level, c.Stride
			break
		}
	}
	if level != tensor.Sampled {
		return level
	}
	if t.Position%stride == 0 {
		return tensor.Full
	}
	return tensor.Off
}

func inGroup(c tensor.GateClause, r Request, groups *tensor.Groups) bool {
	known := groups != nil && groups.Name == c.Groups
	switch c.Group {
	case 0:
		return true
	case tensor.UnknownGroup:
		return !known
	}
	if !known {
		return false
	}
	g := groups.Sets[c.Group-1]
	for _, tag := range g.Tags {
		if !slices.Contains(r.Tags, tag) {
			return false
		}
	}
	return len(g.IDs) == 0 || slices.ContainsFunc(g.IDs, func(id string) bool { return tensor.MatchText(id, r.ID) })
}

// inRegion counts the region's positions one by one, as far as any test goes.
func inRegion(c tensor.GateClause, r Request, t Token) bool {
	var region []uint32
	for p := range uint32(64) {
		switch {
		case c.Region == tensor.Prompt && r.Prompt != 0 && p >= r.Prompt, c.Region == tensor.Generated && p < r.Prompt:
		default:
			region = append(region, p)
		}
	}
	if r.Prompt == 0 && (c.Region == tensor.Generated || int64(c.Start) < 0 || int64(c.Stop) < 0 || c.Region == tensor.Prompt && t.Phase != Prefill) {
		return false
	}
	bound := func(v uint64) int {
		if n := int64(v); n < 0 {
			return max(0, len(region)+int(n))
		} else if n < int64(len(region)) {
			return int(n)
		}
		return len(region)
	}
	for i := bound(c.Start); i < bound(c.Stop); i += int(c.Step) {
		if region[i] == t.Position {
			return true
		}
	}
	return false
}

func TestSamplesAreSharesAndNested(t *testing.T) {
	const n = 100000
	for _, seed := range []uint64{0, 1, 12345} {
		last := 0
		for _, share := range []float64{0.01, 0.1, 0.5, 0.9} {
			in := 0
			for i := range uint64(n) {
				if Hash(seed, i) < Threshold(share) {
					in++
				}
			}
			if f := float64(in) / n; f < share*0.93-0.002 || f > share*1.07+0.002 || in < last {
				t.Errorf("seed %d: a share of %v gave %v", seed, share, f)
			}
			last = in
		}
	}
	if Hash(0, 0) != 0xe220a8397b1dcdaf { // splitmix64's first output of seed 0, from its author's test vectors
		t.Errorf("hash: %x", Hash(0, 0))
	}
}

func TestLadders(t *testing.T) {
	full, off, stats := Level{}, Level{Level: tensor.Off}, Level{Level: tensor.Stats}
	all := func(tensor.Level) bool { return true }
	gates := func(l tensor.Level) bool { return l == tensor.Full || l == tensor.Off }
	for _, test := range []struct {
		rule Rule
		has  func(tensor.Level) bool
		want []Level
	}{
		{Rule{}, gates, []Level{full, off}},
		{Rule{}, all, []Level{full, {Level: tensor.FP8}, {Level: tensor.Sampled, Stride: 8}, stats, off}},
		{Rule{Level: Level{Level: tensor.Int8}}, all, []Level{{Level: tensor.Int8}, {Level: tensor.Sampled, Stride: 8}, stats, off}},
		{Rule{Degrade: []Level{stats}}, all, []Level{full, stats}},
		{Rule{Degrade: []Level{}}, all, []Level{full}},
		{Rule{Level: off}, all, []Level{off}},
	} {
		if got := test.rule.Ladder(test.has); !slices.Equal(got, test.want) {
			t.Errorf("%+v: %v, want %v", test.rule, got, test.want)
		}
	}
}

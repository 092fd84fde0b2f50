package query

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"

	"dmi/tensor"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// modelSites are the sites of a small model, named as in docs/sites.md.
func modelSites() (sites []tensor.Site) {
	add := func(layer int, name string, aliases ...string) {
		sites = append(sites, tensor.Site{ID: uint32(len(sites)), Name: name, Aliases: aliases, Layer: layer})
	}
	add(tensor.NoLayer, "hook_embed", "model.embed_tokens")
	for i := range 3 {
		block := fmt.Sprintf("blocks.%d.", i)
		add(i, block+"hook_resid_pre", block+"hook_in")
		add(i, block+"attn.hook_q")
		add(i, block+"attn.hook_pattern")
		add(i, block+"ln1.hook_scale")
		add(i, block+"ln2.hook_scale")
		add(i, block+"hook_resid_post", block+"hook_out", fmt.Sprintf("model.layers.%d", i))
	}
	add(tensor.NoLayer, "unembed.hook_out", "logits", "lm_head")
	return sites
}

func names(sites []tensor.Site) (list []string) {
	for _, s := range sites {
		list = append(list, s.Name)
	}
	return list
}

func TestResolveSite(t *testing.T) {
	layer := func(i int) *int { return &i }
	for _, test := range []struct {
		name  string
		layer *int
		want  string // or, after "!", code and a part of the message
	}{
		{"blocks.1.hook_resid_post", nil, "blocks.1.hook_resid_post"},
		{"blocks.1.hook_out", nil, "blocks.1.hook_resid_post"},
		{"model.layers.2", nil, "blocks.2.hook_resid_post"},
		{"logits", nil, "unembed.hook_out"},
		{"resid_post", layer(1), "blocks.1.hook_resid_post"},
		{"resid_post", layer(-1), "blocks.2.hook_resid_post"},
		{"hook_in", layer(0), "blocks.0.hook_resid_pre"},
		{"q", layer(2), "blocks.2.attn.hook_q"},
		{"attn.q", layer(2), "blocks.2.attn.hook_q"},
		{"ln1.scale", layer(0), "blocks.0.ln1.hook_scale"},
		{"**.ln2.*", layer(0), "blocks.0.ln2.hook_scale"},
		{"blocks.0.hook_embed", nil, "!not_found did you mean"},
		{"blocks.1.hook_resid_pst", nil, "!not_found blocks.1.hook_resid_post"},
		{"logit", nil, "!not_found unembed.hook_out"},
		{"pattern", layer(7), "!not_found layers end at 2"},
		{"scale", layer(0), "!bad_argument blocks.0.ln1.hook_scale, blocks.0.ln2.hook_scale"},
		{"resid_post", nil, "!bad_argument add a layer"},
		{"blocks.*.hook_resid_post", nil, "!bad_argument blocks.2.hook_resid_post"},
		{"", nil, "!bad_argument no site named"},
		{"a**", nil, "!bad_argument stands alone"},
	} {
		got, err := resolveSite(modelSites(), SiteName{test.name, test.layer})
		if wantError, isError := strings.CutPrefix(test.want, "!"); isError {
			code, part, _ := strings.Cut(wantError, " ")
			var failure *Error
			if !errors.As(err, &failure) || failure.Code != Code(code) || !strings.Contains(err.Error(), part) {
				t.Errorf("%q layer %v: got %v %v, want %s with %q", test.name, test.layer, got.Name, err, code, part)
			}
			continue
		}
		if err != nil || got.Name != test.want {
			t.Errorf("%q layer %v: got %q, %v, want %q", test.name, test.layer, got.Name, err, test.want)
		}
	}
	if _, err := resolveSite(nil, SiteName{Name: "logits"}); !errors.Is(err, ErrNotFound) {
		t.Errorf("no sites: %v", err)
	}
}

func TestSelectSites(t *testing.T) {
	two := 2
	for _, test := range []struct {
		pattern string
		layer   *int
		want    []string
	}{
		{"blocks.*.hook_resid_post", nil, []string{"blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"}},
		{"resid_post", nil, []string{"blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"}},
		{"blocks.2.**", nil, names(modelSites()[13:19])},
		{"", &two, names(modelSites()[13:19])},
		{"*", nil, []string{"hook_embed", "unembed.hook_out"}}, // by its alias
		{"**.hook_scale", &two, []string{"blocks.2.ln1.hook_scale", "blocks.2.ln2.hook_scale"}},
		{"model.layers.?", nil, []string{"blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"}},
		{"", nil, names(modelSites())},
	} {
		got, err := selectSites(modelSites(), test.pattern, test.layer)
		if d := cmp.Diff(test.want, names(got)); err != nil || d != "" {
			t.Errorf("%q: %v (-want +got):\n%s", test.pattern, err, d)
		}
	}
	for _, pattern := range []string{"blocks.*.hook_nothing", "nothing", "a..b", "**.**", strings.Repeat("a", 600) + "*"} {
		if got, err := selectSites(modelSites(), pattern, nil); err == nil {
			t.Errorf("%q: got %v and no error", pattern, names(got))
		}
	}
}

// Globs mean what the regular expression made of them, piece by piece, means.
func TestGlobEqualsRegularExpression(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		component := rapid.StringMatching(`[ab*?]{1,4}`).Filter(func(s string) bool { return !strings.Contains(s, "**") })
		parts := rapid.SliceOfN(rapid.OneOf(component, rapid.Just("**")), 1, 5).Draw(t, "pattern")
		name := rapid.StringMatching(`[ab]{1,3}(\.[ab]{1,3}){0,5}`).Draw(t, "name")
		g, err := tensor.CompileGlob(strings.Join(parts, "."))
		if err != nil {
			if strings.Contains("."+strings.Join(parts, ".")+".", ".**.**.") {
				return
			}
			t.Fatal(err)
		}
		expression := "^" // of the name with a dot after every component
		for _, part := range parts {
			if part == "**" {
				expression += `([^.]+\.)*`
				continue
			}
			expression += strings.NewReplacer("*", "[^.]*", "?", "[^.]").Replace(part) + `\.`
		}
		want := regexp.MustCompile(expression + "$").MatchString(name + ".")
		if got := g.Match(name); got != want {
			t.Fatalf("%v on %s: %v, want %v", parts, name, got, want)
		}
	})
}

func FuzzGlob(f *testing.F) {
	for _, s := range []string{"blocks.*.hook_resid_post", "**", "a.**.b", "?", "..", "***"} {
		f.Add(s, "blocks.0.hook_resid_post")
	}
	f.Fuzz(func(t *testing.T, pattern, name string) {
		g, err := tensor.CompileGlob(pattern)
		if err != nil {
			return
		}
		g.Match(name)
		if !tensor.IsGlob(pattern) && !g.Match(pattern) {
			t.Fatalf("%q does not match itself", pattern)
		}
		if wide, _ := tensor.CompileGlob("**"); !wide.Match(name) {
			t.Fatalf("** does not match %q", name)
		}
	})
}

func FuzzParseRange(f *testing.F) {
	for _, s := range []string{"", ":", "4:9", "-3:", ":-1", "7", "-1", "0:0", "9:4", "1:2:3", "99999999999"} {
		f.Add(s, uint16(8))
	}
	f.Fuzz(func(t *testing.T, text string, n uint16) {
		r, err := ParseRange(text)
		if err != nil {
			if !errors.Is(err, ErrBadArgument) {
				t.Fatal(err)
			}
			return
		}
		if again, err := ParseRange(r.String()); err != nil || again.String() != r.String() {
			t.Fatalf("%q: %s parses as %s, %v", text, r, again, err)
		}
		if from, to := r.clip(int(n)); from < 0 || to < from {
			t.Fatalf("%q of %d: %d..%d", text, n, from, to)
		}
	})
}

func FuzzParseHeads(f *testing.F) {
	for _, s := range []string{"", "0,3", "0:4,7", "1,1", "-1", "0:99999", ",", "4:2"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		heads, err := ParseHeads(text)
		if err != nil {
			if !errors.Is(err, ErrBadArgument) {
				t.Fatal(err)
			}
			return
		}
		seen := map[int]bool{}
		for _, h := range heads {
			if h < 0 || seen[h] {
				t.Fatalf("%q: %v", text, heads)
			}
			seen[h] = true
		}
		if len(heads) > maxHeads {
			t.Fatalf("%q: %d heads", text, len(heads))
		}
	})
}

func TestParseRangeMeansWhatPythonSlicesMean(t *testing.T) {
	for text, want := range map[string][2]int{"": {0, 8}, ":": {0, 8}, "4:9": {4, 9}, "-3:": {5, 8}, ":-1": {0, 7}, "7": {7, 8}, "-1": {7, 8}, "-3": {5, 6},
		"2:-2": {2, 6}, "-20:3": {0, 3}, "9:": {9, 9}, " 1 : 2 ": {1, 2}} {
		r, err := ParseRange(text)
		from, to := r.clip(8)
		if err != nil || from != want[0] || to != want[1] {
			t.Errorf("%q of 8: %d..%d, %v, want %v", text, from, to, err, want)
		}
	}
	for _, text := range []string{"x", "3:3", "9:4", "-1:-4", "1:2:3", "5000000000", "1.5"} {
		if r, err := ParseRange(text); !errors.Is(err, ErrBadArgument) {
			t.Errorf("%q: %v, %v", text, r, err)
		}
	}
	for _, text := range []string{"x", "1,1", "-1", "0:99999", "4:2", "1,,2"} {
		if heads, err := ParseHeads(text); !errors.Is(err, ErrBadArgument) {
			t.Errorf("heads %q: %v, %v", text, heads, err)
		}
	}
	if heads, err := ParseHeads("8:11,0, 3"); err != nil || cmp.Diff(heads, []int{8, 9, 10, 0, 3}) != "" {
		t.Errorf("%v, %v", heads, err)
	}
}

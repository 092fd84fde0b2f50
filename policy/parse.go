package policy

import (
	"fmt"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"dmi/internal/nearest"
	"dmi/tensor"

	"go.yaml.in/yaml/v3"
)

// Parse reads a document. The error is a *ParseError, with everything that is wrong.
func Parse(text []byte) (*Document, error) {
	d := &Document{Text: string(text)}
	r := &reader{}
	if len(text) > MaxBytes {
		r.problems = []Problem{{1, 1, fmt.Sprintf("the document has %d bytes: at most %d", len(text), MaxBytes)}}
		return nil, r.err()
	}
	root := r.document(text)
	if root == nil || root.Tag == "!!null" { // comments, or nothing: everything is full
		return d, r.err()
	}
	r.mapping(root, "a policy",
		field{"version", func(n *yaml.Node) {
			if r.integer(n, "version", 1, math.MaxInt32) > 1 {
				r.bad(n, "version %s: this engine reads version 1", n.Value)
			}
		}},
		field{"default", func(n *yaml.Node) { d.Default = r.level(n, "default") }},
		field{"rules", func(n *yaml.Node) { d.Rules = r.rules(n) }},
		field{"budgets", func(n *yaml.Node) { d.Budgets = r.budgets(n) }},
		field{"triggers", func(n *yaml.Node) { d.Triggers = r.triggers(n) }},
	)
	d.group()
	return d, r.err()
}

// entries reads a list of mappings.
func (r *reader) entries(n *yaml.Node, what string, most int) []*yaml.Node {
	switch {
	case n.Tag == "!!null":
		return nil
	case n.Kind != yaml.SequenceNode:
		r.bad(n, "%s is %s; a list is needed: each entry begins with a dash", what, kind(n))
		return nil
	case len(n.Content) > most:
		r.bad(n, "%s has %d entries: at most %d", what, len(n.Content), most)
		return nil
	}
	return slices.DeleteFunc(slices.Clone(n.Content), func(c *yaml.Node) bool { return !r.plain(c) })
}

func (r *reader) rules(n *yaml.Node) []Rule {
	var all []Rule
	named := map[string]int{}
	for i, c := range r.entries(n, "rules", MaxRules) {
		rule := Rule{Name: "rule " + strconv.Itoa(i+1), Line: c.Line}
		leveled, at := false, c
		s := &rule.Select
		fields := append(r.siteFields(s),
			field{"name", func(n *yaml.Node) { rule.Name, at = r.name(n), n }},
			field{"requests", func(n *yaml.Node) { r.requests(n, s) }},
			field{"phase", func(n *yaml.Node) { s.Phase = r.phase(n) }},
			field{"tokens", func(n *yaml.Node) {
				r.list(n, "tokens", func(n *yaml.Node) {
					w, err := ParseWindow(r.text(n, "tokens"))
					if err != nil && n.Value != "" {
						r.bad(n, "%v", err)
					}
					s.Tokens = append(s.Tokens, w)
				})
			}},
			field{"level", func(n *yaml.Node) { rule.Level, leveled = r.level(n, "level"), true }},
			field{"priority", func(n *yaml.Node) { rule.Priority = int(r.integer(n, "priority", -1000, 1000)) }},
			field{"degrade", func(n *yaml.Node) {
				rule.Degrade = []Level{}
				r.list(n, "degrade", func(n *yaml.Node) { rule.Degrade = append(rule.Degrade, r.level(n, "degrade")) })
			}},
		)
		r.mapping(c, "a rule", fields...)
		if !leveled && c.Kind == yaml.MappingNode {
			r.bad(c, "%s has no level; say full, fp8, int8, sampled/K, stats, stats+K or off", rule.Name)
		}
		if rule.Name == DefaultName {
			r.bad(at, "name %q is that of the default; take another", rule.Name)
		}
		if line, twice := named[rule.Name]; twice {
			r.bad(at, "the rule in line %d has the name %q already", line, rule.Name)
		}
		named[rule.Name] = c.Line
		for i, l := range rule.Degrade {
			if above := append([]Level{rule.Level}, rule.Degrade[:i]...)[i]; l.rung() <= above.rung() {
				r.bad(c, "%s: degrade: %v is not below %v; the ladder is full, fp8 or int8, sampled, stats+K, stats, off", rule.Name, l, above)
			}
		}
		all = append(all, rule)
	}
	return all
}

func (r *reader) name(n *yaml.Node) string {
	s := r.text(n, "name")
	if len(s) > 64 || strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c == 0x7f || c == 0xfffd }) {
		r.bad(n, "name %q: up to 64 bytes without control characters are possible", short(s))
	}
	return s
}

func (r *reader) level(n *yaml.Node, what string) Level {
	l, err := ParseLevel(n.Value)
	switch {
	case n.Kind != yaml.ScalarNode:
		r.bad(n, "%s is %s; full, fp8, int8, sampled/K, stats, stats+K or off is needed", what, kind(n))
	case err != nil:
		r.bad(n, "%s: %v", what, err)
	}
	return l
}

func (r *reader) siteFields(s *Selection) []field {
	return []field{
		{"hooks", func(n *yaml.Node) { r.hooks(n, s) }},
		{"layers", func(n *yaml.Node) {
			r.list(n, "layers", func(n *yaml.Node) { s.Layers = append(s.Layers, r.layers(n)) })
		}},
	}
}

func (r *reader) hooks(n *yaml.Node, s *Selection) {
	r.list(n, "hooks", func(n *yaml.Node) {
		pattern := r.text(n, "hooks")
		fits, err := tensor.SiteMatcher(pattern)
		if err != nil {
			r.bad(n, "hooks: %v", err)
		}
		s.Hooks, s.sites = append(s.Hooks, pattern), append(s.sites, fits)
	})
}

func (r *reader) layers(n *yaml.Node) Layers {
	first, last, through := strings.Cut(n.Value, "-")
	from, err := strconv.ParseUint(first, 10, 20)
	to := from
	if err == nil && through {
		if last == "" {
			to = 1 << 20
		} else {
			to, err = strconv.ParseUint(last, 10, 20)
		}
	}
	if n.Kind != yaml.ScalarNode || err != nil || to < from {
		r.bad(n, "layers: %s: a layer or a range upwards is needed: 3, 0-15, 20-", kind(n))
	}
	return Layers{int(from), int(to)}
}

func (r *reader) requests(n *yaml.Node, s *Selection) {
	r.mapping(n, "requests",
		field{"ids", func(n *yaml.Node) {
			r.list(n, "ids", func(n *yaml.Node) { s.IDs = append(s.IDs, r.text(n, "ids")) })
		}},
		field{"tags", func(n *yaml.Node) {
			r.list(n, "tags", func(n *yaml.Node) { s.Tags = append(s.Tags, r.text(n, "tags")) })
		}},
		field{"sample", func(n *yaml.Node) {
			if s.Sample = r.number(n, "sample"); n.Value != "" && !(s.Sample > 0 && s.Sample <= 1) {
				r.bad(n, "sample is %s; a share above 0 and up to 1 is needed", kind(n))
			}
			if s.Sample == 1 {
				s.Sample = 0
			}
		}},
		field{"seed", func(n *yaml.Node) { s.Seed = uint64(r.integer(n, "seed", 0, math.MaxInt64)) }},
	)
}

func (r *reader) phase(n *yaml.Node) *Phase {
	for _, p := range []Phase{Prefill, Decode} {
		if n.Kind == yaml.ScalarNode && n.Value == p.String() {
			return &p
		}
	}
	r.bad(n, "phase is %s; prefill or decode is needed", kind(n))
	return nil
}

func (r *reader) budgets(n *yaml.Node) (b Budgets) {
	if n.Tag == "!!null" {
		return b
	}
	size := func(key string, to *uint64) field {
		return field{key, func(n *yaml.Node) { *to = r.bytes(n, key) }}
	}
	r.mapping(n, "budgets", size("copied_bytes_per_s", &b.Copied), size("disk_bytes_per_s", &b.Disk), size("disk_free_bytes", &b.DiskFree), size("engine_bytes", &b.EngineBytes),
		size("device_bytes", &b.Device), size("pinned_bytes", &b.Pinned), size("retain_bytes", &b.Retain),
		field{"retain_age", func(n *yaml.Node) {
			if b.RetainAge = r.duration(n, "retain_age", longest); b.RetainAge < time.Second && n.Value != "" {
				r.bad(n, "retain_age is %s; a second at least is needed", kind(n))
			}
		}})
	return b
}

const longest = 100 * 365 * 24 * time.Hour // that anything is kept

var statistics = tensor.FigureNames // that a condition may be on

func (r *reader) triggers(n *yaml.Node) []Trigger {
	var all []Trigger
	named := map[string]int{}
	for i, c := range r.entries(n, "triggers", MaxTriggers) {
		t := Trigger{Name: "trigger " + strconv.Itoa(i+1), Line: c.Line, Cooldown: 10 * time.Second}
		conditioned := false
		r.mapping(c, "a trigger", append(r.siteFields(&t.Select),
			field{"name", func(n *yaml.Node) { t.Name = r.name(n) }},
			field{"when", func(n *yaml.Node) { t.When, conditioned = r.condition(n), true }},
			field{"webhook", func(n *yaml.Node) { t.Webhook = r.webhook(n) }},
			field{"promote", func(n *yaml.Node) {
				t.Promote = &Selection{}
				r.hooks(n, t.Promote)
			}},
			field{"keep", func(n *yaml.Node) {
				t.Keep = &Selection{}
				r.hooks(n, t.Keep)
			}},
			field{"cooldown", func(n *yaml.Node) { t.Cooldown = r.duration(n, "cooldown", 24*time.Hour) }},
		)...)
		if !conditioned && c.Kind == yaml.MappingNode {
			r.bad(c, "%s has no condition; say when", t.Name)
		}
		if line, twice := named[t.Name]; twice {
			r.bad(c, "the trigger in line %d has the name %q already", line, t.Name)
		}
		named[t.Name] = c.Line
		all = append(all, t)
	}
	return all
}

func (r *reader) condition(n *yaml.Node) Condition {
	c := Condition{Warmup: 100}
	said := map[string]*yaml.Node{}
	bound := func(to **float64) func(*yaml.Node) {
		return func(n *yaml.Node) {
			v := r.number(n, "a bound")
			*to = &v
		}
	}
	fields := []field{
		{"nonfinite", func(n *yaml.Node) {
			if c.NonFinite = r.boolean(n, "nonfinite"); !c.NonFinite {
				r.bad(n, "nonfinite: only true means something")
			}
		}},
		{"statistic", func(n *yaml.Node) {
			if c.Statistic = r.text(n, "statistic"); !slices.Contains(statistics, c.Statistic) && c.Statistic != "" {
				r.bad(n, "there is no statistic %q; did you mean %s?", short(c.Statistic), strings.Join(nearest.Names(statistics, c.Statistic, 3), ", "))
			}
		}},
		{"zscore", func(n *yaml.Node) {
			if c.ZScore = r.number(n, "zscore"); c.ZScore <= 0 {
				r.bad(n, "zscore is %s; a number above 0 is needed", kind(n))
			}
		}},
		{"warmup", func(n *yaml.Node) { c.Warmup = uint64(r.integer(n, "warmup", 2, 1<<40)) }},
		{"probe", func(n *yaml.Node) { c.Probe = r.text(n, "probe") }},
		{"above", bound(&c.Above)},
		{"below", bound(&c.Below)},
	}
	for i, f := range fields {
		fields[i].read = func(n *yaml.Node) { said[f.key] = n; f.read(n) }
	}
	r.mapping(n, "when", fields...)
	has := func(keys ...string) bool {
		return slices.ContainsFunc(keys, func(k string) bool { return said[k] != nil })
	}
	switch bounded := has("above", "below"); {
	case n.Kind != yaml.MappingNode:
	case c.NonFinite && has("statistic", "zscore", "warmup", "probe", "above", "below"):
		r.bad(n, "when: nonfinite stands alone")
	case c.NonFinite:
	case has("statistic") && has("probe"):
		r.bad(n, "when: a condition is on a statistic or on a probe, not both")
	case has("probe") && has("zscore", "warmup"):
		r.bad(n, "when: a z-score is of a statistic")
	case has("statistic") && has("zscore") == bounded:
		r.bad(n, "when: a statistic takes a zscore, or bounds: above, below")
	case has("warmup") && !has("zscore"):
		r.bad(n, "when: warmup belongs to a zscore")
	case has("probe") && !bounded:
		r.bad(n, "when: a probe takes bounds: above, below")
	case !has("statistic", "probe"):
		r.bad(n, "when: say nonfinite: true, a statistic, or a probe")
	}
	return c
}

func (r *reader) webhook(n *yaml.Node) string {
	s := r.text(n, "webhook")
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil {
		r.bad(n, "webhook %q: http://HOST/... or https://HOST/... without a password is needed", short(s))
	}
	return s
}

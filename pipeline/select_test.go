package pipeline_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"dmi/drain"
	"dmi/pipeline"
	"dmi/policy"
	"dmi/ring"
	"dmi/tensor"

	"pgregory.net/rapid"
)

// drawnRules are random documents, each a revision, and who random requests are.
type drawnRules struct {
	random    *rand.Rand
	documents []*policy.Document // by revision - 1; revision 0 keeps everything
	promoted  []policy.Promotion
	sites     []policy.Site
	late      bool // requests are told when asked for the second time

	mu       sync.Mutex
	requests map[uint64]policy.Request
	prompts  map[uint64]uint32 // as the pipeline says
	asked    map[uint64]bool
}

var ruleTexts = map[string][]string{
	"hooks":    {"'**'", "resid", "[pattern, scores]", "'*'", "nothing", "logits"},
	"phase":    {"prefill", "decode"},
	"tokens":   {"prompt[-1]", "'generated[:3]'", `["prompt[::2]", "generated[1::3]"]`, "'all[2:5]'", "prompt", "generated", "'all[::2]'"},
	"requests": {"{sample: 0.5}", "{sample: 0.25, seed: 3}", "{ids: a*}", "{tags: [x, y]}", `{tags: x, ids: ["b?", a1]}`},
}

// choiceLabels are what random requests ask for themselves; the last cannot be understood, and is nothing.
var choiceLabels = []map[string]string{
	{policy.CaptureLabel: "off"}, {policy.SitesLabel: "resid, logits"}, {policy.PositionsLabel: "prompt[-1]"}, {policy.PositionsLabel: "all[::2] generated[:1]"},
	{policy.SitesLabel: "*", policy.PositionsLabel: "prompt"}, {policy.PositionsLabel: "prompt["},
}

func drawRules(t interface{ Fatal(...any) }, seed uint64, traffic *traffic) *drawnRules {
	d := &drawnRules{random: rand.New(rand.NewPCG(seed, 11)), requests: map[uint64]policy.Request{}, prompts: map[uint64]uint32{}, asked: map[uint64]bool{}, late: seed%7 == 0}
	for i := range traffic.sites {
		d.sites = append(d.sites, policy.Site{ID: uint32(i), Name: traffic.sites[i].name, Layer: tensor.NoLayer})
	}
	levels := []string{"full", "off", "sampled/2", "sampled/3"}
	level := func() string { return levels[d.random.IntN(len(levels))] }
	for range 1 + d.random.IntN(4) {
		var b strings.Builder
		fmt.Fprintf(&b, "default: %s\nrules:\n", level())
		for range d.random.IntN(5) {
			fmt.Fprintf(&b, "- level: %s\n", level())
			for _, key := range slices.Sorted(maps.Keys(ruleTexts)) {
				if values := ruleTexts[key]; d.random.IntN(3) == 0 {
					fmt.Fprintf(&b, "  %s: %s\n", key, values[d.random.IntN(len(values))])
				}
			}
		}
		b.WriteString("triggers: [{when: {nonfinite: true}, promote: [resid, q]}]\n")
		document, err := policy.Parse([]byte(b.String()))
		if err != nil {
			t.Fatal(err, b.String())
		}
		d.documents = append(d.documents, document)
	}
	for range d.random.IntN(3) {
		d.promoted = append(d.promoted, policy.Promotion{Request: 1 + d.random.Uint64N(12), Sites: d.documents[0].Triggers[0].Promote})
	}
	return d
}

func (d *drawnRules) Plan(revision uint64, sites int) *policy.Plan {
	if revision == 0 {
		return nil
	}
	plan := d.documents[revision-1].Compile(d.sites[:sites], policy.State{Promoted: d.promoted})
	return &plan
}

func (d *drawnRules) Site(number int) policy.Site { return d.sites[number] }

func (d *drawnRules) Request(number uint64) (policy.Request, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	r, known := d.requests[number]
	if d.late && !d.asked[number] {
		d.asked[number] = true
		return policy.Request{Number: number, Prompt: d.prompts[number]}, false
	}
	r.Number, r.Prompt = number, d.prompts[number]
	return r, known
}

func (d *drawnRules) Took(*policy.Class, []uint32) {}

func (d *drawnRules) Prompt(number uint64, tokens uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.prompts[number] = tokens
}

// step makes up who the requests of a step are, and under which revision it is.
func (d *drawnRules) step(r *stepRows) (revision uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range r.spans {
		s := &r.spans[i]
		q, known := d.requests[s.Request]
		if !known {
			q = policy.Request{Number: s.Request, ID: []string{"a1", "a2", "b1", "c"}[d.random.IntN(4)]}
			for _, tag := range []string{"x", "y"} {
				if d.random.IntN(2) == 0 {
					q.Tags = append(q.Tags, tag)
				}
			}
			if d.random.IntN(3) == 0 {
				q.Choice, _ = policy.ChoiceOf(choiceLabels[d.random.IntN(len(choiceLabels))])
			}
			if d.random.IntN(2) == 0 {
				s.Phase = ring.PhaseDecode
			}
			told := uint32(d.random.IntN(2) * d.random.IntN(12)) // how long the rows say that the prompt is; 0: they do not
			q.Prompt = told
			for j := range r.spans {
				if r.spans[j].Request == s.Request {
					r.spans[j].Phase, r.spans[j].Prompt = s.Phase, told
				}
			}
		}
		if q.Choice != nil {
			s.Flags |= ring.SpanChosen
		}
		d.requests[s.Request] = q
	}
	return d.random.Uint64N(uint64(len(d.documents)) + 1)
}

// kept is the reference.
func (d *drawnRules) kept(revision uint64, site uint32, x row) bool {
	token := policy.Token{Position: x.position, Phase: policy.Phase(x.span.Phase)}
	if revision == 0 {
		q := d.requests[x.span.Request]
		return q.Choice.Site(d.sites[site]) && q.Choice.Token(q, token)
	}
	return d.documents[revision-1].Evaluate(d.sites[site], d.requests[x.span.Request], token, policy.State{Promoted: d.promoted}).Kept
}

// Random policies, changed at every step, over random traffic: the rows kept are exactly those that the reference selects, byte for byte, and every other row that came is booked skipped.
func TestRandomPoliciesAgainstReference(t *testing.T) {
	var kept, skipped int
	rapid.Check(t, func(t *rapid.T) {
		mode, shape := drawShape(t)
		seed := rapid.Uint64().Draw(t, "seed")
		traffic, err := newTraffic(seed, mode, shape)
		if err != nil {
			t.Fatal(err)
		}
		defer traffic.p.Close()
		traffic.rules = drawRules(t, seed, traffic)
		s := newSink(traffic)
		e := startRuledEngine(t, traffic.p, s, func(level, code, message string) {
			if code != "not_fired" && code != "repeated" {
				s.mu.Lock()
				defer s.mu.Unlock()
				s.complain("unexpected event: %s: %s", code, message)
			}
		}, drain.Options{CoalesceBytes: 1 << rapid.IntRange(9, 16).Draw(t, "coalesce")}, traffic.rules)
		traffic.p.StartPump()
		for range rapid.IntRange(1, 15).Draw(t, "steps") {
			if err := traffic.runStep(traffic.p.Lanes[traffic.IntN(len(traffic.p.Lanes))], s); err != nil {
				t.Fatal(err)
			}
		}
		marked := make(chan struct{})
		e.drain.Mark(func() { close(marked) })
		select {
		case <-marked:
		case <-time.After(time.Minute):
			t.Fatal("the mark does not come")
		}
		traffic.p.Finish()
		if err := e.finish(time.Minute); err != nil {
			t.Fatal(err)
		}
		for _, w := range s.wrong {
			t.Error(w)
		}
		compare(t, traffic, s)
		for _, f := range traffic.want {
			switch f {
			case fate{tensor.Captured, tensor.ReasonNone}:
				kept++
			case fate{tensor.Skipped, tensor.Policy}:
				skipped++
			}
		}
	})
	if kept < 100 || skipped < 100 {
		t.Errorf("%d rows were kept and %d skipped: that tests nothing", kept, skipped)
	}
}

var _ pipeline.Rules = (*drawnRules)(nil)

package steer

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"dmi/policy"
	"dmi/tensor"
	"dmi/trigger"
)

// Status is a revision as readers see it.
type Status struct {
	Revision policy.Revision `json:"revision"`
	Current  bool            `json:"current"`
	Default  string          `json:"default"`
	Rules    []RuleStatus    `json:"rules"` // the default last
	Triggers []TriggerStatus `json:"triggers"`
	Unheld   []string        `json:"unheld"` // budgets of the document that nobody holds now, and why; of the current revision
}

// TriggerStatus is a trigger, and what it has done since it came into force.
type TriggerStatus struct {
	Name  string `json:"name"`
	Line  int    `json:"line"`
	When  string `json:"when"`
	Rows  uint64 `json:"rows"`  // that met its condition
	Fired uint64 `json:"fired"` // times, outside a cooldown
}

// RuleStatus is a rule, its level, and what it costs at the current traffic.
type RuleStatus struct {
	Name     string   `json:"name"`
	Level    string   `json:"level"`    // as written
	InForce  string   `json:"in_force"` // what it has been pushed to, or off by the brake
	Priority int      `json:"priority"`
	Sites    int      `json:"sites"`       // of sessions attached now, that it decides about
	Bytes    *float64 `json:"bytes_per_s"` // null: of some of them no row was ever seen
	Ladder   []string `json:"ladder"`      // levels that pressure may push it to, its own first
}

// Status tells of the current revision.
func (h *Helm) Status() Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.status(h.force)
}

// Find tells of any revision; false: none of that number is kept.
func (h *Helm) Find(number uint64) (Status, bool, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f, found, err := h.forceOf(number)
	if err != nil || !found {
		return Status{}, false, err
	}
	return h.status(f), true, nil
}

// Revisions lists at most n that follow one.
func (h *Helm) Revisions(after uint64, n int) []policy.Revision {
	list := h.options.Ledger.After(after, n)
	for i := range list {
		list[i].Lowered = orEmpty(list[i].Lowered)
	}
	return list
}

// orEmpty has nothing lowered be an empty object in JSON.
func orEmpty(lowered map[string]string) map[string]string {
	if lowered == nil {
		return map[string]string{}
	}
	return lowered
}

func (h *Helm) status(f force) Status {
	s := Status{Revision: f.revision, Current: f.revision.Number == h.force.revision.Number, Default: f.document.Default.String()}
	s.Revision.Lowered = orEmpty(s.Revision.Lowered)
	d := f.document
	for i := 0; i <= len(d.Rules); i++ {
		rule, n := policy.DefaultRule(d), -1
		if i < len(d.Rules) {
			rule, n = d.Rules[i], i
		}
		r := RuleStatus{Name: rule.Name, Level: rule.Level.String(), InForce: f.inForce(n, rule.Level).String(), Priority: rule.Priority}
		for _, l := range rule.Ladder(d.Pushable) {
			r.Ladder = append(r.Ladder, l.String())
		}
		s.Rules = append(s.Rules, r)
	}
	s.Triggers, s.Unheld = h.triggers(f), []string{}
	if s.Current {
		h.price(f, s.Rules)
		s.Unheld = h.unheld(f)
	}
	return s
}

// unheld says which budgets of a document sessions exceed because in complete mode nothing is lowered.
func (h *Helm) unheld(f force) []string {
	list := []string{}
	if h.producers == nil {
		return list
	}
	var waiting []string
	for _, x := range h.producers.Sessions() {
		if x.Mode == complete {
			waiting = append(waiting, x.ID)
		}
	}
	if len(waiting) == 0 {
		return list
	}
	who := strings.Join(waiting[:min(3, len(waiting))], ", ")
	if more := len(waiting) - 3; more > 0 {
		who += fmt.Sprintf(" and %d more", more)
	}
	b := &f.document.Budgets
	for _, budget := range []struct {
		name string
		is   uint64
	}{{"copied_bytes_per_s", b.Copied}, {"disk_bytes_per_s", b.Disk}, {"disk_free_bytes", b.DiskFree}, {"engine_bytes", b.EngineBytes}} {
		if budget.is > 0 {
			list = append(list, fmt.Sprintf("%s is not held for %s: in complete mode nothing is lowered, the model waits instead; attach with mode=\"best-effort\" to have it held", budget.name, who))
		}
	}
	return list
}

// triggers of a document, with what those in force have done.
func (h *Helm) triggers(f force) []TriggerStatus {
	list := make([]TriggerStatus, len(f.document.Triggers))
	for i := range list {
		t := &f.document.Triggers[i]
		list[i] = TriggerStatus{Name: t.Name, Line: t.Line, When: t.When.String()}
	}
	if h.options.Watch != nil && f.triggers != nil && f.revision.Number == h.force.revision.Number {
		for i, done := range h.options.Watch.Status() {
			list[i].Rows, list[i].Fired = done.Met, done.Fired
		}
	}
	return list
}

// Lowered is how many rules overload holds below their level.
func (h *Helm) Lowered() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.force.lowered)
}

// Triggers are those in force.
func (h *Helm) Triggers() []TriggerStatus {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.triggers(h.force)
}

// Deliveries counts the webhooks of triggers.
func (h *Helm) Deliveries() trigger.Deliveries {
	if h.options.Watch == nil {
		return trigger.Deliveries{}
	}
	return h.options.Watch.Deliveries()
}

func (f force) inForce(rule int, own policy.Level) policy.Level {
	if f.revision.Off {
		return policy.Level{Level: tensor.Off}
	}
	if l, is := f.lowered[rule]; is {
		return l
	}
	return own
}

// price adds up what rules cost, over all sites of all producers.
func (h *Helm) price(f force, rules []RuleStatus) {
	bytes, known := make([]float64, len(rules)), make([]bool, len(rules))
	for i := range known {
		known[i] = true
	}
	if h.producers != nil {
		sessions := h.producers.Sessions()
		h.traffic.measure(h.options.Store, sessions, time.Now())
		for _, x := range sessions {
			flow, _ := h.traffic.of(x.Number)
			sites, err := h.options.Store.Sites(x.Number)
			if err != nil {
				continue
			}
			plan := f.plan(x.Number, x.Mode, sites)
			for i, site := range sites {
				class := &plan.Classes[plan.Of[i]]
				shares := h.rules[x.Number].shares(class)
				for c, clause := range class.Clauses {
					n := clause.Rule
					if n == policy.ByPromotion {
						continue // in the price of whose rows they were
					}
					if n < 0 {
						n = len(rules) - 1
					}
					rules[n].Sites++
					cost, ok := flow.cost(site.ID, f.inForce(clause.Rule, clause.Level))
					bytes[n] += cost * shares[c]
					known[n] = known[n] && ok
				}
			}
		}
	}
	for i := range rules {
		if known[i] {
			rules[i].Bytes = &bytes[i]
		}
	}
}

// Question is about rows of one token.
type Question struct {
	Request  string // its id
	Site     string // glob, name, alias or end of one; "": all
	Position uint32
	Phase    *policy.Phase // nil: what the position is, where the prompt's length is known; else decode
}

// Verdict is what is in force for a row at a site.
type Verdict struct {
	Site     string   `json:"site"`
	Rule     string   `json:"rule"`
	Line     int      `json:"line"` // of the rule in the document; 0: the default
	Level    string   `json:"level"`
	Captured bool     `json:"captured"`
	Why      string   `json:"why"`
	Bytes    *float64 `json:"bytes_per_s"` // of the rows of the site that the rule takes, at the current traffic; null: no row of it was ever seen
}

// ErrNoRequest is returned where no request has the id.
var ErrNoRequest = fmt.Errorf("steer: no such request")

// Explain says what the policy in force makes of a token's rows.
func (h *Helm) Explain(ctx context.Context, q Question) ([]Verdict, error) {
	r, found, err := h.options.Store.RequestByID(q.Request)
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, fmt.Errorf("%w: %q", ErrNoRequest, q.Request)
	}
	fits, err := tensor.SiteMatcher(q.Site)
	if err != nil {
		return nil, err
	}
	sites, err := h.options.Store.Sites(r.Key.Session)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.producers != nil {
		h.traffic.measure(h.options.Store, h.producers.Sessions(), time.Now())
	}
	f := h.force
	flow, _ := h.traffic.of(r.Key.Session)
	request, mode := policy.Request{Number: r.Key.Request, ID: r.ID, Tags: r.Tags}, ""
	if rules := h.rules[r.Key.Session]; rules != nil {
		mode = rules.mode
		if known, told := rules.Request(r.Key.Request); told {
			request = known
		}
	}
	token := policy.Token{Position: q.Position, Phase: policy.Decode}
	switch {
	case q.Phase != nil:
		token.Phase = *q.Phase
	case q.Position < request.Prompt:
		token.Phase = policy.Prefill
	}
	now := policy.State{Lowered: f.lowered, Promoted: f.promotions(r.Key.Session)}
	if mode == complete {
		now.Lowered = nil
	}
	list := []Verdict{}
	plan := f.plan(r.Key.Session, mode, sites)
	for i, site := range sites {
		if !fits(site) {
			continue
		}
		said := f.document.Evaluate(site, request, token, now)
		v := Verdict{Site: site.Name, Rule: ruleName(f.document, said.Rule), Level: said.Level.String(), Captured: said.Kept}
		if said.Rule >= 0 {
			v.Line = f.document.Rules[said.Rule].Line
		}
		level := said.Level
		lowered, is := now.Lowered[said.Rule]
		switch {
		case said.Rule == policy.ByChoice:
			v.Rule, v.Why = "the request", "the request itself asks for other rows, or for none"
		case f.revision.Off:
			v.Level, v.Captured, v.Why, level = tensor.Off.String(), false, "the brake is on: dmi policy on releases it", policy.Level{Level: tensor.Off}
		case is:
			v.Why = fmt.Sprintf("%s is at %v, pushed there by: %s", v.Rule, lowered, f.revision.Why)
		case said.Rule == policy.ByPromotion:
			v.Why = "a trigger has promoted the request"
		case said.Rule < 0:
			v.Why = "no rule selects it: the default decides"
		default:
			v.Why = fmt.Sprintf("%s, in line %d, is the first that selects it", v.Rule, v.Line)
		}
		if bytes, known := flow.cost(site.ID, level); known {
			class := &plan.Classes[plan.Of[i]]
			if c := slices.IndexFunc(class.Clauses, func(c policy.Clause) bool { return c.Rule == said.Rule && c.Rule != policy.ByPromotion }); c >= 0 {
				bytes *= h.rules[r.Key.Session].shares(class)[c]
			}
			v.Bytes = &bytes
		}
		list = append(list, v)
	}
	return list, ctx.Err()
}

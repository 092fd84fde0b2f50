package steer

import (
	"fmt"
	"slices"
	"sync"

	"dmi/policy"
	"dmi/tensor"
)

// Rules are the policy for the rows of one session; its pipeline asks them.
type Rules struct {
	helm    *Helm
	session uint32
	mode    string

	mu      sync.Mutex
	prompts map[uint64]uint32
	sites   []tensor.Site
	divided map[string][]float64 // by the rules of a class, promotions left out: rows that each took of late
}

// Bounds of what is remembered of sessions and requests. Beyond, all of them are forgotten: windows that need the length of a prompt then select none of its request's rows.
const (
	keptSessions = 256
	keptPrompts  = 1 << 17
	keptDivided  = 1 << 12
	lateRows     = 1 << 12 // beyond so many rows of a class, those before count half
)

// Rules of a session in a mode.
func (h *Helm) Rules(session uint32, mode string) *Rules {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.rules) >= keptSessions {
		clear(h.rules)
	}
	r := &Rules{helm: h, session: session, mode: mode, prompts: map[uint64]uint32{}, divided: map[string][]float64{}}
	h.rules[session] = r
	return r
}

// Request is who a request is, as far as it was told.
func (r *Rules) Request(number uint64) (q policy.Request, known bool) {
	if r.helm.options.Requests != nil {
		q, known = r.helm.options.Requests.PolicyRequest(tensor.RequestKey{Session: r.session, Request: number})
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	q.Number, q.Prompt = number, r.prompts[number]
	return q, known
}

// Site is one of the session's. Of one that the store does not know, which is told as an event, nothing but the number is.
func (r *Rules) Site(number int) tensor.Site {
	r.mu.Lock()
	defer r.mu.Unlock()
	if number >= len(r.sites) {
		sites, err := r.helm.options.Store.Sites(r.session)
		if err != nil || number >= len(sites) {
			r.helm.event("error", "policy", fmt.Sprintf("a request of session %d chooses among sites, and site %d is not known: %v", r.session, number, err))
			return tensor.Site{ID: uint32(number), Layer: tensor.NoLayer}
		}
		r.sites = sites
	}
	return r.sites[number]
}

// Took is told how rows divide among the rules of a class.
func (r *Rules) Took(class *policy.Class, rows []uint32) {
	key := rulesOf(class)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.divided) >= keptDivided {
		clear(r.divided)
	}
	took := r.divided[key]
	if took == nil {
		took = make([]float64, len(key)/2)
		r.divided[key] = took
	}
	sum, n := 0.0, 0
	for i := range class.Clauses {
		if class.Clauses[i].Rule != policy.ByPromotion {
			took[n] += float64(rows[i])
			sum += took[n]
			n++
		}
	}
	for i := range took {
		if sum > lateRows {
			took[i] /= 2
		}
	}
}

// rulesOf names a class by its rules: what divides rows among them.
func rulesOf(class *policy.Class) string {
	key := make([]byte, 0, 2*len(class.Clauses))
	for i := range class.Clauses {
		if rule := class.Clauses[i].Rule; rule != policy.ByPromotion {
			key = append(key, byte(rule), byte(rule>>8))
		}
	}
	return string(key)
}

// shares says how the rows of a class divide among its clauses: as they did of late, or equally where none came yet. nil stands for a session whose rows nobody asked about.
func (r *Rules) shares(class *policy.Class) []float64 {
	key, shares := rulesOf(class), make([]float64, len(class.Clauses))
	var took []float64
	if r != nil {
		r.mu.Lock()
		took = slices.Clone(r.divided[key])
		r.mu.Unlock()
	}
	sum := 0.0
	for _, rows := range took {
		sum += rows
	}
	n := 0
	for i := range shares {
		switch {
		case class.Clauses[i].Rule == policy.ByPromotion: // in the share of whose rows they were
			continue
		case sum > 0:
			shares[i] = took[n] / sum
		default:
			shares[i] = 2 / float64(len(key))
		}
		n++
	}
	return shares
}

// Prompt says how many tokens a request's prompt has.
func (r *Rules) Prompt(number uint64, tokens uint32) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.prompts) >= keptPrompts {
		clear(r.prompts)
	}
	r.prompts[number] = tokens
}

// Plan is that of a revision, for the sites that there are now. nil: everything is kept, because nothing was ever said, or nobody knows any more what.
func (r *Rules) Plan(revision uint64, sites int) *policy.Plan {
	h := r.helm
	h.mu.Lock()
	defer h.mu.Unlock()
	f, found, err := h.forceOf(revision)
	if err == nil && !found && revision != 0 {
		err = fmt.Errorf("steer: revision %d of the policy is forgotten", revision)
	}
	if err != nil {
		h.event("error", "policy", err.Error()+"; what came under it is kept")
		return nil
	}
	all, err := h.options.Store.Sites(r.session)
	if err != nil || len(all) < sites {
		h.event("error", "policy", fmt.Sprintf("the rules of session %d: %d of %d sites are known: %v; what they give is kept", r.session, len(all), sites, err))
		return nil
	}
	plan := f.plan(r.session, r.mode, all)
	return &plan
}

// keptForces are revisions whose documents are at hand, for steps that are still on their way.
const keptForces = 64

// forceOf finds what was in force under a revision; false: it is not known any more.
func (h *Helm) forceOf(number uint64) (force, bool, error) {
	if number == h.force.revision.Number {
		return h.force, true, nil
	}
	for i := range h.past {
		if h.past[i].revision.Number == number {
			return h.past[i], true, nil
		}
	}
	r, found := h.options.Ledger.Find(number)
	if !found {
		return force{}, false, nil
	}
	foreign := func(err error) (force, bool, error) {
		return force{}, false, fmt.Errorf("steer: revision %d of the policy is from another release: %w", number, err)
	}
	document, err := policy.Parse([]byte(r.Text))
	if err != nil {
		return foreign(err)
	}
	f := force{revision: r, document: document, lowered: map[int]policy.Level{}}
	for i := -1; i < len(document.Rules); i++ {
		if text, is := r.Lowered[ruleName(document, i)]; is {
			if f.lowered[i], err = policy.ParseLevel(text); err != nil {
				return foreign(err)
			}
		}
	}
	return f, true, nil
}

// plan is what is in force for a session's sites. One in complete mode waits instead of giving anything up, so nothing of it is lowered.
func (f force) plan(session uint32, mode string, sites []tensor.Site) policy.Plan {
	if f.revision.Off {
		return policy.Plan{Classes: []policy.Class{{Clauses: []policy.Clause{{Rule: -1, Level: policy.Level{Level: tensor.Off}}}}}, Of: make([]int, len(sites))}
	}
	now := policy.State{Promoted: f.promotions(session)}
	if mode != complete {
		now.Lowered = f.lowered
	}
	plan := f.document.Compile(sites, now)
	plan.Document = f.revision.Document
	return plan
}

// promotions of a session.
func (f force) promotions(session uint32) (list []policy.Promotion) {
	for _, p := range f.revision.Promoted {
		if p.Session != session {
			continue
		}
		for i := range f.document.Triggers {
			if t := &f.document.Triggers[i]; t.Name == p.Trigger && t.Promote != nil {
				list = append(list, policy.Promotion{Request: p.Request, Sites: t.Promote})
			}
		}
	}
	return list
}

// gatesOf are the gates of one session's sites. What a producer cannot tell apart comes at the level that all of it needs, and its pipeline leaves out and reduces the rest.
func (f force) gatesOf(session uint32, mode string, sites []tensor.Site) ([]tensor.Gate, []tensor.Watch) {
	plan := f.plan(session, mode, sites)
	classes := make([]tensor.Gate, len(plan.Classes))
	for i := range classes {
		classes[i] = plan.Classes[i].Gate()
	}
	gates := make([]tensor.Gate, len(sites))
	for i := range gates {
		gates[i] = classes[plan.Of[i]]
		if plan.Keeps != nil {
			gates[i].Watch, gates[i].Keep, gates[i].Offer = plan.Keeps[i].Watch, plan.Keeps[i].By, plan.Keeps[i].Late
		}
	}
	return gates, f.watches()
}

// watches are the conditions of triggers that keep rows, for producers.
func (f force) watches() []tensor.Watch {
	if f.triggers == nil {
		return nil
	}
	return f.triggers.Watches()
}

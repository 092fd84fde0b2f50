package pipeline

import (
	"sync"
	"time"

	"dmi/drain"
	"dmi/policy"
	"dmi/ring"
	"dmi/tensor"
)

// Rules are a session's policy. What a producer does not leave out itself is left out here, so that what is kept is what the policy of the step's revision says, whatever the
// producer can do.
type Rules interface {
	// Plan is that of a revision, for so many sites at least; nil: everything is kept.
	Plan(revision uint64, sites int) *policy.Plan
	// Site is one that a plan was asked for, or a step has.
	Site(number int) policy.Site
	// Request is who a request is, as far as it was told by now, with what Prompt said.
	Request(number uint64) (r policy.Request, known bool)
	// Took is told how the rows of a step divide among the rules of a class of sites: of each of its clauses' rules, how many it took.
	Took(class *policy.Class, rows []uint32)
	// Prompt says how many tokens a request's prompt has.
	Prompt(number uint64, tokens uint32)
}

const (
	keptPlans   = 8 // of the latest revisions that steps came under
	keptUnknown = 1 << 16
	keptWanted  = 1 << 16 // choices of requests, site by site
	// A request is told on the socket before its first row is in the ring. Who is not known then is waited for, and after that has no id and no tags.
	introduction = time.Second
)

// selector decides which rows are kept. Its methods may be called from any goroutine; what a lane's book has of it is under its lock as well.
type selector struct {
	rules Rules

	mu      sync.Mutex
	plans   map[uint64]*policy.Plan
	order   []uint64        // of plans, oldest first
	unknown map[uint64]bool // requests that were waited for in vain
	wanted  map[choiceSite]bool
}

type choiceSite struct {
	choice *policy.Choice
	site   int
}

func newSelector(rules Rules) *selector {
	return &selector{rules: rules, plans: map[uint64]*policy.Plan{}, unknown: map[uint64]bool{}, wanted: map[choiceSite]bool{}}
}

// opened takes note of where prompts end, which the step's rows say. Nothing is made of rows that do not say it: their producer cannot either.
func (s *selector) opened(step *drain.Step) {
	if step.Rows == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range step.Rows.Spaces[ring.SpaceTokens].Spans {
		span := &step.Rows.Spaces[ring.SpaceTokens].Spans[i]
		if span.Prompt == 0 {
			continue
		}
		if r, _ := s.rules.Request(span.Request); span.Prompt != r.Prompt {
			s.rules.Prompt(span.Request, span.Prompt)
		}
	}
}

// keepsAll reports whether the step's policy and its requests leave nothing out: then no verdict depends on what is known of them.
func (s *selector) keepsAll(step *drain.Step) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.plan(step) == nil && !chosen(step)
}

// chosen reports whether some request of the step asks for some of its rows alone.
func chosen(step *drain.Step) bool { return step.Rows != nil && step.Rows.Chosen }

func (s *selector) plan(step *drain.Step) *policy.Plan {
	plan, known := s.plans[step.Policy]
	if known && (plan == nil || len(plan.Of) >= len(step.Sites)) {
		return plan
	}
	if plan = s.rules.Plan(step.Policy, len(step.Sites)); !known {
		if s.order = append(s.order, step.Policy); len(s.order) > keptPlans {
			delete(s.plans, s.order[0])
			s.order = s.order[1:]
		}
	}
	s.plans[step.Policy] = plan
	return plan
}

// of is the plan that a step came under.
func (s *selector) of(step *drain.Step) *policy.Plan {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.plan(step)
}

// wants reports whether a choice has a site.
func (s *selector) wants(choice *policy.Choice, site int) bool {
	key := choiceSite{choice, site}
	wanted, known := s.wanted[key]
	if !known {
		if len(s.wanted) >= keptWanted {
			clear(s.wanted)
		}
		wanted = choice.Site(s.rules.Site(site))
		s.wanted[key] = wanted
	}
	return wanted
}

// request is who a span's rows are of. Of one that asks for some of its rows alone, and was not told, nothing is kept.
func (s *selector) request(span *ring.RowSpan) policy.Request {
	number := span.Request
	r, known := s.rules.Request(number)
	if !known && !s.unknown[number] {
		for begun, over := time.Now(), false; !known && !over; {
			time.Sleep(time.Millisecond)
			over = time.Since(begun) >= introduction // before the last look, however late this goroutine comes to it
			r, known = s.rules.Request(number)
		}
		if !known {
			if len(s.unknown) >= keptUnknown {
				clear(s.unknown)
			}
			s.unknown[number] = true
		}
	}
	if span.Flags&ring.SpanChosen == 0 {
		r.Choice = nil
	} else if r.Choice == nil {
		r.Choice = policy.Nothing
	}
	return r
}

// verdict is rows [from, to) of a site's row list, all at one level; Off: none is kept.
type verdict struct {
	from, to uint32
	level    tensor.Level
	top      uint8 // of rows at Stats: so many of the greatest elements
	unwanted bool  // by the request itself: no trigger keeps them
}

// rowsOf names the verdicts on a row list of one step: of sites of one class, or of one site where a request chooses among sites.
type rowsOf struct {
	class     int
	selection uint16
	space     uint8
}

// verdicts appends those on rows [from, to) of a record's site, in order, to a list. They are worked out once a step for sites of one class.
func (s *selector) verdicts(list []verdict, b *book, r *ring.Record, from, to uint32) []verdict {
	site := r.Site
	plan := b.plan
	if plan != nil && int(site) >= len(plan.Of) {
		plan = nil
	}
	if b.step.Rows == nil || plan == nil && !chosen(b.step) {
		return append(list, verdict{from: from, to: to, level: tensor.Full})
	}
	class := -1 - int(site)
	if !chosen(b.step) {
		class = plan.Of[site]
		if clause, uniform := plan.Classes[class].Uniform(); uniform && clause.Level.Level != tensor.Sampled {
			return append(list, verdict{from: from, to: to, level: clause.Level.Level, top: uint8(clause.Level.Top)})
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	space := b.step.Sites[site].Space
	key := rowsOf{class, r.Selection, space}
	all, done := b.verdicts[key]
	if !done {
		all = s.work(b.step, plan, int(site), b.step.Rows.List(r.Selection, space))
		b.verdicts[key] = all
	}
	for _, v := range all {
		if v.to > from && v.from < to {
			list = append(list, verdict{max(v.from, from), min(v.to, to), v.level, v.top, v.unwanted})
		}
	}
	return list
}

func (s *selector) work(step *drain.Step, plan *policy.Plan, site int, list *ring.RowList) (all []verdict) {
	var took []uint32 // rows by clause
	if plan != nil {
		class := &plan.Classes[plan.Of[site]]
		took = make([]uint32, len(class.Clauses))
		defer func() { s.rules.Took(class, took) }()
	}
	for i := range list.Spans {
		span := &list.Spans[i]
		request := s.request(span)
		wanted := request.Choice == nil || s.wants(request.Choice, site)
		for n := range span.Count {
			row := span.Row + n
			token := policy.Token{Position: span.Position + n, Phase: policy.Phase(span.Phase)}
			said := policy.Verdict{Level: policy.Level{Level: tensor.Full}, Kept: true}
			unwanted := !wanted || !request.Choice.Token(request, token)
			switch {
			case unwanted:
				said.Kept = false
			case plan != nil:
				var clause int
				said, clause = plan.Row(site, request, token)
				took[clause]++
			}
			level := said.Level.Level
			if !said.Kept {
				level = tensor.Off
			} else if level == tensor.Sampled {
				level = tensor.Full
			}
			top := uint8(said.Level.Top)
			if last := len(all) - 1; last >= 0 && all[last].level == level && all[last].top == top && all[last].unwanted == unwanted {
				all[last].to++
			} else {
				all = append(all, verdict{row, row + 1, level, top, unwanted})
			}
		}
	}
	return all
}

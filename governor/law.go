package governor

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Resource is something bounded, as it was during the last tick.
type Resource struct {
	Name     string
	Fill     float64 // 0 empty, 1 full
	Refused  uint64  // rows that found no room there since the last tick
	Load     float64 // bytes a second that passed; counts where it is not known what rules cost
	Capacity float64 // bytes a second that could have passed; 0: not known
	Budget   float64 // bytes a second that may; 0: as many as can
}

// Rule is a selection that may be lowered.
type Rule struct {
	Name     string
	Priority int
	Cost     []float64 // bytes a second at each rung, own level first; negative: not known
}

// Step is a change of one rule.
type Step struct {
	Rule     int
	From, To int // rungs
	Why      string
}

// Marks of a Governor. Zero fields take the default.
type Marks struct {
	High, Low float64       // of a fill: at which it presses (0.7), and below which it does not matter (0.3)
	Settle    time.Duration // after a step down, before the next (300 ms)
	Calm      time.Duration // without pressure, before a step up (500 ms)
	Margin    float64       // share of what could pass that restored rules may take (0.85)
	Relapse   time.Duration // pressure so soon after a step up is its doing (10 s)
	HoldMost  time.Duration // for which a rung that relapses is held back, at most (60 s)
}

func (m Marks) withDefaults() Marks {
	m.High, m.Low = cmp.Or(m.High, 0.7), cmp.Or(m.Low, 0.3)
	m.Settle, m.Calm = cmp.Or(m.Settle, 300*time.Millisecond), cmp.Or(m.Calm, 500*time.Millisecond)
	m.Margin, m.Relapse, m.HoldMost = cmp.Or(m.Margin, 0.85), cmp.Or(m.Relapse, 10*time.Second), cmp.Or(m.HoldMost, time.Minute)
	return m
}

// Governor is the law and what it remembers. It is for one goroutine.
type Governor struct {
	marks Marks
	rungs []int              // by rule
	costs [][]float64        // by rule and rung, averaged
	fills map[string]float64 // of the tick before

	last             time.Time // tick
	lastDown, lastUp time.Time
	calmSince        time.Time // zero: something presses
	hold             time.Duration
	heldUntil        time.Time
	heldCapacity     float64 // of the resource that pressed when the hold began
	heldBy           string
}

// New makes a governor of so many rules, none of them lowered.
func New(rules int, m Marks) *Governor {
	return &Governor{marks: m.withDefaults(), rungs: make([]int, rules), costs: make([][]float64, rules), fills: map[string]float64{}}
}

// Rungs are where rules are now: 0 is a rule's own level. Not to be modified.
func (g *Governor) Rungs() []int { return g.rungs }

// smoothing is the time over which what rules cost is averaged: traffic comes in steps and bursts, and rungs are chosen for what it is on average.
const smoothing = time.Second

// smooth replaces what rules cost by averages, and what passes by what they add up to, where that is known: it follows a step at once.
func (g *Governor) smooth(now time.Time, resources []Resource, rules []Rule) ([]Resource, []Rule) {
	share := 1.0
	if since := now.Sub(g.last); !g.last.IsZero() {
		share = float64(since) / float64(since+smoothing)
	}
	smooth, load, known := slices.Clone(rules), 0.0, true
	for i, r := range rules {
		if len(g.costs[i]) != len(r.Cost) {
			g.costs[i] = slices.Clone(r.Cost)
		}
		for rung, cost := range r.Cost {
			if mean := &g.costs[i][rung]; cost < 0 || *mean < 0 {
				*mean = cost
			} else {
				*mean += share * (cost - *mean)
			}
		}
		smooth[i].Cost = g.costs[i]
		at := g.costs[i][g.rungs[i]]
		load += max(at, 0)
		known = known && at >= 0
	}
	if !known {
		return resources, smooth
	}
	resources = slices.Clone(resources)
	for i := range resources {
		resources[i].Load = load
	}
	return resources, smooth
}

// Tick takes the state of resources and rules at a time, and gives the steps that it decided for: none, one down, or some up.
func (g *Governor) Tick(now time.Time, resources []Resource, rules []Rule) []Step {
	resources, rules = g.smooth(now, resources, rules)
	worst, why := g.pressing(resources)
	urgent := worst >= 0 && g.urgent(now, resources[worst])
	for _, r := range resources {
		g.fills[r.Name] = r.Fill
	}
	g.last = now
	if worst >= 0 {
		g.calmSince = time.Time{}
		g.relapse(now, resources[worst])
		if !g.lastDown.IsZero() && now.Sub(g.lastDown) < g.marks.Settle {
			return nil
		}
		return g.down(now, resources[worst], urgent, rules, why)
	}
	for _, r := range resources {
		if r.Fill > g.marks.Low {
			g.calmSince = time.Time{} // between the marks: neither
			return nil
		}
	}
	if g.calmSince.IsZero() {
		g.calmSince = now
	}
	if g.hold > 0 && !g.lastUp.IsZero() && now.Sub(g.lastUp) > 2*g.hold+g.marks.Relapse && now.After(g.heldUntil) {
		g.hold /= 2 // what was restored has stayed
		if g.hold < g.marks.Calm {
			g.hold = 0
		}
		g.lastUp = now
	}
	if now.Sub(g.calmSince) < g.marks.Calm || now.Before(g.heldUntil) && !g.recovered(resources) {
		return nil
	}
	return g.up(now, resources, rules)
}

// pressing gives the resource that presses hardest, -1 where none does, and how.
func (g *Governor) pressing(resources []Resource) (worst int, why string) {
	worst, most := -1, 0.0
	for i, r := range resources {
		score, said := 0.0, ""
		switch {
		case r.Refused > 0:
			score, said = 3, fmt.Sprintf("%s had no room for %d rows", r.Name, r.Refused)
		case r.Fill >= g.marks.High && r.Fill >= g.fills[r.Name]: // one that empties already needs time, not another step
			score, said = 1+r.Fill, fmt.Sprintf("%s is %.0f %% full", r.Name, 100*r.Fill)
		case r.Budget > 0 && r.Load > r.Budget:
			score, said = r.Load/r.Budget/1e6, fmt.Sprintf("%s takes %.3g bytes a second of a budget of %.3g", r.Name, r.Load, r.Budget)
		}
		if score > most {
			worst, why, most = i, said, score
		}
	}
	return worst, why
}

// urgent reports whether a resource has no room, or will have none before a step settles; or is over its budget.
func (g *Governor) urgent(now time.Time, r Resource) bool {
	rise := 0.0
	if since := now.Sub(g.last); !g.last.IsZero() && since > 0 {
		rise = (r.Fill - g.fills[r.Name]) * float64(g.marks.Settle) / float64(since)
	}
	return r.Refused > 0 || r.Fill < g.marks.High || r.Fill+rise >= 1
}

// relapse holds rungs back for longer if pressure comes soon after a step up.
func (g *Governor) relapse(now time.Time, r Resource) {
	if g.lastUp.IsZero() || now.Sub(g.lastUp) > g.marks.Relapse {
		return
	}
	g.hold = min(max(2*g.hold, 2*g.marks.Calm), g.marks.HoldMost)
	g.heldUntil, g.heldCapacity, g.heldBy = now.Add(g.hold), r.Capacity, r.Name
	g.lastUp = time.Time{} // judged
}

// recovered reports whether the resource that the hold is about can clearly take more than when it began.
func (g *Governor) recovered(resources []Resource) bool {
	for _, r := range resources {
		if r.Name == g.heldBy && g.heldCapacity > 0 && r.Capacity > 1.5*g.heldCapacity {
			return true
		}
	}
	return false
}

// down lowers rules by a rung: of the lowest priority, among those the least lowered, among those the one that costs most. One; or,
// where it is urgent, as many as it takes until what is left can pass.
func (g *Governor) down(now time.Time, r Resource, urgent bool, rules []Rule, why string) []Step {
	var steps []Step
	excess := 0.0
	if most := r.most(); most > 0 && urgent {
		excess = r.Load - g.marks.Margin*most
	}
	for len(steps) == 0 || excess > 0 {
		best := -1
		left := func(i int) bool { return g.rungs[i]+1 < len(rules[i].Cost) }
		for i, rule := range rules {
			if left(i) && rule.Cost[g.rungs[i]] != 0 && (best < 0 || less(rule, rules[best], g.rungs[i], g.rungs[best])) {
				best = i
			}
		}
		if best < 0 {
			break // who costs nothing has nothing to give
		}
		// But nobody is lowered before all of a lower priority are: what nothing comes for now may come at any time.
		for i, rule := range rules {
			for rule.Priority < rules[best].Priority && left(i) {
				steps = append(steps, Step{Rule: i, From: g.rungs[i], To: g.rungs[i] + 1, Why: why})
				g.rungs[i]++
			}
		}
		from := g.rungs[best]
		steps = append(steps, Step{Rule: best, From: from, To: from + 1, Why: why})
		g.rungs[best], g.lastDown = from+1, now
		if cost := rules[best].Cost; cost[from] < 0 || cost[from+1] < 0 {
			break // how much that saves will be seen
		} else {
			excess -= cost[from] - cost[from+1]
		}
	}
	return steps
}

// most is what may pass: what can, or the budget. 0: not known.
func (r Resource) most() float64 {
	if r.Budget > 0 && (r.Capacity <= 0 || r.Budget < r.Capacity) {
		return r.Budget
	}
	return max(r.Capacity, 0)
}

// less orders rules by who is lowered first.
func less(a, b Rule, rungA, rungB int) bool {
	return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(rungA, rungB), cmp.Compare(b.Cost[rungB], a.Cost[rungA])) < 0
}

// up restores rungs, of the highest priority first, as long as every resource has room for what they add.
func (g *Governor) up(now time.Time, resources []Resource, rules []Rule) []Step {
	order := make([]int, 0, len(rules))
	for i := range rules {
		if g.rungs[i] > 0 {
			order = append(order, i)
		}
	}
	slices.SortStableFunc(order, func(a, b int) int {
		return cmp.Or(cmp.Compare(rules[b].Priority, rules[a].Priority), cmp.Compare(g.rungs[b], g.rungs[a]))
	})
	// Room that nobody has measured is room for one rung.
	room, known := 0.0, false
	for _, r := range resources {
		most := r.most()
		if most == 0 {
			continue
		}
		if left := g.marks.Margin*most - r.Load; !known || left < room {
			room, known = left, true
		}
	}
	var steps []Step
	for _, i := range order {
		for g.rungs[i] > 0 {
			at := g.rungs[i]
			adds := rules[i].Cost[at-1] - rules[i].Cost[at]
			sure := known && rules[i].Cost[at-1] >= 0 && rules[i].Cost[at] >= 0
			if sure && adds > room || !sure && len(steps) > 0 {
				return g.restored(now, steps) // a rule of lower priority does not come before
			}
			room -= max(adds, 0)
			g.rungs[i]--
			why := "nothing presses any more"
			if sure {
				why = fmt.Sprintf("there is room for the %.3g bytes a second that it adds", adds)
			}
			steps = append(steps, Step{Rule: i, From: at, To: at - 1, Why: why})
			if !sure {
				return g.restored(now, steps)
			}
		}
	}
	return g.restored(now, steps)
}

func (g *Governor) restored(now time.Time, steps []Step) []Step {
	if len(steps) > 0 {
		g.lastUp, g.calmSince, g.heldUntil = now, now, time.Time{}
	}
	return steps
}

package steer

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"time"

	"dmi/control"
	"dmi/governor"
	"dmi/policy"
	"dmi/store"
	"dmi/tensor"
)

// pace is how often the governor looks.
const pace = 100 * time.Millisecond

// watch is what the governor remembers between looks. It is for Run's goroutine.
type watch struct {
	law      *governor.Governor
	document uint64 // revision whose rules law is about
	at       time.Time
	refused  map[uint32]uint64 // by session
	captured map[uint32]uint64
	copied   float64 // bytes a second, averaged
	written  uint64
	busy     time.Duration
	wrote    float64 // bytes a second, averaged
	capacity float64 // of the disk, averaged; 0: not known
	fills    map[string]float64
}

// Run measures traffic and governs until ctx ends.
func (h *Helm) Run(ctx context.Context) {
	ticker := time.NewTicker(pace)
	defer ticker.Stop()
	w := &watch{}
	for {
		select {
		case <-ctx.Done():
			return
		case f := <-h.firings:
			h.promote(f)
		case now := <-ticker.C:
			h.look(w, now)
			h.release()
		}
	}
}

func (h *Helm) look(w *watch, now time.Time) {
	h.mu.Lock()
	producers, f := h.producers, h.force
	h.mu.Unlock()
	if producers == nil {
		return
	}
	sessions := producers.Sessions()
	h.traffic.measure(h.options.Store, sessions, now)
	if w.law == nil || w.document != f.revision.Document {
		w.law, w.document = governor.New(len(f.document.Rules)+1, governor.Marks{}), f.revision.Document
	}
	resources := w.resources(sessions, h.options.Store.Stats(), f.document.Budgets, now)
	if f.revision.Off {
		return // nothing flows: there is nothing to lower, and what is lowered may stay
	}
	rules := h.governed(f, sessions)
	steps := w.law.Tick(now, resources, rules)
	if len(steps) == 0 {
		return
	}
	lowered := map[int]policy.Level{}
	for i, rung := range w.law.Rungs() {
		if rung > 0 {
			lowered[ruleAt(f.document, i)] = ladderOf(f.document, i)[rung]
		}
	}
	var told []string
	for _, s := range steps {
		ladder := ladderOf(f.document, s.Rule)
		told = append(told, fmt.Sprintf("%s goes from %v to %v: %s", rules[s.Rule].Name, ladder[s.From], ladder[s.To], s.Why))
	}
	if err := h.Lower(f.revision.Document, lowered, strings.Join(told, "; ")); err != nil {
		h.event("error", "governor", fmt.Sprintf("the governor's step could not be taken: %v", err))
		w.law = nil // its rungs are not those in force; it begins anew from the document
	}
}

// The governor's rules are the document's, and then the default.

func ruleAt(d *policy.Document, i int) int {
	if i == len(d.Rules) {
		return -1
	}
	return i
}

func ladderOf(d *policy.Document, i int) []policy.Level {
	rule := policy.DefaultRule(d)
	if i < len(d.Rules) {
		rule = d.Rules[i]
	}
	return rule.Ladder(d.Pushable)
}

// governed prices every rung of every rule, over the sites of producers in best-effort mode. A rule without sites has nothing to give.
func (h *Helm) governed(f force, sessions []control.SessionStatus) []governor.Rule {
	rules := make([]governor.Rule, len(f.document.Rules)+1)
	for i := range rules {
		rule := policy.DefaultRule(f.document)
		if i < len(f.document.Rules) {
			rule = f.document.Rules[i]
		}
		rules[i] = governor.Rule{Name: rule.Name, Priority: rule.Priority, Cost: make([]float64, len(ladderOf(f.document, i)))}
	}
	h.mu.Lock()
	divided := maps.Clone(h.rules)
	h.mu.Unlock()
	for _, x := range sessions {
		if x.Mode == complete {
			continue
		}
		flow, _ := h.traffic.of(x.Number)
		sites, err := h.options.Store.Sites(x.Number)
		if err != nil {
			continue
		}
		plan := f.document.Compile(sites, policy.State{})
		for i, site := range sites {
			class := &plan.Classes[plan.Of[i]]
			shares := divided[x.Number].shares(class)
			for c, clause := range class.Clauses {
				n := clause.Rule
				if n < 0 {
					n = len(rules) - 1
				}
				for rung, level := range ladderOf(f.document, n) {
					bytes, known := flow.cost(site.ID, level)
					switch cost := &rules[n].Cost[rung]; {
					case !known:
						*cost = -1
					case *cost >= 0:
						*cost += bytes * shares[c]
					}
				}
			}
		}
	}
	return rules
}

const complete = "complete" // a mode in which the model waits, and nothing is lowered

// resources measures what is bounded.
func (w *watch) resources(sessions []control.SessionStatus, m store.Metrics, budgets policy.Budgets, now time.Time) []governor.Resource {
	seconds := now.Sub(w.at).Seconds()
	first := w.at.IsZero() || seconds <= 0
	if first {
		seconds = pace.Seconds()
		w.fills = map[string]float64{}
	}
	w.at = now
	// Fills are averaged over a few looks: what is full for a moment only has done its work.
	fill := func(name string, used, capacity uint64) float64 {
		if capacity > 0 {
			w.fills[name] += 0.4 * (float64(used)/float64(capacity) - w.fills[name])
		}
		return w.fills[name]
	}
	var worst struct{ payload, records, staging, queue float64 }
	refused, captured := map[uint32]uint64{}, map[uint32]uint64{}
	var rows, bytes uint64
	for _, x := range sessions {
		captured[x.Number] = x.Drain.Copied + x.Producer.SpilledBytes // what is laid in a ring and never asked for costs no way
		if before, known := w.captured[x.Number]; known && captured[x.Number] >= before {
			bytes += captured[x.Number] - before
		}
		if x.Mode == complete {
			continue
		}
		share := func(used, capacity uint64) float64 { return float64(used) / max(1, float64(capacity)) }
		worst.payload = max(worst.payload, share(x.Payload.Used, x.Payload.Capacity))
		worst.staging = max(worst.staging, share(x.Staging.Used, x.Staging.Capacity))
		worst.queue = max(worst.queue, share(x.Queue.Used, x.Queue.Capacity))
		for _, lane := range x.Records {
			worst.records = max(worst.records, share(lane.Used, lane.Capacity))
		}
		refused[x.Number] = x.Producer.OtherRows[tensor.RingFull] + x.Producer.OtherRows[tensor.RecordsFull]
		if before, known := w.refused[x.Number]; known && refused[x.Number] >= before {
			rows += refused[x.Number] - before
		}
	}
	w.refused, w.captured = refused, captured
	w.copied += 0.1 * (float64(bytes)/seconds - w.copied)

	written, busy := m.WrittenBytes-w.written, m.WriteBusy-w.busy
	if first {
		written, busy = 0, 0
	}
	w.written, w.busy = m.WrittenBytes, m.WriteBusy
	w.wrote += 0.1 * (float64(written)/seconds - w.wrote)
	if written > 0 && busy > 0 {
		if speed := float64(written) / busy.Seconds(); w.capacity == 0 {
			w.capacity = speed
		} else {
			w.capacity += 0.3 * (speed - w.capacity)
		}
	}

	const parts = 1 << 20
	of := func(name string, worst float64) float64 { return fill(name, uint64(worst*parts), parts) }
	list := []governor.Resource{
		// What drains the rings is, in the end, the disk: what it can take is what they can.
		{Name: "the payload ring", Fill: of("payload", worst.payload), Refused: rows, Load: w.copied, Capacity: w.capacity, Budget: float64(budgets.Copied)},
		{Name: "a ring of records", Fill: of("records", worst.records), Load: w.copied, Capacity: w.capacity},
		{Name: "staging", Fill: of("staging", worst.staging), Load: w.copied, Capacity: w.capacity},
		{Name: "the queue before the pipeline", Fill: of("queue", worst.queue), Load: w.copied, Capacity: w.capacity},
		{Name: "the disk", Load: w.wrote, Capacity: w.capacity, Budget: float64(budgets.Disk)},
	}
	if budgets.DiskFree > 0 {
		left := (float64(m.DiskFree) - float64(budgets.DiskFree)) / float64(budgets.DiskFree)
		list = append(list, governor.Resource{Name: "the space on the disk", Fill: min(1, max(0, 1-left)), Load: w.wrote})
	}
	if budgets.EngineBytes > 0 {
		list = append(list, governor.Resource{Name: "the engine's buffer", Fill: fill("buffer", m.BufferBytes, budgets.EngineBytes), Load: w.wrote, Capacity: w.capacity})
	}
	return list
}

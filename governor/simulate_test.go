package governor

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// world is a producer, a queue and a disk: bytes of the rules at their rungs come in, as many as the disk takes go out, the queue holds the
// difference, and what it cannot hold is refused.
type world struct {
	rules  []Rule
	load   func(t float64) float64 // factor on what rules cost
	disk   func(t float64) float64 // bytes a second
	queue  float64                 // bytes
	budget float64
	noise  *rand.Rand // nil: measurements are exact
}

// moment is a tick's end.
type moment struct {
	t        float64
	rungs    []int
	fill     float64
	refused  float64
	in, disk float64
}

const tick = 0.1 // seconds

// run simulates so many seconds, holds the order of priorities at every moment, and returns what happened.
func (w world) run(t interface{ Fatalf(string, ...any) }, seconds float64) (trace []moment, steps []Step) {
	g := New(len(w.rules), Marks{})
	start := time.Unix(1e9, 0)
	level := 0.0
	for n := 0; float64(n)*tick < seconds; n++ {
		now := float64(n) * tick
		factor := w.load(now)
		in, rules := 0.0, slices.Clone(w.rules)
		for i := range rules {
			rules[i].Cost = slices.Clone(rules[i].Cost)
			for rung := range rules[i].Cost {
				rules[i].Cost[rung] *= factor
			}
			in += rules[i].Cost[g.Rungs()[i]]
		}
		disk := w.disk(now)
		level += in*tick - disk*tick
		out := disk
		if level < 0 {
			out, level = disk+level/tick, 0
		}
		refused := math.Max(0, level-w.queue)
		level -= refused
		r := Resource{Name: "queue", Fill: level / w.queue, Refused: uint64(math.Ceil(refused / 1000)), Load: in, Budget: w.budget}
		if out > 0 {
			r.Capacity = disk // bytes over the time that the disk was busy
			if w.noise != nil {
				r.Capacity *= 0.9 + 0.2*w.noise.Float64()
				r.Load *= 0.95 + 0.1*w.noise.Float64()
			}
		}
		decided := g.Tick(start.Add(time.Duration(now*1e9)), []Resource{r}, rules)
		steps = append(steps, decided...)
		for i := range w.rules {
			for j := range w.rules {
				if w.rules[i].Priority < w.rules[j].Priority && g.Rungs()[j] > 0 && g.Rungs()[i] < len(w.rules[i].Cost)-1 {
					t.Fatalf("at %.1f s rule %d is at rung %d of %v, while rule %d, of a lower priority, is at %d", now, j, g.Rungs()[j], w.rules[j].Cost, i, g.Rungs()[i])
				}
			}
		}
		trace = append(trace, moment{now, slices.Clone(g.Rungs()), r.Fill, refused, in, disk})
	}
	return trace, steps
}

// ladders are 10 rules of 3 priorities, from full by way of a quarter and a hundredth to off: 100 MB a second together.
func ladders() []Rule {
	var rules []Rule
	for i := range 10 {
		rules = append(rules, Rule{Name: fmt.Sprint("rule ", i), Priority: i % 3, Cost: []float64{10e6, 2.5e6, 0.1e6, 0}})
	}
	return rules
}

func always(v float64) func(float64) float64 { return func(float64) float64 { return v } }

// between gives v within a stretch of time, and other outside.
func between(from, to, v, other float64) func(float64) float64 {
	return func(t float64) float64 {
		if t >= from && t < to {
			return v
		}
		return other
	}
}

// turns counts how often rules changed direction in a stretch of time, whole is whether all are at their own level at its end.
func turns(trace []moment, from, to float64) (n int) {
	last := map[int]int{}
	for k := 1; k < len(trace); k++ {
		if trace[k].t < from || trace[k].t >= to {
			continue
		}
		for i := range trace[k].rungs {
			if d := trace[k].rungs[i] - trace[k-1].rungs[i]; d != 0 {
				if last[i]*d < 0 {
					n++
				}
				last[i] = d
			}
		}
	}
	return n
}

func at(trace []moment, t float64) moment { return trace[min(int(math.Round(t/tick)), len(trace)-1)] }

func whole(m moment) bool { return slices.Max(m.rungs) == 0 }

func refusedIn(trace []moment, from, to float64) (bytes float64) {
	for _, m := range trace {
		if m.t >= from && m.t < to {
			bytes += m.refused
		}
	}
	return bytes
}

// used is the share of what could have been captured that was, over a stretch of time: of the disk's rate, or of the demand where that is less.
func used(w world, trace []moment, from, to float64) float64 {
	in, could := 0.0, 0.0
	full := 0.0
	for _, r := range w.rules {
		full += r.Cost[0]
	}
	for _, m := range trace {
		if m.t >= from && m.t < to {
			in += m.in - m.refused/tick
			could += min(m.disk, full*w.load(m.t))
		}
	}
	return in / could
}

func TestNothingHappensWithinTheBounds(t *testing.T) {
	w := world{rules: ladders(), load: always(1), disk: always(150e6), queue: 256e6}
	if _, steps := w.run(t, 300); len(steps) > 0 {
		t.Error(steps)
	}
}

func TestSlowDisk(t *testing.T) {
	w := world{rules: ladders(), load: always(1), disk: between(10, 130, 10e6, 300e6), queue: 256e6}
	trace, steps := w.run(t, 200)
	if m := at(trace, 132); !whole(m) {
		t.Errorf("2 s after relief: %v", m)
	}
	if n := turns(trace, 40, 130); n > 12 {
		t.Errorf("%d turns in 90 s of a constant overload", n)
	}
	if u := used(w, trace, 60, 130); u < 0.5 || u > 1.01 {
		t.Errorf("%.2f of what the disk takes is used", u)
	}
	if n := turns(trace, 133, 200); n > 0 {
		t.Errorf("%d turns after relief", n)
	}
	t.Logf("slow disk: %d steps, %.1f MB refused, %.0f %% of the disk used", len(steps), refusedIn(trace, 0, 200)/1e6, 100*used(w, trace, 60, 130))
}

// The engine is stopped for 10 s: nothing drains.
func TestStoppedEngine(t *testing.T) {
	w := world{rules: ladders(), load: always(1), disk: between(10, 20, 0, 300e6), queue: 256e6}
	trace, _ := w.run(t, 60)
	if m := at(trace, 22); !whole(m) {
		t.Errorf("2 s after: %v", m)
	}
	if n := turns(trace, 22.5, 60); n > 0 {
		t.Errorf("%d turns after relief", n)
	}
}

func TestBursts(t *testing.T) {
	w := world{rules: ladders(), load: func(t float64) float64 {
		if math.Mod(t, 10) < 1 {
			return 3
		}
		return 0.5
	}, disk: always(120e6), queue: 256e6}
	trace, steps := w.run(t, 300)
	if refused := refusedIn(trace, 0, 300); refused > 0 {
		t.Errorf("%.0f bytes refused of bursts that the queue holds", refused)
	}
	if len(steps) > 100 {
		t.Errorf("%d steps", len(steps))
	}
	t.Logf("bursts: %d steps in 300 s", len(steps))
}

func TestRamp(t *testing.T) {
	w := world{rules: ladders(), load: func(t float64) float64 { return min(t, max(0, 240-t)) / 40 }, disk: always(100e6), queue: 256e6}
	trace, steps := w.run(t, 300)
	if m := at(trace, 299); !whole(m) {
		t.Errorf("at the end of the ramp: %v", m)
	}
	if n := turns(trace, 0, 300); n > 60 {
		t.Errorf("%d turns", n)
	}
	t.Logf("ramp: %d steps, %d turns, %.1f MB refused", len(steps), turns(trace, 0, 300), refusedIn(trace, 0, 300)/1e6)
}

func TestSawtooth(t *testing.T) {
	for _, period := range []float64{1, 4, 15, 60} {
		w := world{rules: ladders(), load: func(t float64) float64 { return 2 * math.Mod(t, period) / period }, disk: always(90e6), queue: 128e6}
		trace, steps := w.run(t, 600)
		// A rule may follow a slow tooth down and up; it must not do so at every short one.
		perMinute := float64(turns(trace, 120, 600)) / 8 / float64(len(w.rules))
		if perMinute > min(4, 2*60/period+0.5) {
			t.Errorf("period %v s: %.1f turns a minute and rule", period, perMinute)
		}
		t.Logf("sawtooth of %v s: %d steps in 600 s, %.2f turns a minute and rule, %.1f MB refused, %.0f %% used", period, len(steps), perMinute, refusedIn(trace, 0, 600)/1e6, 100*used(w, trace, 120, 600))
	}
}

func TestBudget(t *testing.T) {
	w := world{rules: ladders(), load: always(1), disk: always(300e6), queue: 256e6, budget: 40e6}
	trace, _ := w.run(t, 120)
	for _, m := range trace[len(trace)/4:] {
		if m.in > 40e6*1.001 && !(m.in < 52e6) {
			t.Fatalf("at %.1f s %.0f bytes a second", m.t, m.in)
		}
	}
	if u := at(trace, 119).in / 40e6; u < 0.6 || u > 1 {
		t.Errorf("%.2f of the budget is used", u)
	}
	if n := turns(trace, 30, 120); n > 12 {
		t.Errorf("%d turns under a constant budget", n)
	}
}

// A recorded load (bytes a second, ten times a second) over disks of several speeds.
func TestRecordedLoad(t *testing.T) {
	text, err := os.ReadFile("testdata/load.txt")
	if err != nil {
		t.Fatal(err)
	}
	var load []float64
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		v, err := strconv.ParseFloat(line, 64)
		if err != nil {
			t.Fatal(err)
		}
		load = append(load, v)
	}
	mean := 0.0
	for _, v := range load {
		mean += v / float64(len(load))
	}
	for _, speed := range []float64{2, 1, 0.5, 0.1} {
		w := world{rules: ladders(), load: func(t float64) float64 { return load[int(t/tick)%len(load)] / mean }, disk: always(speed * 100e6), queue: 128e6}
		trace, steps := w.run(t, 600)
		if n := float64(turns(trace, 120, 600)) / 8 / 10; n > 4 {
			t.Errorf("disk %v of the mean load: %.1f turns a minute and rule", speed, n)
		}
		u := used(w, trace, 120, 600)
		if u < 0.4 {
			t.Errorf("disk %v of the mean load: %.2f of what could be captured was", speed, u)
		}
		t.Logf("disk %v of the mean load: %d steps, %.1f MB refused, %.0f %% used", speed, len(steps), refusedIn(trace, 0, 600)/1e6, 100*u)
	}
}

// Whatever the load and the disk did: once they leave room for everything, everything is back, and stays.
func TestNoRuleStarves(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		seed := rapid.Uint64().Draw(t, "seed")
		random := rand.New(rand.NewPCG(seed, 7))
		var rules []Rule
		for i := range rapid.IntRange(1, 6).Draw(t, "rules") {
			cost := []float64{1e6 * float64(1+random.IntN(50))}
			for range 1 + random.IntN(4) {
				cost = append(cost, cost[len(cost)-1]*random.Float64()*0.8)
			}
			if random.IntN(4) == 0 {
				for k := range cost {
					cost[k] = -1 // nobody knows
				}
			}
			rules = append(rules, Rule{Name: fmt.Sprint(i), Priority: random.IntN(3), Cost: cost})
		}
		total := 0.0
		for _, r := range rules {
			total += math.Max(r.Cost[0], 0)
		}
		total = math.Max(total, 1e6)
		period, depth := 0.2+20*random.Float64(), random.Float64()
		rough := rapid.Float64Range(10, 100).Draw(t, "rough seconds")
		phase := func(t, quiet, loud float64) float64 {
			if t >= rough {
				return quiet
			}
			return quiet + (loud-quiet)*math.Abs(math.Sin(t/period))
		}
		w := world{rules: rules, load: func(t float64) float64 { return phase(t, 1, 4) }, disk: func(t float64) float64 { return phase(t, 1.6*total, depth*total) },
			queue: total * (0.2 + 3*random.Float64()), noise: random}
		trace, _ := w.run(t, rough+130)
		if m := trace[len(trace)-1]; !whole(m) {
			t.Fatalf("130 s after the load was over: %v", m)
		}
	})
}

// A rule that nothing comes for has nothing to give, but it does not stay whole while one of a higher priority is lowered.
func TestNobodyGoesDownBeforeLowerPriorities(t *testing.T) {
	g := New(3, Marks{})
	rules := []Rule{{Priority: 1, Cost: []float64{100, 10, 0}}, {Priority: 0, Cost: []float64{0, 0, 0}}, {Priority: 1, Cost: []float64{0, 0}}}
	steps := g.Tick(time.Unix(1, 0), []Resource{{Name: "disk", Fill: 0.95}}, rules)
	want := []Step{{Rule: 1, From: 0, To: 1}, {Rule: 1, From: 1, To: 2}, {Rule: 0, From: 0, To: 1}}
	for i := range steps {
		steps[i].Why = ""
	}
	if !slices.Equal(steps, want) {
		t.Errorf("lowered %v, want %v", steps, want)
	}
}

package trigger

import (
	"math"

	"dmi/policy"
	"dmi/tensor"
)

// Set is a document's triggers, ready to be evaluated. It is not modified.
type Set struct {
	triggers []policy.Trigger
	probes   []*Probe // by trigger; nil: it has none
}

// Load makes a set. Probes are read below a folder. The error is a *policy.ParseError, with every probe that cannot be read.
func Load(dir string, d *policy.Document) (*Set, error) {
	s := &Set{triggers: d.Triggers, probes: make([]*Probe, len(d.Triggers))}
	var problems []policy.Problem
	for i, t := range d.Triggers {
		if t.When.Probe == "" {
			continue
		}
		var err error
		if s.probes[i], err = ReadProbe(dir, t.When.Probe); err != nil {
			problems = append(problems, policy.Problem{Line: t.Line, Message: t.Name + ": " + err.Error()})
		}
	}
	if len(problems) > 0 {
		return nil, &policy.ParseError{Problems: problems}
	}
	return s, nil
}

// Watches are the conditions of triggers that keep rows, as producers evaluate them, by index. What they cannot evaluate, or nobody asks of them, nothing meets.
func (s *Set) Watches() []tensor.Watch {
	var list []tensor.Watch
	for i := range s.triggers {
		t := &s.triggers[i]
		w := tensor.Watch{Above: math.Inf(1), Below: math.Inf(-1)}
		if t.Keep != nil && t.When.AtOnce() {
			w.NonFinite, w.Figure = t.When.NonFinite, t.When.Statistic
			if p := s.probes[i]; p != nil {
				w.Bias = p.Bias
				for _, v := range p.Weight {
					w.Probe = append(w.Probe, float32(v))
				}
			}
			if t.When.Above != nil {
				w.Above = *t.When.Above
			}
			if t.When.Below != nil {
				w.Below = *t.When.Below
			}
		}
		list = append(list, w)
	}
	return list
}

// moments are what a z-score is measured by: mean and sum of squared distances of what came so far, by Welford's recurrence.
type moments struct {
	n       uint64
	mean, m float64
}

func (m *moments) add(v float64) {
	m.n++
	d := v - m.mean
	m.mean += d / float64(m.n)
	m.m += d * (v - m.mean)
}

// distance is in standard deviations; 0 where there is none, because nothing ever varied.
func (m *moments) distance(v float64) float64 {
	if sd := math.Sqrt(m.m / float64(m.n)); sd > 0 {
		return math.Abs(v-m.mean) / sd
	}
	return 0
}

// outside reports whether a value is beyond a condition's bounds. NaN is not.
func outside(c *policy.Condition, v float64) bool {
	return c.Above != nil && v > *c.Above || c.Below != nil && v < *c.Below
}

// met says whether a row meets a trigger's condition, and the value that did. seen is the z-score's, of the rows before; the row joins it.
func (s *Set) met(i int, row *tensor.Statistics, elements []float64, seen *moments) (value float64, is bool) {
	c := &s.triggers[i].When
	switch {
	case c.NonFinite:
		return float64(row.NonFinite), row.NonFinite > 0
	case s.probes[i] != nil:
		v := s.probes[i].at(elements)
		return v, outside(c, v)
	}
	v := row.Named(c.Statistic)
	if c.ZScore == 0 {
		return v, outside(c, v)
	}
	if v-v != 0 { // no mean survives one of these; nonfinite is for them
		return v, false
	}
	is = seen.n >= c.Warmup && seen.distance(v) > c.ZScore
	seen.add(v)
	return v, is
}

package policy

import (
	"math"

	"dmi/tensor"
)

const everyPhase = 1<<Prefill | 1<<Decode

// mostClauses bounds a gate: a producer asks each clause of every span of a step, on the thread of the model.
const mostClauses = 128

// Gate is what a producer must give for a class: exactly the rows that it selects where a producer can tell them apart, by number, phase, sample and position; else a level from which
// every row's own can be made.
func (c *Class) Gate() tensor.Gate {
	last := len(c.Clauses) - 1
	gate := tensor.Gate{Level: c.Clauses[last].Level.Level, Stride: c.Clauses[last].Level.Stride}
	for i := range c.Clauses[:last] { // what a producer does not know of a request yet may be anything
		if rows := c.Clauses[i].Rows; rows != nil && rows.group != 0 {
			gate.Clauses = []tensor.GateClause{{Level: c.enough(), Phases: everyPhase, Stop: math.MaxInt64, Step: 1, Group: tensor.UnknownGroup, Groups: rows.groups}}
			break
		}
	}
	for i := range c.Clauses { // one number for all rows of a site: what a row has more than its own is left out later
		gate.Top = max(gate.Top, uint8(c.Clauses[i].Level.Top))
	}
	for i := range c.Clauses[:last] {
		clauses, exact := c.Clauses[i].gate()
		gate.Clauses = append(gate.Clauses, clauses...)
		if !exact || len(gate.Clauses) > mostClauses {
			return tensor.Gate{Level: c.enough(), Top: gate.Top}
		}
	}
	return gate
}

// Exact reports whether producers can tell the rows of all rules apart, whatever their sites, so that what a rule leaves out does not leave the device.
func (d *Document) Exact() bool {
	asked := 0
	for i := range d.Rules {
		if s := &d.Rules[i].Select; s.byRows() {
			clauses, exact := (&Clause{Rows: s}).gate()
			if asked += len(clauses); !exact || asked >= mostClauses {
				return false
			}
		}
	}
	return true
}

// enough is the one level that rows have, if they are not off; full where they have several.
func (c *Class) enough() tensor.Level {
	level := tensor.Off
	for i := range c.Clauses {
		switch l := c.Clauses[i].Level.Level; {
		case l == tensor.Off || l == level:
		case level == tensor.Off && l != tensor.Sampled:
			level = l
		default:
			return tensor.Full
		}
	}
	return level
}

// gate is a clause for producers; they know requests by their numbers and groups.
func (c *Clause) gate() (clauses []tensor.GateClause, exact bool) {
	one := tensor.GateClause{Level: c.Level.Level, Stride: c.Level.Stride, Phases: everyPhase, Stop: math.MaxInt64, Step: 1}
	windows := []Window{{Stop: unbounded, Step: 1}}
	if c.Rows != nil {
		if len(c.Rows.IDs)+len(c.Rows.Tags) > 0 && c.Rows.group == 0 {
			return nil, false
		}
		one.Group, one.Groups = c.Rows.group, c.Rows.groups
		if c.Rows.Sample > 0 {
			one.Seed, one.Threshold = c.Rows.Seed, Threshold(c.Rows.Sample)
			if one.Threshold == 0 { // which would be every request
				return nil, false
			}
		}
		if c.Rows.Phase != nil {
			one.Phases = 1 << *c.Rows.Phase
		}
		if len(c.Rows.Tokens) > 0 {
			windows = c.Rows.Tokens
		}
	}
	for _, w := range windows {
		one.Region, one.Start, one.Stop, one.Step = regions[w.Region], uint64(w.Start), uint64(w.Stop), w.Step
		if c.Only == nil {
			clauses = append(clauses, one)
		}
		for _, number := range c.Only {
			one.One, one.Request = true, number
			clauses = append(clauses, one)
		}
	}
	return clauses, true
}

var regions = map[Region]tensor.Region{All: tensor.Everywhere, Prompt: tensor.Prompt, Generated: tensor.Generated}

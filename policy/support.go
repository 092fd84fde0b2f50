package policy

import (
	"fmt"

	"dmi/tensor"
)

// Abilities are what producers can act on.
type Abilities struct {
	Levels map[tensor.Level]bool
	Rows   bool // rules that tell rows of one site apart
}

// Has reports whether producers can do a level.
func (a Abilities) Has(l tensor.Level) bool { return a.Levels[l] }

// DefaultName is the default's, as a rule.
const DefaultName = "default"

// DefaultRule is a document's default as a rule: the last, of the lowest priority.
func DefaultRule(d *Document) Rule {
	return Rule{Name: DefaultName, Level: d.Default, Priority: -1001}
}

// WholeSites is what every producer can: capture a site in full, or not at all.
var WholeSites = Abilities{Levels: map[tensor.Level]bool{tensor.Full: true, tensor.Off: true}}

// Pushable is to which levels pressure may push rules. What a rule says of rows that producers cannot tell apart the engine has to do itself, which saves disk, but not the way to it.
func (d *Document) Pushable(l tensor.Level) bool {
	return l == tensor.Full || l == tensor.Off || d.Budgets.Copied == 0 || d.Exact()
}

// Check says what of a document producers cannot do, as a *ParseError; nil: nothing.
func (d *Document) Check(a Abilities) error {
	var problems []Problem
	bad := func(line int, format string, args ...any) {
		if len(problems) < maxProblems {
			problems = append(problems, Problem{Line: line, Message: fmt.Sprintf(format, args...)})
		}
	}
	has := func(line int, what string, l Level) {
		if !a.Levels[l.Level] {
			bad(line, "%s: level %v cannot be done", what, l)
		}
	}
	has(1, "default", d.Default)
	for i := range d.Rules {
		r := &d.Rules[i]
		has(r.Line, r.Name, r.Level)
		for _, l := range r.Degrade {
			switch {
			case !a.Has(l.Level):
				has(r.Line, r.Name+": degrade", l)
			case !d.Pushable(l.Level):
				bad(r.Line, "%s: degrade: %v does not hold copied_bytes_per_s: the rules tell rows apart by more than a producer can (%d sets of ids and tags, %d windows; a sample too small to be anybody), and what is left out of those is copied all the same", r.Name, l, tensor.MaxGroups, mostClauses)
			}
		}
		if r.Select.byRows() && !a.Rows {
			bad(r.Line, "%s: producers cannot tell rows apart yet: a rule selects whole sites, by hooks and layers, without requests, phase or tokens", r.Name)
		}
	}
	if len(problems) == 0 {
		return nil
	}
	return &ParseError{problems}
}

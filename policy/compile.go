package policy

import (
	"encoding/binary"
	"slices"

	"dmi/tensor"
)

// Clause is what a rule says to the rows of a site that no clause before it took.
type Clause struct {
	Rule  int // index; ByPromotion; -1: the default, which is the last and takes all
	Level Level
	Rows  *Selection // request, phase and tokens count; nil: takes all
	Only  []uint64   // requests; nil: any
}

// open reports whether the clause may leave rows to those after it.
func (c *Clause) open() bool { return c.Rows != nil || c.Only != nil }

func (c *Clause) takes(r Request, t Token) bool {
	return (c.Only == nil || slices.Contains(c.Only, r.Number)) && (c.Rows == nil || c.Rows.Request(r) && c.Rows.Token(r, t))
}

// Class is what sites have in common whose rows are treated alike. The last clause takes all.
type Class struct{ Clauses []Clause }

// Uniform is the one level of all rows, if it is one.
func (c *Class) Uniform() (Clause, bool) { return c.Clauses[0], !c.Clauses[0].open() }

// Off reports whether no row can be kept.
func (c *Class) Off() bool {
	return !slices.ContainsFunc(c.Clauses, func(c Clause) bool { return c.Level.Level != tensor.Off })
}

// Plan is a document applied to the sites of a session.
type Plan struct {
	Classes  []Class
	Of       []int  // by site: index into Classes
	Document uint64 // the revision that brought it in
	Keeps    []Keep // by site: what is kept of it beyond that; nil: nothing, anywhere
}

// Keep says of a site which triggers of the document have a request's rows of a step captured in full, once one of its rows there met them. Bits are
// indices of triggers.
type Keep struct {
	Watch uint64 // those that look at the site's rows, and that a producer can evaluate
	By    uint64 // those that keep rows of the site
	Late  bool   // some of By may be met when the site's rows have passed, or by nobody but the engine
}

// byRows reports whether rows of one site may be treated differently.
func (s *Selection) byRows() bool {
	return len(s.IDs) > 0 || len(s.Tags) > 0 || s.Sample > 0 || s.Phase != nil || len(s.Tokens) > 0
}

// Compile applies the document to sites. Sites of equal clauses share a class.
func (d *Document) Compile(sites []Site, now State) Plan {
	p := Plan{Of: make([]int, len(sites))}
	seen := map[string]int{}
	for i, site := range sites {
		var clauses []Clause
		var key []byte
		add := func(rule int, level Level, rows *Selection) {
			if l, is := now.Lowered[rule]; is {
				level = l
			}
			clauses, key = append(clauses, Clause{Rule: rule, Level: level, Rows: rows}), append(key, byte(rule), byte(rule>>8))
		}
		var promoted []uint64
		for _, p := range now.Promoted {
			if p.Sites.Site(site) && !slices.Contains(promoted, p.Request) {
				promoted = append(promoted, p.Request)
				key = binary.LittleEndian.AppendUint64(key, p.Request)
			}
		}
		if promoted != nil {
			clauses = append(clauses, Clause{Rule: ByPromotion, Only: promoted})
		}
		key = append(key, '|')
		closed := false
		for n := range d.Rules {
			rule := &d.Rules[n]
			if closed = rule.Select.Site(site) && !rule.Select.byRows(); closed {
				add(n, rule.Level, nil)
				break
			}
			if rule.Select.Site(site) {
				add(n, rule.Level, &rule.Select)
			}
		}
		if !closed {
			add(-1, d.Default, nil)
		}
		class, known := seen[string(key)]
		if !known {
			class = len(p.Classes)
			seen[string(key)] = class
			p.Classes = append(p.Classes, Class{clauses})
		}
		p.Of[i] = class
		if keep := d.keep(site); keep != (Keep{}) {
			if p.Keeps == nil {
				p.Keeps = make([]Keep, len(sites))
			}
			p.Keeps[i] = keep
		}
	}
	return p
}

func (d *Document) keep(site Site) (k Keep) {
	for i := range d.Triggers {
		t, bit := &d.Triggers[i], uint64(1)<<i
		if t.Keep == nil {
			continue
		}
		watches := t.Select.Site(site)
		if watches && t.When.AtOnce() {
			k.Watch |= bit
		}
		if t.Keeps(site) {
			k.By |= bit
			k.Late = k.Late || !watches || !t.When.AtOnce()
		}
	}
	return k
}

// Row is Evaluate by way of the plan, and which clause of the site's class took the row.
func (p *Plan) Row(site int, r Request, t Token) (Verdict, int) {
	for i, c := range p.Classes[p.Of[site]].Clauses {
		if !c.takes(r, t) {
			continue
		}
		return Verdict{c.Rule, c.Level, c.Level.keeps(t.Position)}, i
	}
	panic("policy: a class without an end") // Compile closes every one
}

func (l Level) keeps(position uint32) bool {
	switch l.Level {
	case tensor.Off:
		return false
	case tensor.Sampled:
		return position%l.Stride == 0
	}
	return true
}

// Ladder is the levels that a rule may have, from its own downwards, as far as a producer has them.
func (r *Rule) Ladder(has func(tensor.Level) bool) []Level {
	ladder := []Level{r.Level}
	below := r.Degrade
	if below == nil {
		below = []Level{{Level: tensor.FP8}, {Level: tensor.Sampled, Stride: 8}, {Level: tensor.Stats}, {Level: tensor.Off}}
	}
	for _, l := range below {
		if l.rung() > r.Level.rung() && has(l.Level) {
			ladder = append(ladder, l)
		}
	}
	return slices.Clip(ladder)
}

package policy

import (
	"math"
	"slices"

	"dmi/tensor"
)

// Verdict is what a document says of a row.
type Verdict struct {
	Rule  int // index; -1: no rule selects it
	Level Level
	Kept  bool // whether the row leaves the device: not where it is off, or between sampled ones
}

// State is what holds beside a document at a time.
type State struct {
	Lowered  map[int]Level // by rule: the level that overload has pushed it to
	Promoted []Promotion   // of the session that is looked at
}

// Promotion has the rows of a request captured in full, whatever the rules say.
type Promotion struct {
	Request uint64     // within its session
	Sites   *Selection // hooks count alone
}

// ByPromotion stands for a rule's index where a promotion decides.
const ByPromotion = -2

// ByChoice stands for a rule's index where the request itself does not want the row.
const ByChoice = -3

// Evaluate says what happens to one row. It is the definition: slow, and obvious.
func (d *Document) Evaluate(s Site, r Request, t Token, now State) Verdict {
	if !r.Choice.Site(s) || !r.Choice.Token(r, t) {
		return Verdict{Rule: ByChoice, Level: Level{Level: tensor.Off}}
	}
	for _, p := range now.Promoted {
		if p.Request == r.Number && p.Sites.Site(s) {
			return Verdict{Rule: ByPromotion, Kept: true}
		}
	}
	v := Verdict{Rule: -1, Level: d.Default}
	for i := range d.Rules {
		if d.Rules[i].Select.Row(s, r, t) {
			v.Rule, v.Level = i, d.Rules[i].Level
			break
		}
	}
	if l, is := now.Lowered[v.Rule]; is {
		v.Level = l
	}
	switch v.Level.Level {
	case tensor.Off:
	case tensor.Sampled:
		v.Kept = t.Position%v.Level.Stride == 0
	default:
		v.Kept = true
	}
	return v
}

// Row reports whether a row is selected.
func (s *Selection) Row(site Site, r Request, t Token) bool {
	return s.Site(site) && s.Request(r) && s.Token(r, t)
}

// Site reports whether some rows of a site may be selected.
func (s *Selection) Site(site Site) bool {
	fits := len(s.Hooks) == 0
	for _, hook := range s.sites {
		fits = fits || hook(site)
	}
	inside := len(s.Layers) == 0
	for _, l := range s.Layers {
		inside = inside || site.Layer != tensor.NoLayer && l.First <= site.Layer && site.Layer <= l.Last
	}
	return fits && inside
}

// Request reports whether some rows of a request may be selected.
func (s *Selection) Request(r Request) bool {
	if len(s.IDs) > 0 && !slices.ContainsFunc(s.IDs, func(p string) bool { return tensor.MatchText(p, r.ID) }) {
		return false
	}
	for _, tag := range s.Tags {
		if !slices.Contains(r.Tags, tag) {
			return false
		}
	}
	return s.Sample == 0 || Hash(s.Seed, r.Number) < Threshold(s.Sample)
}

// Token reports whether a row of a request that is selected is.
func (s *Selection) Token(r Request, t Token) bool {
	if s.Phase != nil && *s.Phase != t.Phase {
		return false
	}
	return len(s.Tokens) == 0 || slices.ContainsFunc(s.Tokens, func(w Window) bool { return w.Holds(r, t) })
}

// Hash decides which requests are sampled: splitmix64 of a request's number, seeded. The same on every machine, and in the producer.
func Hash(seed, request uint64) uint64 {
	x := request + (seed+1)*0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// Threshold is what the hashes of a share of all requests lie below.
func Threshold(share float64) uint64 {
	if share >= 1 {
		return math.MaxUint64
	}
	return uint64(math.Ldexp(share, 64))
}

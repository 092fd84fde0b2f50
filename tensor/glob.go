package tensor

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Glob is a pattern over dotted components: `*` stands for any characters within one component, `?` for one, and a component
// `**` for any number of components.
type Glob []string

// MaxGlobBytes bounds a pattern.
const MaxGlobBytes = 512

// CompileGlob takes a pattern apart.
func CompileGlob(pattern string) (Glob, error) {
	if len(pattern) > MaxGlobBytes {
		return nil, fmt.Errorf("pattern of %d bytes: at most %d", len(pattern), MaxGlobBytes)
	}
	parts := strings.Split(pattern, ".")
	for i, part := range parts {
		switch {
		case part == "":
			return nil, fmt.Errorf("pattern %q has an empty component", pattern)
		case part != "**" && strings.Contains(part, "**"):
			return nil, fmt.Errorf("pattern %q: ** stands alone between dots", pattern)
		case i > 0 && part == "**" && parts[i-1] == "**":
			return nil, fmt.Errorf("pattern %q: **.** says no more than **", pattern)
		}
	}
	return parts, nil
}

// IsGlob reports whether a name is a pattern.
func IsGlob(name string) bool { return strings.ContainsAny(name, "*?") }

// Match is linear in the product of components: each stretch between `**` is placed at its first fit.
func (g Glob) Match(name string) bool {
	return matchSeq(g, strings.Split(name, "."), func(p string) bool { return p == "**" }, MatchText)
}

// MatchText matches a whole text, in which dots mean nothing: `*` stands for any characters, `?` for one byte.
func MatchText(pattern, text string) bool {
	return matchSeq([]byte(pattern), []byte(text), func(p byte) bool { return p == '*' }, func(p, t byte) bool { return p == '?' || p == t })
}

// matchSeq matches items against a pattern in which some elements stand for any number of items. Going back to the last of
// those only is enough, because what came before it has matched as early as it can.
func matchSeq[E any](pattern, items []E, many func(E) bool, one func(p, item E) bool) bool {
	p, i := 0, 0
	star, mark := -1, 0
	for i < len(items) {
		switch {
		case p < len(pattern) && many(pattern[p]):
			star, mark = p, i
			p++
		case p < len(pattern) && one(pattern[p], items[i]):
			p++
			i++
		case star >= 0:
			mark++
			p, i = star+1, mark
		default:
			return false
		}
	}
	for p < len(pattern) && many(pattern[p]) {
		p++
	}
	return p == len(pattern)
}

// SiteMatcher turns a glob, name, alias or end of one into a test of one site. "" matches every site.
func SiteMatcher(pattern string) (func(Site) bool, error) {
	if pattern == "" {
		return func(Site) bool { return true }, nil
	}
	g, err := CompileGlob(pattern)
	if err != nil {
		return nil, err
	}
	if IsGlob(pattern) {
		return func(s Site) bool { return g.Match(s.Name) || slices.ContainsFunc(s.Aliases, g.Match) }, nil
	}
	return func(s Site) bool {
		return EndsWith(s.Name, pattern) || slices.ContainsFunc(s.Aliases, func(a string) bool { return a == pattern || EndsWith(a, pattern) })
	}, nil
}

// EndsWith reports whether the dotted components of short end name, the last or first of them with or without "hook_".
func EndsWith(name, short string) bool {
	n, s := strings.Split(name, "."), strings.Split(short, ".")
	if len(s) > len(n) {
		return false
	}
	n = n[len(n)-len(s):]
	for i := range s {
		if n[i] != s[i] && n[i] != "hook_"+s[i] {
			return false
		}
	}
	return true
}

// ParseLevel is the inverse of Level.String.
func ParseLevel(name string) (Level, error) {
	for i, n := range levelNames {
		if n == name {
			return Level(i), nil
		}
	}
	return 0, errors.New("no such level; full, fp8, int8, sampled, stats or off")
}

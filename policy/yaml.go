package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"time"

	"dmi/internal/nearest"

	"go.yaml.in/yaml/v3"
)

// Problem is one thing that is wrong with a document.
type Problem struct {
	Line    int    `json:"line"`
	Column  int    `json:"column"` // 0: the whole line
	Message string `json:"message"`
}

// ParseError is everything that is wrong with a document, in its order.
type ParseError struct{ Problems []Problem }

func (e *ParseError) Error() string {
	var b strings.Builder
	for i, p := range e.Problems {
		if i > 0 {
			b.WriteString("\n")
		}
		fmt.Fprintf(&b, "policy: line %d", p.Line)
		if p.Column > 0 {
			fmt.Fprintf(&b, ", column %d", p.Column)
		}
		b.WriteString(": " + p.Message)
	}
	return b.String()
}

// maxProblems are told; whoever wrote more of them wrote something else than a policy.
const maxProblems = 20

// reader takes a YAML tree apart strictly: nothing unknown, nothing twice, no anchors, no value of another kind than the one that is meant.
type reader struct{ problems []Problem }

func (r *reader) bad(n *yaml.Node, format string, args ...any) {
	if len(r.problems) < maxProblems {
		r.problems = append(r.problems, Problem{n.Line, n.Column, fmt.Sprintf(format, args...)})
	}
}

func (r *reader) err() error {
	if len(r.problems) == 0 {
		return nil
	}
	return &ParseError{r.problems}
}

// document gives the one tree of a text; nil where it is empty.
func (r *reader) document(text []byte) *yaml.Node {
	in := yaml.NewDecoder(bytes.NewReader(text))
	var root, more yaml.Node
	if err := in.Decode(&root); err != nil {
		if !errors.Is(err, io.EOF) {
			r.syntax(err)
		}
		return nil
	}
	if err := in.Decode(&more); err == nil {
		r.bad(&more, "a second document; a policy is one")
	} else if !errors.Is(err, io.EOF) {
		r.syntax(err)
	}
	return root.Content[0]
}

// syntax passes on what the YAML library says, which has a line in its words only.
func (r *reader) syntax(err error) {
	line, text := 1, strings.TrimPrefix(err.Error(), "yaml: ")
	if rest, found := strings.CutPrefix(text, "line "); found {
		if number, message, found := strings.Cut(rest, ": "); found {
			if v, err := strconv.Atoi(number); err == nil {
				line, text = v, message
			}
		}
	}
	r.problems = append(r.problems, Problem{Line: line, Message: "not YAML: " + text})
}

// field is a key of a mapping, and what reads its value.
type field struct {
	key  string
	read func(*yaml.Node)
}

// mapping reads a mapping with the fields given, in the order of the text.
func (r *reader) mapping(n *yaml.Node, what string, fields ...field) {
	if n.Kind != yaml.MappingNode {
		r.bad(n, "%s is %s; keys and values are needed", what, kind(n))
		return
	}
	seen := map[string]int{}
	names := make([]string, len(fields))
	for i := range names {
		names[i] = fields[i].key
	}
next:
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if line, twice := seen[key.Value]; twice {
			r.bad(key, "%s: %q is there twice, first in line %d", what, key.Value, line)
			continue
		}
		seen[key.Value] = key.Line
		for _, f := range fields {
			if f.key != key.Value || key.Kind != yaml.ScalarNode {
				continue
			}
			if r.plain(value) {
				f.read(value)
			}
			continue next
		}
		r.bad(key, "%s has no key %q; did you mean %s?", what, short(key.Value), strings.Join(nearest.Names(names, key.Value, 3), ", "))
	}
}

// plain refuses anchors and aliases, with which a short text can be a long document.
func (r *reader) plain(n *yaml.Node) bool {
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		r.bad(n, "anchors and aliases are not possible here; write it out")
		return false
	}
	return true
}

// list reads a sequence, or one value in place of a sequence of one.
func (r *reader) list(n *yaml.Node, what string, each func(*yaml.Node)) {
	if n.Kind != yaml.SequenceNode {
		each(n)
		return
	}
	if len(n.Content) > maxList {
		r.bad(n, "%s has %d entries: at most %d", what, len(n.Content), maxList)
		return
	}
	for _, c := range n.Content {
		if r.plain(c) {
			each(c)
		}
	}
}

func kind(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	if n.Tag == "!!null" {
		return "nothing"
	}
	return strconv.Quote(short(n.Value))
}

func short(s string) string {
	if len(s) > 64 {
		return s[:64] + "..."
	}
	return s
}

// text reads a string that is not empty. Numbers and the like are as good: a request's id may be 17.
func (r *reader) text(n *yaml.Node, what string) string {
	if n.Kind != yaml.ScalarNode || n.Tag == "!!null" || n.Value == "" {
		r.bad(n, "%s is %s; a text is needed", what, kind(n))
		return ""
	}
	return n.Value
}

func (r *reader) integer(n *yaml.Node, what string, low, high int64) int64 {
	v, err := strconv.ParseInt(n.Value, 10, 64)
	if n.Kind != yaml.ScalarNode || n.Tag != "!!int" || err != nil || v < low || v > high {
		r.bad(n, "%s is %s; a whole number from %d to %d is needed", what, kind(n), low, high)
		return 0
	}
	return v
}

// number reads a finite number.
func (r *reader) number(n *yaml.Node, what string) float64 {
	v, err := strconv.ParseFloat(n.Value, 64)
	if n.Kind != yaml.ScalarNode || n.Tag != "!!int" && n.Tag != "!!float" || err != nil || math.IsNaN(v) || math.IsInf(v, 0) {
		r.bad(n, "%s is %s; a number is needed", what, kind(n))
		return 0
	}
	return v
}

func (r *reader) boolean(n *yaml.Node, what string) bool {
	if n.Kind != yaml.ScalarNode || n.Tag != "!!bool" {
		r.bad(n, "%s is %s; true or false is needed", what, kind(n))
	}
	return n.Value == "true"
}

func (r *reader) duration(n *yaml.Node, what string, most time.Duration) time.Duration {
	v, err := time.ParseDuration(n.Value)
	if n.Kind != yaml.ScalarNode || err != nil || v < 0 || v > most {
		r.bad(n, "%s is %s; a duration up to %v is needed: 500ms, 10s", what, kind(n), most)
		return 0
	}
	return v
}

// bytes reads a size: a number, or one with a unit.
func (r *reader) bytes(n *yaml.Node, what string) uint64 {
	number, factor := strings.TrimSpace(n.Value), 1.0
	for _, u := range []struct {
		name   string
		factor float64
	}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40}, {"kB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12}} {
		if rest, found := strings.CutSuffix(number, u.name); found {
			number, factor = strings.TrimSpace(rest), u.factor
			break
		}
	}
	v, err := strconv.ParseFloat(number, 64)
	if v *= factor; n.Kind != yaml.ScalarNode || err != nil || !(v >= 1 && v < 1<<60) {
		r.bad(n, "%s is %s; a size is needed: 500 MB, 2 GiB", what, kind(n))
		return 0
	}
	return uint64(v)
}

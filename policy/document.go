package policy

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"dmi/tensor"
)

// Document is a policy as it was written down. It is not modified once parsed.
type Document struct {
	Text     string // as it came
	Rules    []Rule // the first that selects a row decides
	Default  Level  // of rows that none selects
	Budgets  Budgets
	Triggers []Trigger
	Groups   tensor.Groups // that its rules name
}

// Bounds of a document.
const (
	MaxBytes    = 1 << 20
	MaxRules    = 256
	MaxTriggers = 64
	maxList     = 256 // hooks, ids, tags, windows of one rule
)

// Level is a rung of the ladder: full, fp8 or int8, sampled/k, stats+k, stats, off.
type Level struct {
	tensor.Level
	Stride uint32 // of sampled: rows at positions that are multiples of it
	Top    uint32 // of stats: so many of the greatest elements of a row as well
}

func (l Level) String() string {
	if l.Level == tensor.Sampled {
		return "sampled/" + strconv.FormatUint(uint64(l.Stride), 10)
	}
	if l.Top > 0 {
		return "stats+" + strconv.FormatUint(uint64(l.Top), 10)
	}
	return l.Level.String()
}

// rung orders levels from full, 0, downwards. The two quantised forms are one rung.
func (l Level) rung() int {
	if l.Top > 0 {
		return 3
	}
	return [...]int{tensor.Full: 0, tensor.FP8: 1, tensor.Int8: 1, tensor.Sampled: 2, tensor.Stats: 4, tensor.Off: 5}[l.Level]
}

// MarshalText writes a level as a document does.
func (l Level) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// ParseLevel reads one.
func ParseLevel(text string) (Level, error) {
	if top, is := strings.CutPrefix(text, "stats+"); is {
		k, err := strconv.ParseUint(top, 10, 16)
		if err != nil || k < 1 || k > tensor.MaxTop {
			return Level{}, fmt.Errorf("level %q: stats+K also keeps the K greatest elements of a row; K is a number from 1 to %d", text, tensor.MaxTop)
		}
		return Level{Level: tensor.Stats, Top: uint32(k)}, nil
	}
	name, stride, sampled := strings.Cut(text, "/")
	level, err := tensor.ParseLevel(name)
	switch {
	case err != nil:
		return Level{}, fmt.Errorf("level %q: there are full, fp8, int8, sampled/K, stats, stats+K and off", text)
	case sampled != (level == tensor.Sampled):
		return Level{}, fmt.Errorf("level %q: sampled has a stride (sampled/8: every 8th position), the others have none", text)
	case !sampled:
		return Level{Level: level}, nil
	}
	k, err := strconv.ParseUint(stride, 10, 16)
	if err != nil || k < 2 {
		return Level{}, fmt.Errorf("level %q: the stride is a number from 2 to 65535", text)
	}
	return Level{Level: level, Stride: uint32(k)}, nil
}

// Rule gives the rows that it selects a level.
type Rule struct {
	Name     string
	Line     int // in the document
	Select   Selection
	Level    Level
	Priority int // under pressure the rules of the lowest are degraded first
	// Degrade is the levels below Level that overload may push the rule to, from the top. nil: those that the producer has; empty: none.
	Degrade []Level
}

// Selection is of rows. What is left out selects all; what is there must all fit.
type Selection struct {
	Hooks  []string // globs, names, aliases or ends of one, as in queries; one must fit
	Layers []Layers // one must fit; sites outside the blocks have none, and fit none
	IDs    []string // of requests, with * and ?; one must fit
	Tags   []string // of requests; all must be there
	Sample float64  // of requests, by a hash of their number: 0 (not said) or in (0, 1)
	Seed   uint64   // of the hash
	Phase  *Phase
	Tokens []Window // one must fit

	sites  []func(tensor.Site) bool // Hooks, compiled
	group  uint8                    // which of the document's groups IDs and Tags are; 0: none
	groups uint64                   // the name of those
}

// Layers is a range, both ends included.
type Layers struct{ First, Last int }

// Phase of a row: a prompt being taken in, or tokens being generated.
type Phase uint8

const (
	Prefill Phase = iota
	Decode
)

func (p Phase) String() string { return [...]string{"prefill", "decode"}[p] }

// Budgets bound what all rules together cost. 0: not bounded.
type Budgets struct {
	// The governor holds these.
	Copied      uint64 // bytes a second that leave the device
	Disk        uint64 // bytes a second that are written
	DiskFree    uint64 // bytes to leave free
	EngineBytes uint64 // rows that wait in the engine

	// Who attaches is fitted to these, or refused.
	Device uint64 // bytes of all producers' payload rings
	Pinned uint64 // bytes of all producers' memory that is shared with the engine

	// The store holds these.
	Retain    uint64        // bytes of segments that are kept
	RetainAge time.Duration // for which rows are
}

// Trigger watches what passes and says when a condition holds.
type Trigger struct {
	Name     string
	Line     int
	Select   Selection // hooks and layers alone
	When     Condition
	Webhook  string        // "": none
	Promote  *Selection    // sites whose rows of the request are captured in full from then on; nil: none
	Keep     *Selection    // sites whose rows of the request, in the very step, come in full, besides those that it watches; none named: those alone. nil: nothing is kept
	Cooldown time.Duration // at least, between two firings for one request
}

// Condition is on one row of a site. Exactly one of the kinds is set.
type Condition struct {
	NonFinite bool
	Statistic string // mean, rms, min, max, absmax, l2 or nonfinite
	ZScore    float64
	Warmup    uint64 // rows of a site before a z-score means anything
	Probe     string // a safetensors file with `weight` and perhaps `bias`
	Above     *float64
	Below     *float64
}

// Keeps reports whether the trigger has rows of a site kept.
func (t *Trigger) Keeps(s Site) bool {
	return t.Keep != nil && (len(t.Keep.Hooks) > 0 && t.Keep.Site(s) || t.Select.Site(s))
}

// AtOnce reports whether a producer can tell by a row alone that it meets the condition.
func (c *Condition) AtOnce() bool { return c.ZScore == 0 }

// String is a condition in a document's words.
func (c *Condition) String() string {
	var parts []string
	add := func(format string, a ...any) { parts = append(parts, fmt.Sprintf(format, a...)) }
	switch {
	case c.NonFinite:
		return "nonfinite: true"
	case c.Probe != "":
		add("probe: %s", c.Probe)
	default:
		add("statistic: %s", c.Statistic)
	}
	if c.ZScore > 0 {
		add("zscore: %v", c.ZScore)
	}
	if c.Above != nil {
		add("above: %v", *c.Above)
	}
	if c.Below != nil {
		add("below: %v", *c.Below)
	}
	return strings.Join(parts, ", ")
}

// Site is what a document needs to know of one; Request and Token likewise.
type Site = tensor.Site

type Request struct {
	Number uint64 // within its session
	ID     string
	Tags   []string
	Prompt uint32  // tokens; 0: not known
	Choice *Choice // its own; nil: it wants all
}

type Token struct {
	Position uint32
	Phase    Phase
}

package steer

import (
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"dmi/control"
	"dmi/policy"
	"dmi/store"
	"dmi/tensor"
	"dmi/trigger"
)

// Producers are those who capture; *control.Server is them.
type Producers interface {
	SetGates(control.Gates)
	Sessions() []control.SessionStatus
}

// Store is what rules are priced by, and requests found in; *store.Store is one.
type Store interface {
	Books() store.Totals
	Stats() store.Metrics
	Sites(session uint32) ([]tensor.Site, error)
	SiteTotals(session uint32) ([]store.SiteTotal, error)
	RequestByID(id string) (tensor.Request, bool, error)
	Retain(bytes uint64, age time.Duration)
}

// Requests tells who requests are, from memory.
type Requests interface {
	PolicyRequest(key tensor.RequestKey) (r policy.Request, known bool)
}

// Options of a Helm. Ledger and Store are needed.
type Options struct {
	Ledger   *policy.Ledger
	Store    Store
	Event    func(level, code, message string) // must not block; nil: nobody is told
	Watch    *trigger.Watch                    // evaluates triggers; nil: nobody does, because nothing is captured
	Requests Requests                          // nil: requests have no names
	Dir      string                            // below which probes are
	ReadOnly bool
}

// ErrReadOnly is what an engine without producers answers to changes.
var ErrReadOnly = errors.New("nothing is captured here: this engine only reads the store")

// Helm holds the policy in force. Its methods may be called from any goroutine.
type Helm struct {
	options Options
	traffic traffic
	firings chan trigger.Firing // that promote

	mu        sync.Mutex // one change at a time
	producers Producers
	force     force
	past      []force // before it, the latest last
	rules     map[uint32]*Rules
}

// force is what is in force. It is replaced, never modified.
type force struct {
	revision policy.Revision
	document *policy.Document
	lowered  map[int]policy.Level // by rule
	triggers *trigger.Set
}

// New takes the ledger's current revision up. It does not take the ledger over.
func New(o Options) (*Helm, error) {
	h := &Helm{options: o, firings: make(chan trigger.Firing, 4*MaxPromoted), rules: map[uint32]*Rules{}}
	revision := o.Ledger.Current()
	document, err := policy.Parse([]byte(revision.Text))
	if err == nil {
		err = document.Check(abilities)
	}
	if err != nil {
		return nil, fmt.Errorf("steer: revision %d of the policy, from another release, cannot be put into force: %w", revision.Number, err)
	}
	h.force = force{revision: revision, document: document}
	o.Store.Retain(document.Budgets.Retain, document.Budgets.RetainAge)
	if o.Watch != nil {
		if h.force.triggers, err = trigger.Load(o.Dir, document); err != nil { // a probe is gone: the engine captures all the same
			h.event("error", "trigger", fmt.Sprintf("no trigger of revision %d of the policy is evaluated: %v", revision.Number, err))
		} else {
			o.Watch.Use(h.force.triggers, revision.Document)
		}
	}
	if len(revision.Lowered)+len(revision.Promoted) > 0 && !o.ReadOnly { // what pressed then is over, and what fired
		revision.Lowered, revision.Promoted, revision.Why = nil, nil, "the engine was restarted: nothing is lowered, nor promoted"
		if h.force.revision, err = o.Ledger.Add(stamped(revision)); err != nil {
			return nil, err
		}
	}
	return h, nil
}

func stamped(r policy.Revision) policy.Revision {
	r.Time = time.Now()
	return r
}

// abilities are what producers and pipelines can act on together: a rule's own level, row by row.
var abilities = policy.Abilities{Levels: map[tensor.Level]bool{tensor.Full: true, tensor.FP8: true, tensor.Int8: true, tensor.Sampled: true, tensor.Stats: true, tensor.Off: true}, Rows: true}

// Gates are those in force.
func (h *Helm) Gates() control.Gates {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.force.gates()
}

// Memory is what producers may have.
func (h *Helm) Memory() control.Memory {
	h.mu.Lock()
	defer h.mu.Unlock()
	return control.Memory{Device: h.force.document.Budgets.Device, Pinned: h.force.document.Budgets.Pinned}
}

// Steer gives h its producers, who have Gates already.
func (h *Helm) Steer(p Producers) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.producers = p
}

func (f force) gates() control.Gates {
	return control.Gates{Revision: f.revision.Number, Groups: f.document.Groups, Of: f.gatesOf}
}

// Set puts a document into force, from the next step of every producer on. Errors: *policy.ParseError, ErrReadOnly, the ledger's; then
// everything stays as it was. The brake stays as it is.
func (h *Helm) Set(text []byte, why string) (Status, error) {
	document, err := policy.Parse(text)
	if err == nil {
		err = document.Check(abilities)
	}
	if err != nil {
		return Status{}, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	next := force{revision: policy.Revision{Text: document.Text, Off: h.force.revision.Off, Why: why}, document: document}
	if h.options.Watch != nil {
		if next.triggers, err = trigger.Load(h.options.Dir, document); err != nil {
			return Status{}, err
		}
	}
	if err := h.change(next, "policy"); err != nil {
		return Status{}, err
	}
	return h.status(h.force), nil
}

// Brake stops all capturing from the next step on, or lets the document decide again. The brake acts even if it cannot be written down: then rows that it
// stops are booked under the revision before.
func (h *Helm) Brake(off bool, why string) (Status, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.force.revision.Off == off && !h.options.ReadOnly {
		return h.status(h.force), nil
	}
	next := h.force
	next.revision.Off, next.revision.Why = off, why
	err := h.change(next, "policy")
	if err != nil && off && !errors.Is(err, ErrReadOnly) {
		h.event("error", "policy", fmt.Sprintf("the brake acts, but could not be written down: %v", err))
		h.apply(next)
		err = nil
	}
	return h.status(h.force), err
}

// Lower puts rules at other levels than the document says; a rule that is left out is back at its own.
func (h *Helm) Lower(document uint64, lowered map[int]policy.Level, why string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	next := h.force
	if next.revision.Document != document {
		return nil // another document came meanwhile: those are not its rules
	}
	next.lowered, next.revision.Why, next.revision.Lowered = maps.Clone(lowered), why, nil
	for rule, level := range lowered {
		if next.revision.Lowered == nil {
			next.revision.Lowered = map[string]string{}
		}
		next.revision.Lowered[ruleName(next.document, rule)] = level.String()
	}
	return h.change(next, "governor")
}

// change writes a revision down, then acts on it.
func (h *Helm) change(next force, code string) error {
	if h.options.ReadOnly {
		return ErrReadOnly
	}
	var err error
	if next.revision, err = h.options.Ledger.Add(stamped(next.revision)); err != nil {
		return err
	}
	h.apply(next)
	h.event("info", code, fmt.Sprintf("revision %d of the policy is in force: %s", next.revision.Number, next.revision.Why))
	return nil
}

func (h *Helm) apply(next force) {
	if h.options.Watch != nil && next.triggers != h.force.triggers {
		h.options.Watch.Use(next.triggers, next.revision.Document)
	}
	if h.past = append(h.past, h.force); len(h.past) > keptForces {
		h.past = h.past[1:]
	}
	h.force = next
	h.options.Store.Retain(next.document.Budgets.Retain, next.document.Budgets.RetainAge)
	if h.producers != nil {
		h.producers.SetGates(next.gates())
	}
}

func (h *Helm) event(level, code, message string) {
	if h.options.Event != nil {
		h.options.Event(level, code, message)
	}
}

// ruleName names a rule; the default is one too.
func ruleName(d *policy.Document, rule int) string {
	if rule < 0 {
		return policy.DefaultName
	}
	return d.Rules[rule].Name
}

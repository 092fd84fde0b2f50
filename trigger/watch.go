package trigger

import (
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"dmi/tensor"
)

// Names tells what numbers stand for; it answers from memory.
type Names interface {
	SessionID(number uint32) (string, bool)
	Sites(session uint32) ([]tensor.Site, error)
	RequestID(key tensor.RequestKey) (string, bool)
}

// Firing is a condition that was met.
type Firing struct {
	Trigger   string            `json:"trigger"`
	Condition string            `json:"condition"`
	Value     Value             `json:"value"` // of the statistic or probe
	Session   string            `json:"session"`
	Request   string            `json:"request"`
	Site      string            `json:"site"`
	Position  uint32            `json:"position"`
	Step      uint64            `json:"step"`
	Revision  uint64            `json:"revision"` // of the policy that has the trigger
	Time      time.Time         `json:"time"`
	Key       tensor.RequestKey `json:"-"`
}

// Value is a number; null in JSON where it is none.
type Value float64

// MarshalJSON implements json.Marshaler.
func (v Value) MarshalJSON() ([]byte, error) {
	if v-v != 0 {
		return []byte("null"), nil
	}
	return json.Marshal(float64(v))
}

func (f *Firing) String() string {
	return fmt.Sprintf("%s: request %s, position %d, %s: %.6g (%s), step %d", f.Trigger, f.Request, f.Position, f.Site, float64(f.Value), f.Condition, f.Step)
}

// Options of a Watch. Names is needed.
type Options struct {
	Names Names
	Event func(level, code, session, message string) // must not block; nil: nobody is told
	// Promote is asked to promote a firing's request. It must not block.
	Promote func(Firing)
	Now     func() time.Time // nil: time.Now
}

// Bounds of a Watch: beyond, the oldest is forgotten, so that a trigger may fire again for a request sooner, or a z-score begins anew.
const (
	keptSessions  = 256
	keptRequests  = 1 << 16
	keptDocuments = 1024 // as many changes as a step may be behind
	toldASecond   = 10   // firings of one trigger; more are counted
)

// Status is what a trigger has done since it came into force.
type Status struct {
	Name  string
	Met   uint64 // rows that met its condition
	Fired uint64 // those outside a cooldown
}

// Watch looks at rows. Its methods may be called from any goroutine; Look from one at a time for each session.
type Watch struct {
	options Options
	force   atomic.Pointer[inForce]
	posts   *post

	mu       sync.Mutex
	sessions map[uint32]*session
	before   []*inForce // what was in force, the latest last: steps that began under it may still be on their way
}

// inForce is a set and what it has done.
type inForce struct {
	set      *Set
	revision uint64  // that brought its document in
	states   []state // by trigger
}

type state struct {
	met, fired atomic.Uint64

	mu     sync.Mutex
	last   map[tensor.RequestKey]time.Time // firings within the cooldown
	second time.Time
	told   int
	silent uint64
}

// session is what is remembered of one, for its pipeline's goroutine.
type session struct {
	force  *inForce
	sites  []tensor.Site
	by     [][]int // triggers by site
	scores map[score]*moments
	wrong  map[score]bool // probes that do not fit a site, and were told of
	row    []float64
}

type score struct {
	trigger int
	site    uint32
}

// New makes a watch without triggers. Close it.
func New(o Options) *Watch {
	if o.Now == nil {
		o.Now = time.Now
	}
	w := &Watch{options: o, sessions: map[uint32]*session{}}
	w.posts = newPost(func(message string) { w.event("warning", "", message) })
	w.force.Store(&inForce{set: &Set{}})
	return w
}

// Close ends deliveries; what waits is given one more try, for a moment.
func (w *Watch) Close() { w.posts.close() }

// Use puts a set into force, as of the revision that brought its document in. Counts and z-scores begin anew.
func (w *Watch) Use(s *Set, revision uint64) {
	f := &inForce{set: s, revision: revision, states: make([]state, len(s.triggers))}
	for i := range f.states {
		f.states[i].last = map[tensor.RequestKey]time.Time{}
	}
	w.mu.Lock()
	if w.before = append(w.before, w.force.Load()); len(w.before) > keptDocuments {
		w.before = w.before[1:]
	}
	w.mu.Unlock()
	w.force.Store(f)
}

// past finds what a document brought in, of those before the one in force.
func (w *Watch) past(document uint64, current *inForce) *inForce {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range slices.Backward(w.before) {
		if f.revision == document {
			return f
		}
	}
	return current
}

// Status tells of every trigger in force.
func (w *Watch) Status() []Status {
	f := w.force.Load()
	list := make([]Status, len(f.states))
	for i := range list {
		s := &f.states[i]
		list[i] = Status{f.set.triggers[i].Name, s.met.Load(), s.fired.Load()}
	}
	return list
}

// Deliveries counts webhooks.
func (w *Watch) Deliveries() Deliveries { return w.posts.status() }

func (w *Watch) event(level, session, message string) {
	if w.options.Event != nil {
		w.options.Event(level, "trigger", session, message)
	}
}

// Look holds chunks of a session against the triggers of the document that was in force for them, named by the revision that brought it in; 0, or one that is forgotten:
// those in force now. met, where there is one, is told of requests that met one that keeps rows: the trigger's index in its document, and that revision.
func (w *Watch) Look(number uint32, chunks []tensor.Chunk, document uint64, met func(request uint64, trigger int, document uint64)) {
	f := w.force.Load()
	if document != 0 && document != f.revision {
		f = w.past(document, f)
	}
	if len(f.set.triggers) == 0 {
		return
	}
	s := w.session(number, f)
	for i := range chunks {
		w.look(s, number, &chunks[i], met)
	}
}

func (w *Watch) session(number uint32, f *inForce) *session {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.sessions[number]
	if s == nil || s.force != f {
		if len(w.sessions) >= keptSessions {
			clear(w.sessions)
		}
		s = &session{force: f, scores: map[score]*moments{}, wrong: map[score]bool{}}
		w.sessions[number] = s
	}
	return s
}

// of gives the triggers that select a site.
func (s *session) of(site uint32, number uint32, names Names) []int {
	if int(site) >= len(s.by) {
		sites, err := names.Sites(number)
		if err != nil || int(site) >= len(sites) {
			return nil
		}
		for _, known := range sites[len(s.by):] {
			var triggers []int
			for i := range s.force.set.triggers {
				if s.force.set.triggers[i].Select.Site(known) {
					triggers = append(triggers, i)
				}
			}
			s.sites, s.by = append(s.sites, known), append(s.by, triggers)
		}
	}
	return s.by[site]
}

func (w *Watch) look(s *session, number uint32, c *tensor.Chunk, met func(request uint64, trigger int, document uint64)) {
	triggers := s.of(c.Site, number, w.options.Names)
	if len(triggers) == 0 || !c.DType.Real() || c.Rows == 0 {
		return
	}
	site, values := s.sites[c.Site], c.Dequantised()
	statistics := tensor.ChunkStatistics(site, values)
	bytes := len(values.Data) / int(c.Rows)
	elements := bytes / values.DType.Size()
	for _, t := range triggers {
		key := score{t, c.Site}
		probe := s.force.set.probes[t]
		if probe != nil && (site.Keyed || len(probe.Weight) != elements || c.Level == tensor.Stats) {
			if !s.wrong[key] {
				s.wrong[key] = true
				w.event("error", "", wrongShape(s.force.set.triggers[t].Name, probe, site, c.Level, elements))
			}
			continue
		}
		seen := s.scores[key]
		if seen == nil {
			seen = &moments{}
			s.scores[key] = seen
		}
		for i := range statistics {
			if probe != nil {
				s.row = slices.Grow(s.row[:0], elements)[:elements]
				values.DType.Floats(s.row, values.Data[i*bytes:(i+1)*bytes])
			}
			if value, is := s.force.set.met(t, &statistics[i], s.row, seen); is {
				if met != nil && s.force.set.triggers[t].Keep != nil {
					met(c.Key.Request, t, s.force.revision)
				}
				w.fire(s.force, t, number, c, i, site, value)
			}
		}
	}
}

func wrongShape(trigger string, probe *Probe, site tensor.Site, level tensor.Level, elements int) string {
	if level == tensor.Stats {
		return fmt.Sprintf("%s: rows of %s come as statistics, which no probe can be applied to: they are passed over; have them at full, fp8 or int8", trigger, site.Name)
	}
	return fmt.Sprintf("%s: the probe has %d weights, and a row of %s %d elements: it is not looked at there; narrow the trigger's hooks", trigger, len(probe.Weight), site.Name, elements)
}

// fire acts on a condition that was met, unless it did for the request a moment ago.
func (w *Watch) fire(f *inForce, t int, number uint32, c *tensor.Chunk, row int, site tensor.Site, value float64) {
	now, state, trigger := w.options.Now(), &f.states[t], &f.set.triggers[t]
	state.met.Add(1)
	silent, fired, tell := state.admit(c.Key, now, trigger.Cooldown)
	if !fired || !tell && trigger.Promote == nil {
		return
	}
	firing := Firing{Trigger: trigger.Name, Condition: trigger.When.String(), Value: Value(value), Site: site.Name, Position: c.First + uint32(row),
		Step: c.Step, Revision: f.revision, Time: now.UTC(), Key: c.Key}
	firing.Session, _ = w.options.Names.SessionID(number)
	firing.Request, _ = w.options.Names.RequestID(c.Key)
	if trigger.Promote != nil && w.options.Promote != nil {
		w.options.Promote(firing)
	}
	if !tell {
		return
	}
	message := firing.String()
	if silent > 0 {
		message += fmt.Sprintf(" (and %d more firings before, too many to tell each)", silent)
	}
	w.event("warning", firing.Session, message)
	if trigger.Webhook != "" {
		w.posts.send(trigger.Webhook, firing)
	}
}

// admit counts a firing, and reports whether it is one, whether it is told, and how many were not before it.
func (s *state) admit(key tensor.RequestKey, now time.Time, cooldown time.Duration) (silent uint64, fired, tell bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if last, before := s.last[key]; before && now.Sub(last) < cooldown {
		return 0, false, false
	}
	if cooldown > 0 {
		if len(s.last) >= keptRequests {
			for k, at := range s.last {
				if now.Sub(at) >= cooldown {
					delete(s.last, k)
				}
			}
			if len(s.last) >= keptRequests {
				clear(s.last)
			}
		}
		s.last[key] = now
	}
	s.fired.Add(1)
	if now.Sub(s.second) >= time.Second {
		s.second, s.told = now, 0
	}
	if s.told == toldASecond {
		s.silent++
		return 0, true, false
	}
	s.told++
	silent, s.silent = s.silent, 0
	return silent, true, true
}

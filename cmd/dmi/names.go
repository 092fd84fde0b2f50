package main

import (
	"slices"
	"sync"
	"time"

	"dmi/policy"
	"dmi/store"
	"dmi/tensor"
)

// recorder is the store as producers' side sees it. It remembers, on the way, what numbers stand for, so that live subscribers can be told
// while publishing without a question to the catalogue.
type recorder struct {
	*store.Store
	mu       sync.RWMutex
	sessions map[uint32]string
	requests map[tensor.RequestKey]named
	order    []tensor.RequestKey // oldest first
	runs     map[string][]string // tags by run, where it has some
	choices  map[[3]string]*policy.Choice
}

// introduction bounds how long the name of a request is waited for. It is on the socket before its first row is in the ring, but who reads the socket may be slower than who drains the ring.
var introduction = time.Second // tests are more patient

// named is what is remembered of a request: its id, the tags that rules may ask for, its own and its run's, and what it asks for itself.
type named struct {
	id     string
	tags   []string
	choice *policy.Choice
}

// requestsNamed bounds the request ids remembered: those that began longest ago are forgotten first, and stream a second late and without an id if they still do.
const requestsNamed = 1 << 17

// newRecorder makes a recorder whose store is set before the first producer comes.
func newRecorder() *recorder {
	return &recorder{sessions: map[uint32]string{}, requests: map[tensor.RequestKey]named{}, runs: map[string][]string{}, choices: map[[3]string]*policy.Choice{}}
}

// BeginSession also learns what the store knows of a session that comes back.
func (r *recorder) BeginSession(t tensor.Session) (uint32, error) {
	number, err := r.Store.BeginSession(t)
	if err != nil {
		return number, err
	}
	r.mu.Lock()
	r.sessions[number] = t.ID
	r.mu.Unlock()
	if runs, err := r.Store.Runs(); err == nil {
		for _, run := range runs {
			if run.Session == number {
				r.learnRun(run)
			}
		}
	}
	known, err := r.Store.Requests(store.RequestFilter{Session: number, Hidden: true})
	if err != nil {
		return number, err
	}
	r.learn(known)
	return number, nil
}

// PutRun also learns its tags, for the requests that come in it.
func (r *recorder) PutRun(run tensor.Run) error {
	r.learnRun(run)
	return r.Store.PutRun(run)
}

func (r *recorder) learnRun(run tensor.Run) {
	if len(run.Tags) == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.runs) >= requestsNamed {
		clear(r.runs)
	}
	r.runs[run.ID] = run.Tags
}

// PutRequests also learns their ids.
func (r *recorder) PutRequests(requests []tensor.Request) error {
	r.learn(requests)
	return r.Store.PutRequests(requests)
}

func (r *recorder) learn(requests []tensor.Request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, q := range requests {
		if q.ID == "" {
			continue
		}
		if _, known := r.requests[q.Key]; !known {
			r.order = append(r.order, q.Key)
		}
		tags := q.Tags
		if more := r.runs[q.Run]; len(more) > 0 {
			tags = append(slices.Clone(tags), more...)
		}
		r.requests[q.Key] = named{q.ID, tags, r.choice(q.Labels)}
	}
	for len(r.order) > requestsNamed {
		delete(r.requests, r.order[0])
		r.order = r.order[1:]
	}
}

// choice is what labels of a request ask for. Requests that ask for the same share it. That labels are wrong their session has said.
func (r *recorder) choice(labels map[string]string) *policy.Choice {
	key := [3]string{labels[policy.CaptureLabel], labels[policy.SitesLabel], labels[policy.PositionsLabel]}
	if key == [3]string{} {
		return nil
	}
	choice, known := r.choices[key]
	if !known {
		choice, _ = policy.ChoiceOf(labels)
		if len(r.choices) >= requestsNamed {
			clear(r.choices)
		}
		r.choices[key] = choice
	}
	return choice
}

// SessionID, with Sites and RequestID, is live.Names.
func (r *recorder) SessionID(number uint32) (string, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	id, known := r.sessions[number]
	return id, known
}

func (r *recorder) RequestID(key tensor.RequestKey) (string, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	q, known := r.requests[key]
	return q.id, known
}

// Introduced, with those, is live.Names: RequestID of one whose rows came at a time, and may be about to be told.
func (r *recorder) Introduced(key tensor.RequestKey, came time.Time) (string, bool) {
	for {
		over := time.Since(came) >= introduction // before the last look, however late this goroutine comes to it
		if id, known := r.RequestID(key); known || over {
			return id, known
		}
		time.Sleep(time.Millisecond)
	}
}

// introducing is trigger.Names: what a trigger tells of has its request's name. The session's pipeline waits meanwhile; one that was waited for in vain does not wait again.
type introducing struct {
	*recorder
	mu   sync.Mutex
	vain map[uint32]bool // by session
}

func (r *introducing) RequestID(key tensor.RequestKey) (string, bool) {
	id, known := r.recorder.RequestID(key)
	r.mu.Lock()
	defer r.mu.Unlock()
	if known || r.vain[key.Session] {
		return id, known
	}
	r.mu.Unlock() // others do not wait with this one
	id, known = r.Introduced(key, time.Now())
	r.mu.Lock()
	if !known {
		r.vain[key.Session] = true
	}
	return id, known
}

// PolicyRequest is steer.Requests.
func (r *recorder) PolicyRequest(key tensor.RequestKey) (policy.Request, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	q, known := r.requests[key]
	return policy.Request{Number: key.Request, ID: q.id, Tags: q.tags, Choice: q.choice}, known
}

package control

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"dmi/drain"
	"dmi/pipeline"
	"dmi/ring"
	"dmi/tensor"
)

// SessionStatus is how an attached producer and its draining are doing.
type SessionStatus struct {
	ID       string
	Number   uint32
	Mode     string
	Model    string // its name, "" where the producer gave none
	Attached time.Time
	Sites    int

	Records  []drain.Occupancy // of each lane's ring, in records
	Payload  drain.Occupancy   // bytes
	Staging  drain.Occupancy
	Spill    drain.Occupancy
	Queue    drain.Occupancy // batches between drain and pipeline
	Producer ring.Counters   // of all lanes; what the producer says
	Drain    drain.Status
	Pipeline pipeline.Status
	Rows     map[tensor.Outcome]map[tensor.Reason]uint64 // booked since it attached
}

// Sessions tells of every session, in the order they attached.
func (s *Server) Sessions() []SessionStatus {
	var all []SessionStatus
	for _, x := range s.list() {
		if status, ok := x.status(); ok {
			all = append(all, status)
		}
	}
	slices.SortFunc(all, func(a, b SessionStatus) int { return a.Attached.Compare(b.Attached) })
	return all
}

func (x *session) status() (SessionStatus, bool) {
	x.mu.Lock()
	defer x.mu.Unlock() // the ring stays mapped meanwhile
	if !x.mapped {
		return SessionStatus{}, false
	}
	s := SessionStatus{ID: x.id, Number: x.number, Mode: x.hello.Mode, Attached: x.begun, Sites: len(x.sites), Drain: x.drain.Status(), Pipeline: x.pipeline.Status()}
	var model struct{ Name string }
	if json.Unmarshal(x.hello.Model, &model) == nil {
		s.Model = model.Name
	}
	s.Records, s.Rows, s.Queue = s.Drain.Lanes, s.Pipeline.Rows, s.Drain.Queue
	s.Payload.Used, s.Payload.Capacity = x.ring.Payload.Used()
	s.Staging.Used, s.Staging.Capacity = x.ring.Stage.Used()
	s.Spill.Used, s.Spill.Capacity = x.ring.Spilled.Used()
	for _, lane := range x.ring.Lanes() {
		c := lane.Counters()
		p := &s.Producer
		p.Steps += c.Steps
		p.Records += c.Records
		p.CapturedRows += c.CapturedRows
		p.CapturedBytes += c.CapturedBytes
		for i := range c.OtherRows {
			p.OtherRows[i] += c.OtherRows[i]
		}
		p.Waits += c.Waits
		p.WaitNS += c.WaitNS
		p.OpCalls += c.OpCalls
		p.OpNS += c.OpNS
		p.Outside += c.Outside
		p.SpilledBytes += c.SpilledBytes
		p.KeptRows += c.KeptRows
		p.OfferedBytes += c.OfferedBytes
	}
	return s, true
}

const (
	eventWindow = 10 * time.Second
	eventBurst  = 5 // of one code in a window
)

// eventFilter keeps one session's events from drowning everybody else's.
type eventFilter struct {
	mu    sync.Mutex
	codes map[string]*eventCount
}

type eventCount struct {
	since  time.Time
	told   int
	silent int
}

// pass reports whether an event is told, with a word on those that were not.
func (f *eventFilter) pass(code, message string, now time.Time) (string, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.codes == nil {
		f.codes = map[string]*eventCount{}
	}
	c := f.codes[code] // codes are ours: there are few
	if c == nil {
		c = &eventCount{since: now}
		f.codes[code] = c
	}
	if now.Sub(c.since) > eventWindow {
		c.since, c.told = now, 0
	}
	if c.told == eventBurst {
		c.silent++
		return "", false
	}
	c.told++
	if c.silent > 0 {
		message = fmt.Sprintf("%s (and %d more of this kind before)", strings.TrimSuffix(message, "."), c.silent)
		c.silent = 0
	}
	return message, true
}

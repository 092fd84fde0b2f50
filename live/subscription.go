package live

import (
	"context"
	"sync"
	"time"

	"dmi/tensor"
)

// Filter says which chunks a subscriber gets.
type Filter struct {
	Site    func(tensor.Site) bool // nil: every site. Called once per session and site
	Session string                 // id; "": every session
	Request string                 // id; "": every request. It need not exist yet
}

// Frame is a chunk on its way to subscribers, which share it: nothing of it may be changed.
type Frame struct {
	Session string
	Request string // "": nobody ever said
	Site    tensor.Site
	Chunk   tensor.Chunk

	came       time.Time // before its request was told; zero: after
	introduced bool      // Request does not change any more. Under the hub's lock

	once sync.Once
	rows []tensor.Statistics
}

// Rows gives the statistics of each row: computed once, by whoever asks first. Of a keyed row only keys up to its own position
// count: it has no others. Nil where the elements are not real numbers.
func (f *Frame) Rows() []tensor.Statistics {
	f.once.Do(func() { f.rows = tensor.ChunkStatistics(f.Site, f.Chunk) })
	return f.rows
}

// Batch is what came since the last one. The slice is valid until the next.
type Batch struct {
	Frames  []*Frame
	Dropped uint64 // rows lost before the first of Frames, because this subscriber was slow
}

// Subscription is one subscriber of chunks. Next is for one goroutine.
type Subscription struct {
	hub    *Hub
	filter Filter
	queue  *queue[*Frame]
	lost   uint64 // rows that Next has yet to tell of

	// Under the hub's lock.
	matches map[uint32][]match // by session and site
}

type match uint8

const (
	unknown match = iota
	yes
	no
)

// Subscribe starts a subscription; close it. Errors: ErrTooMany, ErrClosed.
func (h *Hub) Subscribe(f Filter) (*Subscription, error) {
	s := &Subscription{hub: h, filter: f, matches: map[uint32][]match{},
		queue: newQueue(h.options.QueueFrames, h.options.QueueBytes, func(f *Frame) (int, uint64) { return len(f.Chunk.Data), uint64(f.Chunk.Rows) })}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.admit(); err != nil {
		return nil, err
	}
	h.subscriptions[s] = struct{}{}
	h.chunks.Add(1)
	return s, nil
}

// Next waits for what comes next, and for the names of requests whose rows came before those. Errors: ctx's, or ErrClosed once everything was read.
func (s *Subscription) Next(ctx context.Context) (Batch, error) {
	for {
		frames, dropped, err := s.queue.take(ctx)
		if err != nil {
			return Batch{}, err
		}
		s.lost += dropped
		wanted := frames[:0]
		for _, f := range frames {
			if !f.came.IsZero() {
				s.hub.introduce(f)
			}
			if s.filter.Request == "" || s.filter.Request == f.Request {
				wanted = append(wanted, f)
			}
		}
		if len(wanted) > 0 {
			lost := s.lost
			s.lost = 0
			return Batch{wanted, lost}, nil
		}
	}
}

// Close ends the subscription. It may be called more than once.
func (s *Subscription) Close() {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	if _, there := s.hub.subscriptions[s]; there {
		delete(s.hub.subscriptions, s)
		s.hub.chunks.Add(-1)
		s.queue.close()
	}
}

func (s *Subscription) wants(h *Hub, session uint32, c *tensor.Chunk) bool {
	matches := s.matches[session]
	if int(c.Site) >= len(matches) {
		if c.Site >= 1<<16 {
			return false
		}
		matches = append(matches, make([]match, int(c.Site)+1-len(matches))...)
		s.matches[session] = matches
	}
	if matches[c.Site] == unknown {
		site, known := h.site(session, c.Site)
		if !known {
			return false // not decided for good: its name may still come
		}
		matches[c.Site] = no
		if (s.filter.Session == "" || s.filter.Session == h.session(session)) && (s.filter.Site == nil || s.filter.Site(site)) {
			matches[c.Site] = yes
		}
	}
	if matches[c.Site] != yes || s.filter.Request == "" {
		return matches[c.Site] == yes
	}
	id := h.request(c.Key)
	return id == "" || id == s.filter.Request // of one that is not told yet Next decides
}

package live

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"dmi/tensor"
)

// ErrClosed is what readers get once the hub or the subscription is closed and everything queued was read.
var ErrClosed = errors.New("live: closed")

// ErrTooMany is returned for a subscriber over Options.Subscribers.
var ErrTooMany = errors.New("live: too many subscribers")

// Names tells what numbers stand for. It is called while publishing, a few times for each session and request: it must
// answer from memory.
type Names interface {
	SessionID(number uint32) (string, bool)
	Sites(session uint32) ([]tensor.Site, error)
	RequestID(key tensor.RequestKey) (string, bool)
	// Introduced waits for a request to be told whose rows came at a time, and not for ever: rows and names come by two ways. It is not called while publishing.
	Introduced(key tensor.RequestKey, came time.Time) (string, bool)
}

// Options bound a hub. Zero fields take the default.
type Options struct {
	Subscribers   int // at most, of chunks and of events together; default 512
	QueueFrames   int // of one subscriber; default 8192
	QueueBytes    int // of one subscriber; default 32 MiB
	RecentEvents  int // kept for those who come later; default 256
	RequestsKnown int // request ids remembered; default 65536
}

func (o Options) withDefaults() Options {
	set := func(field *int, value int) {
		if *field <= 0 {
			*field = value
		}
	}
	set(&o.Subscribers, 512)
	set(&o.QueueFrames, 8192)
	set(&o.QueueBytes, 32<<20)
	set(&o.RecentEvents, 256)
	set(&o.RequestsKnown, 65536)
	return o
}

// Hub passes chunks and events on. Its methods are safe for concurrent use.
type Hub struct {
	options Options
	names   Names
	chunks  atomic.Int32 // subscriptions of chunks: the whole cost of Publish when it is zero

	dropped atomic.Uint64 // rows that subscribers, or those who read through one, lost
	frames  atomic.Uint64 // handed to subscribers

	mu            sync.Mutex
	closed        bool
	subscriptions map[*Subscription]struct{}
	sites         map[uint32][]tensor.Site
	sessions      map[uint32]string
	requests      map[tensor.RequestKey]string
	events        eventLog
}

// NewHub makes a hub without subscribers.
func NewHub(names Names, o Options) *Hub {
	o = o.withDefaults()
	h := &Hub{options: o, names: names, subscriptions: map[*Subscription]struct{}{}}
	h.forget()
	h.events.init(o.RecentEvents)
	return h
}

// forget empties what is remembered of names.
func (h *Hub) forget() {
	h.sites = map[uint32][]tensor.Site{}
	h.sessions = map[uint32]string{}
	h.requests = map[tensor.RequestKey]string{}
}

// Publish offers chunks of one session to whoever subscribed to them, and copies what it keeps: once, for all of them. It does not wait for a subscriber, ever.
func (h *Hub) Publish(session uint32, chunks []tensor.Chunk) {
	if !h.Heard() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range chunks {
		var frame *Frame // made for the first who wants it
		for s := range h.subscriptions {
			if !s.wants(h, session, &chunks[i]) {
				continue
			}
			if frame == nil {
				frame = h.frame(session, chunks[i])
			}
			h.frames.Add(1)
			if lost := s.queue.push(frame); lost > 0 {
				h.dropped.Add(lost)
			}
		}
	}
}

// Heard reports whether there are subscribers.
func (h *Hub) Heard() bool { return h.chunks.Load() > 0 }

func (h *Hub) frame(session uint32, c tensor.Chunk) *Frame {
	site, _ := h.site(session, c.Site)
	c.Data = slices.Clone(c.Data)
	f := &Frame{Session: h.session(session), Request: h.request(c.Key), Site: site, Chunk: c}
	if f.Request == "" {
		f.came = time.Now()
	}
	return f
}

// introduce waits for the name of a frame's request, which was not known when it was published.
func (h *Hub) introduce(f *Frame) {
	h.mu.Lock()
	if !f.introduced {
		if f.Request = h.request(f.Chunk.Key); f.Request == "" {
			h.mu.Unlock()
			id, _ := h.names.Introduced(f.Chunk.Key, f.came)
			h.mu.Lock()
			if !f.introduced { // by another subscriber
				f.Request = id
			}
		}
		f.introduced = true
	}
	h.mu.Unlock()
}

// site looks a site up, again where the session has published more since.
func (h *Hub) site(session, id uint32) (tensor.Site, bool) {
	sites := h.sites[session]
	if int(id) >= len(sites) {
		more, err := h.names.Sites(session)
		if err != nil {
			return tensor.Site{}, false
		}
		sites = make([]tensor.Site, 0, len(more))
		for _, s := range more {
			for len(sites) <= int(s.ID) && len(sites) < 1<<16 {
				sites = append(sites, tensor.Site{})
			}
			if int(s.ID) < len(sites) {
				sites[s.ID] = s
			}
		}
		h.sites[session] = sites
		if int(id) >= len(sites) {
			return tensor.Site{}, false
		}
	}
	return sites[id], sites[id].Name != ""
}

func (h *Hub) session(number uint32) string {
	id, known := h.sessions[number]
	if !known {
		if id, known = h.names.SessionID(number); known {
			h.sessions[number] = id
		}
	}
	return id
}

func (h *Hub) request(key tensor.RequestKey) string {
	id, known := h.requests[key]
	if !known {
		if id, known = h.names.RequestID(key); known {
			if len(h.requests) >= h.options.RequestsKnown {
				clear(h.requests)
			}
			h.requests[key] = id
		}
	}
	return id
}

// CountDropped counts rows that one of several readers of a shared subscription was too slow for.
func (h *Hub) CountDropped(rows uint64) { h.dropped.Add(rows) }

// Close ends every subscription; what is queued can still be read.
func (h *Hub) Close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for s := range h.subscriptions {
		s.queue.close()
	}
	h.events.close()
}

// Metrics are a hub's counters.
type Metrics struct {
	Subscribers      int // of chunks
	EventSubscribers int
	Frames           uint64 // handed over
	DroppedRows      uint64 // that subscribers were too slow for
	DroppedEvents    uint64
}

// Metrics returns the counters as they are.
func (h *Hub) Metrics() Metrics {
	h.mu.Lock()
	defer h.mu.Unlock()
	return Metrics{Subscribers: len(h.subscriptions), EventSubscribers: len(h.events.streams), Frames: h.frames.Load(),
		DroppedRows: h.dropped.Load(), DroppedEvents: h.events.dropped}
}

// admit checks the bound on subscribers. Called with the lock held.
func (h *Hub) admit() error {
	if h.closed {
		return ErrClosed
	}
	if n := len(h.subscriptions) + len(h.events.streams); n >= h.options.Subscribers {
		return fmt.Errorf("%w: there are %d already; close one, or raise live.subscribers", ErrTooMany, n)
	}
	return nil
}

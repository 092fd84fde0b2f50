package live

import (
	"context"
	"time"
)

// Event is something that an operator or a user should know.
type Event struct {
	ID      uint64    `json:"id"` // grows by one an event; the hub's
	Time    time.Time `json:"time"`
	Level   string    `json:"level"` // info, warning or error
	Code    string    `json:"code"`  // attach, detach, not_fired, dropped, disk, ...
	Session string    `json:"session,omitempty"`
	Message string    `json:"message"`
	Count   uint64    `json:"count,omitempty"` // rows, bytes or times, as the code says
}

// eventLog keeps the latest events and passes them on. It is under the hub's lock.
type eventLog struct {
	keep    int
	last    uint64
	recent  []Event
	streams map[*EventStream]struct{}
	dropped uint64
}

func (l *eventLog) init(keep int) {
	l.keep = keep
	l.streams = map[*EventStream]struct{}{}
}

func (l *eventLog) close() {
	for s := range l.streams {
		s.queue.close()
	}
}

// Event numbers an event, gives it the time if it has none, keeps it among the recent ones and passes it on. It never waits.
func (h *Hub) Event(e Event) {
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	l := &h.events
	l.last++
	e.ID = l.last
	if len(l.recent) == l.keep {
		l.recent = append(l.recent[:0], l.recent[1:]...)
	}
	l.recent = append(l.recent, e)
	for s := range l.streams {
		l.dropped += s.queue.push(e)
	}
}

// Recent lists the latest events, oldest first, after the one with an id.
func (h *Hub) Recent(after uint64) []Event {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.events.after(after)
}

func (l *eventLog) after(id uint64) []Event {
	var list []Event
	for _, e := range l.recent {
		if e.ID > id {
			list = append(list, e)
		}
	}
	return list
}

// EventStream is one subscriber of events. Next is for one goroutine.
type EventStream struct {
	hub   *Hub
	queue *queue[Event]
}

// Events starts a stream with the recent events after an id, then those that come; close it. Errors: ErrTooMany, ErrClosed.
func (h *Hub) Events(after uint64) (*EventStream, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.admit(); err != nil {
		return nil, err
	}
	s := &EventStream{hub: h, queue: newQueue(max(h.options.RecentEvents, 1024), 1<<30, func(e Event) (int, uint64) { return len(e.Message), 1 })}
	for _, e := range h.events.after(after) {
		s.queue.push(e)
	}
	h.events.streams[s] = struct{}{}
	return s, nil
}

// Next waits for events; dropped says how many were lost before them. Errors: ctx's, or ErrClosed once everything was read.
func (s *EventStream) Next(ctx context.Context) (events []Event, dropped uint64, err error) {
	return s.queue.take(ctx)
}

// Close ends the stream. It may be called more than once.
func (s *EventStream) Close() {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	delete(s.hub.events.streams, s)
	s.queue.close()
}

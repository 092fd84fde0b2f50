package main

import (
	"context"
	"fmt"
	"maps"
	"sync/atomic"
	"time"

	"dmi/control"
	"dmi/serve"
	"dmi/tensor"
)

// lookout tells the operator what no part of the engine finds out by itself: that this process did not run for a while, that a producer finds no room or does not copy, that
// live subscribers do not keep up. It looks at what those parts count, and is in nobody's way.
type lookout struct {
	engine  *engine
	every   time.Duration
	stopped atomic.Int64 // ns in which this process did not run

	// Of its goroutine.
	told     map[string]time.Time // by code and session
	roomless map[string]uint64    // rows that found no room, by session
	lagging  map[string]int       // looks in a row
	slow     uint64               // rows and events that live subscribers lost
}

const (
	stoppedAfter = 3 * time.Second // without a look
	tellAgain    = time.Minute     // of the same, of the same session
)

func newLookout(e *engine) *lookout {
	return &lookout{engine: e, every: 500 * time.Millisecond, told: map[string]time.Time{}, roomless: map[string]uint64{}, lagging: map[string]int{}}
}

func (l *lookout) run(ctx context.Context) {
	tick := time.NewTicker(l.every)
	defer tick.Stop()
	for last := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := time.Now()
		if gap := now.Sub(last); gap >= stoppedAfter {
			l.stopped.Add(int64(gap))
			l.event("warning", "stopped", "", fmt.Sprintf("this engine did not run for %v: it was stopped (SIGSTOP, a debugger, a frozen container) or swapped out, or others have the processors; find out who. "+
				"What found no room in the rings meanwhile is dropped(ring_full), and was waited for in complete mode", gap.Round(100*time.Millisecond)))
		}
		last = now
		l.look(now)
	}
}

// event tells something; of the same session at most once in tellAgain.
func (l *lookout) event(level, code, session, message string) {
	key := code + " " + session
	if now := time.Now(); now.Sub(l.told[key]) >= tellAgain || code == "stopped" || level == "info" {
		l.told[key] = now
		l.engine.tellOf(level, code, session, message)
	}
}

func (l *lookout) look(now time.Time) {
	here := map[string]bool{}
	for _, s := range l.engine.intake.Sessions() {
		here[s.ID] = true
		l.room(&s)
		l.lag(&s)
	}
	maps.DeleteFunc(l.roomless, func(id string, _ uint64) bool { return !here[id] })
	maps.DeleteFunc(l.lagging, func(id string, _ int) bool { return !here[id] })
	maps.DeleteFunc(l.told, func(_ string, at time.Time) bool { return now.Sub(at) > tellAgain })
	if m := l.engine.hub.Metrics(); m.DroppedRows+m.DroppedEvents > l.slow {
		l.slow = m.DroppedRows + m.DroppedEvents
		l.event("warning", "subscriber", "", fmt.Sprintf("live subscribers do not keep up: %d rows and %d events were left out of what they are given, so far. What is stored lacks nothing; "+
			"read faster, or subscribe to fewer sites or to statistics alone", m.DroppedRows, m.DroppedEvents))
	}
}

// room tells of a session whose rows find none.
func (l *lookout) room(s *control.SessionStatus) {
	dropped := s.Rows[tensor.Dropped]
	rows := dropped[tensor.RingFull] + dropped[tensor.RecordsFull]
	before := l.roomless[s.ID]
	if l.roomless[s.ID] = rows; rows == before {
		return
	}
	l.event("warning", "overrun", s.ID, fmt.Sprintf("session %s captures more than is taken away: %d of its rows found no room so far, and are dropped. Capture less (dmi policy), give its rings more room, "+
		"or look for what holds the engine up: events store_write, store_lag, stalled, stopped", s.ID, rows))
}

// lag tells of a session whose records are not settled although the store takes what it is given: then its own pump does not copy.
func (l *lookout) lag(s *control.SessionStatus) {
	m := l.engine.store.Stats()
	held := s.Drain.Lag
	limit := seconds(l.engine.config.Store.LagAfter)
	switch {
	case held >= limit && m.Failure == "" && m.BufferBytes < m.BufferBound*3/4:
		if l.lagging[s.ID]++; l.lagging[s.ID] == 2 { // twice: not because this process was stopped
			l.event("warning", "stalled", s.ID, fmt.Sprintf("what session %s captured %v ago is not here yet, and the store has room: its process does not copy what it is asked for. Is it stopped, or its device hung? "+
				"Nobody else waits for it", s.ID, held.Round(100*time.Millisecond)))
		}
	case held < limit/2:
		if l.lagging[s.ID] >= 2 {
			l.event("info", "stalled", s.ID, fmt.Sprintf("what session %s captures comes again", s.ID))
		}
		delete(l.lagging, s.ID)
	}
}

// troubles are what the engine has counted of them.
func (e *engine) troubles() serve.Troubles {
	t := serve.Troubles{Stopped: time.Duration(e.lookout.stopped.Load())}
	t.Refused, t.Expelled = e.intake.Turned()
	return t
}

package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"

	"dmi/policy"
	"dmi/ring"
	"dmi/store"
	"dmi/tensor"
)

const (
	maxBarriers = 64
	maxAliases  = 64 // of one site
	maxFinishes = 1 << 16
)

func decodeLoose(body []byte, into any) error { return json.Unmarshal(body, into) }

// listen takes messages until bye (true), or until there are no more, for the reason returned.
func (x *session) listen() (bye bool, err error) {
	for {
		body, err := readMessage(x.conn)
		if err != nil {
			return false, err
		}
		kind, err := messageType(body)
		if err != nil {
			return false, err
		}
		if x.tape != nil {
			x.tape.Message(body)
		}
		if kind == "bye" {
			return true, decodeStrict(body, &byeMessage{})
		}
		if err := x.take(kind, body); err != nil {
			return false, err
		}
	}
}

func (x *session) take(kind string, body []byte) error {
	switch kind {
	case "sites":
		var m sitesMessage
		if err := decodeStrict(body, &m); err != nil {
			return err
		}
		return x.takeSites(&m)
	case "run":
		var m runMessage
		if err := decodeStrict(body, &m); err != nil {
			return err
		}
		if err := m.check("run"); err != nil {
			return err
		}
		return x.kept(x.putRun(&m.runBody))
	case "run_end":
		var m runEndMessage
		if err := decodeStrict(body, &m); err != nil {
			return err
		}
		return x.takeRunEnd(&m)
	case "requests":
		var m requestsMessage
		if err := decodeStrict(body, &m); err != nil {
			return err
		}
		return x.takeRequests(&m)
	case "request_end":
		var m requestEndMessage
		if err := decodeStrict(body, &m); err != nil {
			return err
		}
		return x.takeRequestEnd(&m)
	case "barrier":
		var m barrierMessage
		if err := decodeStrict(body, &m); err != nil {
			return err
		}
		return x.takeBarrier(&m)
	}
	return refuse("protocol", "no message is of type %.64q", kind)
}

// kept turns the store's refusal of something into an event: what the ring holds is worth more than a label.
func (x *session) kept(err error) error {
	switch {
	case errors.Is(err, store.ErrForeign):
		x.event("error", "foreign", err.Error())
	case err != nil:
		x.event("error", "store", err.Error())
	}
	return nil
}

func (x *session) putRun(r *runBody) error {
	run := r.run(x.number)
	if run.Begun.IsZero() && !x.hello.Resume { // on a reconnection the store knows better
		run.Begun = time.Now()
	}
	err := x.storeRun(run)
	if err == nil {
		x.mu.Lock()
		if len(x.runs) < maxFinishes {
			x.runs[r.ID] = true
		}
		x.mu.Unlock()
	}
	return err
}

func (x *session) takeRunEnd(m *runEndMessage) error {
	x.mu.Lock()
	known := x.runs[m.ID]
	delete(x.runs, m.ID)
	x.mu.Unlock()
	if !known && !(x.hello.Resume && runID.MatchString(m.ID)) { // one that began before a reconnection
		return refuse("protocol", "run_end.id is %.64q: no such run has begun", m.ID)
	}
	return x.kept(x.store.PutRun(tensor.Run{ID: m.ID, Session: x.number, Ended: orNow(m.Ended)}))
}

func orNow(ns int64) time.Time {
	if t := unixTime(ns); !t.IsZero() {
		return t
	}
	return time.Now()
}

// endRuns ends the runs that the producer left open.
func (x *session) endRuns() {
	x.mu.Lock()
	defer x.mu.Unlock()
	for id := range x.runs {
		_ = x.kept(x.store.PutRun(tensor.Run{ID: id, Session: x.number, Ended: time.Now()}))
	}
	clear(x.runs)
}

func (x *session) takeRequests(m *requestsMessage) error {
	requests := make([]tensor.Request, 0, len(m.Requests))
	for i := range m.Requests {
		b := &m.Requests[i]
		r, err := b.request(x.number, x.hello.Text)
		if err != nil {
			return err
		}
		if (b.Tokens != nil && r.Tokens == nil || b.Text != "" && r.Text == "" || b.Pieces != nil && r.Pieces == nil) && !x.stripped {
			x.stripped = true
			x.event("warning", "text", fmt.Sprintf("session %s was attached with text=%q and sends more than that of prompts: it is not kept", x.id, x.hello.Text))
		}
		if _, err := policy.ChoiceOf(r.Labels); err != nil {
			x.event("warning", "choice", fmt.Sprintf("request %s: %v; nothing of it is kept", r.ID, err))
		}
		x.ownNames(&r)
		requests = append(requests, r)
	}
	if len(requests) == 0 {
		return nil
	}
	return x.kept(x.store.PutRequests(requests))
}

func (x *session) takeRequestEnd(m *requestEndMessage) error {
	if m.Reason != "finished" && m.Reason != "aborted" && m.Reason != "error" {
		return refuse("protocol", "request_end.reason is %.64q: finished, aborted or error", m.Reason)
	}
	if m.Request == tensor.NoRequest {
		return refuse("protocol", "request_end.request is %d: no request has this number", m.Request)
	}
	err := x.store.PutRequests([]tensor.Request{{Key: x.key(m.Request), Ended: orNow(m.Ended), Reason: m.Reason}})
	x.mu.Lock()
	now := m.Step <= x.closed || len(x.finishes) >= maxFinishes
	if !now {
		x.finishes = append(x.finishes, *m)
	}
	x.mu.Unlock()
	if now && err == nil {
		err = x.store.FinishRequest(x.key(m.Request))
	}
	return x.kept(err)
}

func (x *session) key(request uint64) tensor.RequestKey {
	return tensor.RequestKey{Session: x.number, Request: request}
}

// stepClosed has the rows written of requests that ended with a step. The pipeline calls it.
func (x *session) stepClosed(_ int, step uint64) {
	x.mu.Lock()
	x.closed = max(x.closed, step)
	var due []uint64
	x.finishes = slices.DeleteFunc(x.finishes, func(m requestEndMessage) bool {
		if m.Step <= step {
			due = append(due, m.Request)
		}
		return m.Step <= step
	})
	x.mu.Unlock()
	for _, r := range due {
		_ = x.kept(x.store.FinishRequest(x.key(r)))
	}
}

// takeBarrier answers once everything published by now is durable. The producer has published the steps that it names before it asked, so
// waiting for what is there is waiting for them.
func (x *session) takeBarrier(m *barrierMessage) error {
	if len(m.ID) == 0 || len(m.ID) > 128 {
		return refuse("protocol", "barrier.id has %d bytes: 1 to 128 are needed", len(m.ID))
	}
	for lane := range m.Steps {
		if n, err := strconv.Atoi(lane); err != nil || n < 0 || n >= int(x.ring.Header().Lanes) {
			return refuse("protocol", "barrier.steps names lane %.64q: the ring has %d", lane, x.ring.Header().Lanes)
		}
	}
	if x.barriers.Add(1) > maxBarriers {
		x.barriers.Add(-1)
		return refuse("limit", "%d barriers are under way already", maxBarriers)
	}
	x.tasks.Add(1)
	go func() {
		defer x.tasks.Done()
		defer x.barriers.Add(-1)
		err := x.drained(context.Background()) // ends with the drain at the latest
		if err == nil {
			err = x.store.Barrier(context.Background()) // as long as the disk takes; the store ends it when it closes
		}
		answer := durableMessage{Type: "durable", ID: m.ID}
		if err != nil {
			answer.Error = err.Error()
		}
		x.out.answer(answer)
	}()
	return nil
}

// takeSites takes names for sites; the sites themselves come from the ring with the first step that has them, or now.
func (x *session) takeSites(m *sitesMessage) error {
	if err := x.addAliases(m.Aliases); err != nil {
		return err
	}
	x.mu.Lock()
	var renamed []tensor.Site
	for i := range x.sites {
		if names, ok := x.aliases[x.sites[i].Name]; ok && !slices.Equal(names, x.sites[i].Aliases) {
			x.sites[i].Aliases = names
			renamed = append(renamed, x.sites[i])
		}
	}
	x.mu.Unlock()
	if len(renamed) == 0 {
		return nil
	}
	x.applyGates() // which may know them by the new names
	return x.kept(x.store.AddSites(x.number, renamed))
}

func (x *session) addAliases(aliases map[string][]string) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.aliases)+len(aliases) > 2*ring.MaxSites {
		return refuse("limit", "aliases for more sites than a ring can have")
	}
	for name, list := range aliases {
		if len(name) > ring.SiteNameBytes || len(list) > maxAliases {
			return refuse("limit", "site %.64q has %d aliases: at most %d", name, len(list), maxAliases)
		}
		for _, a := range list {
			if a == "" || len(a) > 2*ring.SiteNameBytes || !utf8.ValidString(a) {
				return refuse("limit", "site %.64q: alias %.64q: 1 to %d bytes are possible", name, a, 2*ring.SiteNameBytes)
			}
		}
		x.aliases[name] = list
	}
	return nil
}

// newSites is called by the drain when a step counts sites that are new, before its records are kept.
func (x *session) newSites(more []ring.Site) error {
	x.mu.Lock()
	more = slices.DeleteFunc(slices.Clone(more), func(s ring.Site) bool { return int(s.ID) < len(x.sites) }) // known since hello
	x.mu.Unlock()
	if x.tape != nil && len(more) > 0 {
		x.tape.Sites(x.ring.RawSites(int(more[0].ID), len(more)))
	}
	err := x.addSites(more)
	x.applyGates()
	return err
}

func (x *session) addSites(more []ring.Site) error {
	x.mu.Lock()
	var fresh []tensor.Site
	for i := range more {
		t := more[i].Tensor()
		t.Aliases = x.aliases[t.Name]
		x.sites = append(x.sites, t)
		fresh = append(fresh, t)
	}
	x.mu.Unlock()
	if len(fresh) == 0 {
		return nil
	}
	return x.store.AddSites(x.number, fresh)
}

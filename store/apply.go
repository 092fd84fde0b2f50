package store

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"dmi/tensor"
)

// What a frame of the manifest changes, the same when it is appended and when it is read again after a crash. All with mu held.

func (s *Store) applySession(t tensor.Session) {
	state := s.sessions[t.Number]
	if state == nil {
		state = &sessionState{sites: map[uint32]tensor.Site{}, totals: map[uint32]*siteTotal{}}
		s.sessions[t.Number] = state
	}
	state.Session = t
	s.byID[t.ID] = t.Number
	s.dirty.sessions[t.Number] = true
}

func (s *Store) applySessionEnd(e sessionEnd) {
	state := s.sessions[e.Session]
	if state == nil {
		return
	}
	state.Ended = e.Ended
	for site := range state.sites {
		s.buffer.forget(streamKeyOfSite{e.Session, site})
	}
	s.dirty.sessions[e.Session] = true
	s.flight.ended(e.Session)
	for key := range s.books.open {
		if key.Session == e.Session {
			s.finished = append(s.finished, key)
		}
	}
	for key := range s.requests {
		if key.Session == e.Session && s.books.open[key] == nil {
			s.finished = append(s.finished, key)
		}
	}
}

func (s *Store) applySites(f sitesFrame) {
	state := s.sessions[f.Session]
	if state == nil {
		return
	}
	for _, site := range f.Sites {
		if old, known := state.sites[site.ID]; known {
			for _, a := range site.Aliases {
				if !slices.Contains(old.Aliases, a) {
					old.Aliases = append(slices.Clip(old.Aliases), a)
				}
			}
			site = old
		} else if site.Optional {
			state.optional = append(state.optional, site.ID)
			slices.Sort(state.optional)
		}
		state.sites[site.ID] = site
		s.dirty.sites[streamKeyOfSite{f.Session, site.ID}] = true
	}
}

func (s *Store) applyRun(r tensor.Run) {
	state := s.runs[r.ID]
	if state == nil {
		s.nextSeq++
		state = &runState{Run: tensor.Run{ID: r.ID}, seq: s.nextSeq}
		s.runs[r.ID] = state
	}
	old := &state.Run
	if r.Session != 0 {
		old.Session = r.Session
	}
	if r.Labels != nil {
		old.Labels = r.Labels
	}
	if r.Tags != nil {
		old.Tags = r.Tags
	}
	setTime(&old.Begun, r.Begun)
	setTime(&old.Ended, r.Ended)
	s.dirty.runs[r.ID] = true
}

func setTime(to *time.Time, from time.Time) {
	if !from.IsZero() {
		*to = from
	}
}

func (s *Store) applyRequests(frames []requestFrame) {
	for _, f := range frames {
		key := tensor.RequestKey{Session: f.Session, Request: f.Number}
		state := s.requests[key]
		if state == nil {
			s.nextSeq++
			state = &requestState{seq: s.nextSeq}
			state.Key = key
			s.requests[key] = state
		}
		s.touch(key) // and below, where its run may be another
		old, r := &state.Request, &f.Request
		for _, field := range [...]struct {
			to   *string
			from string
		}{{&old.ID, r.ID}, {&old.Run, r.Run}, {&old.Text, r.Text}, {&old.Reason, r.Reason}} {
			if field.from != "" {
				*field.to = field.from
			}
		}
		if r.Labels != nil {
			old.Labels = r.Labels
		}
		if r.Tags != nil {
			old.Tags = r.Tags
		}
		if r.Tokens != nil {
			old.Tokens, old.Pieces = r.Tokens, r.Pieces
		}
		if r.Path != nil {
			old.Path = r.Path
		}
		old.Hidden = old.Hidden || r.Hidden
		setTime(&old.Begun, r.Begun)
		setTime(&old.Ended, r.Ended)
		s.touch(key)
		s.dirty.requests[key] = true
		if !old.Ended.IsZero() {
			s.finished = append(s.finished, key)
		}
	}
}

func (s *Store) applyStep(at position, step *Step, opened []opening) {
	k := laneKey{step.Session, step.Lane}
	s.lanes[k] = max(s.lanes[k], step.First+uint64(step.Count))
	s.dirty.lanes[k] = true
	for _, o := range opened {
		s.books.produced[step.Session] += o.rows*uint64(len(s.required(step.Session, o.sites))) + o.loose
	}
	s.dirty.produced[step.Session] = true
	s.followStep(at, step.Session, opened)
}

func (s *Store) followStep(at position, session uint32, opened []opening) {
	for _, o := range opened {
		s.flight.opened(at, session, o, s.required(session, o.sites))
	}
}

// required are the first n sites of a session less the optional ones.
func (s *Store) required(session uint32, n uint32) []uint32 {
	sites := make([]uint32, 0, n)
	state := s.sessions[session]
	for i := range n {
		if state != nil && len(state.optional) > 0 {
			if _, optional := slices.BinarySearch(state.optional, i); optional {
				continue
			}
		}
		sites = append(sites, i)
	}
	return sites
}

func (s *Store) applyBook(at position, entries []tensor.Entry) {
	for i := range entries {
		e := &entries[i]
		if free := s.freeRows(e); free > 0 {
			s.books.produced[e.Key.Session] += free
			s.dirty.produced[e.Key.Session] = true
		}
		s.enter(*e)
	}
	s.followBook(at, entries)
}

// freeRows are those of an entry that no step owed: at optional sites, and of the prefix cache.
func (s *Store) freeRows(e *tensor.Entry) uint64 {
	if e.Outcome == tensor.Cached {
		return rowsOf(e)
	}
	state := s.sessions[e.Key.Session]
	if state == nil || len(state.optional) == 0 {
		return 0
	}
	return uint64(e.Count) * uint64(len(intersect(e.Sites, state.optional)))
}

func (s *Store) followBook(at position, entries []tensor.Entry) {
	for i := range entries {
		s.flight.booked(at, &entries[i], rowsOf(&entries[i])-s.freeRows(&entries[i]))
	}
}

func (s *Store) enter(e tensor.Entry) {
	s.weigh(&e)
	s.touch(e.Key)
	s.books.add(e)
	s.dirty.sums[totalOf(&e)] = true
}

// weigh adds up how many bytes the rows that were not captured would have had. How long a row is, the sites' latest rows say, looked up now and then: of attention it grows.
func (s *Store) weigh(e *tensor.Entry) {
	state := s.sessions[e.Key.Session]
	if e.Outcome == tensor.Captured || state == nil {
		return
	}
	const every = 64
	set := s.books.intern(e.Key.Session, e.Sites)
	if set.weighed%every == 0 {
		set.weight = 0
		for _, site := range set.sites {
			if t := state.totals[site]; t != nil {
				latest := s.buffer.total(e.Key.Session, t, false)
				set.weight += uint64(tensor.RowBytes(tensor.Full, latest.DType, latest.Shape))
			}
		}
	}
	set.weighed++
	s.metrics.OtherBytes[e.Outcome] += uint64(e.Count) * set.weight
}

func (s *Store) applyCorrect(entries []tensor.Entry) {
	for _, e := range entries {
		if a := s.books.open[e.Key]; a != nil {
			for _, l := range a.lines {
				s.dirty.sums[totalOf(&l.Entry)] = true
			}
		}
		s.dirty.sums[totalOf(&e)] = true
		s.touch(e.Key)
		s.books.correct(e)
	}
}

func (s *Store) applyAdopt(entries []tensor.Entry) {
	for _, e := range entries {
		s.books.produced[e.Key.Session] += rowsOf(&e)
		s.dirty.produced[e.Key.Session] = true
		s.enter(e)
	}
}

// replay takes in a frame read from the manifest: all of it, or where the catalogue has it already, only what recovery needs to know.
func (s *Store) replay(at position, kind frameKind, payload []byte, apply bool) error {
	decode := func(v any) error {
		if err := json.Unmarshal(payload, v); err != nil {
			return fmt.Errorf("store: manifest file %d, frame at %d: %w: %w", at.file, at.offset, err, ErrCorrupt)
		}
		return nil
	}
	wrong := func(err error) error {
		if err == nil {
			return nil
		}
		return fmt.Errorf("store: manifest file %d, frame at %d: %w: %w", at.file, at.offset, err, ErrCorrupt)
	}
	switch kind {
	case frameSession:
		var t tensor.Session
		if err := decode(&t); err != nil || !apply {
			return err
		}
		for _, raw := range [...]*json.RawMessage{&t.Model, &t.Versions, &t.Process} { // there was nothing
			if string(*raw) == "null" {
				*raw = nil
			}
		}
		s.applySession(t)
	case frameSessionEnd:
		var e sessionEnd
		if err := decode(&e); err != nil {
			return err
		}
		s.flight.ended(e.Session)
		if apply {
			s.applySessionEnd(e)
		}
	case frameSites:
		var f sitesFrame
		if err := decode(&f); err != nil || !apply {
			return err
		}
		s.applySites(f)
	case frameRun:
		var r tensor.Run
		if err := decode(&r); err != nil || !apply {
			return err
		}
		if err := s.loadRun(r.ID); err != nil {
			return err
		}
		s.applyRun(r)
	case frameRequests:
		var f []requestFrame
		if err := decode(&f); err != nil || !apply {
			return err
		}
		for _, r := range f {
			if err := s.loadRequest(tensor.RequestKey{Session: r.Session, Request: r.Number}); err != nil {
				return err
			}
		}
		s.applyRequests(f)
	case frameStep:
		step, err := decodeStep(payload)
		if err != nil {
			return wrong(err)
		}
		opened, err := openings(&step)
		if err != nil {
			return wrong(err)
		}
		if apply {
			s.applyStep(at, &step, opened)
		} else {
			s.followStep(at, step.Session, opened)
		}
	case frameBook, frameCorrect, frameAdopt:
		entries, err := decodeEntries(payload)
		if err != nil {
			return wrong(err)
		}
		return s.replayEntries(at, kind, entries, apply)
	case frameExpire:
		entries, err := decodeExpired(payload)
		if err != nil {
			return wrong(err)
		}
		return s.replayEntries(at, kind, entries, apply)
	case frameForget:
		var f []forgetFrame
		if err := decode(&f); err != nil || !apply {
			return err
		}
		for _, r := range f {
			if err := s.loadRequest(tensor.RequestKey{Session: r.Session, Request: r.Number}); err != nil {
				return err
			}
		}
		s.applyForget(f)
	case frameReplace:
		r, err := decodeReplacement(payload)
		if err != nil {
			return wrong(err)
		}
		s.replayReplace(at, r)
	case frameSync:
		p, err := decodeSync(payload)
		if err != nil {
			return wrong(err)
		}
		s.flight.durable(p)
	default:
		return wrong(fmt.Errorf("kind %d", kind))
	}
	return nil
}

func (s *Store) replayEntries(at position, kind frameKind, entries []tensor.Entry, apply bool) error {
	switch kind {
	case frameBook:
		if apply {
			s.applyBook(at, entries)
		} else {
			s.followBook(at, entries)
		}
	case frameAdopt:
		if apply {
			s.applyAdopt(entries)
		}
	case frameCorrect, frameExpire:
		if apply {
			keys := map[tensor.RequestKey]bool{}
			for _, e := range entries {
				keys[e.Key] = true
			}
			for key := range maps.Keys(keys) {
				if err := s.loadAccount(key); err != nil {
					return err
				}
			}
			if kind == frameCorrect {
				s.applyCorrect(entries)
			} else {
				s.applyExpire(entries)
			}
		}
		s.flight.corrected(entries)
	}
	return nil
}

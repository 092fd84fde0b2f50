package store

import (
	"cmp"
	"fmt"
	"slices"

	"dmi/tensor"
)

// What is known of sessions, runs and requests: the catalogue, and in memory what it does not have yet.

// Sessions lists them in the order of their numbers.
func (s *Store) Sessions() ([]tensor.Session, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sessions := make([]tensor.Session, 0, len(s.sessions))
	for _, t := range s.sessions {
		sessions = append(sessions, t.Session)
	}
	slices.SortFunc(sessions, func(a, b tensor.Session) int { return cmp.Compare(a.Number, b.Number) })
	return sessions, nil
}

// Sites lists a session's sites by ID.
func (s *Store) Sites(session uint32) ([]tensor.Site, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.sessions[session]
	if t == nil {
		return nil, nil
	}
	sites := make([]tensor.Site, 0, len(t.sites))
	for _, site := range t.sites {
		sites = append(sites, site)
	}
	slices.SortFunc(sites, func(a, b tensor.Site) int { return cmp.Compare(a.ID, b.ID) })
	return sites, nil
}

// SiteTotals tells what was captured of a session's sites, by ID; sites of which nothing was are left out.
func (s *Store) SiteTotals(session uint32) ([]SiteTotal, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.sessions[session]
	if t == nil {
		return nil, nil
	}
	totals := make([]SiteTotal, 0, len(t.totals))
	for _, total := range t.totals {
		if total := s.buffer.total(session, total, false); total.Rows > 0 {
			totals = append(totals, total)
		}
	}
	slices.SortFunc(totals, func(a, b SiteTotal) int { return cmp.Compare(a.Site, b.Site) })
	return totals, nil
}

// Runs lists them in the order in which they became known.
func (s *Store) Runs() ([]tensor.Run, error) {
	s.mu.Lock()
	states := make(map[string]runState, len(s.runs))
	for id, r := range s.runs {
		states[id] = *r
	}
	s.mu.Unlock()
	committed, err := s.cat.runs("")
	if err != nil {
		return nil, explain("list runs", err)
	}
	for _, r := range committed {
		if _, newer := states[r.ID]; !newer {
			states[r.ID] = *r
		}
	}
	list := make([]runState, 0, len(states))
	for _, r := range states {
		list = append(list, r)
	}
	slices.SortFunc(list, func(a, b runState) int { return cmp.Compare(a.seq, b.seq) })
	runs := make([]tensor.Run, len(list))
	for i := range list {
		runs[i] = list[i].Run
	}
	return runs, nil
}

// Requests lists requests in the order in which they became known, without Tokens and Text.
func (s *Store) Requests(f RequestFilter) ([]tensor.Request, error) {
	var after int64
	if f.After != "" {
		r, err := s.requestNamed(f.After)
		if err != nil {
			return nil, err
		}
		if r == nil {
			return nil, fmt.Errorf("store: list requests after %q: there is none of that id", f.After)
		}
		after = r.seq
	}
	s.mu.Lock()
	states := make(map[tensor.RequestKey]requestState, len(s.requests))
	for key, r := range s.requests {
		states[key] = *r
	}
	s.mu.Unlock()
	where, args := "WHERE seq>?", []any{after}
	if f.Session != 0 {
		where, args = where+" AND session=?", append(args, f.Session)
	}
	if f.Run != "" {
		where, args = where+" AND run=?", append(args, f.Run)
	}
	if !f.Hidden {
		where += " AND NOT hidden"
	}
	// Each of those in memory may be in the way of one of the catalogue's that it has made obsolete.
	switch {
	case f.Latest > 0:
		where, args = where+" ORDER BY seq DESC LIMIT ?", append(args, f.Latest+len(states))
	case f.Limit > 0:
		where, args = where+" ORDER BY seq LIMIT ?", append(args, f.Limit+len(states))
	}
	committed, err := s.cat.requests(false, where, args...)
	if err != nil {
		return nil, explain("list requests", err)
	}
	for _, r := range committed {
		if _, newer := states[r.Key]; !newer {
			states[r.Key] = *r
		}
	}
	list := make([]requestState, 0, len(states))
	for _, r := range states {
		if r.seq > after && (f.Session == 0 || r.Key.Session == f.Session) && (f.Run == "" || r.Run == f.Run) && (f.Hidden || !r.Hidden) {
			list = append(list, r)
		}
	}
	slices.SortFunc(list, func(a, b requestState) int { return cmp.Compare(a.seq, b.seq) })
	if f.Latest > 0 {
		list = list[max(0, len(list)-f.Latest):]
	}
	if f.Limit > 0 {
		list = list[:min(len(list), f.Limit)]
	}
	requests := make([]tensor.Request, len(list))
	for i := range list {
		requests[i] = list[i].Request
		requests[i].Tokens, requests[i].Text, requests[i].Pieces = nil, "", nil
	}
	return requests, nil
}

// RequestByID finds a request, whole; the latest where several sessions used the same id.
func (s *Store) RequestByID(id string) (tensor.Request, bool, error) {
	r, err := s.requestNamed(id)
	if err != nil || r == nil {
		return tensor.Request{}, false, err
	}
	return r.Request, true, nil
}

func (s *Store) requestNamed(id string) (*requestState, error) {
	var best *requestState
	consider := func(r *requestState) {
		if r.ID == id && (best == nil || r.seq >= best.seq) {
			best = r
		}
	}
	s.mu.Lock()
	newer := map[tensor.RequestKey]bool{}
	for key, r := range s.requests {
		if r.ID == id {
			clone := *r
			consider(&clone)
			newer[key] = true
		}
	}
	s.mu.Unlock()
	committed, err := s.cat.requests(true, "WHERE id=?", id)
	if err != nil {
		return nil, explain("look up request "+id, err)
	}
	for _, r := range committed {
		if !newer[r.Key] {
			consider(r)
		}
	}
	return best, nil
}

// Entries are the books of a request, or with key.Request == tensor.NoRequest those of a session's rows that are nobody's.
func (s *Store) Entries(key tensor.RequestKey) ([]tensor.Entry, error) {
	var byID map[int64]line
	var stale map[int64]bool
	var committed []*line
	for drops, again := uint64(0), true; again; { // a correction that comes in between, and is committed, would be seen on one side only
		s.mu.Lock()
		byID, stale, drops = map[int64]line{}, s.books.stale(), s.books.drops
		if a := s.books.open[key]; a != nil {
			for _, l := range a.lines {
				byID[l.id] = *l
			}
		}
		s.mu.Unlock()
		var err error
		if committed, err = s.cat.lines(key, s.setByID); err != nil {
			return nil, explain("look up the books", err)
		}
		s.mu.Lock()
		again = drops != s.books.drops
		s.mu.Unlock()
	}
	for _, l := range committed {
		if _, newer := byID[l.id]; !newer && !stale[l.id] {
			byID[l.id] = *l
		}
	}
	lines := make([]line, 0, len(byID))
	for _, l := range byID {
		lines = append(lines, l)
	}
	slices.SortFunc(lines, func(a, b line) int {
		return cmp.Or(cmp.Compare(a.First, b.First), cmp.Compare(a.Attempt, b.Attempt), cmp.Compare(a.id, b.id))
	})
	entries := make([]tensor.Entry, len(lines))
	for i := range lines {
		entries[i] = lines[i].Entry
	}
	return entries, nil
}

func (s *Store) setByID(id int64) *siteSet {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.books.setByID[id]
}

// loadRun, loadRequest and loadAccount bring what the catalogue has into memory, where it is not yet.
func (s *Store) loadRun(id string) error {
	s.mu.Lock()
	_, known := s.runs[id]
	s.mu.Unlock()
	if known {
		return nil
	}
	found, err := s.cat.runs("WHERE id=?", id)
	if err != nil || len(found) == 0 {
		return err
	}
	s.mu.Lock()
	s.runs[id] = found[0]
	s.mu.Unlock()
	return nil
}

func (s *Store) loadRequest(key tensor.RequestKey) error {
	s.mu.Lock()
	_, known := s.requests[key]
	s.mu.Unlock()
	if known {
		return nil
	}
	found, err := s.cat.requests(true, "WHERE session=? AND request=?", key.Session, int64(key.Request))
	if err != nil || len(found) == 0 {
		return err
	}
	s.mu.Lock()
	s.requests[key] = found[0]
	s.mu.Unlock()
	return nil
}

// loadAccount makes sure that every line of a request's books is in memory.
func (s *Store) loadAccount(key tensor.RequestKey) error {
	committed, err := s.cat.lines(key, s.setByID)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.books.account(key)
	have := map[int64]bool{}
	for _, l := range a.lines {
		have[l.id] = true
	}
	for _, l := range committed {
		if !have[l.id] && !s.books.gone(l.id) {
			a.lines = append(a.lines, l)
		}
	}
	return nil
}

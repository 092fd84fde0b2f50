package store

import "dmi/tensor"

// marks are for readers that keep what they made of the books: as long as a request or a run has the mark that it had before they
// read, what they made holds. A mark that was taken away does not come back.
type marks struct {
	last     uint64
	requests map[tensor.RequestKey]requestMark
	runs     map[string]uint64
	none     bool // another process may change the store
}

type requestMark struct {
	mark uint64
	run  string
}

// maxMarks bounds each kind; at the bound any one makes room, and who had it reads again.
const maxMarks = 1 << 17

func newMarks() marks {
	return marks{requests: map[tensor.RequestKey]requestMark{}, runs: map[string]uint64{}}
}

func makeRoom[K comparable, V any](in map[K]V) {
	for some := range in {
		if len(in) < maxMarks {
			return
		}
		delete(in, some)
	}
}

// MarkRequest is the mark of what Entries tells of a request of a run. 0: not to be kept.
func (s *Store) MarkRequest(key tensor.RequestKey, run string) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := &s.marks
	if m.none {
		return 0
	}
	if known, ok := m.requests[key]; ok && known.run == run {
		return known.mark
	}
	makeRoom(m.requests)
	m.last++
	m.requests[key] = requestMark{m.last, run}
	return m.last
}

// MarkRun is the mark of a run's requests, as Requests lists them, and of what Entries tells of them. 0: not to be kept.
func (s *Store) MarkRun(id string) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := &s.marks
	if m.none {
		return 0
	}
	if known, ok := m.runs[id]; ok {
		return known
	}
	makeRoom(m.runs)
	m.last++
	m.runs[id] = m.last
	return m.last
}

// touch takes the marks of a request of which something is changing, and of its run. With mu held.
func (s *Store) touch(key tensor.RequestKey) {
	m := &s.marks
	had, marked := m.requests[key]
	delete(m.requests, key)
	if len(m.runs) == 0 || key.Request == tensor.NoRequest {
		return
	}
	if r := s.requests[key]; r != nil {
		delete(m.runs, r.Run)
	} else if marked && had.run != "" {
		delete(m.runs, had.run)
	} else { // only the catalogue knows its run
		clear(m.runs)
	}
}

package ring

import "sync"

// Stage allocates the staging region, a ring of which leases may come back in any order. Methods are safe for concurrent use.
type Stage struct {
	mu         sync.Mutex
	mem        []byte
	head, tail uint64 // virtual
	leases     []*Lease
	starved    bool
}

// Lease is a piece of staging in use. It has as many holders as Retain was called, and one more.
type Lease struct {
	stage   *Stage
	end     uint64
	holders int
	At      uint64 // in the staging region
	Bytes   []byte
}

func newStage(mem []byte) *Stage { return &Stage{mem: mem} }

// Capacity is the most that Take can ever give.
func (s *Stage) Capacity() uint64 { return uint64(len(s.mem)) }

// Take leases bytes that do not wrap, or returns nil; then Give will one time report that somebody was left waiting.
func (s *Stage) Take(bytes uint64) *Lease {
	s.mu.Lock()
	defer s.mu.Unlock()
	capacity := uint64(len(s.mem))
	size := aligned(bytes)
	start := s.head
	if at := start % capacity; at+size > capacity {
		start += capacity - at
	}
	if start+size-s.tail > capacity {
		if s.head != s.tail || size > capacity {
			s.starved = true
			return nil
		}
		s.tail = start // empty: the place at the end that is too small is in nobody's way
	}
	l := &Lease{stage: s, end: start + size, holders: 1, At: start % capacity}
	l.Bytes = s.mem[l.At : l.At+bytes : l.At+bytes]
	s.head = l.end
	s.leases = append(s.leases, l)
	return l
}

// Retain adds a holder.
func (l *Lease) Retain() {
	l.stage.mu.Lock()
	l.holders++
	l.stage.mu.Unlock()
}

// Give ends one holder's use. True where somebody waits for room.
func (l *Lease) Give() bool {
	s := l.stage
	s.mu.Lock()
	defer s.mu.Unlock()
	l.holders--
	if l.holders < 0 {
		panic("ring: a lease of staging was given back twice")
	}
	n := 0
	for n < len(s.leases) && s.leases[n].holders == 0 {
		s.tail = s.leases[n].end
		n++
	}
	if n == 0 {
		return false
	}
	clear(s.leases[:n])
	s.leases = s.leases[n:]
	if len(s.leases) == 0 {
		s.tail, s.leases = s.head, nil
	}
	starved := s.starved
	s.starved = false
	return starved
}

// Used is the bytes leased, and the capacity.
func (s *Stage) Used() (used, capacity uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.head - s.tail, uint64(len(s.mem))
}

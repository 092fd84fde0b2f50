package ring

import (
	"sync"
	"sync/atomic"
)

// Stage allocates the staging region, a ring of which leases may come back in any order. Methods are safe for concurrent use.
type Stage struct {
	mu         sync.Mutex
	mem        []byte
	head, tail uint64 // virtual
	leases     []*Lease
	starved    bool
}

// Lease is a piece of staging in use. It has as many holders as Retain was told of, and one more.
type Lease struct {
	stage   *Stage
	end     uint64
	holders atomic.Int32
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
	l := &Lease{stage: s, end: start + size, At: start % capacity}
	l.holders.Store(1)
	l.Bytes = s.mem[l.At : l.At+bytes : l.At+bytes]
	s.head = l.end
	s.leases = append(s.leases, l)
	return l
}

// Retain adds holders. The caller is one.
func (l *Lease) Retain(holders int) { l.holders.Add(int32(holders)) }

// Give ends one holder's use. True where somebody waits for room.
func (l *Lease) Give() bool {
	// Each holder's reads are before its decrement, and so before the last one's, behind which Take may lend the bytes anew.
	left := l.holders.Add(-1)
	if left < 0 {
		panic("ring: a lease of staging was given back twice")
	}
	if left > 0 {
		return false
	}
	s := l.stage
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for n < len(s.leases) && s.leases[n].holders.Load() == 0 {
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

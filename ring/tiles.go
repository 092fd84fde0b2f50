package ring

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
)

const maxTiles = 1 << 16 // ranges in use or waiting behind one; honest producers have fewer than record slots

// Tiles follows the ranges of a byte ring: claimed when their record is read, freed when we have their bytes, in any order. The tail,
// below which the producer may write again, moves over what is freed without a hole.
//
// The rejected simpler design frees in the order of claims: a lane that is slow to publish would then hold up what others freed.
// Methods are safe for concurrent use.
type Tiles struct {
	name     string
	capacity uint64
	wraps    bool

	mu   sync.Mutex
	tail atomic.Uint64 // written under mu
	word *uint64       // the producer's view of tail
	list []tile        // sorted by start, none overlapping, all at or above tail
}

type tile struct {
	start, end uint64
	free       bool
}

func newTiles(name string, capacity uint64, wraps bool, word *uint64) *Tiles {
	t := &Tiles{name: name, capacity: capacity, wraps: wraps, word: word}
	t.tail.Store(atomic.LoadUint64(word))
	return t
}

func aligned(n uint64) uint64 { return (n + PayloadAlign - 1) / PayloadAlign * PayloadAlign }

// Claim takes note of a range of a record, or says why it cannot be one. The bytes up to the next multiple of the alignment go with it.
func (t *Tiles) Claim(at, bytes uint64) error {
	if bytes == 0 {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	tail := t.tail.Load()
	switch {
	case at%PayloadAlign != 0:
		return fmt.Errorf("ring: record.payload is %d: a multiple of %d is needed", at, PayloadAlign)
	case bytes > t.capacity:
		return fmt.Errorf("ring: record.payload_bytes is %d, and the %s ring has %d", bytes, t.name, t.capacity)
	case at < tail || at-tail > t.capacity-aligned(bytes):
		return fmt.Errorf("ring: record.payload is %d: its %d bytes are not within the %d of the %s ring from %d on", at, bytes, t.capacity, t.name, tail)
	case !t.wraps && at%t.capacity+bytes > t.capacity:
		return fmt.Errorf("ring: record.payload is %d: its %d bytes cross the end of the %s ring", at, bytes, t.name)
	case len(t.list) >= maxTiles:
		return fmt.Errorf("ring: more than %d ranges of the %s ring are in use", maxTiles, t.name)
	}
	end := at + aligned(bytes)
	i := len(t.list)
	for i > 0 && t.list[i-1].start >= end {
		i--
	}
	if i > 0 && t.list[i-1].end > at {
		return fmt.Errorf("ring: record.payload is %d: its %d bytes overlap another record's, %d to %d", at, bytes, t.list[i-1].start, t.list[i-1].end)
	}
	t.list = slices.Insert(t.list, i, tile{start: at, end: end})
	return nil
}

// Free gives back a claimed range.
func (t *Tiles) Free(at, bytes uint64) {
	if bytes == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	i, found := slices.BinarySearchFunc(t.list, at, func(x tile, at uint64) int {
		switch {
		case x.start < at:
			return -1
		case x.start > at:
			return 1
		}
		return 0
	})
	if !found {
		panic(fmt.Sprintf("ring: free of %d in the %s ring, which is not claimed", at, t.name))
	}
	t.list[i].free = true
	n, tail := 0, t.tail.Load()
	for n < len(t.list) && t.list[n].free && t.list[n].start == tail {
		tail = t.list[n].end
		n++
	}
	if n > 0 {
		t.list = t.list[n:]              // nothing is moved: there may be a record for each of thousands of sites
		atomic.StoreUint64(t.word, tail) // pairs with every lane's acquire on shortage
		t.tail.Store(tail)               // behind it: who sees that a range is passed gives its record back, and an engine after us must not find it ahead of the tail
		return
	}
	// Behind a hole: neighbours become one, so that what waits is bounded by the holes.
	if i+1 < len(t.list) && t.list[i+1].free && t.list[i].end == t.list[i+1].start {
		t.list[i].end = t.list[i+1].end
		t.list = slices.Delete(t.list, i+1, i+2)
	}
	if i > 0 && t.list[i-1].free && t.list[i-1].end == t.list[i].start {
		t.list[i-1].end = t.list[i].end
		t.list = slices.Delete(t.list, i, i+1)
	}
}

// Passed reports whether the tail has moved to end or over it.
func (t *Tiles) Passed(end uint64) bool { return t.tail.Load() >= end }

// Used is the bytes from the tail to the end of the last range known, and the capacity.
func (t *Tiles) Used() (used, capacity uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := len(t.list); n > 0 {
		used = t.list[n-1].end - t.tail.Load()
	}
	return used, t.capacity
}

package store

import (
	"math/bits"
	"sync"
)

// memory lends room for rows again and again: fresh memory costs as much again as what is put into it. Safe for concurrent use.
type memory struct {
	mu    sync.Mutex
	free  [memoryClasses][][]byte
	idle  int64 // bytes in free
	spare int64 // bytes that free may have; more is left to the garbage collector
}

const (
	smallestMemory = 4 << 10
	memoryClasses  = 1 + 4*12 // up to 16 MiB
)

// memoryClass is the smallest size, of four between each power of two and the next, that n bytes fit into, and its number.
func memoryClass(n int) (class, size int) {
	if n <= smallestMemory {
		return 0, smallestMemory
	}
	power := bits.Len(uint(n - 1))
	base, step := 1<<(power-1), 1<<(power-3)
	quarter := (n - base + step - 1) / step
	return 4*(power-1-bits.Len(smallestMemory-1)) + quarter, base + quarter*step
}

// roomOf is how many bytes take has room for when it is asked for n.
func roomOf(n int) int {
	class, size := memoryClass(n)
	if n < smallestMemory || class >= memoryClasses { // little, of many streams perhaps, or very much
		return n
	}
	return size
}

// take is empty, and has room for n bytes at least, for whoever asked to use until it is given back.
func (m *memory) take(n int) []byte {
	class, size := memoryClass(n)
	if n < smallestMemory || class >= memoryClasses {
		return make([]byte, 0, n)
	}
	m.mu.Lock()
	list := m.free[class]
	if len(list) == 0 {
		m.mu.Unlock() // to make it, and clear it, takes its time
		return make([]byte, 0, size)
	}
	defer m.mu.Unlock()
	room := list[len(list)-1]
	m.free[class] = list[:len(list)-1]
	m.idle -= int64(size)
	return room
}

// give takes back what nobody can see any more.
func (m *memory) give(room []byte) {
	class, size := memoryClass(cap(room))
	if class >= memoryClasses || cap(room) != size {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.idle+int64(size) <= m.spare {
		m.free[class] = append(m.free[class], room[:0])
		m.idle += int64(size)
	}
}

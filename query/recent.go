package query

import (
	"container/list"
	"sync"

	"dmi/store"
	"dmi/tensor"
)

// What is remembered at most: of rows their statistics, 48 bytes each; of thumbnails their pixels, 4 bytes each.
const (
	maxSummedRows = 1 << 20
	maxPixels     = 8 << 20
)

// chunkKey names a chunk whose rows do not change any more.
type chunkKey struct {
	request     tensor.RequestKey
	site        uint32
	attempt     uint16
	level       tensor.Level
	first, rows uint32
	lastStep    uint64
}

func chunkKeyOf(ref store.ChunkRef) chunkKey {
	return chunkKey{ref.Key, ref.Site, ref.Attempt, ref.Level, ref.First, ref.Rows, ref.LastStep}
}

// recent remembers slices of chunks whose rows do not change any more: those asked for last, to a bound on the elements of all.
type recent[K comparable, V any] struct {
	most int

	mu    sync.Mutex
	held  int
	byKey map[K]*list.Element
	order list.List // of recentSlice, the one used last in front
}

type recentSlice[K comparable, V any] struct {
	key    K
	values []V // not to be modified
}

func (r *recent[K, V]) get(key K) ([]V, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	at, known := r.byKey[key]
	if !known {
		return nil, false
	}
	r.order.MoveToFront(at)
	return at.Value.(recentSlice[K, V]).values, true
}

func (r *recent[K, V]) put(key K, values []V) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, known := r.byKey[key]; known || len(values) > r.most {
		return
	}
	if r.byKey == nil {
		r.byKey = map[K]*list.Element{}
	}
	r.byKey[key] = r.order.PushFront(recentSlice[K, V]{key, values})
	for r.held += len(values); r.held > r.most; {
		oldest := r.order.Remove(r.order.Back()).(recentSlice[K, V])
		delete(r.byKey, oldest.key)
		r.held -= len(oldest.values)
	}
}

package query

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"dmi/store"
	"dmi/tensor"
)

// What lists say of a request or a run is kept until its books change: listing costs what is listed, not what was captured.

// sum is what was captured of a request.
type sum struct {
	positions uint32 // rows of the token space
	rows      uint64
	bytes     uint64
}

// sumKey names a sum of books: of the request's own, or of those that its path, as text, leads through.
type sumKey struct {
	request tensor.RequestKey
	path    string
}

// runSum is what was captured of a run.
type runSum struct {
	requests int // that people see
	rows     uint64
	bytes    uint64
}

// maxKept bounds how many sums are kept, of requests and of runs: about 100 bytes each. At the bound any one makes room.
const maxKept = 1 << 17

// kept are sums, each with the marks that its books had before they were read. The zero value is ready.
type kept[K comparable, V any] struct {
	mu    sync.Mutex
	byKey map[K]marked[V]
}

type marked[V any] struct {
	marks []uint64
	value V
}

// get gives what is kept under the marks, or makes it.
func (k *kept[K, V]) get(key K, marks []uint64, make func() (V, error)) (V, error) {
	k.mu.Lock()
	had, ok := k.byKey[key]
	k.mu.Unlock()
	if ok && slices.Equal(had.marks, marks) {
		return had.value, nil
	}
	value, err := make()
	if err != nil || slices.Contains(marks, 0) {
		return value, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.byKey == nil {
		k.byKey = map[K]marked[V]{}
	}
	for some := range k.byKey {
		if len(k.byKey) < maxKept {
			break
		}
		delete(k.byKey, some)
	}
	k.byKey[key] = marked[V]{marks, value}
	return value, nil
}

func (e *Engine) sumOf(ctx context.Context, r tensor.Request) (sum, error) {
	parts, err := partsOf(r)
	if err != nil {
		return sum{}, err
	}
	key := sumKey{request: r.Key}
	if len(r.Path) > 0 {
		key.path = fmt.Sprint(r.Path)
	}
	marks := make([]uint64, len(parts))
	for i, p := range parts {
		marks[i] = e.source.MarkRequest(p.key, r.Run)
	}
	return e.requests.get(key, marks, func() (sum, error) {
		var all sum
		sites, err := e.source.Sites(r.Key.Session)
		if err != nil {
			return all, fmt.Errorf("query: sites of request %s: %w", r.ID, err)
		}
		bySite := map[uint32]*siteSum{}
		if all.positions, err = e.addSums(ctx, bySite, r, sites); err != nil {
			return all, err
		}
		for _, s := range bySite {
			all.rows += s.rows
			all.bytes += s.bytes
		}
		return all, nil
	})
}

func (e *Engine) sumOfRun(ctx context.Context, id string) (runSum, error) {
	return e.runs.get(id, []uint64{e.source.MarkRun(id)}, func() (runSum, error) {
		var all runSum
		requests, err := e.source.Requests(store.RequestFilter{Run: id, Hidden: true})
		if err != nil {
			return all, fmt.Errorf("query: list the requests of run %s: %w", id, err)
		}
		for _, r := range requests {
			if !r.Hidden {
				all.requests++
			}
			if len(r.Path) > 0 { // its rows are those of hidden ones
				continue
			}
			own, err := e.sumOf(ctx, r)
			if err != nil {
				return all, err
			}
			all.rows += own.rows
			all.bytes += own.bytes
		}
		return all, nil
	})
}

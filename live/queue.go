package live

import (
	"context"
	"sync"
)

// queue is a bounded queue with one reader. What does not fit pushes the oldest out; the reader is told how much was lost.
type queue[T any] struct {
	maxItems, maxBytes int
	cost               func(T) (bytes int, weight uint64) // weight is what dropped counts
	wake               chan struct{}                      // holds at most one token: "there may be something"
	done               chan struct{}

	mu      sync.Mutex
	items   []T
	spare   []T // the slice that the reader is done with
	bytes   int
	dropped uint64
	closed  bool
}

func newQueue[T any](maxItems, maxBytes int, cost func(T) (int, uint64)) *queue[T] {
	return &queue[T]{maxItems: maxItems, maxBytes: maxBytes, cost: cost, wake: make(chan struct{}, 1), done: make(chan struct{})}
}

// push appends an item and returns the weight of what it pushed out. One item larger than maxBytes is kept, alone.
func (q *queue[T]) push(item T) (lost uint64) {
	bytes, _ := q.cost(item)
	var zero T
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		return 0
	}
	for len(q.items) > 0 && (len(q.items) >= q.maxItems || q.bytes+bytes > q.maxBytes) {
		oldBytes, weight := q.cost(q.items[0])
		q.items[0] = zero // let its memory go
		q.items = q.items[1:]
		q.bytes -= oldBytes
		q.dropped += weight
		lost += weight
	}
	q.items = append(q.items, item)
	q.bytes += bytes
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return lost
}

// take waits for items and takes all there are, and the weight dropped since the last call. The slice is valid until the next call.
func (q *queue[T]) take(ctx context.Context) (items []T, dropped uint64, err error) {
	for {
		q.mu.Lock()
		if len(q.items) > 0 {
			items, dropped = q.items, q.dropped
			clear(q.spare)
			q.items, q.spare = q.spare[:0], items
			q.bytes, q.dropped = 0, 0
			q.mu.Unlock()
			return items, dropped, nil
		}
		closed := q.closed
		q.mu.Unlock()
		if closed {
			return nil, 0, ErrClosed
		}
		select {
		case <-q.wake:
		case <-q.done:
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		}
	}
}

// close ends the queue: what is in it can still be taken.
func (q *queue[T]) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.closed {
		q.closed = true
		close(q.done)
	}
}

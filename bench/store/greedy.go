package main

import (
	"context"
	"sync"
	"sync/atomic"

	"dmi/store"
	"dmi/tensor"
)

// greedy reads everything there is, again and again, until end is called. It counts the bytes of rows; those that two verifications read besides are not in it.
func greedy(s *store.Store, requests []tensor.RequestKey) (read *atomic.Int64, end func()) {
	read = new(atomic.Int64)
	ctx, stop := context.WithCancel(context.Background())
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for n := i * 13; ctx.Err() == nil; n++ {
				if _, err := readOne(s, requests[n%len(requests)], uint32(n%layers)); err == nil { // retention may have taken it
					read.Add(decoded * width)
				}
			}
		})
	}
	for range 2 {
		all.Go(func() {
			for ctx.Err() == nil {
				_, _ = s.Verify(ctx, nil) // cut off at the end
			}
		})
	}
	return read, func() { stop(); all.Wait() }
}

package inspect

import (
	"context"
	"runtime"
	"sync"
)

// inOrder does pieces 0 to n-1 of a job on all cores and hands each result to take, in order, so that what is summed up does not depend
// on which core was faster. Twice as many pieces as there are cores are under way, for some wait for the disk meanwhile, and as many results wait at most; every
// goroutine has ended when it returns.
func inOrder[T any](ctx context.Context, n int, do func(ctx context.Context, i int) (T, error), take func(i int, result T) error) error {
	type outcome struct {
		result T
		err    error
	}
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	cores := runtime.GOMAXPROCS(0)
	working := make(chan struct{}, 2*cores)
	waiting := make(chan chan outcome, 2*cores)
	running.Go(func() {
		defer close(waiting)
		for i := range n {
			select {
			case working <- struct{}{}:
			case <-ctx.Done():
				return
			}
			result := make(chan outcome, 1)
			running.Go(func() {
				defer func() { <-working }()
				r, err := do(ctx, i)
				result <- outcome{r, err}
			})
			select {
			case waiting <- result:
			case <-ctx.Done():
				return
			}
		}
	})
	i := 0
	for result := range waiting {
		done := <-result
		if done.err != nil {
			return done.err
		}
		if err := take(i, done.result); err != nil {
			return err
		}
		i++
	}
	if i < n {
		return context.Cause(ctx)
	}
	return nil
}

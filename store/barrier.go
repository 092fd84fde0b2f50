package store

import (
	"context"
	"errors"
	"fmt"
)

type barrier struct {
	done chan error
	seal bool // and have it all in sealed segments
}

// Barrier returns once everything that was appended, booked or noted before the call is durable.
func (s *Store) Barrier(ctx context.Context) error {
	if s.readOnly {
		return errors.New("store: barrier: opened for reading only")
	}
	return s.barrier(ctx, &barrier{done: make(chan error, 1)})
}

func (s *Store) barrier(ctx context.Context, b *barrier) error {
	defer s.way.hold()()
	select {
	case s.barriers <- b:
	case <-s.stopped:
		return fmt.Errorf("store: barrier: %w", ErrClosed)
	case <-ctx.Done():
		return fmt.Errorf("store: barrier: %w", context.Cause(ctx))
	}
	select {
	case err := <-b.done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("store: barrier: %w", context.Cause(ctx))
	}
}

//go:build !linux

package ring

import "time"

// Map fails: there is no memfd here.
func Map(int, uint64) (*Ring, error) { return nil, ErrUnsupported }

// Close does nothing: there is nothing that Map could have mapped.
func (r *Ring) Close() error { return nil }

// Bell needs eventfds.
type Bell struct{}

// NewBell fails: there are no eventfds here.
func NewBell(*Ring, int, int) (*Bell, error) { return nil, ErrUnsupported }

// Wait returns at once.
func (b *Bell) Wait(func() bool, time.Time) {}

// Yield does nothing.
func Yield() {}

// Woken is false.
func (b *Bell) Woken() bool { return false }

// Wake does nothing.
func (b *Bell) Wake() {}

// Useful does nothing.
func (b *Bell) Useful() {}

// RingPump does nothing.
func (b *Bell) RingPump() {}

// Close does nothing.
func (b *Bell) Close() error { return nil }

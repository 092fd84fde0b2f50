//go:build linux

package drain_test

import (
	"sync/atomic"
	"testing"
	"time"

	"dmi/drain"
	"dmi/ring"
)

func sleeps(t *testing.T, asleep func(*offering) bool, x *offering) {
	t.Helper()
	for deadline := time.Now().Add(patience); !asleep(x); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nothing comes, or nobody waits for it, and it does not sleep")
		}
	}
}

// TestBusyPoll: a drain that polls takes what is published without ever having asked to be woken, sleeps when nothing comes for as long as it was told or nobody waits for it, and ends when it is told to.
func TestBusyPoll(t *testing.T) {
	asleep := func(x *offering) bool { return atomic.LoadUint64(x.p.Control(ring.ControlEngineWaitingOffset)) != 0 }
	x := newOffering(t, drain.Options{BusyPoll: time.Hour})
	for number := uint64(1); number <= 20; number++ {
		x.step(number, byte(number))
		x.offer().Fetch(nil, nil)
		if asleep(x) {
			t.Fatal("it asked to be woken")
		}
	}
	x.finish()

	x = newOffering(t, drain.Options{BusyPoll: time.Hour, Awaited: func() bool { return false }})
	x.step(1, 1)
	x.offer().Fetch(nil, nil)
	sleeps(t, asleep, x)
	x.finish()

	x = newOffering(t, drain.Options{BusyPoll: time.Millisecond})
	x.step(1, 1)
	x.offer().Fetch(nil, nil)
	sleeps(t, asleep, x)
	x.step(2, 2)
	x.offer().Fetch(nil, nil)
	x.finish()
}

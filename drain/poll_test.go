//go:build linux

package drain_test

import (
	"sync/atomic"
	"testing"
	"time"

	"dmi/drain"
	"dmi/ring"
)

// TestBusyPoll: a drain that polls takes what is published without ever having asked to be woken, sleeps when nothing comes for as long as it was told, and ends when it is told to.
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

	x = newOffering(t, drain.Options{BusyPoll: time.Millisecond})
	x.step(1, 1)
	x.offer().Fetch(nil, nil)
	for deadline := time.Now().Add(patience); !asleep(x); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nothing comes, and it does not sleep")
		}
	}
	x.step(2, 2)
	x.offer().Fetch(nil, nil)
	x.finish()
}

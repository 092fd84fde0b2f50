package ring

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Bell is the two doorbells: an eventfd that the producer writes and we wait for, and one that we write to wake the pump.
//
// Waiting reads nothing: the netpoller is edge-triggered, and every write to an eventfd is an edge, whatever its counter. So a producer
// that makes the descriptor blocking again, empties the counter or fills it cannot hold us in a system call; and what wakes us from
// inside the engine is a deadline, which it cannot reach at all.
type Bell struct {
	ring    *Ring
	engine  *os.File
	raw     syscall.RawConn
	pump    int
	blocked atomic.Bool
	woken   atomic.Bool
	idle    int // times in a row that the producer rang for nothing
}

// NewBell takes over the two eventfds, also when it fails.
func NewBell(r *Ring, engine, pump int) (*Bell, error) {
	b := &Bell{ring: r, pump: pump}
	fail := func(err error) (*Bell, error) {
		if b.engine != nil {
			b.engine.Close()
		} else {
			unix.Close(engine)
		}
		unix.Close(pump)
		return nil, err
	}
	for i, fd := range []int{engine, pump} {
		whose := []string{"engine", "pump"}[i]
		target, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
		if err != nil || !strings.Contains(target, "[eventfd]") {
			return fail(fmt.Errorf("ring: the %s's doorbell is %q, not an eventfd", whose, target))
		}
		if err := unix.SetNonblock(fd, true); err != nil {
			return fail(fmt.Errorf("ring: the %s's doorbell: %w", whose, err))
		}
	}
	b.engine = os.NewFile(uintptr(engine), "doorbell")
	err := b.engine.SetReadDeadline(time.Time{}) // fails where the netpoller has not got it
	if err == nil {
		b.raw, err = b.engine.SyscallConn()
	}
	if err != nil {
		return fail(fmt.Errorf("ring: the engine's doorbell cannot be polled: %w", err))
	}
	return b, nil
}

// Wait blocks until the producer rings, Wake is called, or until passes (zero: never), unless look, called once after the producer has
// been told that we wait, finds something to do.
func (b *Bell) Wait(look func() bool, until time.Time) {
	if b.woken.Swap(false) {
		return
	}
	if b.idle++; b.idle > 64 { // rung again and again for nothing: such a producer is heard at most so often
		time.Sleep(time.Duration(min(b.idle-64, 10)) * time.Millisecond)
	}
	b.engine.SetReadDeadline(until)
	b.ring.announce(true)
	b.blocked.Store(true)
	looked := false
	// The look comes within Read: that forgets edges when it begins, and keeps those that come later.
	_ = b.raw.Read(func(uintptr) bool {
		if looked {
			return true
		}
		looked = true
		// A Wake before blocked was set has left woken; one after it sets the deadline.
		return b.woken.Load() || look()
	})
	b.blocked.Store(false)
	b.ring.announce(false)
	b.woken.Store(false)
}

// Useful says that the last Wait ended for a reason.
func (b *Bell) Useful() { b.idle = 0 }

// Wake ends a Wait, or the next one. Any goroutine may call it.
func (b *Bell) Wake() {
	b.woken.Store(true)
	if b.blocked.Load() {
		b.engine.SetReadDeadline(time.Unix(1, 0))
	}
}

// RingPump wakes the pump. A full counter means that it has been rung: then there is nothing to do, and nothing to block on.
func (b *Bell) RingPump() {
	poll := []unix.PollFd{{Fd: int32(b.pump), Events: unix.POLLOUT}}
	if n, err := unix.Poll(poll, 0); err != nil || n == 0 {
		return
	}
	var one [8]byte
	binary.LittleEndian.PutUint64(one[:], 1)
	unix.Write(b.pump, one[:])
}

// Yield lets other threads have the processor first.
func Yield() { _, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) }

// Woken reports whether the next Wait would end at once because of Wake.
func (b *Bell) Woken() bool { return b.woken.Load() }

// Close gives the descriptors back.
func (b *Bell) Close() error {
	err := b.engine.Close()
	if e := unix.Close(b.pump); err == nil {
		err = e
	}
	return err
}

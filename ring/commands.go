package ring

import (
	"fmt"
	"sync/atomic"
)

// CommandRoom is how many commands can be posted.
func (r *Ring) CommandRoom() int { return int(uint64(r.header.CommandCapacity) - (r.posted - r.done)) }

// Post asks the pump to copy a payload range into a lease of staging. It returns the command's index. Publish makes it visible.
func (r *Ring) Post(payload, bytes uint64, staging uint64) uint64 {
	i := r.posted
	c := Command{Payload: payload, Bytes: bytes, Staging: staging, ID: i}
	at := r.header.CommandsOffset + i%uint64(r.header.CommandCapacity)*CommandSize
	c.Encode(r.mem[at : at+CommandSize])
	r.posted++
	return i
}

// Publish hands the posted commands to the pump. Pairs with its acquire of commands_head.
func (r *Ring) Publish() { atomic.StoreUint64(r.control(ControlCommandsHeadOffset), r.posted) }

// Completed is the number of commands that are done: the bytes of all below it are in staging. Pairs with the pump's release.
func (r *Ring) Completed() (uint64, error) {
	done := atomic.LoadUint64(r.control(ControlCommandsDoneOffset))
	if done-r.done > r.posted-r.done {
		return r.done, fmt.Errorf("ring: control.commands_done is %d, after %d of %d posted", done, r.done, r.posted)
	}
	r.done = done
	return done, nil
}

// Advanced reports whether the pump has completed commands since Completed was asked.
func (r *Ring) Advanced() bool {
	return atomic.LoadUint64(r.control(ControlCommandsDoneOffset)) != r.done
}

// Posted is the number of commands posted since the ring was created.
func (r *Ring) Posted() uint64 { return r.posted }

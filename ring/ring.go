package ring

import (
	"encoding/hex"
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"
)

// ErrUnsupported is returned where there is no memfd.
var ErrUnsupported = errors.New("ring: capture needs Linux (memfd, eventfd); reading a store works here")

// Ring is a mapped ring. Its methods are for one goroutine (the session's drain), except those that say otherwise. Slices of the
// mapping (Staging, Spill) are valid until Close.
type Ring struct {
	header  Header
	mem     []byte
	sites   []Site // copied and checked so far
	lanes   []*Lane
	names   map[string]uint32
	posted  uint64 // commands
	done    uint64
	Payload *Tiles // which ranges of the payload ring are in use; releases payload_tail
	Spilled *Tiles
	Stage   *Stage
}

// over makes a ring of a mapping. Every word of the engine's is read once, here: from then on our own copies count.
func over(mem []byte, header Header) (*Ring, error) {
	r := &Ring{header: header, mem: mem, names: map[string]uint32{}}
	r.Payload = newTiles("payload", header.PayloadBytes, true, r.control(ControlPayloadTailOffset))
	r.Spilled = newTiles("spill", header.SpillBytes, false, r.control(ControlSpillTailOffset))
	if payload, spill := r.Payload.tail.Load(), r.Spilled.tail.Load(); payload%PayloadAlign != 0 || spill%PayloadAlign != 0 {
		return nil, fmt.Errorf("ring: control.payload_tail is %d and spill_tail %d: multiples of %d are needed", payload, spill, PayloadAlign)
	}
	r.posted, r.done = atomic.LoadUint64(r.control(ControlCommandsHeadOffset)), atomic.LoadUint64(r.control(ControlCommandsDoneOffset))
	if r.posted-r.done > uint64(header.CommandCapacity) {
		return nil, fmt.Errorf("ring: control.commands_done is %d and commands_head %d: more than the %d slots apart", r.done, r.posted, header.CommandCapacity)
	}
	r.Stage = newStage(mem[header.StagingOffset:][:header.StagingBytes:header.StagingBytes])
	for i := range int(header.Lanes) {
		r.lanes = append(r.lanes, newLane(r, i))
	}
	return r, nil
}

// Header is what the ring was found to be.
func (r *Ring) Header() Header { return r.header }

// Producer is the ring's name for its whole life: 32 hex digits.
func (r *Ring) Producer() string { return hex.EncodeToString(r.header.Producer[:]) }

// Lanes are the ring's lanes.
func (r *Ring) Lanes() []*Lane { return r.lanes }

// word is an aligned word of the mapping: offsets of regions are multiples of pages, and those of words multiples of 8.
func (r *Ring) word(offset uint64) *uint64 {
	// Sliced to check the bounds, not read: a read that is not atomic would race with who writes the word.
	return (*uint64)(unsafe.Pointer(unsafe.SliceData(r.mem[offset : offset+8])))
}

func (r *Ring) control(offset uint64) *uint64 { return r.word(r.header.ControlOffset + offset) }

// Closed reports whether the producer has said that it will not write again. Pairs with its release of state.
func (r *Ring) Closed() bool { return atomic.LoadUint64(r.control(ControlStateOffset)) == StateClosed }

// SetEngine says whose the ring is; 0: nobody's. Informational.
func (r *Ring) SetEngine(pid int) { atomic.StoreUint64(r.control(ControlEnginePIDOffset), uint64(pid)) }

// announce says that the engine is about to block, or no more. A producer that publishes after it has seen 1 writes the doorbell; one
// that published before will be seen by the look that must come between announce(true) and blocking.
func (r *Ring) announce(waiting bool) {
	v := uint64(0)
	if waiting {
		v = 1
	}
	atomic.StoreUint64(r.control(ControlEngineWaitingOffset), v)
}

// PumpWaiting reports whether the pump blocks, or is about to. Called after posting; pairs with the pump's last look.
func (r *Ring) PumpWaiting() bool { return atomic.LoadUint64(r.control(ControlPumpWaitingOffset)) != 0 }

// Spill is the bytes of a claimed spill range.
func (r *Ring) Spill(at, bytes uint64) []byte {
	if bytes == 0 {
		return nil
	}
	from := r.header.SpillOffset + at%r.header.SpillBytes
	return r.mem[from : from+bytes : from+bytes]
}

// HeaderPage is the header as it was checked.
func (r *Ring) HeaderPage() []byte {
	b := make([]byte, HeaderSize)
	r.header.Encode(b)
	return b
}

// RawSites is entries of the site table as they were checked.
func (r *Ring) RawSites(first, count int) []byte {
	b := make([]byte, count*SiteSize)
	for i := range count {
		r.sites[first+i].Encode(b[i*SiteSize:])
	}
	return b
}

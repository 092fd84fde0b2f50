package ringtape

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"dmi/ring"

	"golang.org/x/sys/unix"
)

// Shape is the geometry of a producer's ring. Capacities are powers of two, sizes multiples of 4096.
type Shape struct {
	Mode            uint32
	Lanes           uint32
	RecordCapacity  uint32
	CommandCapacity uint32
	SiteCapacity    uint32
	Payload         uint64
	Table           uint64
	Staging         uint64
	Spill           uint64
}

// Header lays a ring of this shape out.
func (s Shape) Header(producer [16]byte) ring.Header {
	h := ring.Header{Magic: ring.Magic, Version: ring.ABIVersion, Mode: s.Mode, CreatedUnixNS: uint64(time.Now().UnixNano()), Producer: producer,
		Lanes: s.Lanes, RecordCapacity: s.RecordCapacity, CommandCapacity: s.CommandCapacity, SiteCapacity: s.SiteCapacity, PayloadBytes: s.Payload,
		TableBytes: s.Table, StagingBytes: s.Staging, SpillBytes: s.Spill}
	end := uint64(4096)
	place := func(bytes uint64) uint64 {
		at := end
		end += (bytes + 4095) / 4096 * 4096
		return at
	}
	h.ControlOffset = place(ring.ControlSize)
	h.SitesOffset = place(uint64(s.SiteCapacity) * ring.SiteSize)
	h.GatesOffset = place(uint64(s.SiteCapacity)*(ring.GateSize+ring.KeepSize) + ring.MaxClauses*ring.ClauseSize + ring.MaxWatches*ring.WatchSize + 4*ring.ProbeFloats)
	h.RecordsOffset = place(uint64(s.Lanes) * uint64(s.RecordCapacity) * ring.RecordSize)
	h.TablesOffset = place(uint64(s.Lanes) * s.Table)
	h.CommandsOffset = place(uint64(s.CommandCapacity) * ring.CommandSize)
	h.StagingOffset = place(s.Staging)
	h.SpillOffset = place(s.Spill)
	h.TotalBytes = end
	return h
}

// ShapeOf is the geometry that a header tells of, wherever it puts things.
func ShapeOf(h ring.Header) Shape {
	return Shape{h.Mode, h.Lanes, h.RecordCapacity, h.CommandCapacity, h.SiteCapacity, h.PayloadBytes, h.TableBytes, h.StagingBytes, h.SpillBytes}
}

// Producer is a ring as its process holds it. Lanes may be used by a goroutine each.
type Producer struct {
	Header     ring.Header
	Mem        []byte // the shared mapping
	PayloadMem []byte // the payload ring, not shared
	FDs        [3]int // memfd, engine's doorbell, pump's doorbell
	Lanes      []*ProducerLane
	Pumped     atomic.Uint64 // bytes
	Lenient    bool          // the pump passes over commands that make no sense instead of panicking: for those who lie to the engine
	payload    space
	spill      space
	sites      uint64
	pump       chan struct{} // closed when the pump has ended
	pumpTime   time.Duration
	stop       atomic.Bool
	closed     sync.Once
}

// NewProducer makes a sealed ring without a site; its pump is not running.
func NewProducer(s Shape) (*Producer, error) {
	var name [16]byte
	rand.Read(name[:])
	return NewProducerOf(s.Header(name))
}

// NewProducerOf makes a ring of a header, which is believed.
func NewProducerOf(h ring.Header) (p *Producer, err error) {
	p = &Producer{Header: h, FDs: [3]int{-1, -1, -1}}
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	if p.FDs[0], err = unix.MemfdCreate("dmi-ring", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING); err != nil {
		return nil, fmt.Errorf("ringtape: memfd: %w", err)
	}
	if err = unix.Ftruncate(p.FDs[0], int64(h.TotalBytes)); err != nil {
		return nil, fmt.Errorf("ringtape: size of the memfd: %w", err)
	}
	if _, err = unix.FcntlInt(uintptr(p.FDs[0]), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return nil, fmt.Errorf("ringtape: seal the memfd: %w", err)
	}
	if p.Mem, err = unix.Mmap(p.FDs[0], 0, int(h.TotalBytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, fmt.Errorf("ringtape: map the memfd: %w", err)
	}
	if p.PayloadMem, err = unix.Mmap(-1, 0, int(h.PayloadBytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE); err != nil {
		return nil, fmt.Errorf("ringtape: payload ring: %w", err)
	}
	for i := 1; i < 3; i++ {
		if p.FDs[i], err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
			return nil, fmt.Errorf("ringtape: doorbell: %w", err)
		}
	}
	h.Encode(p.Mem)
	p.payload = space{capacity: h.PayloadBytes, tail: p.Control(ring.ControlPayloadTailOffset), wraps: true}
	p.spill = space{capacity: h.SpillBytes, tail: p.Control(ring.ControlSpillTailOffset)}
	for i := range int(h.Lanes) {
		p.Lanes = append(p.Lanes, &ProducerLane{p: p, index: i})
	}
	atomic.StoreUint64(p.Control(ring.ControlStateOffset), ring.StateRunning)
	return p, nil
}

// Name is the ring's: 32 hex digits.
func (p *Producer) Name() string { return hex.EncodeToString(p.Header.Producer[:]) }

func (p *Producer) word(at uint64) *uint64 { return (*uint64)(unsafe.Pointer(&p.Mem[at])) }

// Control is a word of the control block.
func (p *Producer) Control(offset uint64) *uint64 { return p.word(p.Header.ControlOffset + offset) }

// AddSite publishes a site; its ID is given.
func (p *Producer) AddSite(s ring.Site, name string) uint32 {
	s.ID = uint32(p.sites)
	s.NameBytes = uint32(copy(s.Name[:], name))
	s.Encode(p.Mem[p.Header.SitesOffset+p.sites*ring.SiteSize:])
	p.sites++
	atomic.StoreUint64(p.Control(ring.ControlSitesCountOffset), p.sites)
	return s.ID
}

// Wake rings the engine's doorbell if the engine waits. Called after publishing.
func (p *Producer) Wake() {
	if atomic.LoadUint64(p.Control(ring.ControlEngineWaitingOffset)) != 0 {
		p.Ring()
	}
}

// Ring rings the engine's doorbell.
func (p *Producer) Ring() {
	var one [8]byte
	binary.LittleEndian.PutUint64(one[:], 1)
	unix.Write(p.FDs[1], one[:])
}

// Finish says that nothing more will be written.
func (p *Producer) Finish() {
	atomic.StoreUint64(p.Control(ring.ControlStateOffset), ring.StateClosed)
	p.Wake()
}

// StartPump starts the goroutine that carries out the engine's commands.
func (p *Producer) StartPump() {
	p.pump = make(chan struct{})
	p.stop.Store(false)
	go p.runPump()
}

// PumpTime is the CPU time that pumps have taken which have ended: on a GPU its copy engine does their work.
func (p *Producer) PumpTime() time.Duration { return p.pumpTime }

// ThreadTime is the CPU time of the calling thread: of the goroutine's that is locked to it.
func ThreadTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &u); err != nil {
		panic(err) // there is no other reason than a kernel without it
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// StopPump ends it after the commands that are posted by now: a process that is killed has none from then on.
func (p *Producer) StopPump() {
	if p.pump == nil {
		return
	}
	p.stop.Store(true)
	var one [8]byte
	one[0] = 1
	unix.Write(p.FDs[2], one[:])
	<-p.pump
	p.pump = nil
}

func (p *Producer) runPump() {
	defer close(p.pump)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	begun := ThreadTime()
	defer func() { p.pumpTime += ThreadTime() - begun }()
	waiting := p.Control(ring.ControlPumpWaitingOffset)
	done := atomic.LoadUint64(p.Control(ring.ControlCommandsDoneOffset))
	for {
		if p.copyPosted(&done) {
			continue
		}
		atomic.StoreUint64(waiting, 1)
		stopping := p.stop.Load()
		if p.copyPosted(&done) {
			atomic.StoreUint64(waiting, 0)
			continue
		}
		if stopping {
			return
		}
		poll := []unix.PollFd{{Fd: int32(p.FDs[2]), Events: unix.POLLIN}}
		unix.Poll(poll, 1000)
		var b [8]byte
		unix.Read(p.FDs[2], b[:])
		atomic.StoreUint64(waiting, 0)
	}
}

func (p *Producer) copyPosted(done *uint64) bool {
	head := atomic.LoadUint64(p.Control(ring.ControlCommandsHeadOffset))
	if head == *done || p.Lenient && head-*done > uint64(p.Header.CommandCapacity) {
		return false
	}
	for *done != head {
		var c ring.Command
		c.Decode(p.Mem[p.Header.CommandsOffset+*done%uint64(p.Header.CommandCapacity)*ring.CommandSize:])
		if c.ID != *done || c.Bytes > p.Header.PayloadBytes || c.Staging > p.Header.StagingBytes || c.Bytes > p.Header.StagingBytes-c.Staging {
			if !p.Lenient {
				panic(fmt.Sprintf("ringtape: the engine's command %+v at %d", c, *done))
			}
			c = ring.Command{}
		}
		to := p.Mem[p.Header.StagingOffset+c.Staging:][:c.Bytes]
		at := c.Payload % p.Header.PayloadBytes
		n := copy(to, p.PayloadMem[at:])
		copy(to[n:], p.PayloadMem)
		p.Pumped.Add(c.Bytes)
		*done++
		atomic.StoreUint64(p.Control(ring.ControlCommandsDoneOffset), *done)
		p.Wake()
	}
	return true
}

// Close frees everything. The engine keeps what it has mapped.
func (p *Producer) Close() {
	p.closed.Do(func() {
		p.StopPump()
		for _, fd := range p.FDs {
			if fd >= 0 {
				unix.Close(fd)
			}
		}
		if p.Mem != nil {
			unix.Munmap(p.Mem)
		}
		if p.PayloadMem != nil {
			unix.Munmap(p.PayloadMem)
		}
	})
}

// space is a byte ring that all lanes reserve from.
type space struct {
	mu       sync.Mutex
	capacity uint64
	head     uint64
	tail     *uint64
	wraps    bool
}

// take reserves bytes, or returns false.
func (s *space) take(bytes uint64) (uint64, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	size := (bytes + ring.PayloadAlign - 1) / ring.PayloadAlign * ring.PayloadAlign
	if size > s.capacity || s.head+size-atomic.LoadUint64(s.tail) > s.capacity || !s.wraps && s.head%s.capacity+size > s.capacity {
		return 0, false
	}
	at := s.head
	s.head += size
	return at, true
}

// toEnd is the bytes before the end of the ring.
func (s *space) toEnd() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.capacity - s.head%s.capacity
}

// WritePayload puts bytes into the payload ring (or the spill), if there is room, and returns where.
func (p *Producer) WritePayload(place uint8, data []byte) (at uint64, ok bool) {
	if place == ring.PlaceSpill {
		if p.spill.capacity == 0 {
			return 0, false
		}
		if at, ok = p.spill.take(uint64(len(data))); ok && len(data) > 0 {
			copy(p.Mem[p.Header.SpillOffset+at%p.Header.SpillBytes:], data)
		}
		return at, ok
	}
	if at, ok = p.payload.take(uint64(len(data))); ok {
		n := copy(p.PayloadMem[at%p.Header.PayloadBytes:], data)
		copy(p.PayloadMem, data[n:])
	}
	return at, ok
}

// ReservePayload takes room in the payload ring for bytes that are there already.
func (p *Producer) ReservePayload(bytes uint64) (at uint64, ok bool) { return p.payload.take(bytes) }

// SpillToEnd is how much fits the spill before its end, which no range crosses.
func (p *Producer) SpillToEnd() uint64 { return p.spill.toEnd() }

// ProducerLane writes one lane. Its methods are for one goroutine.
type ProducerLane struct {
	p     *Producer
	index int
	head  uint64
	table uint64
}

func (l *ProducerLane) tail(offset uint64) uint64 {
	return atomic.LoadUint64(l.p.Control(uint64(ring.ControlLaneOffset+l.index*ring.LaneSize) + offset))
}

// Room is the number of records that can be published.
func (l *ProducerLane) Room() int {
	return int(uint64(l.p.Header.RecordCapacity) - (l.head - l.tail(ring.LaneRecordTailOffset)))
}

// Head is the number of records published.
func (l *ProducerLane) Head() uint64 { return l.head }

// Slot is the memory of record i.
func (l *ProducerLane) Slot(i uint64) []byte {
	capacity := uint64(l.p.Header.RecordCapacity)
	at := l.p.Header.RecordsOffset + (uint64(l.index)*capacity+i%capacity)*ring.RecordSize
	return l.p.Mem[at : at+ring.RecordSize]
}

// Publish writes records, of any kind, one after another, waiting for room for all of them until the deadline, and then wakes the engine.
func (l *ProducerLane) Publish(raw []byte, deadline time.Time) error {
	for l.Room() < len(raw)/ring.RecordSize {
		if time.Now().After(deadline) {
			return fmt.Errorf("ringtape: lane %d: no room for record %d", l.index, l.head)
		}
		time.Sleep(100 * time.Microsecond)
	}
	for record := range slices.Chunk(raw, ring.RecordSize) {
		slot := l.Slot(l.head)
		copy(slot[8:], record[8:])
		l.head++
		atomic.StoreUint64((*uint64)(unsafe.Pointer(&slot[0])), l.head)
	}
	l.p.Wake()
	return nil
}

// WriteTable writes a row table, waiting for room until the deadline, and returns its offset.
func (l *ProducerLane) WriteTable(b []byte, deadline time.Time) (uint64, error) {
	capacity := l.p.Header.TableBytes
	size := uint64(len(b))
	at := l.table
	if at%capacity+size > capacity {
		at += capacity - at%capacity
	}
	for at+size-l.tail(ring.LaneTableTailOffset) > capacity {
		if size > capacity || time.Now().After(deadline) {
			return 0, fmt.Errorf("ringtape: lane %d: no room for a row table of %d bytes", l.index, size)
		}
		time.Sleep(100 * time.Microsecond)
	}
	base := l.p.Header.TablesOffset + uint64(l.index)*capacity
	copy(l.p.Mem[base+at%capacity:], b)
	l.table = at + size
	return at, nil
}

// Counters are the lane's counters in the shared memory, to be written by whoever counts.
func (l *ProducerLane) SetCounters(c *ring.Counters) {
	c.Encode(l.p.Mem[l.p.Header.ControlOffset+uint64(ring.ControlLaneOffset+l.index*ring.LaneSize+ring.LaneCountersOffset):])
}

// EncodeTable makes a row table of spans.
func EncodeTable(step uint64, spans []ring.Span, keys uint32, width [ring.Spaces]uint32, packed bool) []byte {
	b := make([]byte, ring.TableSize+len(spans)*ring.SpanSize)
	t := ring.Table{Magic: ring.TableMagic, Bytes: uint32(len(b)), Step: step, Spans: uint32(len(spans)), Keys: keys, Width: width}
	if packed {
		t.Flags = ring.TablePacked
	}
	t.Encode(b)
	for i := range spans {
		spans[i].Encode(b[ring.TableSize+i*ring.SpanSize:])
	}
	return b
}

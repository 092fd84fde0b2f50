package drain

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"dmi/ring"
	"dmi/tensor"
)

// Manifest takes the records of a lane as they were read, and the row tables of those OPEN records whose table_bytes is not 0. A record that
// was refused has kind 0. It copies what it keeps.
type Manifest interface {
	Append(lane int, first uint64, records []byte, tables [][]byte) error
}

// Options of a Drain. Zero numbers take the default.
type Options struct {
	Manifest Manifest
	// Sites is told of sites before any record that counts them is appended or handed on.
	Sites func([]ring.Site) error
	// Event is told what somebody should know. It must not block.
	Event func(level, code, message string)
	// Tap is given every record with its row table and payload as they are handed on, on Run's goroutine; nil: nobody records.
	Tap func(lane int, record, table, payload []byte)
	// Resume is, by lane, how many records the manifest has already: those are not appended or handed on again.
	Resume []uint64
	// CoalesceBytes is the size of a copy command where there is much (4 MiB).
	CoalesceBytes uint64
	// TensorBytes bounds what is put together outside staging: rows in parts, and records larger than all of it (1 GiB). What exceeds it
	// is dropped(budget). The memory of the last such record is kept for the next one. As much again may be taken away from a device's spill, which then stays full beyond that.
	TensorBytes uint64
	// BusyPoll is for how long Run looks for more work, after some, before it sleeps (0: not at all), while somebody waits for what is handed on.
	BusyPoll time.Duration
	// Awaited says whether somebody does; nil: always. It is asked often.
	Awaited func() bool
	// HoldTime is how long an offer may wait for a decision (5 s).
	HoldTime time.Duration
}

const (
	passRecords  = 1024                  // of a lane, before other work gets its turn
	laneEntries  = 8192                  // read and not handed on, or not released; then the lane waits
	batchItems   = 512                   // handed over at once
	fewItems     = 64                    // of a decode step: handed on without delay
	manifestWait = 50 * time.Millisecond // between attempts to append
)

// Drain empties one ring. Run is its goroutine; the other methods may be called from any.
type Drain struct {
	ring    *ring.Ring
	bell    *ring.Bell
	options Options
	out     chan<- []*Item

	sites   []ring.Site
	lanes   []*lane
	want    []*entry // payload not yet asked for, in the order it was read
	copying []copyJob
	big     *entry                 // the one record at a time that is put together outside staging
	gone    tensor.Reason          // not none: the pump is gone, and with it what is in the payload ring
	taken   []*entry               // of this pass, whose spill is to be freed
	spilled *spillPass             // likewise, whose spill the consumer reads; nil: it took none
	spare   atomic.Pointer[[]byte] // memory of the last payload that was put together outside staging
	away    uint64                 // bytes of spilled payload that were taken away and are not handed on
	done    uint64                 // commands completed
	foreign uint64                 // commands below this were posted by an engine before us, into staging we do not know of
	batch   []*Item
	passed  uint64  // bytes of the batch
	entries []entry // not used yet
	failure error
	offers  []*Offer // not decided, oldest first
	claimed uint64   // of the payload ring: the end of what was last claimed

	mu        sync.Mutex
	finishing *finish
	marks     []*mark
	decided   []*Offer

	records, stray, bytes, steps atomic.Uint64
	copied, offered, fetched     atomic.Uint64                // bytes
	expired                      atomic.Uint64                // rows
	reading                      [ring.MaxLanes]atomic.Uint64 // record tail, for occupancy
	oldest                       atomic.Int64                 // unix ns when the oldest entry still held was read; 0: none
}

type finish struct {
	reason tensor.Reason
	grace  time.Duration
	begun  bool
	since  time.Time
	moved  time.Time // when the pump was last seen to do something
}

type mark struct {
	targets []uint64
	done    func()
}

// New makes the drain of a ring, whose items Run sends to out. It takes over neither.
func New(r *ring.Ring, bell *ring.Bell, out chan<- []*Item, o Options) *Drain {
	if o.CoalesceBytes == 0 {
		o.CoalesceBytes = 4 << 20
	}
	if o.HoldTime == 0 {
		o.HoldTime = 5 * time.Second
	}
	if o.TensorBytes == 0 {
		o.TensorBytes = 1 << 30
	}
	d := &Drain{ring: r, bell: bell, options: o, out: out, foreign: r.Posted()}
	for i, l := range r.Lanes() {
		own := &lane{ring: l, released: l.Next()}
		if i < len(o.Resume) {
			own.skipTo = o.Resume[i]
		}
		own.quiet = own.released > 0 || own.skipTo > 0
		d.reading[i].Store(own.released)
		d.lanes = append(d.lanes, own)
	}
	return d
}

// Run drains until Finish, then sends what ends open steps and closes out. An error says why the ring cannot be read any further; what was
// open is then lost(corrupt).
func (d *Drain) Run() error {
	defer close(d.out)
	for {
		moved := d.pass()
		if d.finished() {
			break
		}
		if moved {
			d.bell.Useful()
			continue
		}
		if until := d.deadline(); !d.poll(until) {
			d.bell.Wait(d.look, until)
		}
	}
	return d.failure
}

// poll looks for work for BusyPoll, or until a deadline that is earlier (zero: there is none), and reports whether it found any. To be woken takes a processor tens of microseconds, and the producer
// a system call.
func (d *Drain) poll(until time.Time) bool {
	if d.options.BusyPoll == 0 || d.options.Awaited != nil && !d.options.Awaited() {
		return false
	}
	end := time.Now().Add(d.options.BusyPoll)
	if !until.IsZero() && until.Before(end) {
		end = until
	}
	for !d.bell.Woken() && time.Now().Before(end) {
		if d.look() {
			return true
		}
		runtime.Gosched() // what is on its way comes first,
		ring.Yield()      // also on another thread of ours, where there is one core
	}
	return false
}

// Finish makes Run hand on what is published now and return. What is open then, or in payload that the pump does not copy for as long as
// grace, is lost for the reason given. Where it is we who leave, steps that are open have as long as grace to close.
func (d *Drain) Finish(reason tensor.Reason, grace time.Duration) {
	d.mu.Lock()
	if d.finishing == nil {
		d.finishing = &finish{reason: reason, grace: grace}
	}
	d.mu.Unlock()
	d.bell.Wake()
}

// Mark calls done once everything published by now has been consumed, as far as its payload is there. After Run has returned it never is.
func (d *Drain) Mark(done func()) {
	d.mu.Lock()
	d.marks = append(d.marks, &mark{done: done})
	d.mu.Unlock()
	d.bell.Wake()
}

// pass does what there is to do, and reports whether that was anything.
func (d *Drain) pass() bool {
	d.begin()
	moved := d.completions()
	now := time.Now()
	for _, l := range d.lanes {
		if d.read(l, now) {
			moved = true
		}
	}
	d.expire(now)
	if d.request() {
		moved = true
	}
	for _, l := range d.lanes {
		d.append(l)
	}
	for _, e := range d.taken {
		d.ring.Spilled.Free(e.at, e.bytes)
	}
	d.taken = d.taken[:0]
	if d.emit() {
		moved = true
	}
	d.placeMarks()
	if d.spilled != nil {
		d.spilled.left.Add(-1) // where that was the last, there is nobody to be woken by: so it comes before release
		d.spilled = nil
	}
	d.release()
	return moved
}

// look is pass's question without its answer: is there anything to do?
func (d *Drain) look() bool {
	if d.ring.Advanced() {
		return true
	}
	for _, l := range d.lanes {
		if l.open() && l.ring.Ready() {
			return true
		}
	}
	return false
}

// begin takes note of what other goroutines want.
func (d *Drain) begin() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.decide(d.decided)
	d.decided = nil
	for _, m := range d.marks {
		if m.targets == nil {
			for _, l := range d.lanes {
				m.targets = append(m.targets, min(l.ring.Next()+l.ring.Published(), l.limit()))
			}
		}
	}
	if f := d.finishing; f != nil && !f.begun {
		f.begun, f.since, f.moved = true, time.Now(), time.Now()
		for _, l := range d.lanes {
			l.stop(l.ring.Next() + l.ring.Published())
		}
	}
}

// fail ends the draining: nothing the producer says from here on can be relied on.
func (d *Drain) fail(err error) {
	if d.failure != nil {
		return
	}
	d.failure = err
	d.event("error", "corrupt", err.Error()+"; the session is closed")
	d.mu.Lock()
	d.finishing = &finish{reason: tensor.Corrupt, begun: true}
	d.mu.Unlock()
	for _, l := range d.lanes {
		l.stop(l.ring.Next())
	}
}

func (d *Drain) deadline() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.finishing != nil:
		return time.Now().Add(5 * time.Millisecond)
	case len(d.offers) > 0:
		return time.Now().Add(d.options.HoldTime / 8)
	}
	return time.Time{}
}

// finished carries the end through, and reports whether all is done.
func (d *Drain) finished() bool {
	d.mu.Lock()
	f := d.finishing
	d.mu.Unlock()
	if f == nil || !f.begun {
		return false
	}
	waiting := false
	for _, l := range d.lanes {
		if d.lingers(l, f) {
			return false
		}
		if l.ring.Next() < l.limit() && l.open() {
			return false
		}
		waiting = waiting || len(l.queue) > 0 || l.ring.Next() < l.limit()
	}
	if waiting {
		stalled := len(d.copying) > 0 || !d.foreignDone()
		if d.failure != nil || stalled && time.Since(f.moved) >= f.grace {
			d.abandon(f.reason)
		}
		return false // it is the pump that we wait for, or the consumer
	}
	for _, l := range d.lanes {
		if l.step != nil {
			d.cut(l, f.reason)
		}
	}
	d.emit()
	if len(d.offers) > 0 { // whoever has them decides now that no step is open
		return false
	}
	d.mu.Lock()
	for _, m := range d.marks { // nothing is to come that they could wait for
		d.place(m)
	}
	d.marks = nil
	d.mu.Unlock()
	d.emit()
	d.release()
	return true
}

// lingers reports whether a lane is read on, although all is read that was to be, because its step may still close in time. It is read a record
// at a time, so that no step is begun.
func (d *Drain) lingers(l *lane, f *finish) bool {
	if f.reason != tensor.EngineExit || d.failure != nil || l.ring.Next()+l.extra < l.end {
		return false
	}
	l.extra = 0
	if l.step != nil && time.Since(f.since) < f.grace {
		l.extra = 1
	}
	l.end = l.ring.Next() + l.extra
	return l.extra > 0
}

// placeMarks puts a mark behind what it waits for, on every lane.
func (d *Drain) placeMarks() {
	d.mu.Lock()
	defer d.mu.Unlock()
	kept := d.marks[:0]
	for _, m := range d.marks {
		ready := m.targets != nil
		for i, target := range m.targets {
			ready = ready && d.lanes[i].ring.Next() >= target
		}
		if ready {
			d.place(m)
		} else {
			kept = append(kept, m)
		}
	}
	clear(d.marks[len(kept):])
	d.marks = kept
}

func (d *Drain) place(m *mark) {
	left := new(atomic.Int32)
	left.Store(int32(len(d.lanes)))
	done := func() {
		if left.Add(-1) == 0 {
			m.done()
		}
	}
	for _, l := range d.lanes {
		l.queue = append(l.queue, &entry{item: Item{Kind: Mark, Lane: l.ring.Index, Done: done}, ready: true})
	}
	d.emit()
}

func (d *Drain) event(level, code, message string) {
	if d.options.Event != nil {
		d.options.Event(level, code, message)
	}
}

// append writes to the manifest what was read of a lane, and insists: no slot is given back before. It gives up only where draining ends.
func (d *Drain) append(l *lane) {
	if len(l.raw) == 0 {
		return
	}
	told := false
	for {
		err := d.options.Manifest.Append(l.ring.Index, l.rawFirst, l.raw, l.tables)
		if err == nil {
			break
		}
		if !told {
			d.event("error", "store", fmt.Sprintf("the step manifest of lane %d cannot be written: %v; draining waits", l.ring.Index, err))
			told = true
		}
		d.mu.Lock()
		ending := d.finishing != nil
		d.mu.Unlock()
		if ending {
			l.unwritten = true
			break
		}
		time.Sleep(manifestWait)
	}
	l.raw, l.tables = l.raw[:0], l.tables[:0]
}

// Status is what a drain has done and holds.
type Status struct {
	Records uint64 // read
	Stray   uint64 // records that belonged to no step
	Bytes   uint64 // of payload handed on
	Steps   uint64 // ended
	Copied  uint64 // bytes that the pump was asked for: what crosses PCIe
	Offered uint64 // bytes that lay in the payload ring to be fetched or not
	Fetched uint64 // of them, asked for
	Expired uint64 // rows of offers that were let go before anybody decided
	Lanes   []Occupancy
	Queue   Occupancy     // batches between us and the consumer
	Lag     time.Duration // since the oldest record that is read and still held
}

// Occupancy of a ring in its unit.
type Occupancy struct{ Used, Capacity uint64 }

// Status may be asked until the ring is closed.
func (d *Drain) Status() Status {
	s := Status{Records: d.records.Load(), Stray: d.stray.Load(), Bytes: d.bytes.Load(), Steps: d.steps.Load(), Copied: d.copied.Load(),
		Offered: d.offered.Load(), Fetched: d.fetched.Load(), Expired: d.expired.Load(), Queue: Occupancy{uint64(len(d.out)), uint64(cap(d.out))}}
	if at := d.oldest.Load(); at != 0 {
		s.Lag = time.Since(time.Unix(0, at))
	}
	for i, l := range d.ring.Lanes() {
		s.Lanes = append(s.Lanes, Occupancy{l.Used(d.reading[i].Load()), uint64(d.ring.Header().RecordCapacity)})
	}
	return s
}

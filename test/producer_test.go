//go:build linux

package test

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"dmi/internal/ringtape"
	"dmi/ring"
)

// Words of a tally: what a producer has counted itself, kept where it outlives the producer.
const (
	tallyProduced = iota // rows x sites of all OPEN and GAP records published
	tallyNext            // the same once the one under way is published
	tallyLane            // the lane of that one
	tallyIndex           // its number there
	tallyCaptured        // rows in CAPTURED records
	tallyDropped         // rows said to be dropped for want of room
	tallySkipped
	tallySilent  // rows of sites that did not fire in a step that ended
	tallyAborted // the same where the step was aborted
	tallyClosed  // steps closed
	tallyDurable // by lane: its steps below this are, the engine has said
	tallyWords   = tallyDurable + ring.MaxLanes
)

var errStopped = errors.New("told to stop")

// producer plays a script into a ring as libdmi does it, in best-effort or complete mode. play is for one goroutine, the socket's methods for another.
type producer struct {
	*ringtape.Producer
	script   *script
	complete bool
	session  string
	tally    []uint64
	stop     atomic.Bool // after this step
	abandon  atomic.Bool // at once, also where it waits for room
	// note, where set, is told what was published of each site's rows.
	note func(f *forward, site, first, count uint32, captured bool)

	client atomic.Pointer[ringtape.Client]

	mu   sync.Mutex
	told [][]byte // of late, to be said again to another engine

	gap     ring.GapRecord
	scratch []byte
	raw     [ring.RecordSize]byte
	closed  []atomic.Uint64 // by lane: its steps below this are closed
	waits   uint64
}

func newProducer(session string, l load, mode uint32, s ringtape.Shape, tally []uint64) (*producer, error) {
	p, err := newStalledProducer(session, l, mode, s, tally)
	if err == nil {
		p.StartPump()
	}
	return p, err
}

// newStalledProducer makes one whose pump does nothing: what it captures stays in its ring.
func newStalledProducer(session string, l load, mode uint32, s ringtape.Shape, tally []uint64) (*producer, error) {
	s.Mode, s.Lanes = mode, uint32(l.Lanes)
	if mode == ring.ModeBestEffort {
		s.Spill = 0
	}
	r, err := ringtape.NewProducer(s)
	if err != nil {
		return nil, err
	}
	p := &producer{Producer: r, script: newScript(l), complete: mode == ring.ModeComplete, session: session, tally: tally, closed: make([]atomic.Uint64, l.Lanes)}
	for i := range l.Sites {
		p.AddSite(ring.Site{Layer: i, NDim: 1, Role: [ring.MaxDims]uint8{ring.RoleRow}}, siteName(i))
	}
	return p, nil
}

func siteName(i uint32) string { return fmt.Sprintf("blocks.%d.hook_resid_post", i) }

// newSession makes up a session's id.
func newSession(r *rand.Rand) string { return fmt.Sprintf("s%08x", r.Uint32()) }

// attach introduces the producer to an engine. Messages of before are said again: those to a dead engine may be lost.
func (p *producer) attach(socket string, resume bool) error {
	c, err := ringtape.Dial(socket)
	if err != nil {
		return err
	}
	mode := "best-effort"
	if p.complete {
		mode = "complete"
	}
	hello, err := json.Marshal(map[string]any{"type": "hello", "protocol": 1, "abi": ring.ABIVersion, "token": "", "session": p.session, "producer": p.Name(),
		"resume": resume, "mode": mode, "text": "ids", "process": map[string]any{}, "versions": map[string]any{}, "model": map[string]any{"name": "script"},
		"aliases": map[string]any{}, "hooks": []string{"**"},
		"run": map[string]any{"id": "r" + p.session[1:], "labels": map[string]any{}, "tags": []string{}, "begun_unix_ns": time.Now().UnixNano()}})
	if err == nil {
		err = c.Hello(hello, p.FDs[:]...)
	}
	if err == nil {
		_, err = c.Expect("welcome", patience)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, m := range p.told {
		if err == nil {
			err = c.SendRaw(m)
		}
	}
	if err != nil {
		c.Close()
		return err
	}
	p.client.Store(c)
	return nil
}

func (p *producer) tell(m map[string]any) {
	body, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.told = append(p.told, body); len(p.told) > 512 {
		p.told = append([][]byte(nil), p.told[256:]...)
	}
	if c := p.client.Load(); c != nil {
		c.SendRaw(body) // an engine that is gone: it is said again
	}
}

// barrier waits until all steps closed by now are durable, and returns how many there are by lane.
func (p *producer) barrier(timeout time.Duration) ([]uint64, error) {
	c := p.client.Load()
	if c == nil {
		return nil, errors.New("not attached")
	}
	steps := map[string]any{}
	closed := make([]uint64, len(p.closed))
	for i := range p.closed {
		if closed[i] = p.closed[i].Load(); closed[i] > 0 {
			steps[fmt.Sprint(i)] = closed[i] - 1
		}
	}
	if err := c.Send(map[string]any{"type": "barrier", "id": "b", "steps": steps}); err != nil {
		return nil, err
	}
	answer, err := c.Expect("durable", timeout)
	if why, _ := answer["error"].(string); err == nil && why != "" {
		err = fmt.Errorf("the engine says: %s", why)
	}
	return closed, err
}

// play publishes one step of the script. An error is errStopped, or a ring that does not move.
func (p *producer) play() error {
	f := p.script.next()
	p.introduce(f)
	opened, err := p.open(f)
	if err != nil || !opened {
		return err
	}
	captures := uint64(0)
	for site := range uint32(len(f.actions)) {
		n, err := p.offer(f, site)
		if err != nil {
			return err
		}
		captures += n
	}
	end := ring.CloseRecord{Step: f.step, ClosedUnixNS: uint64(time.Now().UnixNano()), Records: captures, Kind: ring.KindClose}
	if f.aborted {
		end.Aborted = 1
	}
	if err := p.publish(f.lane, &end); err != nil {
		return err
	}
	p.ended(f)
	return nil
}

func (p *producer) introduce(f *forward) {
	if len(f.begun) == 0 {
		return
	}
	var list []map[string]any
	for _, n := range f.begun {
		list = append(list, map[string]any{"request": n, "id": fmt.Sprintf("%s.%d", p.session, n), "run": "r" + p.session[1:], "begun_unix_ns": time.Now().UnixNano()})
	}
	p.tell(map[string]any{"type": "requests", "requests": list})
}

func (p *producer) ended(f *forward) {
	p.closed[f.lane].Store(f.step + 1)
	p.add(tallyClosed, 1)
	for _, n := range f.ended {
		p.tell(map[string]any{"type": "request_end", "request": n, "reason": "finished", "step": f.step, "ended_unix_ns": time.Now().UnixNano()})
	}
}

func (p *producer) add(word int, n uint64) { atomic.AddUint64(&p.tally[word], n) }

// stuck is how long a ring may stand still before its producer gives up. Where engines are killed before they have done anything, on a machine with
// other work, that is many engines' lives.
const stuck = 7 * patience

// room waits in complete mode until try succeeds; in best-effort mode it asks once.
func (p *producer) room(try func() bool) (bool, error) {
	for begun := time.Now(); !try(); {
		if !p.complete {
			return false, nil
		}
		if p.abandon.Load() {
			return false, errStopped
		}
		if p.waits++; time.Since(begun) > stuck {
			return false, errors.New("the engine makes no room")
		}
		time.Sleep(50 * time.Microsecond)
	}
	return true, nil
}

// publish writes a record that there is room for.
func (p *producer) publish(lane int, r interface{ Encode([]byte) }) error {
	r.Encode(p.raw[:])
	return p.Lanes[lane].Publish(p.raw[:], time.Time{})
}

// owe publishes a record that says what was produced, and counts it so that whoever finds the tally after a kill can tell what was published.
func (p *producer) owe(lane int, r interface{ Encode([]byte) }, rows uint64) error {
	atomic.StoreUint64(&p.tally[tallyLane], uint64(lane))
	atomic.StoreUint64(&p.tally[tallyIndex], p.Lanes[lane].Head())
	after := p.tally[tallyProduced] + rows
	atomic.StoreUint64(&p.tally[tallyNext], after)
	if err := p.publish(lane, r); err != nil {
		return err
	}
	atomic.StoreUint64(&p.tally[tallyProduced], after)
	return nil
}

// open publishes the OPEN, or says why not: without room for the step's records it is gated, without any it goes into a gap.
func (p *producer) open(f *forward) (bool, error) {
	lane := p.Lanes[f.lane]
	table := ringtape.EncodeTable(f.step, f.spans, 0, [ring.Spaces]uint32{f.rows}, true)
	produced := uint64(f.rows) * uint64(len(f.actions))
	at := uint64(0)
	ok, err := p.room(func() bool {
		if lane.Room() < 2*len(f.actions)+3 {
			return false
		}
		var err error
		at, err = lane.WriteTable(table, time.Time{})
		return err == nil
	})
	if err != nil {
		return false, err
	}
	if !ok && lane.Room() < 3 {
		if p.gap.Steps == 0 {
			p.gap.Step = f.step
		}
		p.gap.LastStep, p.gap.Steps, p.gap.Rows = f.step, p.gap.Steps+1, p.gap.Rows+produced
		p.drop(f, produced)
		return false, nil
	}
	if err := p.closeGap(f.lane); err != nil {
		return false, err
	}
	open := ring.OpenRecord{Step: f.step, OpenedUnixNS: uint64(time.Now().UnixNano()), Sites: uint32(len(f.actions)), Kind: ring.KindOpen, Rows: [3]uint32{f.rows}}
	if ok {
		open.Table, open.TableBytes = at, uint64(len(table))
		return true, p.owe(f.lane, &open, produced)
	}
	open.Gated = 1
	p.drop(f, produced)
	if err := p.owe(f.lane, &open, produced); err != nil {
		return false, err
	}
	if err := p.publish(f.lane, &ring.CloseRecord{Step: f.step, Kind: ring.KindClose}); err != nil {
		return false, err
	}
	p.ended(f)
	return false, nil
}

func (p *producer) drop(f *forward, produced uint64) {
	p.add(tallyDropped, produced)
	if p.note != nil {
		for site := range uint32(len(f.actions)) {
			p.note(f, site, 0, f.rows, false)
		}
	}
}

// closeGap publishes what was not said of steps that found no room.
func (p *producer) closeGap(lane int) error {
	if p.gap.Steps == 0 {
		return nil
	}
	p.gap.Kind = ring.KindGap
	gap := p.gap
	p.gap = ring.GapRecord{}
	return p.owe(lane, &gap, gap.Rows)
}

// offer does with a site's rows what the script says, and returns how many records that took.
func (p *producer) offer(f *forward, site uint32) (records uint64, err error) {
	switch f.actions[site] {
	case silent:
		if f.aborted {
			p.add(tallyAborted, uint64(f.rows))
		} else {
			p.add(tallySilent, uint64(f.rows))
		}
		return 0, nil
	case skip:
		r := ring.Record{Step: f.step, Site: site, Rows: f.rows, Kind: ring.KindCapture, Outcome: ring.OutcomeSkipped, Reason: ring.ReasonPolicy, Level: ring.LevelOff}
		p.add(tallySkipped, uint64(f.rows))
		return 1, p.publish(f.lane, &r)
	}
	first, count := uint32(0), f.rows
	if f.actions[site] == halves {
		count = f.rows / 2
	}
	for first < f.rows {
		data := p.rowsOf(f, site, first, count)
		at, ok := uint64(0), false
		ok, err := p.room(func() bool {
			at, ok = p.WritePayload(ring.PlaceRing, data)
			return ok
		})
		if err != nil {
			return records, err
		}
		r := ring.Record{Step: f.step, Site: site, RowFirst: first, Rows: count, Kind: ring.KindCapture, Outcome: ring.OutcomeCaptured, Payload: at,
			PayloadBytes: uint64(len(data)), TensorBytes: uint64(len(data)), Size: [ring.MaxDims]uint32{count}, Stride: [ring.MaxDims]uint32{1},
			Role: [ring.MaxDims]uint8{ring.RoleRow}, DType: ring.DTypeU64, NDim: 1, Place: ring.PlaceRing, Flags: ring.RecordGathered}
		if !ok {
			count = f.rows - first
			r = ring.Record{Step: f.step, Site: site, RowFirst: first, Rows: count, Kind: ring.KindCapture, Outcome: ring.OutcomeDropped, Reason: ring.ReasonRingFull}
			p.add(tallyDropped, uint64(count))
		} else {
			p.add(tallyCaptured, uint64(count))
		}
		if p.note != nil {
			p.note(f, site, first, count, ok)
		}
		if err := p.publish(f.lane, &r); err != nil {
			return records, err
		}
		records++
		first, count = first+count, f.rows-first-count
	}
	return records, nil
}

// rowsOf is the payload of some of a step's rows at a site.
func (p *producer) rowsOf(f *forward, site, first, count uint32) []byte {
	b := p.scratch[:0]
	for _, s := range f.spans {
		from, to := max(s.First, first), min(s.First+s.Count, first+count)
		for i := from; i < to; i++ {
			b = binary.LittleEndian.AppendUint64(b, value(site, s.Request, s.Position+i-s.First))
		}
	}
	p.scratch = b
	return b
}

// bye ends the session in good order.
func (p *producer) bye() error {
	for begun := time.Now(); p.gap.Steps > 0; time.Sleep(time.Millisecond) {
		if p.Lanes[0].Room() > 0 {
			if err := p.closeGap(0); err != nil {
				return err
			}
		} else if time.Since(begun) > patience {
			return errors.New("the engine makes no room for the last record")
		}
	}
	p.Finish()
	c := p.client.Load()
	err := c.Send(map[string]any{"type": "bye"})
	if err == nil {
		_, err = c.Expect("bye", patience)
	}
	c.Close()
	return err
}

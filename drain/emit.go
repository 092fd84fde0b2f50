package drain

import (
	"fmt"
	"runtime"

	"dmi/ring"
	"dmi/tensor"
)

// assembly is a row that comes in parts.
type assembly struct {
	step, tensorBytes uint64
	site, row         uint32
	data              []byte
	over              bool
	lost              uint8 // reason why an earlier part did not come
}

// emit hands on what is ready, each lane in its order.
func (d *Drain) emit() bool {
	moved := false
	oldest := int64(0)
	for _, l := range d.lanes {
		n := 0
		for n < len(l.queue) && l.queue[n].ready {
			d.hand(l, l.queue[n])
			l.queue[n] = nil
			n++
		}
		if n > 0 {
			moved = true
			l.queue = l.queue[n:]
		}
		if len(l.queue) > 0 && (oldest == 0 || l.queue[0].read < oldest) {
			oldest = l.queue[0].read
		}
	}
	d.send()
	d.oldest.Store(oldest)
	return moved
}

func (d *Drain) send() {
	if len(d.batch) == 0 {
		return
	}
	few := len(d.batch) < fewItems
	d.bytes.Add(d.passed)
	d.passed = 0
	d.out <- d.batch
	d.batch = nil
	if few { // whoever waits for them goes first: what is left to do here can wait, and they would wait for it where there is one processor
		runtime.Gosched()
	}
}

func (d *Drain) hand(l *lane, e *entry) {
	e.handed = true
	if e.away {
		d.away -= e.bytes
	}
	if e.raw != nil {
		d.options.Tap(l.ring.Index, e.raw[:], e.table, e.item.Data)
		e.raw, e.table = nil, nil
	}
	if e.none {
		return
	}
	i := &e.item
	if e.part {
		d.assemble(l, i)
		return
	}
	if i.Kind == Captured || i.Kind == Settled {
		l.parts = nil // a row in parts that something else follows is settled by a later record
	}
	var cut *Item
	if i.Kind == Opened && i.Reason != tensor.ReasonNone {
		cut = &Item{Kind: Cut, Lane: i.Lane, Step: i.Step, Reason: i.Reason}
	}
	if d.add(i); cut != nil {
		d.add(cut)
	}
}

// add hands an item on, which is the consumer's from here on.
func (d *Drain) add(i *Item) {
	d.passed += uint64(len(i.Data))
	d.batch = append(d.batch, i)
	if len(d.batch) >= batchItems {
		d.send()
	}
}

// assemble takes in a part of a row, and hands the row on when it is whole.
func (d *Drain) assemble(l *lane, i *Item) {
	r := &i.Record
	a := l.parts
	if a != nil && (a.step != r.Step || a.site != r.Site || a.row != r.RowFirst || a.tensorBytes != r.TensorBytes) {
		a = nil
	}
	if r.PartOffset == 0 || a == nil && i.Kind == Settled {
		a = &assembly{step: r.Step, tensorBytes: r.TensorBytes, site: r.Site, row: r.RowFirst}
	}
	l.parts = a
	if i.Kind == Settled {
		a.lost = r.Reason
	}
	// Of a row that is not kept or has lost a part, only the end matters: what offset its parts have says nothing.
	fits := a != nil && r.Rows <= 1 && r.Size[0] == 1 && (a.over || a.lost != 0 || r.PartOffset == uint64(len(a.data)))
	if fits && a.lost == 0 && !a.over {
		if a.over = uint64(len(a.data))+uint64(len(i.Data)) > d.options.TensorBytes; a.over {
			a.data = nil
		} else {
			a.data = append(a.data, i.Data...)
		}
	}
	i.Release()
	if r.Rows == 0 {
		if !fits {
			l.parts = nil
		}
		return
	}
	l.parts = nil
	switch {
	case fits && a.lost != 0:
		i.Kind, r.Outcome, r.Reason = Settled, ring.OutcomeLost, a.lost
	case fits && a.over:
		i.Kind, r.Outcome, r.Reason = Settled, ring.OutcomeDropped, ring.ReasonBudget
		d.event("warning", "budget", fmt.Sprintf("a row of %d bytes at site %q is larger than the %d that the engine puts together in memory: it is dropped(budget); capture a narrower site",
			r.TensorBytes, i.Step.Sites[r.Site].Text(), d.options.TensorBytes))
	case !fits || uint64(len(a.data)) != r.TensorBytes:
		i.Kind, r.Outcome, r.Reason = Settled, ring.OutcomeLost, ring.ReasonCorrupt
		d.event("error", "corrupt", fmt.Sprintf("step %d: parts of row %d of site %q do not make a row", r.Step, r.RowFirst, i.Step.Sites[r.Site].Text()))
	default:
		i.Data, r.PartOffset, r.PayloadBytes = a.data, 0, r.TensorBytes
	}
	d.add(i)
}

// release gives slots back to the producer whose record is written to the manifest and whose payload is ours and may be written over.
//
// The rejected simpler design does not look at the payload's tail. But a payload that is freed behind one of another lane that is still in use
// does not move the tail; an engine after us would find no record that tells of it, and the tail would stay below it for ever.
func (d *Drain) release() {
	for i, l := range d.lanes {
		if l.unwritten {
			continue
		}
		n := 0
		for n < len(l.slots) && l.slots[n].handed && (l.slots[n].tiles == nil || l.slots[n].tiles.Passed(l.slots[n].end)) {
			n++
		}
		if n == 0 {
			continue
		}
		table := l.slots[n-1].tableEnd
		clear(l.slots[:n])
		l.slots = l.slots[n:]
		l.released = l.ring.Next() - uint64(len(l.slots))
		l.ring.Release(l.released, table)
		d.reading[i].Store(l.released)
	}
}

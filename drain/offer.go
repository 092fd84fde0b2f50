package drain

import (
	"fmt"
	"time"

	"dmi/ring"
	"dmi/tensor"
)

// Offer is rows that lie in the payload ring and are copied only if somebody wants them. Whoever is handed one as an item of kind Offered calls Fetch once.
//
// It waits without holding anything up: what comes after it is copied and handed on. But a ring is freed from its oldest byte on, so an offer is let go
// when it is HoldTime old, or when what the ring has from it on is half of its capacity: then nothing of it can be had any more.
type Offer struct {
	Step   *Step
	Record ring.Record

	drain *Drain
	lane  int
	row   uint64 // bytes
	read  time.Time
	// written by the drain's goroutine, as all that follows
	gone bool
	left int // copies that are not made
	// of Fetch
	rows  []Span
	owner any
}

// Span is rows [From, To) of a row list.
type Span struct{ From, To uint32 }

// Fetch asks for rows of an offer, those of its record; the rest is let go. For each span an item comes, of the offer's lane, with owner: Captured, or Settled where it
// could not be had any more. It may be called from any goroutine.
func (o *Offer) Fetch(rows []Span, owner any) {
	d := o.drain
	d.mu.Lock()
	o.rows, o.owner = rows, owner
	d.decided = append(d.decided, o)
	d.mu.Unlock()
	d.bell.Wake()
}

// hold takes a record's payload as an offer.
func (d *Drain) hold(l *lane, e *entry, now time.Time) error {
	r := &e.item.Record
	if r.Level != ring.LevelFull || r.Place != ring.PlaceRing || r.Flags&ring.RecordGathered == 0 || r.Rows == 0 || r.PartOffset != 0 || r.TensorBytes != r.PayloadBytes ||
		r.PayloadBytes%uint64(r.Rows) != 0 {
		return fmt.Errorf("drain: lane %d: step %d: record.flags is %d: an offer is of gathered rows in full, in one part, in the payload ring", l.ring.Index, r.Step, r.Flags)
	}
	if err := d.claim(e, d.ring.Payload, r); err != nil {
		return err
	}
	o := &Offer{Step: l.step, Record: *r, drain: d, lane: l.ring.Index, row: r.PayloadBytes / uint64(r.Rows), read: now}
	e.item.Kind, e.item.Offer = Offered, o
	d.offers = append(d.offers, o)
	d.offered.Add(r.PayloadBytes)
	if d.gone != tensor.ReasonNone {
		d.letGo(o)
	}
	return nil
}

// letGo frees what is held of an offer. It stays in the list until it is decided.
func (d *Drain) letGo(o *Offer) {
	if !o.gone {
		o.gone = true
		d.ring.Payload.Free(o.Record.Payload, o.Record.PayloadBytes)
	}
}

// expire lets go of offers that have waited too long, or have too much of the ring behind them.
func (d *Drain) expire(now time.Time) {
	for _, o := range d.offers {
		if o.gone {
			continue
		}
		behind := d.claimed - o.Record.Payload
		if now.Sub(o.read) < d.options.HoldTime && behind <= d.ring.Header().PayloadBytes/2 {
			return
		}
		d.letGo(o)
		d.expired.Add(uint64(o.Record.Rows))
	}
}

// decide acts on what was asked for.
func (d *Drain) decide(offers []*Offer) {
	for _, o := range offers {
		for i := range d.offers {
			if d.offers[i] == o {
				d.offers = append(d.offers[:i], d.offers[i+1:]...)
				break
			}
		}
		l := d.lanes[o.lane]
		for _, rows := range o.rows {
			e := &entry{item: Item{Kind: Captured, Lane: o.lane, Step: o.Step, Record: o.Record, Owner: o.owner}, place: ring.PlaceRing, read: time.Now().UnixNano(), of: o}
			r := &e.item.Record
			r.Flags = r.Flags&^ring.RecordOffer | ring.RecordKept
			r.RowFirst, r.Rows, r.Size[0] = rows.From, rows.To-rows.From, rows.To-rows.From
			r.Payload += uint64(rows.From-o.Record.RowFirst) * o.row
			r.PayloadBytes = uint64(r.Rows) * o.row
			r.TensorBytes = r.PayloadBytes
			e.at, e.bytes = r.Payload, r.PayloadBytes
			if l.queue = append(l.queue, e); o.gone {
				e.ready = true
				e.lose(tensor.Budget)
				continue
			}
			o.left++
			d.fetched.Add(r.PayloadBytes)
			d.want = append(d.want, e)
		}
		if o.left == 0 {
			d.letGo(o)
		}
	}
}

// free gives back an entry's payload, once it is ours, or given up.
func (d *Drain) free(e *entry) {
	if e.of == nil {
		d.ring.Payload.Free(e.at, e.bytes)
		return
	}
	if e.of.left--; e.of.left == 0 {
		d.letGo(e.of)
	}
}

package drain

import (
	"fmt"
	"slices"
	"time"

	"dmi/ring"
	"dmi/tensor"
)

// lane is what is known of a lane of the ring.
type lane struct {
	ring *ring.Lane
	step *Step // open
	// by site of the open step: what its records said, -1 before the first
	selections []int32
	caught     uint64
	skipTo     uint64 // records below are in the manifest already
	quiet      bool   // strays are expected: of a step that an engine before us has booked
	end        uint64 // not read from here on; 0: no end
	ended      bool
	extra      uint64 // 1: of end, to see whether the open step closes

	queue    []*entry // read, not handed on
	slots    []*entry // read, not released
	released uint64
	parts    *assembly

	raw       []byte // records of this pass, for the manifest
	rawFirst  uint64
	tables    [][]byte
	unwritten bool // the manifest has not got all that was read: no slot is given back any more
}

// entry is a record, or something else that takes its turn among them.
type entry struct {
	item     Item // the consumer's once handed on
	none     bool // there is nothing to hand on
	ready    bool
	handed   bool
	part     bool // item is a part of a row
	away     bool // spilled payload, in memory of ours
	read     int64
	place    uint8
	at       uint64 // payload
	bytes    uint64
	owned    []byte // payload put together outside staging
	slot     bool   // a record's: released in turn
	tableEnd uint64
	tiles    *ring.Tiles            // where its payload is claimed; nil: it has none
	end      uint64                 // of the payload there
	of       *Offer                 // what it is fetched from
	raw      *[ring.RecordSize]byte // for the Tap
	table    []byte
}

// entry makes one. They are made some at a time: of a small tensor, making one alone is most of the work.
func (d *Drain) entry() *entry {
	if len(d.entries) == 0 {
		d.entries = make([]entry, 64)
	}
	e := &d.entries[0]
	d.entries = d.entries[1:]
	return e
}

func (l *lane) stop(at uint64) { l.end, l.ended = at, true }

func (l *lane) limit() uint64 {
	if l.ended {
		return l.end
	}
	return ^uint64(0)
}

// open reports whether the lane may be read.
func (l *lane) open() bool {
	return len(l.queue) < laneEntries && len(l.slots) < laneEntries && l.ring.Next() < l.limit()
}

// read takes in records of a lane, as many as there are and have their turn.
func (d *Drain) read(l *lane, now time.Time) bool {
	var b [ring.RecordSize]byte
	stamp := now.UnixNano()
	n := 0
	for ; n < passRecords && l.open(); n++ {
		ok, skipped, err := l.ring.Read(&b)
		if err != nil {
			d.fail(err)
			return true
		}
		if !ok {
			break
		}
		index := l.ring.Next() - 1
		if skipped > 0 {
			// The manifest counts records without holes; so an overrun ends what is written of this pass.
			d.append(l)
			d.event("error", "corrupt", fmt.Sprintf("lane %d wrote over %d records that were not released", l.ring.Index, skipped))
			d.stray.Add(skipped)
			if l.step != nil {
				d.cut(l, tensor.Corrupt)
			}
		}
		e := d.entry()
		e.none, e.ready, e.slot, e.read = true, true, true, stamp
		if index < l.skipTo {
			d.forgo(e, &b)
			l.pass(&b)
		} else {
			if len(l.raw) == 0 {
				l.rawFirst = index
			}
			l.raw = append(l.raw, b[:]...)
			tables := len(l.tables)
			d.take(l, e, &b)
			if d.options.Tap != nil {
				e.raw = new([ring.RecordSize]byte)
				*e.raw = b
				if len(l.tables) > tables {
					e.table = l.tables[tables]
				}
			}
		}
		e.tableEnd = l.ring.TableEnd()
		l.queue = append(l.queue, e)
		l.slots = append(l.slots, e)
		if d.failure != nil {
			return true
		}
	}
	d.records.Add(uint64(n))
	return n > 0
}

// take files a record. It may put others before e in the queue.
func (d *Drain) take(l *lane, e *entry, b *[ring.RecordSize]byte) {
	switch b[ring.RecordKindOffset] {
	case ring.KindOpen:
		d.takeOpen(l, e, b)
	case ring.KindCapture:
		d.takeCapture(l, e, b)
	case ring.KindClose:
		d.takeClose(l, e, b)
	case ring.KindGap:
		d.takeGap(l, e, b)
	default:
		d.refuse(l, fmt.Errorf("drain: lane %d: record.kind is %d: no such kind", l.ring.Index, b[ring.RecordKindOffset]))
	}
}

// rawLast is the record being taken, as the manifest will have it.
func (l *lane) rawLast() []byte { return l.raw[len(l.raw)-ring.RecordSize:] }

// refuse ends the open step over a record that does not fit it, and leaves the record out of the manifest's count.
func (d *Drain) refuse(l *lane, err error) {
	l.rawLast()[ring.RecordKindOffset] = 0
	d.stray.Add(1)
	if l.quiet && l.step == nil {
		return
	}
	d.event("error", "corrupt", err.Error()+"; the step's remaining rows are lost(corrupt), records up to the next step are skipped")
	if l.step != nil {
		d.cut(l, tensor.Corrupt)
	}
	l.quiet = true // one event is enough until the next OPEN
}

// cut ends the open step without a CLOSE.
func (d *Drain) cut(l *lane, reason tensor.Reason) {
	l.queue = append(l.queue, &entry{item: Item{Kind: Cut, Lane: l.ring.Index, Step: l.step, Reason: reason}, ready: true})
	l.step = nil
}

func (d *Drain) takeOpen(l *lane, e *entry, b *[ring.RecordSize]byte) {
	var o ring.OpenRecord
	o.Decode(b[:])
	if l.step != nil {
		d.event("error", "corrupt", fmt.Sprintf("drain: lane %d opens step %d within step %d; the rows that %d still owes are lost(corrupt)",
			l.ring.Index, o.Step, l.step.Number, l.step.Number))
		d.cut(l, tensor.Corrupt)
	}
	l.quiet = false
	if o.Sites > uint32(len(d.sites)) {
		before := len(d.sites)
		sites, err := d.ring.Sites()
		if len(sites) > before {
			if told := d.options.Sites(sites[before:]); told != nil {
				d.event("error", "store", fmt.Sprintf("%d sites cannot be kept: %v", len(sites)-before, told))
			}
			d.sites = sites
		}
		if err != nil {
			d.fail(err)
		}
	}
	if o.Sites > uint32(len(d.sites)) || o.Gated > 1 {
		d.refuse(l, fmt.Errorf("drain: lane %d: open.sites is %d of %d published, open.gated %d", l.ring.Index, o.Sites, len(d.sites), o.Gated))
		return
	}
	step := &Step{Lane: l.ring.Index, Number: o.Step, Policy: ring.Revision(o.Policy), Sites: d.sites[:o.Sites:o.Sites], Gated: o.Gated == 1, Tokens: o.Rows[ring.SpaceTokens]}
	var broken error
	if o.TableBytes != 0 {
		var table []byte
		if table, broken = l.ring.ReadTable(&o); broken == nil {
			step.Rows, broken = ring.ParseRows(table, &o)
		}
		if broken == nil {
			l.tables = append(l.tables, table)
		} else {
			step.Rows = nil
			clear(l.rawLast()[ring.OpenRecordTableBytesOffset:][:8]) // to the manifest it is a step whose rows are counted, not named
		}
	} else if !step.Gated {
		broken = fmt.Errorf("drain: lane %d: open.table_bytes is 0 in step %d, which is not gated", l.ring.Index, o.Step)
	}
	e.none, e.item = false, Item{Kind: Opened, Lane: l.ring.Index, Step: step}
	l.step, l.caught = step, 0
	l.selections = slices.Grow(l.selections[:0], len(step.Sites))[:len(step.Sites)]
	for i := range l.selections {
		l.selections[i] = -1
	}
	if broken != nil {
		d.event("error", "corrupt", broken.Error()+"; the step's rows are lost(corrupt)")
		// The Cut must come behind e, which is not in the queue yet: the step is over as soon as it is begun.
		step.Gated = false
		e.item.Reason = tensor.Corrupt
		l.step, l.quiet = nil, true
	}
}

func (d *Drain) takeClose(l *lane, e *entry, b *[ring.RecordSize]byte) {
	var c ring.CloseRecord
	c.Decode(b[:])
	switch {
	case l.step == nil:
		d.refuse(l, fmt.Errorf("drain: lane %d: closes step %d, and none is open", l.ring.Index, c.Step))
	case c.Step != l.step.Number || c.Aborted > 1:
		d.refuse(l, fmt.Errorf("drain: lane %d: close.step is %d in step %d, close.aborted %d", l.ring.Index, c.Step, l.step.Number, c.Aborted))
	case c.Records != l.caught:
		d.refuse(l, fmt.Errorf("drain: lane %d: step %d: close.records is %d, and %d came", l.ring.Index, c.Step, c.Records, l.caught))
	default:
		e.none, e.item = false, Item{Kind: Closed, Lane: l.ring.Index, Step: l.step, Aborted: c.Aborted == 1}
		l.step = nil
		d.steps.Add(1)
	}
}

// maxGapRows bounds what one GAP can claim: 2^40 row-outcomes, 4,096 million rows at 256 sites.
const maxGapRows = 1 << 40

func (d *Drain) takeGap(l *lane, e *entry, b *[ring.RecordSize]byte) {
	var g ring.GapRecord
	g.Decode(b[:])
	if l.step != nil || g.Rows > maxGapRows || g.LastStep < g.Step {
		d.refuse(l, fmt.Errorf("drain: lane %d: a gap of steps %d to %d, gap.rows %d, where it cannot be", l.ring.Index, g.Step, g.LastStep, g.Rows))
		return
	}
	e.none, e.item = false, Item{Kind: Gap, Lane: l.ring.Index, GapStep: g.Step, GapRows: g.Rows, GapSite: d.someSite()}
}

// someSite is a site that owes rows, or 0: the books want one for rows of which only the number is known.
func (d *Drain) someSite() uint32 {
	for i := range d.sites {
		if !d.sites[i].Optional() {
			return uint32(i)
		}
	}
	return 0
}

// check holds a capture record against the step that it stands in.
func (l *lane) check(r *ring.Record) error {
	bad := func(field string, value any, want string) error {
		return fmt.Errorf("drain: lane %d: step %d: record.%s is %v: %s", l.ring.Index, l.step.Number, field, value, want)
	}
	switch {
	case r.Step != l.step.Number:
		return bad("step", r.Step, "of another step")
	case l.step.Gated || l.step.Rows == nil:
		return bad("kind", r.Kind, "nothing is captured in a gated step")
	case uint64(r.Site) >= uint64(len(l.step.Sites)):
		return bad("site", r.Site, fmt.Sprintf("the step has %d", len(l.step.Sites)))
	case !tensor.Outcome(r.Outcome).Valid():
		return bad("outcome", r.Outcome, "no such outcome")
	case r.Reason >= ring.Reasons:
		return bad("reason", r.Reason, "no such reason")
	case !tensor.Level(r.Level).Valid():
		return bad("level", r.Level, "no such level")
	case r.Outcome == ring.OutcomeCaptured && r.Level == ring.LevelOff:
		return bad("level", r.Level, "nothing is captured of rows that are off")
	case r.Outcome == ring.OutcomeCaptured && r.Place != ring.PlaceRing && r.Place != ring.PlaceSpill:
		return bad("place", r.Place, "captured rows are in the ring or the spill")
	case r.Outcome != ring.OutcomeCaptured && (r.Place != ring.PlaceNone || r.PayloadBytes != 0):
		return bad("place", r.Place, "rows that were not captured have no payload")
	}
	list := l.step.Rows.List(r.Selection, l.step.Sites[r.Site].Space)
	if list == nil {
		return bad("selection", r.Selection, "the row table has none such")
	}
	if before := l.selections[r.Site]; before >= 0 && before != int32(r.Selection) {
		return bad("selection", r.Selection, fmt.Sprintf("the site had %d before", before))
	}
	if uint64(r.RowFirst)+uint64(r.Rows) > uint64(list.Count) {
		return bad("rows", r.Rows, fmt.Sprintf("from %d on there are not so many in the %d of its space", r.RowFirst, list.Count))
	}
	if r.Flags&(ring.RecordKept|ring.RecordOffer) != 0 {
		if r.Outcome == ring.OutcomeCaptured && r.Level != ring.LevelFull {
			return bad("level", r.Level, "what is kept or offered is full")
		}
		return nil
	}
	if r.Outcome == ring.OutcomeCaptured && !list.Has(r.RowFirst, r.Rows, r.Level) {
		return bad("level", r.Level, "its rows have others")
	}
	return nil
}

// forgo lets a record's payload go uncopied.
func (d *Drain) forgo(e *entry, b *[ring.RecordSize]byte) {
	if b[ring.RecordKindOffset] != ring.KindCapture || b[ring.RecordOutcomeOffset] != ring.OutcomeCaptured {
		return
	}
	var r ring.Record
	r.Decode(b[:])
	if tiles := d.tiles(r.Place); tiles != nil && d.claim(e, tiles, &r) == nil {
		tiles.Free(r.Payload, r.PayloadBytes)
	}
}

// pass goes over the row table of a record that is in the manifest already.
func (l *lane) pass(b *[ring.RecordSize]byte) {
	if b[ring.RecordKindOffset] != ring.KindOpen {
		return
	}
	var o ring.OpenRecord
	if o.Decode(b[:]); o.TableBytes != 0 {
		_ = l.ring.PassTable(&o) // one that lies keeps its room
	}
}

// claim takes note of a record's payload, which the record's slot then outlasts.
func (d *Drain) claim(e *entry, tiles *ring.Tiles, r *ring.Record) error {
	if err := tiles.Claim(r.Payload, r.PayloadBytes); err != nil || r.PayloadBytes == 0 {
		return err
	}
	e.tiles, e.end = tiles, r.Payload+aligned(r.PayloadBytes)
	if tiles == d.ring.Payload {
		d.claimed = max(d.claimed, e.end)
	}
	return nil
}

func (d *Drain) tiles(place uint8) *ring.Tiles {
	switch place {
	case ring.PlaceRing:
		return d.ring.Payload
	case ring.PlaceSpill:
		return d.ring.Spilled
	}
	return nil
}

// takeAway copies spilled payload to memory of ours, up to Options.TensorBytes, where copies that come before it are still to be made. A
// device's pump may be kept from making them by a call of the model's thread that itself waits for the kernel that waits for the spill:
// only we can end that. Otherwise, and in best-effort mode, in which no kernel waits, it reports false, and the payload is read in place.
func (d *Drain) takeAway(e *entry) bool {
	if h := d.ring.Header(); h.Device != ring.DeviceCUDA || h.Mode != ring.ModeComplete || len(d.want)+len(d.copying) == 0 || d.away+e.bytes > d.options.TensorBytes {
		return false
	}
	d.away += e.bytes
	e.away = true
	e.item.Data = append([]byte(nil), d.ring.Spill(e.at, e.bytes)...)
	d.taken = append(d.taken, e) // freed once the manifest has the record: an engine after us must not read it anew
	return true
}

func (d *Drain) takeCapture(l *lane, e *entry, b *[ring.RecordSize]byte) {
	r := &e.item.Record
	r.Decode(b[:])
	if l.step == nil {
		d.refuse(l, fmt.Errorf("drain: lane %d: a capture of step %d, and none is open", l.ring.Index, r.Step))
		d.forgo(e, b)
		return
	}
	if err := l.check(r); err != nil {
		d.refuse(l, err)
		d.forgo(e, b)
		return
	}
	l.caught++
	l.selections[r.Site] = int32(r.Selection)
	e.none, e.item.Lane, e.item.Step = false, l.ring.Index, l.step
	offer := r.Flags&ring.RecordOffer != 0
	if r.Outcome != ring.OutcomeCaptured {
		e.item.Kind, e.none = Settled, offer
		return
	}
	if offer {
		if err := d.hold(l, e, time.Now()); err != nil {
			e.none = true
			d.refuse(l, err)
			d.forgo(e, b)
		}
		return
	}
	if err := d.claim(e, d.tiles(r.Place), r); err != nil {
		e.none = true
		d.refuse(l, err)
		return
	}
	e.item.Kind = Captured
	e.part = r.PartOffset != 0 || r.TensorBytes != r.PayloadBytes
	e.place, e.at, e.bytes = r.Place, r.Payload, r.PayloadBytes
	if r.PayloadBytes == 0 {
		return
	}
	if r.Place == ring.PlaceSpill && d.takeAway(e) {
		return
	}
	if r.Place == ring.PlaceSpill {
		if d.spilled == nil {
			d.spilled = new(spillPass)
			d.spilled.left.Store(1)
		}
		d.spilled.left.Add(1)
		e.item.spill, e.item.drain = &spillUse{at: r.Payload, bytes: r.PayloadBytes, pass: d.spilled}, d
		e.item.Data = d.ring.Spill(r.Payload, r.PayloadBytes)
		return
	}
	if d.gone != tensor.ReasonNone {
		e.lose(d.gone)
		d.ring.Payload.Free(e.at, e.bytes)
		return
	}
	e.ready = false
	d.want = append(d.want, e)
}

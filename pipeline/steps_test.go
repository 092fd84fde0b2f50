package pipeline_test

import (
	"errors"
	"time"

	"dmi/internal/ringtape"
	"dmi/ring"
	"dmi/tensor"
)

var errNoRoom = errors.New("no room within the deadline")

// runStep publishes a whole step on a lane. The sink is told where sliding windows begin, before their rows are published.
func (t *traffic) runStep(lane *ringtape.ProducerLane, sink *sink) error {
	t.step++
	step := t.step
	if t.IntN(12) == 0 {
		rows := uint64(t.IntN(1000))
		t.loose[fate{tensor.Dropped, tensor.RecordsFull}] += rows
		return t.publish(lane, &ring.GapRecord{Step: step, LastStep: step + 3, Steps: 3, Rows: rows, Kind: ring.KindGap})
	}
	r := t.plan()
	rejected := t.judge(lane, &r)
	if t.rules != nil {
		t.revision = t.rules.step(&r)
	}
	gated := t.IntN(12) == 0
	open := ring.OpenRecord{Step: step, OpenedUnixNS: uint64(time.Now().UnixNano()), Sites: uint32(len(t.sites)), Kind: ring.KindOpen, Rows: r.rows, Policy: t.revision << 16}
	if gated {
		open.Gated = 1
	}
	if !gated || t.IntN(2) == 0 {
		table := ringtape.EncodeTable(step, r.spans, r.keys, r.width, r.packed)
		if t.lie != nil {
			t.lie(table)
		}
		at, err := lane.WriteTable(table, t.until())
		if err != nil {
			return err
		}
		open.Table, open.TableBytes = at, uint64(len(table))
	}
	if err := t.publish(lane, &open); err != nil {
		return err
	}
	if open.TableBytes > 0 {
		for _, s := range r.spans {
			if s.Space == ring.SpaceTokens && s.Flags&ring.SpanDraft != 0 {
				t.drafts[lane] = append(t.drafts[lane], s)
			}
		}
		for i := range t.sites {
			for _, x := range rejected {
				if _, owed := t.want[keyOf(uint32(i), x)]; owed {
					t.want[keyOf(uint32(i), x)] = fate{tensor.Rejected, tensor.Speculation}
				}
			}
			for _, x := range r.cached() {
				if t.sites[i].Flags&ring.SiteOptional == 0 {
					t.want[keyOf(uint32(i), x)] = fate{tensor.Cached, tensor.Prefix}
				}
			}
		}
	}
	if gated {
		for i := range t.sites {
			if open.TableBytes == 0 {
				t.loose[fate{tensor.Dropped, tensor.RecordsFull}] += uint64(r.rows[0])
				continue
			}
			for _, x := range r.list(ring.SpaceTokens) {
				t.want[keyOf(uint32(i), x)] = fate{tensor.Dropped, tensor.RecordsFull}
			}
		}
		return t.publish(lane, &ring.CloseRecord{Step: step, Kind: ring.KindClose})
	}
	aborted := t.IntN(10) == 0
	rest := fate{tensor.Lost, tensor.NotFired}
	if aborted {
		rest = fate{tensor.Dropped, tensor.Aborted}
	}
	records := uint64(0)
	for _, i := range t.Perm(len(t.sites)) {
		s := &t.sites[i]
		rows := r.list(s.Space)
		settled := make([]fate, len(rows))
		for j := range settled {
			settled[j] = rest
		}
		if t.IntN(8) != 0 { // else it stays silent
			n, err := t.fire(lane, s, &r, step, settled, sink)
			if err != nil {
				return err
			}
			records += n
			if t.IntN(10) == 0 { // and once more: the first firing counts
				again := make([]fate, len(rows))
				for j := range again {
					again[j] = rest
				}
				if n, err = t.fire(lane, s, &r, step, again, nil); err != nil {
					return err
				}
				records += n
				for j := range settled {
					switch {
					case settled[j] == rest:
						settled[j] = again[j]
					case settled[j].outcome == tensor.Captured && again[j] != rest:
						settled[j].reason = tensor.Repeated
					}
				}
			}
		}
		t.expect(s, &r, rows, settled, rest)
	}
	c := ring.CloseRecord{Step: step, Records: records, Kind: ring.KindClose}
	if aborted {
		c.Aborted = 1
	}
	return t.publish(lane, &c)
}

func keyOf(site uint32, x row) rowKey {
	return rowKey{site, x.span.Request, x.span.Attempt, x.position}
}

// expect writes down what must become of a site's rows in a step.
func (t *traffic) expect(s *trafficSite, r *stepRows, rows []row, settled []fate, rest fate) {
	optional := s.Flags&ring.SiteOptional != 0
	if s.Space != ring.SpaceTokens && !optional {
		for _, x := range r.list(ring.SpaceTokens) {
			t.want[keyOf(s.ID, x)] = fate{tensor.NotComputed, tensor.Engine}
		}
	}
	for j, x := range rows {
		if settled[j] == rest && optional {
			continue
		}
		if settled[j].outcome == tensor.Captured && t.rules != nil && !t.rules.kept(t.revision, s.ID, x) {
			settled[j] = fate{tensor.Skipped, tensor.Policy}
		}
		t.want[keyOf(s.ID, x)] = settled[j]
	}
}

// fire captures a site in one of the ways in which that happens, and notes the fates.
func (t *traffic) fire(lane *ringtape.ProducerLane, s *trafficSite, r *stepRows, step uint64, settled []fate, sink *sink) (uint64, error) {
	rows := r.list(s.Space)
	switch t.IntN(8) {
	case 0: // nothing of it is wanted, or fits
		f := []fate{{tensor.Skipped, tensor.Policy}, {tensor.Dropped, tensor.RingFull}, {tensor.Dropped, tensor.Mismatch}}[t.IntN(3)]
		return 1, t.settle(lane, s, step, 0, len(rows), f, settled)
	case 1, 2:
		if len(rows) > 0 {
			if fits, err := t.whole(lane, s, r, step, rows, settled, sink); fits || err != nil {
				return 1, err
			}
		}
	}
	return t.gathered(lane, s, r, step, rows, settled, sink)
}

func (t *traffic) settle(lane *ringtape.ProducerLane, s *trafficSite, step uint64, from, count int, f fate, settled []fate) error {
	for j := from; j < from+count; j++ {
		settled[j] = f
	}
	return t.publish(lane, &ring.Record{Step: step, Site: s.ID, RowFirst: uint32(from), Rows: uint32(count), Kind: ring.KindCapture,
		Outcome: uint8(f.outcome), Reason: uint8(f.reason)})
}

func (t *traffic) note(sink *sink, s *trafficSite, x row, keyBase uint32) {
	if sink != nil && s.keyed() {
		sink.mu.Lock()
		defer sink.mu.Unlock()
		sink.windows[keyOf(s.ID, x)] = max(0, int(keyBase)-int(x.span.KeyFirst))
	}
}

// place finds room for payload: in the ring, or in complete mode perhaps in the spill, waiting as long as it takes.
func (t *traffic) place(data []byte) (at uint64, place uint8, err error) {
	for deadline := t.until(); time.Now().Before(deadline); time.Sleep(50 * time.Microsecond) {
		if t.complete && t.IntN(3) == 0 {
			if at, ok := t.p.WritePayload(ring.PlaceSpill, data); ok {
				return at, ring.PlaceSpill, nil
			}
		}
		if at, ok := t.p.WritePayload(ring.PlaceRing, data); ok {
			return at, ring.PlaceRing, nil
		}
	}
	return 0, 0, errNoRoom
}

func (t *traffic) whole(lane *ringtape.ProducerLane, s *trafficSite, r *stepRows, step uint64, rows []row, settled []fate, sink *sink) (fits bool, err error) {
	data, size, stride, keyBase := t.tensorOf(s, r)
	if uint64(len(data)) > t.p.Header.PayloadBytes {
		return false, nil
	}
	at, place, err := t.place(data)
	if err != nil {
		return false, err
	}
	rec := ring.Record{Step: step, Payload: at, PayloadBytes: uint64(len(data)), TensorBytes: uint64(len(data)), Site: s.ID, Rows: uint32(len(rows)),
		Kind: ring.KindCapture, Outcome: ring.OutcomeCaptured, DType: uint8(s.dtype), NDim: uint8(len(size)), Place: place, KeyBase: keyBase}
	copy(rec.Size[:], size)
	copy(rec.Stride[:], stride)
	copy(rec.Role[:], s.Role[:s.NDim])
	for j, x := range rows {
		settled[j] = fate{tensor.Captured, tensor.ReasonNone}
		t.note(sink, s, x, keyBase)
	}
	return true, t.publish(lane, &rec)
}

// gathered captures rows in one record or several, some of them in parts, some perhaps dropped at the end.
func (t *traffic) gathered(lane *ringtape.ProducerLane, s *trafficSite, r *stepRows, step uint64, rows []row, settled []fate, sink *sink) (uint64, error) {
	keyBase := uint32(0)
	if s.keyed() && r.keys > 1 && t.IntN(3) == 0 {
		keyBase = uint32(t.IntN(int(r.keys)))
		for _, x := range rows {
			keyBase = min(keyBase, x.span.KeyFirst+x.position)
		}
	}
	data, size, roles := gatheredOf(s, r, keyBase)
	rowSize := 0
	if len(rows) > 0 {
		rowSize = len(data) / len(rows)
	}
	records := uint64(0)
	emit := func(first, count int, payload []byte, offset, whole int, rowsSettled int) error {
		at, place, err := t.place(payload)
		if err != nil {
			return err
		}
		rec := ring.Record{Step: step, Payload: at, PayloadBytes: uint64(len(payload)), PartOffset: uint64(offset), TensorBytes: uint64(whole), Site: s.ID,
			RowFirst: uint32(first), Rows: uint32(rowsSettled), Kind: ring.KindCapture, Outcome: ring.OutcomeCaptured, DType: uint8(s.dtype),
			NDim: uint8(len(size)), Place: place, Flags: ring.RecordGathered, KeyBase: keyBase}
		copy(rec.Size[:], size)
		rec.Size[0] = uint32(count)
		copy(rec.Role[:], roles)
		stride := uint32(1)
		for d := len(size) - 1; d >= 0; d-- {
			rec.Stride[d] = stride
			stride *= rec.Size[d]
		}
		records++
		return t.publish(lane, &rec)
	}
	if t.IntN(10) == 0 { // a device that leaves the end of its spill: of whatever length, it is a part that nothing continues
		corner := make([]byte, 1+t.IntN(int(min(t.p.Header.PayloadBytes/4, 4096))))
		if err := emit(0, 1, corner, 0, len(corner)+ring.PayloadAlign, 0); err != nil {
			return records, err
		}
	}
	done := 0
	for {
		n := len(rows) - done
		if n > 1 && t.IntN(2) == 0 {
			n = 1 + t.IntN(n)
		}
		if rowSize > 0 {
			n = min(n, int(t.p.Header.PayloadBytes)/2/rowSize)
		}
		if t.IntN(15) == 0 && n > 0 && done > 0 { // the rest found no room
			records++
			return records, t.settle(lane, s, step, done, len(rows)-done, fate{tensor.Dropped, tensor.RingFull}, settled)
		}
		payload := data[done*rowSize : (done+n)*rowSize]
		for _, x := range rows[done : done+n] {
			t.note(sink, s, x, keyBase)
		}
		if n == 1 && rowSize > 64 && t.IntN(3) == 0 {
			for offset := 0; offset < rowSize; {
				part := min(rowSize-offset, 64*(1+t.IntN(4)))
				if t.IntN(20) == 0 && offset > 0 { // given up half-way: the row is dropped instead
					records++
					return records, t.settle(lane, s, step, done, len(rows)-done, fate{tensor.Dropped, tensor.Timeout}, settled)
				}
				if err := emit(done, 1, payload[offset:offset+part], offset, rowSize, boolInt(offset+part == rowSize)); err != nil {
					return records, err
				}
				offset += part
			}
		} else if err := emit(done, n, payload, 0, len(payload), n); err != nil {
			return records, err
		}
		for j := done; j < done+n; j++ {
			settled[j] = fate{tensor.Captured, tensor.ReasonNone}
		}
		if done += n; done == len(rows) {
			return records, nil
		}
	}
}

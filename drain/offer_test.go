//go:build linux

package drain_test

import (
	"bytes"
	"sync/atomic"
	"testing"
	"time"

	"dmi/drain"
	"dmi/internal/ringtape"
	"dmi/ring"
	"dmi/tensor"

	"golang.org/x/sys/unix"
)

const rowBytes = 64

// offering is a producer whose steps have four rows, offered and then given as figures.
type offering struct {
	*testing.T
	p     *ringtape.Producer
	d     *drain.Drain
	items chan drain.Item
	ended chan error
}

func newOffering(t *testing.T, o drain.Options) *offering {
	p, err := ringtape.NewProducer(ringtape.Shape{Mode: ring.ModeBestEffort, Lanes: 1, RecordCapacity: 64, CommandCapacity: 16, SiteCapacity: 1, Payload: 1 << 12, Table: 1 << 13, Staging: 1 << 14})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	p.AddSite(ring.Site{NDim: 2, Role: [ring.MaxDims]uint8{ring.RoleRow, ring.RoleInner}}, "a")
	p.StartPump()
	r, err := ring.Map(p.FDs[0], 1<<40)
	if err != nil {
		t.Fatal(err)
	}
	var bells [2]int
	for i := range bells {
		if bells[i], err = unix.FcntlInt(uintptr(p.FDs[1+i]), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			t.Fatal(err)
		}
	}
	bell, err := ring.NewBell(r, bells[0], bells[1])
	if err != nil {
		t.Fatal(err)
	}
	o.Manifest, o.Sites = &counted{}, func([]ring.Site) error { return nil }
	batches := make(chan []*drain.Item)
	x := &offering{t, p, drain.New(r, bell, batches, o), make(chan drain.Item, 1024), make(chan error, 1)}
	go func() {
		done := make(chan error, 1)
		go func() { done <- x.d.Run() }()
		for batch := range batches {
			for _, i := range batch {
				kept := *i
				kept.Data = bytes.Clone(i.Data)
				i.Release()
				x.items <- kept
			}
		}
		err := <-done
		bell.Close()
		r.Close()
		x.ended <- err
	}()
	return x
}

func (x *offering) step(number uint64, content byte) {
	x.Helper()
	l, until := x.p.Lanes[0], time.Now().Add(patience)
	spans := []ring.Span{{Request: 1, Count: 2}, {Request: 2, First: 2, Count: 2}}
	table := ringtape.EncodeTable(number, spans, 0, [ring.Spaces]uint32{4}, true)
	at, err := l.WriteTable(table, until)
	if err != nil {
		x.Fatal(err)
	}
	rows := make([]byte, 4*rowBytes)
	for i := range rows {
		rows[i] = content + byte(i/rowBytes)
	}
	payload, ok := x.p.WritePayload(ring.PlaceRing, rows)
	figures, also := x.p.WritePayload(ring.PlaceRing, make([]byte, 4*32))
	if !ok || !also {
		x.Fatalf("step %d: no room in the ring", number)
	}
	record := ring.Record{Step: number, Payload: payload, PayloadBytes: 4 * rowBytes, TensorBytes: 4 * rowBytes, Rows: 4, Kind: ring.KindCapture, Outcome: ring.OutcomeCaptured,
		Size: [ring.MaxDims]uint32{4, rowBytes}, Stride: [ring.MaxDims]uint32{rowBytes, 1}, Role: [ring.MaxDims]uint8{ring.RoleRow, ring.RoleInner},
		DType: ring.DTypeU8, NDim: 2, Place: ring.PlaceRing, Flags: ring.RecordGathered | ring.RecordOffer}
	given := record
	given.Payload, given.PayloadBytes, given.TensorBytes, given.Level, given.Flags = figures, 4*32, 4*32, ring.LevelStats, ring.RecordGathered
	for _, r := range []interface{ Encode([]byte) }{
		&ring.OpenRecord{Step: number, Table: at, TableBytes: uint64(len(table)), Sites: 1, Kind: ring.KindOpen, Rows: [3]uint32{4}},
		&record, &given, &ring.CloseRecord{Step: number, Records: 2, Kind: ring.KindClose},
	} {
		var b [ring.RecordSize]byte
		r.Encode(b[:])
		if err := l.Publish(b[:], until); err != nil {
			x.Fatal(err)
		}
	}
}

func (x *offering) next(want drain.Kind) drain.Item {
	x.Helper()
	select {
	case i := <-x.items:
		if i.Kind != want {
			x.Fatalf("kind %d came, want %d", i.Kind, want)
		}
		return i
	case <-time.After(patience):
		x.Fatalf("kind %d does not come", want)
	}
	panic("unreachable")
}

// offer reads a step up to its end, and gives its offer.
func (x *offering) offer() *drain.Offer {
	x.Helper()
	x.next(drain.Opened)
	o := x.next(drain.Offered).Offer
	x.next(drain.Captured)
	x.next(drain.Closed)
	return o
}

func (x *offering) finish() {
	x.Helper()
	x.p.Finish()
	x.d.Finish(tensor.ProducerExit, patience)
	select {
	case err := <-x.ended:
		if err != nil {
			x.Error(err)
		}
	case <-time.After(patience):
		x.Fatal("the drain does not end")
	}
	head := atomic.LoadUint64(x.p.Control(ring.ControlPayloadTailOffset))
	if head%ring.PayloadAlign != 0 || x.p.Lanes[0].Room() != 64 {
		x.Errorf("the payload's tail is %d, and there is room for %d of 64 records", head, x.p.Lanes[0].Room())
	}
}

// Of what is offered only that is copied which is asked for, while later steps go by.
func TestOffersAreCopiedOnlyWhereTheyAreWanted(t *testing.T) {
	x := newOffering(t, drain.Options{HoldTime: time.Hour})
	const figures = 4 * 32
	x.step(1, 10)
	first := x.offer()
	x.step(2, 20) // behind an offer that nobody has decided about
	second := x.offer()
	if copied := x.d.Status().Copied; copied != 2*figures {
		t.Errorf("%d bytes were copied of two steps' figures", copied)
	}
	first.Fetch(nil, nil)
	second.Fetch([]drain.Span{{From: 1, To: 3}}, "mine")
	got := x.next(drain.Captured)
	want := append(bytes.Repeat([]byte{21}, rowBytes), bytes.Repeat([]byte{22}, rowBytes)...)
	if !bytes.Equal(got.Data, want) || got.Owner != "mine" || got.Record.RowFirst != 1 || got.Record.Rows != 2 || got.Record.Size[0] != 2 {
		t.Errorf("fetched: %v, %+v", got.Data, got.Record)
	}
	s := x.d.Status()
	if s.Copied != 2*figures+2*rowBytes || s.Offered != 8*rowBytes || s.Fetched != 2*rowBytes || s.Expired != 0 {
		t.Errorf("copied %d, offered %d, fetched %d bytes; expired %d rows", s.Copied, s.Offered, s.Fetched, s.Expired)
	}
	x.finish()
}

// What nobody decides about is let go when half of the ring lies behind it, or it is too old: the producer always finds room.
func TestOffersDoNotHoldTheRingUp(t *testing.T) {
	for name, o := range map[string]drain.Options{"bytes": {HoldTime: time.Hour}, "time": {HoldTime: 20 * time.Millisecond}} {
		t.Run(name, func(t *testing.T) {
			x := newOffering(t, o)
			var offers []*drain.Offer
			const steps = 40 // four rings of them
			for i := range uint64(steps) {
				x.step(i, 30)
				offers = append(offers, x.offer())
				if name == "time" {
					for until := time.Now().Add(patience); x.d.Status().Expired < 4*(i+1) && time.Now().Before(until); {
						time.Sleep(time.Millisecond)
					}
				}
			}
			if expired := x.d.Status().Expired; expired < 4*steps/2 {
				t.Errorf("%d of %d rows were let go", expired, 4*steps)
			}
			offers[0].Fetch([]drain.Span{{From: 0, To: 4}}, "late")
			if late := x.next(drain.Settled); late.Owner != "late" || late.Record.Rows != 4 || late.Record.Outcome != ring.OutcomeLost {
				t.Errorf("of an offer that is gone: %+v", late.Record)
			}
			for _, o := range offers[1:] {
				o.Fetch(nil, nil)
			}
			x.finish()
		})
	}
}

// A producer that offers what cannot be one is refused, and the step goes on being whole: what it owes is lost.
func TestOffersThatLie(t *testing.T) {
	x := newOffering(t, drain.Options{})
	l, until := x.p.Lanes[0], time.Now().Add(patience)
	table := ringtape.EncodeTable(1, []ring.Span{{Request: 1, Count: 1}}, 0, [ring.Spaces]uint32{1}, true)
	at, err := l.WriteTable(table, until)
	if err != nil {
		t.Fatal(err)
	}
	payload, _ := x.p.WritePayload(ring.PlaceRing, make([]byte, rowBytes))
	for _, r := range []interface{ Encode([]byte) }{
		&ring.OpenRecord{Step: 1, Table: at, TableBytes: uint64(len(table)), Sites: 1, Kind: ring.KindOpen, Rows: [3]uint32{1}},
		&ring.Record{Step: 1, Payload: payload, PayloadBytes: rowBytes, TensorBytes: rowBytes, Rows: 1, Kind: ring.KindCapture, Outcome: ring.OutcomeCaptured,
			Size: [ring.MaxDims]uint32{1, rowBytes}, Stride: [ring.MaxDims]uint32{rowBytes, 1}, Role: [ring.MaxDims]uint8{ring.RoleRow, ring.RoleInner},
			DType: ring.DTypeU8, NDim: 2, Place: ring.PlaceRing, Flags: ring.RecordOffer}, // not gathered
	} {
		var b [ring.RecordSize]byte
		r.Encode(b[:])
		if err := l.Publish(b[:], until); err != nil {
			t.Fatal(err)
		}
	}
	x.next(drain.Opened)
	if cut := x.next(drain.Cut); cut.Reason != tensor.Corrupt {
		t.Errorf("cut for %v", cut.Reason)
	}
	x.finish()
}

//go:build linux

package drain_test

import (
	"sync/atomic"
	"testing"
	"time"

	"dmi/drain"
	"dmi/internal/ringtape"
	"dmi/ring"
	"dmi/tensor"

	"golang.org/x/sys/unix"
)

// counted is a manifest that only counts.
type counted struct{ records [2]uint64 }

func (c *counted) Append(lane int, first uint64, records []byte, _ [][]byte) error {
	c.records[lane] = first + uint64(len(records)/ring.RecordSize)
	return nil
}

type resumed struct {
	drain *drain.Drain
	ended chan error
}

// engineOf drains a ring as an engine does that finds so much in its manifest.
func engineOf(t *testing.T, p *ringtape.Producer, m *counted) *resumed {
	t.Helper()
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
	items := make(chan []*drain.Item)
	e := &resumed{ended: make(chan error, 1)}
	e.drain = drain.New(r, bell, items, drain.Options{Manifest: m, Sites: func([]ring.Site) error { return nil }, Resume: append([]uint64(nil), m.records[:]...),
		Event: func(level, code, message string) { t.Log(level, code, message) }})
	go func() {
		done := make(chan error, 1)
		go func() { done <- e.drain.Run() }()
		for batch := range items {
			for _, i := range batch {
				i.Release()
				if i.Done != nil {
					i.Done()
				}
			}
		}
		err := <-done
		bell.Close()
		r.Close()
		e.ended <- err
	}()
	return e
}

// settle returns once the drain has given back what it will.
func (e *resumed) settle() {
	for range 3 {
		done := make(chan struct{})
		e.drain.Mark(func() { close(done) })
		<-done
	}
}

const patience = time.Minute // with what takes a moment

const tableBytes = ring.TableSize + ring.SpanSize // of one span

func publishRows(t *testing.T, p *ringtape.Producer, lane int, step, payload, bytes uint64) {
	t.Helper()
	l, until := p.Lanes[lane], time.Now().Add(patience)
	table := ringtape.EncodeTable(step, []ring.Span{{Request: 1, Count: 1}}, 0, [ring.Spaces]uint32{1}, true)
	at, err := l.WriteTable(table, until)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []interface{ Encode([]byte) }{
		&ring.OpenRecord{Step: step, Table: at, TableBytes: uint64(len(table)), Sites: 1, Kind: ring.KindOpen, Rows: [3]uint32{1}},
		&ring.Record{Step: step, Payload: payload, PayloadBytes: bytes, TensorBytes: bytes, Rows: 1, Kind: ring.KindCapture, Outcome: ring.OutcomeCaptured,
			Size: [ring.MaxDims]uint32{1, uint32(bytes)}, Stride: [ring.MaxDims]uint32{uint32(bytes), 1}, Role: [ring.MaxDims]uint8{ring.RoleRow, ring.RoleInner},
			DType: ring.DTypeU8, NDim: 2, Place: ring.PlaceRing, Flags: ring.RecordGathered},
		&ring.CloseRecord{Step: step, Records: 1, Kind: ring.KindClose},
	} {
		var b [ring.RecordSize]byte
		r.Encode(b[:])
		if err := l.Publish(b[:], until); err != nil {
			t.Fatal(err)
		}
	}
}

// An engine ends between what two lanes have to say of neighbouring payload. The one after it must find out about all of it: else the payload's tail
// stays where it is, and a producer in complete mode waits for ever.
func TestPayloadOutlivesAnEngine(t *testing.T) {
	p, err := ringtape.NewProducer(ringtape.Shape{Mode: ring.ModeComplete, Lanes: 2, RecordCapacity: 16, CommandCapacity: 16, SiteCapacity: 1, Payload: 1 << 14, Table: 4096, Staging: 1 << 14})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	p.AddSite(ring.Site{NDim: 2, Role: [ring.MaxDims]uint8{ring.RoleRow, ring.RoleInner}}, "a")
	p.StartPump()
	m := &counted{}
	first := engineOf(t, p, m)
	slow, _ := p.WritePayload(ring.PlaceRing, make([]byte, 1000))
	quick, _ := p.WritePayload(ring.PlaceRing, make([]byte, 1000))
	publishRows(t, p, 1, 1, quick, 1000)
	third, _ := p.WritePayload(ring.PlaceRing, make([]byte, 1000))
	publishRows(t, p, 1, 3, third, 1000)
	first.settle()
	first.drain.Finish(tensor.EngineExit, 0)
	if err := <-first.ended; err != nil {
		t.Fatal(err)
	}
	second := engineOf(t, p, m)
	publishRows(t, p, 0, 2, slow, 1000)
	second.settle()
	end := third + (1000+ring.PayloadAlign-1)/ring.PayloadAlign*ring.PayloadAlign
	if tail := atomic.LoadUint64(p.Control(ring.ControlPayloadTailOffset)); tail != end {
		t.Errorf("the payload's tail is %d, with nothing in use below %d", tail, end)
	}
	for i, l := range p.Lanes {
		if l.Room() != 16 {
			t.Errorf("lane %d: room for %d of 16 records", i, l.Room())
		}
		if tail, want := atomic.LoadUint64(p.Control(uint64(ring.ControlLaneOffset+i*ring.LaneSize+ring.LaneTableTailOffset))), []uint64{tableBytes, 2 * tableBytes}[i]; tail != want {
			t.Errorf("lane %d: the row tables' tail is %d, with nothing in use below %d", i, tail, want)
		}
	}
	second.drain.Finish(tensor.ProducerExit, 0)
	if err := <-second.ended; err != nil {
		t.Fatal(err)
	}
	if m.records != [2]uint64{3, 6} {
		t.Errorf("the manifest has %v records", m.records)
	}
}

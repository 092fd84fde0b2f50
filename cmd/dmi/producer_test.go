//go:build linux

package main

import (
	"encoding/binary"
	"encoding/json"
	"math"
	"sync/atomic"
	"testing"
	"time"

	"dmi/internal/ringtape"
	"dmi/ring"
)

const patience = 2 * time.Minute // with what takes a moment

// producer is a real ring in a memfd, with one site of 4 float32 and one request, attached to a real engine.
type producer struct {
	t testing.TB
	*ringtape.Producer
	client  *ringtape.Client
	session string
	step    uint64
	rows    uint32 // published of the request
}

// value is an element of the site.
func value(position, dim int) float32 { return float32(position)*4 + float32(dim) + 0.25 }

func newProducer(t testing.TB, session string, mode uint32) *producer {
	t.Helper()
	p, err := ringtape.NewProducer(ringtape.Shape{Mode: mode, Lanes: 1, RecordCapacity: 1024, CommandCapacity: 256, SiteCapacity: 16, Payload: 1 << 20, Table: 1 << 16, Staging: 1 << 20, Spill: uint64(mode) << 16})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	p.AddSite(ring.Site{NDim: 2, Role: [ring.MaxDims]uint8{ring.RoleRow, ring.RoleInner}}, "blocks.0.hook_resid_post")
	p.StartPump()
	return &producer{t: t, Producer: p, session: session}
}

func (p *producer) attach(socket, token string, resume bool) error {
	p.t.Helper()
	client, err := ringtape.Dial(socket)
	if err != nil {
		return err
	}
	p.client = client
	p.t.Cleanup(func() { client.Close() })
	mode := "best-effort"
	if p.Header.Mode == ring.ModeComplete {
		mode = "complete"
	}
	hello, err := json.Marshal(map[string]any{"type": "hello", "protocol": 1, "abi": ring.ABIVersion, "token": token, "session": p.session, "producer": p.Name(), "resume": resume, "mode": mode,
		"text": "ids", "process": map[string]any{"pid": 1}, "versions": map[string]any{}, "model": map[string]any{"name": "toy"}, "aliases": map[string]any{}, "hooks": []string{"**"},
		"run": map[string]any{"id": "r" + p.session[1:], "labels": map[string]any{}, "tags": []string{}, "begun_unix_ns": time.Now().UnixNano()}})
	if err != nil {
		return err
	}
	if err := client.Hello(hello, p.FDs[:]...); err != nil {
		return err
	}
	if _, err := client.Expect("welcome", patience); err != nil {
		return err
	}
	if !resume {
		return client.Send(map[string]any{"type": "requests", "requests": []map[string]any{{"request": 1, "id": p.request(), "run": "r" + p.session[1:], "begun_unix_ns": time.Now().UnixNano()}}})
	}
	return nil
}

func (p *producer) request() string { return "r" + p.session[1:] + ".0" }

// forward publishes a step of count rows of the request.
func (p *producer) forward(count uint32) error {
	lane, deadline := p.Lanes[0], time.Now().Add(patience)
	table := ringtape.EncodeTable(p.step, []ring.Span{{Request: 1, Count: count, Position: p.rows}}, 0, [ring.Spaces]uint32{count}, true)
	at, err := lane.WriteTable(table, deadline)
	if err != nil {
		return err
	}
	raw := make([]byte, ring.RecordSize)
	policy, off := uint64(1), false
	for again := uint64(0); policy%2 != 0 || again != policy; again = atomic.LoadUint64(p.Control(ring.ControlPolicyOffset)) {
		policy = atomic.LoadUint64(p.Control(ring.ControlPolicyOffset))
		off = p.Mem[p.Header.GatesOffset] == ring.LevelOff // of the one site
	}
	open := ring.OpenRecord{Step: p.step, Policy: policy, Table: at, TableBytes: uint64(len(table)), OpenedUnixNS: uint64(time.Now().UnixNano()), Sites: 1, Kind: ring.KindOpen, Rows: [3]uint32{count}}
	open.Encode(raw)
	if err := lane.Publish(raw, deadline); err != nil {
		return err
	}
	if off {
		record := ring.Record{Step: p.step, Rows: count, Kind: ring.KindCapture, Outcome: ring.OutcomeSkipped, Reason: ring.ReasonPolicy, Level: ring.LevelOff}
		record.Encode(raw)
		return p.close(raw, count, deadline)
	}
	var data []byte
	for i := range int(count) {
		for d := range 4 {
			data = binary.LittleEndian.AppendUint32(data, math.Float32bits(value(int(p.rows)+i, d)))
		}
	}
	payload, ok := p.WritePayload(ring.PlaceRing, data)
	for !ok && time.Now().Before(deadline) { // complete mode: wait for the engine
		time.Sleep(100 * time.Microsecond)
		payload, ok = p.WritePayload(ring.PlaceRing, data)
	}
	bytes := uint64(len(data))
	record := ring.Record{Step: p.step, Payload: payload, PayloadBytes: bytes, TensorBytes: bytes, Rows: count, Kind: ring.KindCapture, Outcome: ring.OutcomeCaptured,
		Size: [ring.MaxDims]uint32{count, 4}, Stride: [ring.MaxDims]uint32{4, 1}, Role: [ring.MaxDims]uint8{ring.RoleRow, ring.RoleInner}, DType: ring.DTypeF32, NDim: 2, Place: ring.PlaceRing,
		Flags: ring.RecordGathered}
	record.Encode(raw)
	return p.close(raw, count, deadline)
}

// close publishes the step's one record and its end.
func (p *producer) close(raw []byte, count uint32, deadline time.Time) error {
	lane := p.Lanes[0]
	if err := lane.Publish(raw, deadline); err != nil {
		return err
	}
	closing := ring.CloseRecord{Step: p.step, ClosedUnixNS: uint64(time.Now().UnixNano()), Records: 1, Kind: ring.KindClose}
	closing.Encode(raw)
	if err := lane.Publish(raw, deadline); err != nil {
		return err
	}
	p.step++
	p.rows += count
	return nil
}

func (p *producer) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// bye ends the session in good order.
func (p *producer) bye() {
	p.t.Helper()
	p.Finish()
	p.must(p.client.Send(map[string]any{"type": "bye"}))
	_, err := p.client.Expect("bye", patience)
	p.must(err)
}

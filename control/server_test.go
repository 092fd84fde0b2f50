package control_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dmi/control"
	"dmi/internal/leaks"
	"dmi/internal/ringtape"
	"dmi/ring"
	"dmi/store"
	"dmi/tensor"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { leaks.Main(m) }

const patience = time.Minute // with what takes a moment

// rig is a real store behind a real control socket.
type rig struct {
	*testing.T
	dir    string
	store  *store.Store
	server *control.Server
	socket string
	stop   func()
}

func newRig(t *testing.T, change func(*control.Options)) *rig {
	r := &rig{T: t, dir: t.TempDir()}
	r.open(change)
	t.Cleanup(func() { r.stop() })
	return r
}

func (r *rig) open(change func(*control.Options)) {
	r.Helper()
	var err error
	if r.store, err = store.Open(filepath.Join(r.dir, "store"), store.Options{GroupCommit: time.Millisecond}); err != nil {
		r.Fatal(err)
	}
	o := control.Options{Store: r.store, Engine: "e00000001", Version: "test", StorePath: r.dir, StopGrace: patience}
	if change != nil {
		change(&o)
	}
	r.server = control.New(o)
	r.socket = filepath.Join(r.TempDir(), "engine.sock")
	listener, err := net.Listen("unix", r.socket)
	if err != nil {
		r.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.server.Serve(ctx, listener) }()
	r.stop = func() {
		r.stop = func() {}
		cancel()
		select {
		case err := <-done:
			if err != nil {
				r.Error("serve:", err)
			}
		case <-time.After(patience):
			r.Fatal("the server does not stop")
		}
		if err := r.store.Close(); err != nil {
			r.Error("close:", err)
		}
	}
}

var small = ringtape.Shape{Mode: ring.ModeComplete, Lanes: 2, RecordCapacity: 256, CommandCapacity: 64, SiteCapacity: 8, Payload: 1 << 20, Table: 1 << 16,
	Staging: 1 << 20, Spill: 1 << 16}

// producer is a ring with two sites of 4 floats a row.
func (r *rig) producer(shape ringtape.Shape) *ringtape.Producer {
	r.Helper()
	p, err := ringtape.NewProducer(shape)
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(p.Close)
	for _, name := range []string{"blocks.0.hook_resid_post", "logits"} {
		p.AddSite(ring.Site{Layer: ring.NoLayer, NDim: 2, Role: [6]uint8{ring.RoleRow, ring.RoleInner}}, name)
	}
	p.StartPump()
	return p
}

func hello(p *ringtape.Producer, session string) map[string]any {
	mode := "best-effort"
	if p.Header.Mode == ring.ModeComplete {
		mode = "complete"
	}
	return map[string]any{"type": "hello", "protocol": 1, "abi": ring.ABIVersion, "token": "", "session": session, "producer": p.Name(), "resume": false,
		"mode": mode, "text": "ids", "process": map[string]any{"pid": 1}, "versions": map[string]any{}, "model": map[string]any{"name": "toy"},
		"aliases": map[string]any{"logits": []string{"unembed.hook_out"}}, "hooks": []string{"**"},
		"run": map[string]any{"id": "r" + session[1:], "labels": map[string]string{}, "tags": []string{}}}
}

func (r *rig) dial() *ringtape.Client {
	r.Helper()
	c, err := ringtape.Dial(r.socket)
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() { c.Close() })
	return c
}

func (r *rig) attach(p *ringtape.Producer, session string, change func(map[string]any)) *ringtape.Client {
	r.Helper()
	c := r.dial()
	h := hello(p, session)
	if change != nil {
		change(h)
	}
	body, _ := json.Marshal(h)
	if err := c.Hello(body, p.FDs[:]...); err != nil {
		r.Fatal(err)
	}
	if _, err := c.Expect("welcome", patience); err != nil {
		r.Fatal(err)
	}
	return c
}

func publish(t testing.TB, lane *ringtape.ProducerLane, v interface{ Encode([]byte) }) {
	t.Helper()
	var b [ring.RecordSize]byte
	v.Encode(b[:])
	if err := lane.Publish(b[:], time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
}

// open publishes an OPEN of one request's rows.
func open(t testing.TB, lane *ringtape.ProducerLane, step, request uint64, position, rows, sites uint32) {
	t.Helper()
	table := ringtape.EncodeTable(step, []ring.Span{{Request: request, Count: rows, Position: position}}, 0, [3]uint32{}, true)
	at, err := lane.WriteTable(table, time.Now().Add(patience))
	if err != nil {
		t.Fatal(err)
	}
	publish(t, lane, &ring.OpenRecord{Step: step, Table: at, TableBytes: uint64(len(table)), Sites: sites, Kind: ring.KindOpen, Rows: [3]uint32{rows, 0, 0}})
}

// capture publishes rows of 4 floats, and returns their bytes.
func capture(t testing.TB, p *ringtape.Producer, lane *ringtape.ProducerLane, random *rand.Rand, step uint64, site, rows uint32) []byte {
	t.Helper()
	data := make([]byte, 16*rows)
	for i := range data {
		data[i] = byte(random.Uint32())
	}
	at, ok := p.WritePayload(ring.PlaceRing, data)
	for deadline := time.Now().Add(patience); !ok && time.Now().Before(deadline); at, ok = p.WritePayload(ring.PlaceRing, data) {
		time.Sleep(time.Millisecond)
	}
	if !ok {
		t.Fatal("no room for payload")
	}
	publish(t, lane, &ring.Record{Step: step, Payload: at, PayloadBytes: uint64(len(data)), TensorBytes: uint64(len(data)), Site: site, Rows: rows,
		Kind: ring.KindCapture, Outcome: ring.OutcomeCaptured, Size: [6]uint32{rows, 4}, Stride: [6]uint32{4, 1}, Role: [6]uint8{ring.RoleRow, ring.RoleInner},
		DType: ring.DTypeF32, NDim: 2, Place: ring.PlaceRing, Flags: ring.RecordGathered})
	return data
}

func closeStep(t testing.TB, lane *ringtape.ProducerLane, step, records uint64) {
	t.Helper()
	publish(t, lane, &ring.CloseRecord{Step: step, Records: records, Kind: ring.KindClose})
}

// read is a request's rows at a site.
func (r *rig) read(session uint32, request uint64, site, rows uint32) []byte {
	r.Helper()
	key := tensor.RequestKey{Session: session, Request: request}
	refs, err := r.store.Chunks(key, site, 0, rows)
	if err != nil {
		r.Fatal(err)
	}
	var out []byte
	next := uint32(0)
	for _, ref := range refs {
		if ref.First != next {
			r.Fatalf("request %d, site %d: rows %d to %d are missing", request, site, next, ref.First)
		}
		b := make([]byte, 16*ref.Rows)
		if err := r.store.ReadRows(ref, 0, ref.Rows, b); err != nil {
			r.Fatal(err)
		}
		out, next = append(out, b...), next+ref.Rows
	}
	return out
}

func (r *rig) books() map[string]uint64 {
	out := map[string]uint64{}
	totals := r.store.Books()
	sum := uint64(0)
	for _, l := range totals.Lines {
		out[fmt.Sprintf("%v %v", l.Outcome, l.Reason)] += l.Rows
		sum += l.Rows
	}
	if sum != totals.Produced {
		r.Errorf("books: %d rows produced, %d booked: %v", totals.Produced, sum, out)
	}
	return out
}

func (r *rig) wantBooks(want map[string]uint64) {
	r.Helper()
	if got := r.books(); fmt.Sprint(got) != fmt.Sprint(want) {
		r.Errorf("books: %v, want %v", got, want)
	}
}

func (r *rig) waitNoSessions() {
	r.Helper()
	for deadline := time.Now().Add(patience); len(r.server.Sessions()) > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			r.Fatal("a session does not end")
		}
	}
}

func TestASessionFromHelloToBye(t *testing.T) {
	var lacking []string
	r := newRig(t, func(o *control.Options) {
		o.Event = func(level, code, session, message string) {
			if code == "lacking" {
				lacking = append(lacking, level+" "+session+" "+message)
			}
		}
	})
	random := rand.New(rand.NewPCG(1, 2))
	p := r.producer(small)
	c := r.attach(p, "s0000000a", func(h map[string]any) {
		h["skipped"] = []string{"a: no such part", "b: the same", "c: the same", "d: the same", "e: the same", "f: the same"}
	})
	c.Send(map[string]any{"type": "requests", "requests": []any{map[string]any{"request": 7, "id": "a.0", "run": "r0000000a", "begun_unix_ns": 5, "tokens": []int{1, 2, 3}, "text": "not asked for"}}})
	lane := p.Lanes[1]
	var want [2][]byte
	for step := uint64(1); step <= 20; step++ {
		rows := uint32(1)
		if step == 1 {
			rows = 3
		}
		open(t, lane, step, 7, uint32(len(want[0])/16), rows, 2)
		for site := range uint32(2) {
			want[site] = append(want[site], capture(t, p, lane, random, step, site, rows)...)
		}
		closeStep(t, lane, step, 2)
	}
	c.Send(map[string]any{"type": "barrier", "id": "b1", "steps": map[string]uint64{"1": 20}})
	m, err := c.Expect("durable", patience)
	if err != nil || m["id"] != "b1" || m["error"] != "" {
		t.Fatal(m, err)
	}
	for site := range uint32(2) {
		if got := r.read(1, 7, site, 22); !bytes.Equal(got, want[site]) {
			t.Fatalf("site %d: got %d bytes that differ from the %d captured", site, len(got), len(want[site]))
		}
	}
	r.wantBooks(map[string]uint64{"captured ": 44})
	status := r.server.Sessions()
	if len(status) != 1 || status[0].Model != "toy" || status[0].Drain.Steps != 20 || status[0].Records[1].Used != 0 {
		t.Errorf("status: %+v", status)
	}
	c.Send(map[string]any{"type": "request_end", "request": 7, "reason": "finished", "step": 20, "ended_unix_ns": 9})
	p.Finish()
	c.Send(map[string]any{"type": "bye"})
	if _, err := c.Expect("bye", patience); err != nil {
		t.Fatal(err)
	}
	r.waitNoSessions()
	request, found, err := r.store.RequestByID("a.0")
	if err != nil || !found || len(request.Tokens) != 3 || request.Text != "" || request.Reason != "finished" {
		t.Errorf("request: %+v, %v, %v", request, found, err)
	}
	told := "info s0000000a session s0000000a: its hooks match 6 sites that the model cannot give: a: no such part; b: the same; c: the same; d: the same; and 2 more: session.skipped"
	if len(lacking) != 1 || lacking[0] != told {
		t.Errorf("told of sites that are lacking: %q", lacking)
	}
	sites, _ := r.store.Sites(1)
	if len(sites) != 2 || sites[1].Name != "logits" || len(sites[1].Aliases) != 1 {
		t.Errorf("sites: %+v", sites)
	}
	sessions, _ := r.store.Sessions()
	if len(sessions) != 1 || sessions[0].Ended.IsZero() {
		t.Errorf("sessions: %+v", sessions)
	}
}

// A producer that is killed: what is published and copied is kept, what an open step still owed is lost(producer_exit), and it may come back.
func TestHangUpAndResume(t *testing.T) {
	r := newRig(t, func(o *control.Options) { o.StopGrace = 300 * time.Millisecond })
	random := rand.New(rand.NewPCG(3, 4))
	p := r.producer(small)
	c := r.attach(p, "s0000000b", nil)
	lane := p.Lanes[0]
	open(t, lane, 1, 1, 0, 5, 2)
	first := capture(t, p, lane, random, 1, 0, 5) // site 1 will owe 5 rows
	if err := r.server.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	p.StopPump() // from here on nothing is copied any more
	open(t, p.Lanes[1], 2, 2, 0, 4, 2)
	capture(t, p, p.Lanes[1], random, 2, 0, 4) // published, and still in private memory
	c.Close()
	r.waitNoSessions()
	r.wantBooks(map[string]uint64{"captured ": 5, "lost producer_exit": 5 + 4 + 4})
	if got := r.read(1, 1, 0, 5); !bytes.Equal(got, first) {
		t.Error("the rows that were copied before differ")
	}

	p.StartPump()
	c = r.attach(p, "s0000000b", func(h map[string]any) { h["resume"] = true })
	// What belongs to the steps that were booked is skipped; the next ones are taken.
	capture(t, p, lane, random, 1, 1, 5)
	closeStep(t, lane, 1, 2)
	closeStep(t, p.Lanes[1], 2, 1)
	var want []byte
	for step := uint64(3); step < 40; step++ {
		l := p.Lanes[step%2]
		open(t, l, step, 3, uint32(len(want)/16), 2, 1)
		want = append(want, capture(t, p, l, random, step, 0, 2)...)
		closeStep(t, l, step, 1)
		if err := r.server.Flush(context.Background()); err != nil { // two lanes: the order of steps is that of positions
			t.Fatal(err)
		}
	}
	p.Finish()
	c.Send(map[string]any{"type": "bye"})
	if _, err := c.Expect("bye", patience); err != nil {
		t.Fatal(err)
	}
	if got := r.read(1, 3, 0, 74); !bytes.Equal(got, want) {
		t.Error("rows captured after the reconnection differ")
	}
	r.wantBooks(map[string]uint64{"captured ": 5 + 74, "lost producer_exit": 13})
	if used, _ := payloadUsed(p); used != 0 {
		t.Errorf("%d bytes of payload were not given back", used)
	}
}

func payloadUsed(p *ringtape.Producer) (uint64, uint64) {
	at, _ := p.WritePayload(ring.PlaceRing, nil)
	return at - *p.Control(ring.ControlPayloadTailOffset), at
}

// The engine stops in the middle of a step and another takes over: no record is taken twice, none is forgotten, nothing is stuck.
func TestAnotherEngineTakesOver(t *testing.T) {
	r := newRig(t, func(o *control.Options) { o.StopGrace = 300 * time.Millisecond }) // for the step that stays open
	random := rand.New(rand.NewPCG(5, 6))
	p := r.producer(small)
	c := r.attach(p, "s0000000c", nil)
	lane := p.Lanes[0]
	open(t, lane, 1, 1, 0, 2, 2)
	capture(t, p, lane, random, 1, 0, 2)
	closeStep(t, lane, 1, 1) // site 1 did not fire
	open(t, lane, 2, 1, 2, 3, 2)
	capture(t, p, lane, random, 2, 0, 3)
	r.server.Flush(context.Background())
	r.stop()
	if _, err := c.Expect("bye", patience); err == nil || !strings.Contains(err.Error(), "connect again when it is back") {
		t.Error("the producer was told:", err)
	}
	capture(t, p, lane, random, 2, 1, 3) // while nobody is there
	closeStep(t, lane, 2, 2)
	open(t, lane, 3, 1, 5, 1, 2)
	capture(t, p, lane, random, 3, 0, 1)
	capture(t, p, lane, random, 3, 1, 1)
	closeStep(t, lane, 3, 2)
	r.open(nil)
	c = r.attach(p, "s0000000c", func(h map[string]any) { h["resume"] = true })
	p.Finish()
	c.Send(map[string]any{"type": "bye"})
	if _, err := c.Expect("bye", patience); err != nil {
		t.Fatal(err)
	}
	r.wantBooks(map[string]uint64{"captured ": 2 + 3 + 2, "lost not_fired": 2, "lost engine_exit": 3})
	if used, _ := payloadUsed(p); used != 0 {
		t.Errorf("%d bytes of payload were not given back", used)
	}
	if lane.Room() != int(small.RecordCapacity) {
		t.Errorf("%d of %d slots were given back", lane.Room(), small.RecordCapacity)
	}
}

func TestRefusals(t *testing.T) {
	r := newRig(t, func(o *control.Options) { o.Token = "secret"; o.RingBytes = 64 << 20 })
	p := r.producer(small)
	good := func() map[string]any { h := hello(p, "s0000000d"); h["token"] = "secret"; return h }
	unsealed, err := unix.MemfdCreate("x", unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(unsealed)
	unix.Ftruncate(unsealed, int64(p.Header.TotalBytes))
	unix.Pwrite(unsealed, p.Mem[:4096], 0)
	short, _ := unix.MemfdCreate("x", unix.MFD_ALLOW_SEALING)
	defer unix.Close(short)
	unix.Ftruncate(short, 8192)
	unix.Pwrite(short, p.Mem[:4096], 0)
	unix.FcntlInt(uintptr(short), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW)
	huge := small
	huge.Staging = 128 << 20
	large, err := ringtape.NewProducer(huge)
	if err != nil {
		t.Fatal(err)
	}
	defer large.Close()
	with := func(key string, value any) map[string]any { h := good(); h[key] = value; return h }
	for name, c := range map[string]struct {
		hello any
		fds   []int
		code  string
		says  string
	}{
		"protocol":         {with("protocol", 2), p.FDs[:], "protocol", "same release"},
		"a newer hello":    {func() any { h := with("protocol", 2); h["shiny"] = 1; return h }(), p.FDs[:], "protocol", "same release"},
		"abi":              {with("abi", 99), p.FDs[:], "abi", "same release"},
		"token":            {with("token", "guess"), p.FDs[:], "token", "token"},
		"session":          {with("session", "../../etc"), p.FDs[:], "protocol", "hello.session"},
		"producer":         {with("producer", strings.Repeat("0", 32)), p.FDs[:], "ring", "header.producer"},
		"mode":             {with("mode", "best-effort"), p.FDs[:], "ring", "hello.mode"},
		"unknown field":    {with("shiny", 1), p.FDs[:], "protocol", "shiny"},
		"run":              {with("run", map[string]any{"id": "x"}), p.FDs[:], "protocol", "hello.run.id"},
		"not hello":        {map[string]any{"type": "bye"}, p.FDs[:], "protocol", "must be hello"},
		"no descriptors":   {good(), nil, "ring", "0 descriptors"},
		"two descriptors":  {good(), p.FDs[:2], "ring", "2 descriptors"},
		"unsealed":         {good(), []int{unsealed, p.FDs[1], p.FDs[2]}, "ring", "F_SEAL_SHRINK"},
		"truncated":        {good(), []int{short, p.FDs[1], p.FDs[2]}, "ring", "header.total_bytes"},
		"not a memfd":      {good(), []int{p.FDs[1], p.FDs[1], p.FDs[2]}, "ring", "memfd"},
		"not an eventfd":   {good(), []int{p.FDs[0], p.FDs[0], p.FDs[2]}, "ring", "not an eventfd"},
		"no pump eventfd":  {good(), []int{p.FDs[0], p.FDs[1], p.FDs[0]}, "ring", "not an eventfd"},
		"larger than life": {func() any { h := good(); h["producer"] = large.Name(); return h }(), large.FDs[:], "ring", "more than"},
		"not an object":    {[]int{1}, p.FDs[:], "protocol", "JSON object"},
	} {
		t.Run(name, func(t *testing.T) {
			conn := r.dial()
			body, _ := json.Marshal(c.hello)
			if err := conn.Hello(body, c.fds...); err != nil {
				t.Fatal(err)
			}
			m, err := conn.Expect("welcome", patience)
			if err == nil {
				t.Fatal("it was welcomed")
			}
			if m["code"] != c.code || !strings.Contains(fmt.Sprint(m["message"]), c.says) {
				t.Errorf("got %v, want code %s and a message with %q", err, c.code, c.says)
			}
		})
	}
	// After all that, an honest one is served.
	c := r.attach(p, "s0000000d", func(h map[string]any) { h["token"] = "secret" })
	p.Finish()
	c.Send(map[string]any{"type": "bye"})
	if _, err := c.Expect("bye", patience); err != nil {
		t.Fatal(err)
	}
}

// Lies within a session end that session; another one beside it loses nothing.
func TestLiarsAffectNobodyElse(t *testing.T) {
	r := newRig(t, func(o *control.Options) { o.Sessions = 8 })
	random := rand.New(rand.NewPCG(7, 8))
	honest := r.producer(small)
	hc := r.attach(honest, "s000000aa", nil)
	var want []byte
	step := uint64(0)
	work := func() {
		step++
		open(t, honest.Lanes[0], step, 1, uint32(len(want)/16), 1, 1)
		want = append(want, capture(t, honest, honest.Lanes[0], random, step, 0, 1)...)
		closeStep(t, honest.Lanes[0], step, 1)
	}
	for i, lie := range []func(p *ringtape.Producer, c *ringtape.Client){
		func(p *ringtape.Producer, c *ringtape.Client) { c.SendRaw([]byte(`{"type":"dance"}`)) },
		func(p *ringtape.Producer, c *ringtape.Client) { c.SendRaw([]byte(`not json`)) },
		func(p *ringtape.Producer, c *ringtape.Client) { c.Conn.Write([]byte{255, 255, 255, 255}) },
		func(p *ringtape.Producer, c *ringtape.Client) { // more commands done than there were
			*p.Control(ring.ControlCommandsDoneOffset) = 77
			p.Ring()
		},
		func(p *ringtape.Producer, c *ringtape.Client) { // a sequence number that is none
			p.Lanes[0].Slot(0)[0] = 3
			p.Ring()
		},
		func(p *ringtape.Producer, c *ringtape.Client) { // fewer sites than before
			*p.Control(ring.ControlSitesCountOffset) = 1 << 40
			open(t, p.Lanes[0], 1, 1, 0, 1, 60000)
		},
		func(p *ringtape.Producer, c *ringtape.Client) { // barriers without end
			for range 200 {
				c.SendRaw([]byte(`{"type":"barrier","id":"x","steps":{}}`))
			}
			c.SendRaw([]byte(`{"type":"run_end","id":"rffffffff"}`))
		},
	} {
		p := r.producer(small)
		c := r.attach(p, fmt.Sprintf("s%08x", i), nil)
		work()
		lie(p, c)
		work()
		if m, err := c.Expect("bye", patience); err == nil {
			t.Errorf("lie %d: answered %v", i, m)
		}
		c.Close()
		p.Close()
	}
	honest.Finish()
	hc.Send(map[string]any{"type": "bye"})
	if _, err := hc.Expect("bye", patience); err != nil {
		t.Fatal(err)
	}
	if got := r.read(1, 1, 0, uint32(step)); !bytes.Equal(got, want) {
		t.Error("the honest session's rows differ")
	}
	r.waitNoSessions()
	r.books()
}

package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"dmi/drain"
	"dmi/pipeline"
	"dmi/ring"
	"dmi/store"
	"dmi/tensor"

	"golang.org/x/sys/unix"
)

// session is one attached producer. Its connection's goroutine runs it; drain and pipeline have one each.
type session struct {
	server   *Server
	store    Store // from start on one that insists
	conn     *net.UnixConn
	out      *outbox
	hello    *helloMessage
	id       string
	number   uint32
	begun    time.Time
	events   eventFilter
	gone     chan struct{}   // closed at the very end
	stopping <-chan struct{} // closed when the engine is told to
	ended    chan struct{}   // closed when everything has been drained and delivered

	ring     *ring.Ring
	bell     *ring.Bell
	drain    *drain.Drain
	pipeline *pipeline.Pipeline
	failure  error // of the drain; read after ended
	tape     Tape

	barriers atomic.Int32
	tasks    sync.WaitGroup // barriers under way

	mu       sync.Mutex
	mapped   bool // the ring can be looked at
	sites    []tensor.Site
	aliases  map[string][]string
	runs     map[string]bool // begun and not ended
	owned    map[string]bool // runs that the store has as this session's; a part of them
	finishes []requestEndMessage
	closed   uint64 // highest step that was closed on any lane
	stripped bool
	groups   uint64 // the name of those that the producer was told
}

// begin maps the ring, introduces the session to the store, and starts draining. The descriptors are the session's once it returns no error.
func (s *Server) begin(ctx context.Context, conn *net.UnixConn, out *outbox, hello *helloMessage, body []byte, fds []int) (*session, error) {
	x := &session{server: s, store: s.options.Store, stopping: ctx.Done(), conn: conn, out: out, hello: hello, id: hello.Session, begun: time.Now(), gone: make(chan struct{}), ended: make(chan struct{}),
		aliases: map[string][]string{}, runs: map[string]bool{}, owned: map[string]bool{}}
	if err := s.claim(context.Background(), x); err != nil {
		return nil, err
	}
	if err := x.prepare(body, fds); err != nil {
		s.forget(x)
		return nil, err
	}
	return x, nil
}

func (x *session) prepare(body []byte, fds []int) (err error) {
	o := &x.server.options
	if x.ring, err = ring.Map(fds[0], o.RingBytes); err != nil {
		return refuse("ring", "%v", err)
	}
	defer func() {
		if err != nil {
			x.ring.Close()
		}
	}()
	header := x.ring.Header()
	switch {
	case x.ring.Producer() != x.hello.Producer:
		return refuse("ring", "hello.producer is %s, and header.producer %s", x.hello.Producer, x.ring.Producer())
	case (header.Mode == ring.ModeComplete) != (x.hello.Mode == "complete"):
		return refuse("ring", "hello.mode is %s, and header.mode %d", x.hello.Mode, header.Mode)
	}
	if err = x.server.take(x, header); err != nil {
		x.event("warning", "memory", err.Error())
		return err
	}
	sites, err := x.ring.Sites()
	if err != nil {
		return refuse("ring", "%v", err)
	}
	// The doorbells are taken over at once, and closed if they are not what they should be.
	bells := [2]int{fds[1], fds[2]}
	fds[1], fds[2] = -1, -1
	if x.bell, err = ring.NewBell(x.ring, bells[0], bells[1]); err != nil {
		return refuse("ring", "%v", err)
	}
	defer func() {
		if err != nil {
			x.bell.Close()
		}
	}()
	begun := time.Unix(0, int64(header.CreatedUnixNS)) // the same on a reconnection
	if age := time.Since(begun); age < 0 || age > 10*365*24*time.Hour {
		begun = x.begun
	}
	x.number, err = x.store.BeginSession(tensor.Session{ID: x.id, Producer: x.hello.Producer, Mode: x.hello.Mode, Text: x.hello.Text, Model: object(x.hello.Model),
		Versions: object(x.hello.Versions), Process: object(x.hello.Process), Hooks: x.hello.Hooks, Begun: begun})
	if err != nil {
		return refuse("store", "%v", err)
	}
	if err = x.addAliases(x.hello.Aliases); err == nil {
		err = x.addSites(sites)
	}
	if err == nil {
		err = x.putRun(&x.hello.Run)
	}
	if err != nil {
		return refuse("store", "%v", err)
	}
	if o.Recorder != nil {
		if x.tape, err = o.Recorder.Begin(x.id, x.ring.HeaderPage(), body); err != nil {
			return refuse("store", "record the session: %v", err)
		}
		x.tape.Sites(x.ring.RawSites(0, len(sites)))
	}
	unix.Close(fds[0]) // the mapping stays
	fds[0] = -1
	x.start()
	return nil
}

// object is a JSON object as it came, {} where it is missing.
func object(raw json.RawMessage) json.RawMessage {
	var o map[string]any
	if json.Unmarshal(raw, &o) != nil || o == nil {
		return json.RawMessage("{}")
	}
	return raw
}

func (x *session) start() {
	o := &x.server.options
	x.store = insistent{o.Store, x}
	resume := make([]uint64, x.ring.Header().Lanes)
	for i := range resume {
		resume[i] = x.store.Resume(x.hello.Producer, i) // 0 for one that is new
	}
	items := make(chan []*drain.Item, o.QueueBatches)
	d := drain.Options{Manifest: manifest{x.store, x.number}, Sites: x.newSites, Event: x.event, Resume: resume, TensorBytes: o.TensorBytes, BusyPoll: o.BusyPoll}
	if o.Live != nil {
		d.Awaited = o.Live.Heard
	}
	if x.tape != nil {
		d.Tap = x.tape.Record
	}
	x.drain = drain.New(x.ring, x.bell, items, d)
	p := pipeline.Options{Session: x.number, Store: x.store, Live: o.Live, Triggers: o.Triggers, Event: x.event, Closed: x.stepClosed, Full: x.waiting}
	if o.Rules != nil {
		p.Rules = o.Rules(x.number, x.hello.Mode)
	}
	x.pipeline = pipeline.New(p)
	x.mu.Lock()
	x.mapped = true
	x.mu.Unlock()
	x.applyGates() // the producer waits for its welcome: it opens no step before
	x.ring.SetEngine(os.Getpid())
	done := make(chan error, 1)
	go func() { done <- x.drain.Run() }()
	go func() {
		x.pipeline.Run(items)
		x.failure = <-done
		close(x.ended)
		if x.failure != nil {
			x.conn.SetReadDeadline(time.Unix(1, 0)) // the connection's goroutine tells the producer
		}
	}()
}

// waiting is the part that is in use of where payload lies until it is sliced.
func (x *session) waiting() float64 {
	part := func(used, capacity uint64) float64 { return float64(used) / float64(max(capacity, 1)) }
	return max(part(x.ring.Stage.Used()), part(x.ring.Spilled.Used()))
}

// applyGates writes the gates of the sites that there are. A session that is not mapped yet, or no more, does so when it is.
func (x *session) applyGates() {
	x.mu.Lock()
	defer x.mu.Unlock() // keeps the ring mapped, and calls apart
	if !x.mapped {
		return
	}
	x.server.mu.Lock()
	g := x.server.gates
	x.server.mu.Unlock()
	if g.Groups.Name != x.groups && x.out.replace(groupsMessage{"groups", g.Groups.Name, append([]tensor.Group{}, g.Groups.Sets...)}) { // who was not told gives what any request may need
		x.groups = g.Groups.Name
	}
	gates, watches := make([]tensor.Gate, len(x.sites)), []tensor.Watch(nil)
	if g.Of != nil {
		gates, watches = g.Of(x.number, x.hello.Mode, x.sites)
	}
	if err := x.ring.SetGates(g.Revision, gates, watches); err != nil {
		x.event("error", "policy", fmt.Sprintf("revision %d of the policy cannot be given to session %s: %v", g.Revision, x.id, err))
	}
}

// manifest is the store's, for one session.
type manifest struct {
	store  Store
	number uint32
}

func (m manifest) Append(lane int, first uint64, records []byte, tables [][]byte) error {
	return m.store.AppendStep(store.Step{Session: m.number, Lane: lane, First: first, Count: len(records) / ring.RecordSize, Records: records, Tables: tables})
}

// run talks to the producer until one of the two ends, then ends the session.
func (x *session) run(ctx context.Context) {
	o := &x.server.options
	o.Log.Info("a producer attached", "session", x.id, "number", x.number, "mode", x.hello.Mode, "resume", x.hello.Resume, "sites", len(x.sites))
	x.event("info", "attach", fmt.Sprintf("session %s attached", x.id))
	if lacking := x.hello.lacking(); lacking != "" && !x.hello.Resume {
		x.event("info", "lacking", lacking)
	}
	x.out.answer(welcomeMessage{Type: "welcome", Engine: o.Engine, Version: o.Version, Protocol: ProtocolVersion, Store: o.StorePath,
		HTTP: httpDoor{o.HTTPURL, o.HTTPUnix}, Number: x.number})
	stop := context.AfterFunc(ctx, func() { x.conn.SetReadDeadline(time.Unix(1, 0)) })
	bye, err := x.listen()
	stop()

	reason := tensor.ProducerExit
	if ctx.Err() != nil && !bye {
		reason = tensor.EngineExit
	}
	x.drain.Finish(reason, o.StopGrace)
	<-x.ended
	x.tasks.Wait()
	x.mu.Lock()
	x.mapped = false
	x.mu.Unlock()
	x.ring.SetEngine(0)
	x.bell.Close()
	x.ring.Close()
	if x.tape != nil {
		if err := x.tape.Close(); err != nil {
			x.event("error", "record", fmt.Sprintf("the recording of session %s is not whole: %v", x.id, err))
		}
	}
	x.finish(reason, bye, err)
	x.server.forget(x)
}

// finish tells the store, the operator and the producer that the session is over.
func (x *session) finish(reason tensor.Reason, bye bool, err error) {
	o := &x.server.options
	if reason == tensor.ProducerExit { // else it may come back, to the engine after us
		x.endRuns()
		if err := x.store.EndSession(x.number, time.Now()); err != nil {
			x.event("error", "store", fmt.Sprintf("the end of session %s cannot be kept: %v", x.id, err))
		}
	}
	switch {
	case bye:
		if err := x.store.Barrier(context.Background()); err != nil {
			x.event("error", "store", fmt.Sprintf("what session %s captured last is not durable: %v", x.id, err))
		}
		x.event("info", "detach", fmt.Sprintf("session %s detached", x.id))
		x.out.answer(byeMessage{"bye"})
	case x.failure != nil:
		x.server.expelled.Add(1)
		x.out.refuse(refuse("ring", "%v; attach again", x.failure))
	case reason == tensor.EngineExit:
		x.out.refuse(refuse("stopping", "the engine is stopping; connect again when it is back"))
	default:
		if err == nil || gone(err) {
			x.event("warning", "detach", fmt.Sprintf("the producer of session %s is gone without a bye; what its open steps still owed is lost(producer_exit)", x.id))
		} else {
			x.server.expelled.Add(1)
			x.event("error", "detach", fmt.Sprintf("session %s was closed: %v", x.id, err))
			x.out.refuse(err)
		}
	}
	o.Log.Info("a session ended", "session", x.id, "bye", bye, "why", err)
}

// gone reports whether an error only says that the other side is not there any more.
func gone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) ||
		errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed)
}

// event tells the operator and the producer something, unless it has been told it again and again.
func (x *session) event(level, code, message string) {
	message, tell := x.events.pass(code, message, time.Now())
	if !tell {
		return
	}
	o := &x.server.options
	if level != "info" {
		o.Log.Warn(message, "session", x.id, "code", code)
	}
	if o.Event != nil {
		o.Event(level, code, x.id, message)
	}
	x.out.send(eventMessage{"event", level, code, message})
}

// drained returns when everything published by now has been delivered.
func (x *session) drained(ctx context.Context) error {
	done := make(chan struct{})
	x.drain.Mark(func() { close(done) })
	select {
	case <-done:
		return nil
	case <-x.ended:
		return nil // all of it was
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

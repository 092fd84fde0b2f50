package control

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"dmi/pipeline"
	"dmi/store"
	"dmi/tensor"

	"golang.org/x/sync/errgroup"
)

// Store is what sessions write to; *store.Store is one.
type Store interface {
	pipeline.Store
	BeginSession(tensor.Session) (uint32, error)
	EndSession(number uint32, at time.Time) error
	AddSites(session uint32, sites []tensor.Site) error
	PutRun(tensor.Run) error
	PutRequests([]tensor.Request) error
	AppendStep(store.Step) error
	FinishRequest(tensor.RequestKey) error
	Barrier(context.Context) error
	Resume(producer string, lane int) uint64
}

// Recorder makes a tape of a session; internal/ringtape has one.
type Recorder interface {
	// Begin is given the ring's first page and the hello as it came. The tape is of one goroutine at a time.
	Begin(session string, header []byte, hello []byte) (Tape, error)
}

// Tape takes a session down, in the order in which the engine saw it.
type Tape interface {
	Message(body []byte)
	Sites(raw []byte)
	Record(lane int, raw []byte, table []byte, payload []byte)
	Close() error
}

// Options of a Server. Store is needed; zero fields take the default.
type Options struct {
	Store Store
	Live  pipeline.Live // nil: nobody listens
	// Triggers look at what passes; nil: nobody does.
	Triggers pipeline.Triggers
	Log      *slog.Logger
	// Event is told what an operator or user should know. It must not block.
	Event func(level, code, session, message string)

	Engine, Version   string // what welcome says
	StorePath         string
	HTTPURL, HTTPUnix string

	Token        string        // not "": producers must give it
	Sessions     int           // at once (64)
	RingBytes    uint64        // of one ring's mapping (64 GiB)
	TensorBytes  uint64        // put together outside staging (1 GiB)
	HelloTimeout time.Duration // for a producer to introduce itself (10 s)
	StopGrace    time.Duration // that a pump may do nothing before what it owes is given up (1 s)
	BusyPoll     time.Duration // that a drain looks for more work before it sleeps, while somebody follows tensors live (0: not at all)
	QueueBatches int           // between drain and pipeline (16)
	Recorder     Recorder      // nil: no tapes
	Gates        Gates         // in force from the start
	// Memory is what producers may have together; nil: as much as they like.
	Memory func() Memory
	// Rules are those of a session in a mode; nil: everything that comes is kept.
	Rules func(session uint32, mode string) pipeline.Rules
}

// Gates say at what level a session's sites are captured.
type Gates struct {
	Revision uint64
	Groups   tensor.Groups                                                                          // that the gates name
	Of       func(session uint32, mode string, sites []tensor.Site) ([]tensor.Gate, []tensor.Watch) // those of a session in a mode; nil: all in full
}

func (o Options) withDefaults() Options {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Sessions == 0 {
		o.Sessions = 64
	}
	if o.RingBytes == 0 {
		o.RingBytes = 64 << 30
	}
	if o.HelloTimeout == 0 {
		o.HelloTimeout = 10 * time.Second
	}
	if o.StopGrace == 0 {
		o.StopGrace = time.Second
	}
	if o.QueueBatches == 0 {
		o.QueueBatches = 16
	}
	return o
}

// Server admits producers. Its methods may be called from any goroutine.
type Server struct {
	options Options

	mu       sync.Mutex
	sessions map[string]*session // by id, from admission to their very end
	entering int                 // connections that have not said hello
	gates    Gates
	taken    map[*session]Memory // by those attached

	events            eventFilter // of those who never got a session
	refused, expelled atomic.Uint64
}

// New makes a server.
func New(o Options) *Server {
	HoldHeap()
	GiveWay()
	return &Server{options: o.withDefaults(), sessions: map[string]*session{}, gates: o.Gates, taken: map[*session]Memory{}}
}

// Serve admits producers until ctx ends, then drains and ends every session, closes the listener, and returns.
func (s *Server) Serve(ctx context.Context, listener net.Listener) error {
	group, inner := errgroup.WithContext(ctx)
	group.Go(func() error {
		<-inner.Done()
		return listener.Close()
	})
	var conns sync.WaitGroup
	var failure error
	for wait := time.Millisecond; ; {
		conn, err := listener.Accept()
		if err != nil {
			if inner.Err() != nil || errors.Is(err, net.ErrClosed) {
				break
			}
			var network net.Error
			if !(errors.As(err, &network) && network.Timeout()) && !temporary(err) {
				failure = fmt.Errorf("control: accept producers: %w", err)
				break
			}
			time.Sleep(wait) // out of descriptors, most likely: those who end give theirs back
			wait = min(2*wait, time.Second)
			continue
		}
		wait = time.Millisecond
		unix, ok := conn.(*net.UnixConn)
		if !ok {
			conn.Close()
			failure = fmt.Errorf("control: %s is not a Unix socket: descriptors cannot come through it", listener.Addr().Network())
			break
		}
		conns.Add(1)
		go func() {
			defer conns.Done()
			s.attend(inner, unix)
		}()
	}
	group.Go(func() error { return errors.Join(failure, errStopped) })
	err := group.Wait()
	conns.Wait()
	if errors.Is(err, errStopped) && failure == nil {
		return nil
	}
	return failure
}

var errStopped = errors.New("control: stopped")

// attend is a connection's goroutine, from hello to its end.
func (s *Server) attend(ctx context.Context, conn *net.UnixConn) {
	out := newOutbox(conn)
	defer out.close()
	session, err := s.admit(ctx, conn, out)
	if err != nil {
		s.refused.Add(1)
		s.event("warning", "refused", fmt.Sprintf("a producer was refused: %v", err))
		out.refuse(err)
		return
	}
	if session != nil {
		session.run(ctx)
	}
}

// event tells the operator of somebody who has no session, unless there are very many of them.
func (s *Server) event(level, code, message string) {
	message, tell := s.events.pass(code, message, time.Now())
	if !tell {
		return
	}
	s.options.Log.Warn(message, "code", code)
	if s.options.Event != nil {
		s.options.Event(level, code, "", message)
	}
}

// Turned is how many producers were refused, and how many were thrown out for what they said or wrote later.
func (s *Server) Turned() (refused, expelled uint64) {
	return s.refused.Load(), s.expelled.Load()
}

func (s *Server) enter(by int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if by > 0 && s.entering >= 4*s.options.Sessions {
		return false
	}
	s.entering += by
	return true
}

// admit reads hello and makes a session of it. None of who only asks for what memory it may have.
func (s *Server) admit(ctx context.Context, conn *net.UnixConn, out *outbox) (*session, error) {
	if !s.enter(1) {
		return nil, refuse("limit", "too many connections wait to say hello")
	}
	defer s.enter(-1)
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	conn.SetReadDeadline(time.Now().Add(s.options.HelloTimeout))
	body, fds, err := readHello(conn)
	defer func() { closeAll(fds) }()
	if ctx.Err() != nil {
		return nil, refuse("stopping", "the engine is stopping; connect again when it is back")
	}
	if err != nil {
		return nil, err
	}
	conn.SetReadDeadline(time.Time{})
	kind, err := messageType(body)
	if err != nil {
		return nil, err
	}
	if kind == "memory" {
		return nil, s.tellMemory(body, out)
	}
	if kind != "hello" {
		return nil, refuse("protocol", "the first message is %.64q; it must be hello", kind)
	}
	// The versions come first: a newer producer's hello may have fields that we do not know.
	var versions struct{ Protocol, ABI int }
	if err := decodeLoose(body, &versions); err == nil {
		h := helloMessage{Type: "hello", Protocol: versions.Protocol, ABI: versions.ABI}
		var refusal *Refusal
		if err := h.check(); errors.As(err, &refusal) && (versions.Protocol != ProtocolVersion || refusal.Code == "abi") {
			return nil, err
		}
	}
	var hello helloMessage
	if err := decodeStrict(body, &hello); err != nil {
		return nil, err
	}
	if err := hello.check(); err != nil {
		return nil, err
	}
	if err := s.admits(hello.Token); err != nil {
		return nil, err
	}
	if len(fds) != helloFDs {
		return nil, refuse("ring", "hello came with %d descriptors; the memfd and two eventfds are needed", len(fds))
	}
	session, err := s.begin(ctx, conn, out, &hello, body, fds)
	if err == nil {
		fds = nil // the session's
	}
	return session, err
}

func (s *Server) admits(token string) error {
	if want := s.options.Token; want != "" && subtle.ConstantTimeCompare([]byte(want), []byte(token)) != 1 {
		return refuse("token", "the token is not this engine's; it is in the file `token` in the store's folder")
	}
	return nil
}

// claim puts a session on the list, or says why it cannot be. A producer that comes back while its old connection is not yet given up has that
// one ended first.
func (s *Server) claim(ctx context.Context, own *session) error {
	for {
		s.mu.Lock()
		other := s.sessions[own.id]
		if other == nil {
			if len(s.sessions) >= s.options.Sessions {
				s.mu.Unlock()
				return refuse("limit", "%d sessions are attached already, as many as this engine admits; detach one, or raise control.sessions", s.options.Sessions)
			}
			s.sessions[own.id] = own
			s.mu.Unlock()
			return nil
		}
		s.mu.Unlock()
		if !own.hello.Resume || other.hello.Producer != own.hello.Producer {
			return refuse("protocol", "session %s is attached already", own.id)
		}
		other.conn.SetReadDeadline(time.Unix(1, 0))
		select {
		case <-other.gone:
		case <-ctx.Done():
			return refuse("stopping", "the engine is stopping; connect again when it is back")
		case <-time.After(s.options.HelloTimeout):
			return refuse("limit", "the session's former connection does not end; try again")
		}
	}
}

func (s *Server) forget(own *session) {
	s.mu.Lock()
	if s.sessions[own.id] == own {
		delete(s.sessions, own.id)
	}
	delete(s.taken, own)
	s.mu.Unlock()
	close(own.gone)
}

func (s *Server) list() []*session {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*session, 0, len(s.sessions))
	for _, x := range s.sessions {
		all = append(all, x)
	}
	return all
}

// SetGates has every producer, those to come included, capture as g says from its next step on. Calls must not overlap.
func (s *Server) SetGates(g Gates) {
	s.mu.Lock()
	s.gates = g
	s.mu.Unlock()
	for _, x := range s.list() {
		x.applyGates()
	}
}

// Flush returns when everything that producers have published by now is durable.
func (s *Server) Flush(ctx context.Context) error {
	for _, x := range s.list() {
		if err := x.drained(ctx); err != nil && ctx.Err() != nil {
			return fmt.Errorf("control: flush session %s: %w", x.id, err)
		}
	}
	return s.options.Store.Barrier(ctx)
}

package serve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"dmi/live"
	"dmi/query"
	"dmi/serve/audit"
	"dmi/steer"
	"dmi/store"
	"dmi/tensor"
)

// Store is what the server asks of a store besides what queries do; *store.Store is one.
type Store interface {
	query.Source
	Verify(ctx context.Context, progress func(store.Progress)) (store.Report, error)
	Delete(ctx context.Context, requests []tensor.RequestKey, progress func(store.DeletionProgress)) (store.Deletion, error)
	Stats() store.Metrics
}

// Identity says which engine this is.
type Identity struct {
	ID       string // "e" and 8 hex digits
	Version  string
	Revision string
	Store    string // absolute path
	Started  time.Time
	ReadOnly bool
}

// Options wire a Server. Live, Attached and Flush are nil in an engine that only reads.
type Options struct {
	Identity Identity
	Formats  map[string]int // versions of what the engine writes and speaks
	Store    Store
	Live     *live.Hub
	Attached func() []Attached // producers, as the control socket knows them
	Troubles func() Troubles
	Flush    func(ctx context.Context) error // drain what was published, then make it durable
	Policy   *steer.Helm                     // nil: PolicyError says why not
	Config   any                             // effective configuration, as `dmi config --json` prints it
	Log      *slog.Logger

	PolicyError error

	Audit           *audit.Log // where reads are recorded; nil: nowhere
	AuditStatistics bool       // those of statistics as well
	AuditRequired   bool       // a read that cannot be recorded is refused

	Requests     int           // served at once, streams apart; more get 503. Default 256
	StallTimeout time.Duration // a reader that takes nothing for so long is cut off. Default 60 s
	Heartbeat    time.Duration // between signs of life on a silent stream. Default 15 s
}

// Server answers readers. Its handlers are safe for concurrent use.
type Server struct {
	options Options
	full    *query.Engine
	veiled  *query.Engine // for those who may not see prompts
	inUse   chan struct{}
	used    atomic.Int64 // Unix ns at which a request last began or ended
	busy    atomic.Int64 // requests under way, streams apart
	rates   rateMeter
	maps    mapSources
	stop    context.Context // ends when the server does: streams end with it
	end     context.CancelFunc
	metrics http.Handler
	reads   reads // recorded so far
}

// New makes a server over a store, which it does not close.
func New(o Options) *Server {
	if o.Requests <= 0 {
		o.Requests = 256
	}
	if o.StallTimeout <= 0 {
		o.StallTimeout = time.Minute
	}
	if o.Heartbeat <= 0 {
		o.Heartbeat = 15 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{options: o, full: query.New(o.Store), veiled: query.New(veil{o.Store}), inUse: make(chan struct{}, o.Requests), maps: mapSources{shared: map[bool]*mapSource{}}}
	s.stop, s.end = context.WithCancel(context.Background())
	s.metrics = s.metricsHandler()
	return s
}

// LastUsed says when a reader last asked for something; now while one is being answered. Streams and supervisors do not count.
func (s *Server) LastUsed() time.Time {
	if s.busy.Load() > 0 {
		return time.Now()
	}
	return time.Unix(0, s.used.Load())
}

// Stop ends streams and refuses new requests with 503. Requests under way go on.
func (s *Server) Stop() { s.end() }

// Local serves those whom the permissions of a socket, or of the process itself, have admitted: they may do everything.
func (s *Server) Local() http.Handler {
	return s.handler(func(*http.Request) (caller, *failure) { return caller{ScopeAdmin, "local"}, nil })
}

// Remote serves those who come over TCP, through a gate.
func (s *Server) Remote(g *Gate) http.Handler { return s.handler(g.admit) }

// call is one request on its way through a route.
type call struct {
	*http.Request
	*arguments
	caller
	query *query.Engine // sees what the scope allows
	rows  uint64        // that the answer holds, as its handler counts them
}

func (s *Server) handler(admit func(*http.Request) (caller, *failure)) http.Handler {
	mux := http.NewServeMux()
	methods := map[string][]string{}
	for _, route := range s.routes() {
		mux.HandleFunc(route.method+" "+route.path, func(w http.ResponseWriter, r *http.Request) { s.serve(w, r, route, admit) })
		methods[route.path] = append(methods[route.path], route.method)
	}
	known := http.NewServeMux() // of paths, whatever the method
	for path, allowed := range methods {
		method := strings.Join(allowed, ", ")
		known.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Allow", method)
			(&failure{http.StatusMethodNotAllowed, "method", fmt.Sprintf("%s %s: not with this method", r.Method, r.URL.Path), "use " + strings.Join(allowed, " or "), nil}).write(w)
		})
	}
	known.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		(&failure{http.StatusNotFound, "not_found", fmt.Sprintf("%s %s: there is nothing at this path", r.Method, r.URL.Path), "GET /v1/openapi.json lists what there is", nil}).write(w)
	})
	mux.Handle("/", known)
	return mux
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request, route route, admit func(*http.Request) (caller, *failure)) {
	defer func() {
		switch p := recover(); p {
		case nil:
		case http.ErrAbortHandler:
			panic(p)
		default:
			s.options.Log.Error("request failed: a bug in the engine; please report it", "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
			panic(http.ErrAbortHandler) // nobody takes what was sent so far for an answer
		}
	}()
	if r.ContentLength != 0 { // whatever the answer: a body that never comes must not hold the connection
		w.Header().Set("Connection", "close")
		patience := time.Second
		if route.body {
			patience = s.options.StallTimeout
		}
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(patience)) // there is none in process, nor a connection to hold
	}
	if !route.open && !route.stream { // streams have a bound of their own: live.subscribers
		select {
		case s.inUse <- struct{}{}:
			defer func() { <-s.inUse }()
		default:
			(&failure{http.StatusServiceUnavailable, "busy", fmt.Sprintf("%d requests are being served already", cap(s.inUse)), "try again, or raise http.requests", nil}).write(w)
			return
		}
	}
	if !route.open && !route.stream {
		s.busy.Add(1)
		defer func() {
			s.used.Store(time.Now().UnixNano())
			s.busy.Add(-1)
		}()
	}
	who := caller{scope: ScopeAdmin}
	if !route.open {
		var refused *failure
		if who, refused = admit(r); refused == nil && who.scope < route.scope {
			refused = &failure{http.StatusForbidden, "scope", fmt.Sprintf("%s %s: the token's scope is %s, this needs %s", r.Method, r.URL.Path, who.scope, route.scope),
				"use a token of a wider scope", nil}
		}
		if refused != nil {
			s.recordRefusal(route, r, who, refused)
			refused.write(w)
			return
		}
	}
	if s.stop.Err() != nil && !route.open {
		asFailure(live.ErrClosed).write(w)
		return
	}
	if r.ContentLength != 0 && !route.body {
		badArgument("leave it out", "%s %s: takes no body", r.Method, r.URL.Path).write(w)
		return
	}
	args, bad := parseArguments(r, route.takes)
	if bad != nil {
		bad.write(w)
		return
	}
	engine := s.full
	if who.scope < ScopeText {
		engine = s.veiled
	}
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	out := &writer{ResponseWriter: w, control: http.NewResponseController(w), timeout: s.options.StallTimeout, status: http.StatusOK}
	c := &call{Request: r, arguments: args, caller: who, query: engine}
	record, refused := s.beginRecord(route, c)
	if refused != nil {
		refused.write(w)
		return
	}
	defer func() { record.end(out, c, "cut", nil) }() // where nothing better was said: the handler panicked
	err := route.handle(out, c)
	if err == nil && args.err != nil {
		err = args.err
	}
	if err == nil {
		record.end(out, c, "answered", nil)
		return
	}
	if r.Context().Err() != nil {
		record.end(out, c, "left", nil)
		panic(http.ErrAbortHandler)
	}
	f := asFailure(err)
	if f.status >= 500 && f.status != http.StatusServiceUnavailable {
		s.options.Log.Error("request failed", "method", r.Method, "path", r.URL.Path, "error", err)
	}
	if out.started {
		if errors.Is(err, errReaderGone) {
			record.end(out, c, "left", nil)
		} else {
			s.options.Log.Error("answer cut short", "method", r.Method, "path", r.URL.Path, "error", err)
			record.end(out, c, "cut", f)
		}
		panic(http.ErrAbortHandler) // the reader sees a broken answer, not one that looks complete
	}
	outcome := "refused"
	if f.status >= 500 {
		outcome = "failed"
	}
	record.end(out, c, outcome, f)
	f.write(w)
}

var errReaderGone = errors.New("the reader took nothing, or left")

// writer gives every write a deadline and notes that the answer has begun.
type writer struct {
	http.ResponseWriter
	control *http.ResponseController
	timeout time.Duration
	started bool
	status  int
	bytes   uint64 // of the body, taken by the connection
}

func (w *writer) WriteHeader(status int) {
	w.started, w.status = true, status
	w.ResponseWriter.WriteHeader(status)
}

func (w *writer) Write(p []byte) (int, error) {
	w.started = true
	// Connections that have no deadlines (in-process ones) have no stalls either: their readers share our fate.
	_ = w.control.SetWriteDeadline(time.Now().Add(w.timeout))
	n, err := w.ResponseWriter.Write(p)
	w.bytes += uint64(n)
	if err != nil {
		err = fmt.Errorf("%w: %w", errReaderGone, err)
	}
	return n, err
}

func (w *writer) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// flush sends what was written on its way.
func (w *writer) flush() error {
	w.started = true
	_ = w.control.SetWriteDeadline(time.Now().Add(w.timeout))
	if err := w.control.Flush(); err != nil {
		return fmt.Errorf("%w: %w", errReaderGone, err)
	}
	return nil
}

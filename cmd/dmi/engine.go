package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"path/filepath"
	"time"

	"dmi/control"
	"dmi/internal/vfs"
	"dmi/live"
	"dmi/policy"
	"dmi/ring"
	"dmi/serve"
	"dmi/serve/audit"
	"dmi/steer"
	"dmi/store"
	"dmi/trigger"

	"golang.org/x/net/netutil"
	"golang.org/x/sync/errgroup"
)

// engine is the running whole: what `dmi serve` is. Fields are set while it starts and only read after.
type engine struct {
	config   *effective
	log      *slog.Logger
	dir      string // absolute
	token    string
	store    *store.Store
	names    *recorder // nil when it only reads
	hub      *live.Hub
	intake   *control.Server // nil when it only reads
	helm     *steer.Helm     // likewise
	ledger   *policy.Ledger
	watch    *trigger.Watch // nil when it only reads
	lookout  *lookout       // likewise
	audit    *audit.Log     // nil: reads are not recorded
	server   *serve.Server
	said     announcement
	temporal string // folder of a temporary socket

	producers net.Listener
	doors     []door
}

// door is a listener and who serves it.
type door struct {
	listener net.Listener
	server   *http.Server
}

// runEngine runs an engine until ctx ends or it is idle, then stops it in order. ready is called once, when everything listens.
func runEngine(ctx context.Context, config *effective, log *slog.Logger, ready func(announcement) error) (err error) {
	e := &engine{config: config, log: log, dir: absolute(config.Store.Path)}
	defer func() { err = errors.Join(err, e.release()) }()
	if err := e.open(); err != nil {
		return err
	}
	if err := e.listen(); err != nil {
		return err
	}
	// Serving outlives ctx: while the engine drains, readers are answered.
	group, serving := errgroup.WithContext(context.WithoutCancel(ctx))
	intakeCtx, stopIntake := context.WithCancel(serving)
	defer stopIntake()
	intakeDone := make(chan struct{})
	for _, d := range e.doors {
		group.Go(func() error {
			if err := d.server.Serve(d.listener); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve: %s: %w", d.listener.Addr(), err)
			}
			return nil
		})
	}
	if e.intake != nil {
		group.Go(func() error { e.helm.Run(intakeCtx); return nil })
		group.Go(func() error { e.lookout.run(intakeCtx); return nil })
		group.Go(func() error {
			defer close(intakeDone)
			return e.intake.Serve(intakeCtx, e.producers)
		})
	} else {
		close(intakeDone)
	}
	if !config.ReadOnly {
		if err = writeAnnouncement(e.dir, e.said); err == nil {
			defer func() { os.Remove(filepath.Join(e.dir, announcementName)) }() // runs before release: the lock is still ours
		}
	}
	if err == nil {
		err = ready(e.said)
	}
	if err == nil {
		notifySupervisor("READY=1\nSTATUS=store "+e.dir, log)
		log.Info("engine ready", "engine", e.said.EngineID, "version", e.said.Version, "store", e.dir, "control", e.said.Control, "http_unix", e.said.HTTPUnix, "http", e.said.HTTP, "read_only", config.ReadOnly)
		watchdog, stopWatchdog := context.WithCancel(serving)
		group.Go(func() error { return feedWatchdog(watchdog, e.said.HTTPUnix, log) })
		why := e.wait(ctx, serving)
		stopWatchdog()
		notifySupervisor("STOPPING=1\nSTATUS=draining", log)
		log.Info("engine stopping", "why", why, "deadline", seconds(config.StopTimeout))
	}
	return errors.Join(err, e.stop(stopIntake, intakeDone, group))
}

// open makes the parts, from the store outwards.
func (e *engine) open() (err error) {
	c := e.config
	if err := e.place(); err != nil {
		return err
	}
	identity := serve.Identity{ID: newEngineID(), Version: version(), Revision: revision(), Store: e.dir, Started: time.Now(), ReadOnly: c.ReadOnly}
	e.said.EngineID, e.said.PID, e.said.Version, e.said.Store = identity.ID, os.Getpid(), identity.Version, e.dir
	e.said.ReadOnly, e.said.Started = c.ReadOnly, identity.Started.UnixNano()
	o := serve.Options{Identity: identity, Formats: formats(), Config: c.lines(), Log: e.log, Requests: c.HTTP.Requests, StallTimeout: seconds(c.HTTP.StallTimeout), Heartbeat: seconds(c.HTTP.Heartbeat),
		AuditStatistics: c.Audit.Statistics, AuditRequired: c.Audit.Required}
	if c.ReadOnly {
		if e.store, err = openStoreToRead(e.dir); err != nil {
			return err
		}
		if err = e.openAudit(); err != nil {
			return err
		}
		o.Store, o.Audit = e.store, e.audit
		o.Policy, e.ledger, o.PolicyError = openHelm(e.dir, e.store, nil, nil, nil)
		e.server = serve.New(o)
		return nil
	}
	e.names = newRecorder()
	e.hub = live.NewHub(e.names, live.Options{Subscribers: c.Live.Subscribers, QueueFrames: c.Live.QueueFrames, QueueBytes: c.Live.QueueMiB << 20, RecentEvents: c.Live.RecentEvents})
	storing := c.storeOptions(e.tell)
	if storing.FS = c.files; storing.FS == nil {
		storing.FS = diskOf(e.dir)
	}
	if e.store, err = store.Open(e.dir, storing); err != nil {
		return unopened(err)
	}
	if e.token, err = serve.AdminToken(filepath.Join(e.dir, "token")); err != nil {
		return unopened(err)
	}
	if err = e.openAudit(); err != nil {
		return err
	}
	e.names.Store = e.store
	e.watch = trigger.New(trigger.Options{Names: &introducing{recorder: e.names, vain: map[uint32]bool{}}, Event: e.tellOf, Promote: func(f trigger.Firing) { e.helm.Promote(f) }})
	if e.helm, e.ledger, err = openHelm(e.dir, e.store, e.names, e.watch, e.tell); err != nil {
		return unopened(err)
	}
	e.lookout = newLookout(e)
	o.Store, o.Live, o.Attached, o.Audit, o.Policy, o.Troubles = e.store, e.hub, e.attached, e.audit, e.helm, e.troubles
	o.Flush = func(ctx context.Context) error { return e.intake.Flush(ctx) } // which listen makes, knowing the addresses
	e.server = serve.New(o)
	return nil
}

// openAudit begins the record of reads. An engine that only reads a store may not be its owner, nor alone there: it records where it is told to.
func (e *engine) openAudit() (err error) {
	c := e.config.Audit
	dir := c.Dir
	if dir == "" && !e.config.ReadOnly {
		dir = filepath.Join(e.dir, "audit")
	}
	if dir == "" {
		if c.Required {
			return usage(fmt.Errorf("serve: audit.required is set, and an engine that only reads has no record of its own: set audit.dir"))
		}
		return nil
	}
	e.audit, err = audit.Open(vfs.OS{}, absolute(dir), audit.Options{FileBytes: int64(c.FileMiB) << 20, Files: c.Files, Engine: e.said.EngineID, Tell: e.tell})
	if err != nil {
		return unopened(err)
	}
	return nil
}

// tell says something to the operator and to whoever watches events.
func (e *engine) tell(level, code, message string) {
	e.log.Log(context.Background(), logLevel(level), message, "code", code)
	if e.hub != nil {
		e.hub.Event(live.Event{Level: level, Code: code, Message: message})
	}
}

// tellOf is tell, of a session.
func (e *engine) tellOf(level, code, session, message string) {
	e.log.Log(context.Background(), logLevel(level), message, "code", code, "session", session)
	e.hub.Event(live.Event{Level: level, Code: code, Session: session, Message: message})
}

// place decides where the sockets are, and refuses impossible paths before anything is opened.
func (e *engine) place() error {
	c := e.config
	e.said.HTTPUnix = c.HTTP.Socket
	if e.said.HTTPUnix == "" && c.ReadOnly {
		// A store that is only read may not be ours to write to, and its own socket may be a live engine's.
		dir, err := os.MkdirTemp("", "dmi-")
		if err != nil {
			return &exitError{exitAddress, fmt.Errorf("serve: make a folder for the socket: %w; set http.socket", err)}
		}
		e.temporal = dir
		e.said.HTTPUnix = filepath.Join(dir, "http.sock")
	} else if e.said.HTTPUnix == "" {
		e.said.HTTPUnix = filepath.Join(e.dir, "http.sock")
	}
	e.said.HTTPUnix = absolute(e.said.HTTPUnix)
	if err := checkSocketPath(e.said.HTTPUnix, "http.socket (--http-socket)"); err != nil || c.ReadOnly {
		return err
	}
	if e.said.Control = c.Control.Socket; e.said.Control == "" {
		e.said.Control = filepath.Join(e.dir, "engine.sock")
	}
	e.said.Control = absolute(e.said.Control)
	return checkSocketPath(e.said.Control, "control.socket (--socket)")
}

// listen opens the doors. From here on others can connect; nobody is served before run.
func (e *engine) listen() error {
	c := e.config
	local, err := listenUnix(e.said.HTTPUnix, "http.socket (--http-socket)")
	if err != nil {
		return err
	}
	e.add(namingPeers{local}, e.server.Local())
	if !c.ReadOnly {
		if e.producers, err = listenUnix(e.said.Control, "control.socket (--socket)"); err != nil {
			return err
		}
		if err = admitGroup(e.said.Control, c.Control.Group); err != nil {
			return err
		}
	}
	if c.HTTP.Address != "" {
		if err := e.listenRemote(); err != nil {
			return err
		}
	}
	if c.Admin.Address != "" {
		admin, err := listenTCP(c.Admin.Address, "admin.address (--admin)")
		if err != nil {
			return err
		}
		e.said.Admin = "http://" + admin.Addr().String()
		e.add(admin, e.adminHandler())
	}
	if !c.ReadOnly {
		if e.intake, err = e.newIntake(); err != nil {
			return err
		}
	}
	return nil
}

func (e *engine) listenRemote() error {
	c := e.config.HTTP
	tokens := &serve.Tokens{}
	var err error
	if e.token == "" { // reading only: the store's token, where there is one
		if e.token, err = serve.AdminToken(filepath.Join(e.dir, "token")); err != nil {
			return unopened(err)
		}
	}
	if err := tokens.Add(e.token, serve.ScopeAdmin, "store"); err != nil {
		return fmt.Errorf("token file %s: %w", filepath.Join(e.dir, "token"), err)
	}
	if c.Tokens != "" {
		if err := tokens.ReadTokens(c.Tokens); err != nil {
			return usage(err)
		}
	}
	remote, err := listenTCP(c.Address, "http.address (--http)")
	if err != nil {
		return err
	}
	e.said.HTTP = "http://" + remote.Addr().String()
	if c.TLSCert != "" {
		plain := remote
		if remote, err = withTLS(plain, c.TLSCert, c.TLSKey); err != nil {
			plain.Close()
			return err
		}
		e.said.HTTP = "https://" + plain.Addr().String()
	}
	hosts := c.Hosts
	if host, _, err := net.SplitHostPort(c.Address); err == nil && host != "" {
		hosts = append([]string{host}, hosts...)
	}
	e.add(remote, withPage(e.server.Remote(&serve.Gate{Tokens: tokens, Hosts: hosts, Origins: c.Origins}), c.Origins))
	return nil
}

// add serves a listener. There is no write timeout: answers stream, and the server cuts off readers that stall; no read timeout either, as it
// would end streams, and no body is read. At the bound on connections new ones wait to be accepted.
func (e *engine) add(l net.Listener, h http.Handler) {
	l = netutil.LimitListener(l, 4*e.config.HTTP.Requests)
	e.doors = append(e.doors, door{l, &http.Server{
		Handler: h, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 128 << 10,
		ErrorLog: slog.NewLogLogger(e.log.Handler(), slog.LevelWarn),
	}})
}

func (e *engine) adminHandler() http.Handler {
	mux := http.NewServeMux()
	local := e.server.Local()
	for _, path := range []string{"/metrics", "/healthz", "/readyz"} {
		mux.Handle("GET "+path, local)
	}
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return mux
}

// firstSession is how long exit_when_idle waits for a first session: whoever started this engine may still be loading a library.
const firstSession = 30 * time.Second

// wait returns why the engine should stop: it was told to, a part failed, or nobody needs it.
func (e *engine) wait(ctx, serving context.Context) string {
	var tick <-chan time.Time
	if e.config.ExitWhenIdle {
		ticker := time.NewTicker(100 * time.Millisecond)
		defer ticker.Stop()
		tick = ticker.C
	}
	idleSince, grace := time.Now(), max(firstSession, seconds(e.config.ExitGrace))
	for {
		select {
		case <-ctx.Done():
			if cause := context.Cause(ctx); cause != ctx.Err() {
				return cause.Error()
			}
			return "told to"
		case <-serving.Done():
			return "a part failed"
		case now := <-tick:
			if e.intake != nil && len(e.intake.Sessions()) > 0 {
				idleSince, grace = now, seconds(e.config.ExitGrace)
			} else if last := e.server.LastUsed(); last.After(idleSince) {
				idleSince = last
			}
			if now.Sub(idleSince) >= grace {
				return "idle: the last session has ended"
			}
		}
	}
}

// stop ends everything in the order in which data flows: intake and what it has drained, then readers. What was accepted is durable after.
func (e *engine) stop(stopIntake func(), intakeDone <-chan struct{}, group *errgroup.Group) error {
	ctx, cancel := context.WithTimeout(context.Background(), seconds(e.config.StopTimeout))
	defer cancel()
	var errs []error
	stopIntake()
	select {
	case <-intakeDone:
	case <-ctx.Done():
		errs = append(errs, fmt.Errorf("serve: producers were not drained within stop_timeout_s (%v s); what was not is booked lost(engine_exit) at the next start", e.config.StopTimeout))
	}
	if e.intake != nil {
		if err := e.store.Barrier(ctx); err != nil {
			errs = append(errs, fmt.Errorf("serve: make everything durable: %w", err))
		}
	}
	e.server.Stop()
	if e.hub != nil {
		e.hub.Close()
	}
	for _, d := range e.doors {
		brief, done := context.WithTimeout(ctx, 2*time.Second) // readers under way may end; those who take longer are cut off
		if d.server.Shutdown(brief) != nil {
			d.server.Close()
		}
		done()
	}
	done := make(chan error, 1)
	go func() { done <- group.Wait() }()
	select {
	case err := <-done:
		errs = append(errs, err)
	case <-ctx.Done():
	}
	return errors.Join(errs...)
}

// release closes what open and listen opened, also after a start that failed half-way.
func (e *engine) release() error {
	if e.producers != nil {
		e.producers.Close()
	}
	for _, d := range e.doors {
		d.server.Close()
		d.listener.Close()
	}
	if e.hub != nil {
		e.hub.Close()
	}
	if e.server != nil {
		e.server.Stop()
	}
	if e.temporal != "" {
		os.RemoveAll(e.temporal)
	}
	if e.watch != nil {
		e.watch.Close()
	}
	if e.ledger != nil {
		e.ledger.Close() // every revision is synced
	}
	if e.audit != nil {
		if err := e.audit.Close(); err != nil {
			e.log.Error(err.Error())
		}
	}
	if e.store == nil {
		return nil
	}
	closed := make(chan error, 1)
	go func() { closed <- e.store.Close() }()
	select {
	case err := <-closed:
		if err != nil {
			return fmt.Errorf("serve: close the store: %w", err)
		}
		e.log.Info("engine stopped", "store", e.dir)
		return nil
	case <-time.After(seconds(e.config.StopTimeout) + time.Second):
		return fmt.Errorf("serve: the store did not close within stop_timeout_s (%v s): the disk hangs; nothing durable is lost", e.config.StopTimeout)
	}
}

// formats are the versions of all that outlives this engine, or that others have to speak.
func formats() map[string]int {
	versions := store.Formats()
	versions["ring"], versions["control"] = ring.ABIVersion, control.ProtocolVersion
	return versions
}

func newEngineID() string {
	var random [4]byte
	rand.Read(random[:])
	return "e" + hex.EncodeToString(random[:])
}

// writeAnnouncement makes STORE/engine.json appear whole.
func writeAnnouncement(dir string, a announcement) error {
	text, err := json.MarshalIndent(a, "", "  ")
	if err != nil {
		return err
	}
	name := filepath.Join(dir, announcementName)
	if err = os.WriteFile(name+".new", append(text, '\n'), 0o600); err == nil {
		err = os.Rename(name+".new", name)
	}
	if err != nil {
		return fmt.Errorf("serve: announce the engine: %w", err)
	}
	return nil
}

// storeOptions says the store's keys in its own words.
func (c *Config) storeOptions(tell func(level, code, message string)) store.Options {
	s := c.Store
	o := store.Options{BufferMiB: s.BufferMiB, ChunkKiB: s.ChunkKiB, FlushAge: milliseconds(s.FlushAge), SegmentMiB: s.SegmentMiB, SegmentTensors: s.SegmentTensors,
		SegmentAge: seconds(s.SegmentAge), SyncMiB: s.SyncMiB, SyncAge: milliseconds(s.SyncAge), GroupCommit: milliseconds(s.GroupCommit),
		FullDiskWait: seconds(s.FullDiskWait), RetainMiB: s.RetainMiB, RetainAge: seconds(s.RetainAge), TidyEvery: seconds(s.TidyEvery), CompactAfter: seconds(s.CompactAfter), CompactMiBs: s.CompactMiBs,
		StallAfter: seconds(s.StallAfter), LagAfter: seconds(s.LagAfter), Log: tell}
	if s.Direct != "auto" {
		direct := s.Direct == "true"
		o.Direct = &direct
	}
	return o
}

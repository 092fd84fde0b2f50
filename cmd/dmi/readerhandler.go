package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// readerHandler answers for a store as openReader finds it at that moment: through the engine that owns it while one lives, else by itself. A page
// stays open while engines come and go.
type readerHandler struct {
	dir, engine string

	mu  sync.Mutex
	now *answering // nil: nobody yet
}

// answering is a reader and the answers that are under way through it.
type answering struct {
	reader *reader
	proxy  *httputil.ReverseProxy
	state  string // what the reader was opened on
	users  sync.WaitGroup
}

func newReaderHandler(dir, engine string) *readerHandler {
	return &readerHandler{dir: dir, engine: engine}
}

// check opens the reader, so that what is wrong with the store is said at once.
func (h *readerHandler) check(ctx context.Context) error {
	a, err := h.acquire(ctx)
	if err == nil {
		a.users.Done()
	}
	return err
}

// acquire is who answers now; the caller says users.Done when its answer is over.
func (h *readerHandler) acquire(ctx context.Context) (*answering, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	state := h.look()
	if h.now == nil || state != h.now.state {
		r, err := openReader(context.WithoutCancel(ctx), h.dir, h.engine)
		if err != nil {
			return nil, err
		}
		h.retire()
		h.now = &answering{reader: r, state: state, proxy: newProxy(r)}
	}
	h.now.users.Add(1)
	return h.now, nil
}

// look says what a reader opened now would stand on: an engine that lives, or the store as it is on disk.
func (h *readerHandler) look() string {
	if h.engine != "" {
		return h.engine
	}
	if a, err := readAnnouncement(h.dir); err == nil && a.HTTPUnix != "" {
		if connection, err := net.DialTimeout("unix", a.HTTPUnix, 2*time.Second); err == nil {
			connection.Close()
			return a.EngineID
		}
	}
	state := "stored"
	for _, name := range []string{"catalogue.sqlite", "catalogue.sqlite-wal", "segments", "manifest"} {
		if info, err := os.Stat(filepath.Join(h.dir, name)); err == nil {
			state += fmt.Sprint(" ", info.ModTime().UnixNano())
		}
	}
	return state
}

// retire closes the reader once the answers under way are over. Called with the lock held.
func (h *readerHandler) retire() {
	if old := h.now; old != nil {
		h.now = nil
		go func() { // ends with the slowest answer
			old.users.Wait()
			old.reader.close()
		}()
	}
}

func (h *readerHandler) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.now != nil {
		h.now.reader.close()
		h.now = nil
	}
}

func newProxy(r *reader) *httputil.ReverseProxy {
	base, err := url.Parse(r.base)
	if err != nil {
		panic(err) // openReader made it
	}
	return &httputil.ReverseProxy{
		Transport: r.http.Transport, FlushInterval: -1, ErrorLog: slog.NewLogLogger(slog.NewTextHandler(os.Stderr, nil), slog.LevelWarn),
		Rewrite: func(p *httputil.ProxyRequest) {
			p.SetURL(base)
			p.Out.Header.Del("Authorization") // the page's own token is nobody else's
			p.Out.Header.Del("Origin")
			if r.token != "" {
				p.Out.Header.Set("Authorization", "Bearer "+r.token)
			}
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			refuse(w, http.StatusServiceUnavailable, "unreachable", fmt.Sprintf("ask the engine: %v", err), "it may have stopped: ask again")
		},
	}
}

func refuse(w http.ResponseWriter, status int, code, message, hint string) {
	text, _ := json.Marshal(map[string]any{"error": map[string]string{"code": code, "message": message, "hint": hint}})
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(text, '\n'))
}

func (h *readerHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a, err := h.acquire(r.Context())
	if err != nil {
		refuse(w, http.StatusServiceUnavailable, "store", err.Error(), "dmi verify says more about a store")
		return
	}
	defer a.users.Done()
	a.proxy.ServeHTTP(w, r)
}

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"dmi/live"
	"dmi/query"
	"dmi/serve"
	"dmi/store"
)

// announcement is STORE/engine.json, and the line that `dmi serve` prints when it is ready.
type announcement struct {
	EngineID string `json:"engine_id"`
	PID      int    `json:"pid"`
	Version  string `json:"version"`
	Store    string `json:"store"`     // absolute path
	Control  string `json:"control"`   // Unix socket for producers; "" where nothing is captured
	HTTPUnix string `json:"http_unix"` // Unix socket for readers
	HTTP     string `json:"http"`      // base URL on TCP, or ""
	Admin    string `json:"admin"`     // base URL of the admin listener, or ""
	ReadOnly bool   `json:"read_only"`
	Started  int64  `json:"started_unix_ns"`
}

const announcementName = "engine.json"

// readAnnouncement reads who owns the store at dir. A copy of a live store has its announcement too, which is about the original.
func readAnnouncement(dir string) (announcement, error) {
	var a announcement
	text, err := os.ReadFile(filepath.Join(dir, announcementName))
	if err == nil {
		err = json.Unmarshal(text, &a)
	}
	if err != nil {
		return a, err
	}
	here, err := os.Stat(dir)
	if err != nil {
		return a, err
	}
	if there, err := os.Stat(a.Store); err != nil || !os.SameFile(here, there) {
		return announcement{}, fmt.Errorf("%s is about the store %s", filepath.Join(dir, announcementName), a.Store)
	}
	return a, nil
}

// reader asks questions over HTTP: of the live engine of a store, of one elsewhere, or of a handler in this process.
type reader struct {
	http  *http.Client
	base  string
	token string
	live  *announcement // of the store's engine, if it lives
	close func()
}

// openReader finds whoever answers for a store: the engine that owns it, else this process, reading only.
func openReader(ctx context.Context, dir, engine string) (*reader, error) {
	if engine != "" {
		return remoteReader(engine)
	}
	if a, answers := owner(dir); answers {
		r := unixReader(a.HTTPUnix)
		r.live = &a
		return r, nil
	}
	s, err := openStoreToRead(dir)
	if err != nil {
		return nil, err
	}
	identity := serve.Identity{ID: "in-process", Version: version(), Revision: revision(), Store: absolute(dir), Started: time.Now(), ReadOnly: true}
	o := serve.Options{Identity: identity, Store: s, Config: []configLine{}, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	o.Policy, _, o.PolicyError = openHelm(dir, s, nil, nil, nil)
	server := serve.New(o)
	return &reader{http: &http.Client{Transport: serve.InProcess(server.Local())}, base: "http://in-process", close: func() { server.Stop(); s.Close() }}, nil
}

// owner is the engine that owns the store at dir, if it answers.
func owner(dir string) (announcement, bool) {
	a, err := readAnnouncement(dir)
	if err != nil || a.HTTPUnix == "" {
		return a, false
	}
	connection, err := net.DialTimeout("unix", a.HTTPUnix, 2*time.Second)
	if err != nil {
		return a, false
	}
	connection.Close()
	return a, true
}

// startPatience is how long a change waits for an engine that has the store and does not answer yet.
const startPatience = 10 * time.Second

// awaitOwner waits for an engine that has just been started and answers soon, where what follows is for it and nobody else. It says so after a second.
func awaitOwner(ctx context.Context, dir string, say io.Writer) {
	for begun, said := time.Now(), false; store.Held(dir) && ctx.Err() == nil; time.Sleep(20 * time.Millisecond) {
		if _, answers := owner(dir); answers || time.Since(begun) > startPatience {
			return
		}
		if !said && time.Since(begun) > time.Second {
			said = true
			fmt.Fprintf(say, "dmi: somebody has the store %s and does not answer yet: waiting for %v at most\n", absolute(dir), startPatience)
		}
	}
}

func openStoreToRead(dir string) (*store.Store, error) {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrPermission) {
		return nil, unopened(fmt.Errorf("open the store %s: %w", absolute(dir), err))
	} else if err != nil {
		return nil, unopened(fmt.Errorf("open the store %s: %w; name the store with --store or DMI_STORE", absolute(dir), err))
	}
	s, err := store.OpenReadOnly(dir)
	if err != nil {
		return nil, unopened(err)
	}
	return s, nil
}

// unopened is what opening a store, or a file of it, ended with; it says what to do where this user may not.
func unopened(err error) error {
	if errors.Is(err, fs.ErrPermission) && !errors.Is(err, store.ErrDenied) {
		err = fmt.Errorf("%w: %w", err, store.ErrDenied)
	}
	return &exitError{exitStore, err}
}

func absolute(path string) string {
	if full, err := filepath.Abs(path); err == nil {
		return full
	}
	return path
}

func unixReader(socket string) *reader {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	return &reader{http: &http.Client{Transport: transport}, base: "http://localhost", close: transport.CloseIdleConnections}
}

func remoteReader(engine string) (*reader, error) {
	if socket, is := strings.CutPrefix(engine, "unix:"); is {
		return unixReader(socket), nil
	}
	u, err := url.Parse(engine)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, &exitError{exitUsage, fmt.Errorf("--engine %q: say unix:PATH, http://HOST:PORT or https://HOST:PORT", engine)}
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.Proxy = nil // tensors do not go by way of a proxy
	return &reader{http: &http.Client{Transport: transport}, base: strings.TrimSuffix(u.String(), "/"), token: os.Getenv("DMI_TOKEN"), close: transport.CloseIdleConnections}, nil
}

// answerError is an error as the engine answered it.
type answerError struct {
	status int
	Body   struct {
		Code    string `json:"code"`
		Message string `json:"message"`
		Hint    string `json:"hint"`
	} `json:"error"`
	Coverage *query.Coverage `json:"coverage"`
}

func (e *answerError) Error() string {
	if e.Body.Hint == "" {
		return e.Body.Message
	}
	return e.Body.Message + "\n  " + e.Body.Hint
}

// do sends a request; the caller closes the answer's body. Anything but success is an *answerError.
func (r *reader) do(ctx context.Context, method, path string, arguments url.Values) (*http.Response, error) {
	return r.send(ctx, method, path, arguments, nil, "")
}

// send is do with a body, or for an answer of a type.
func (r *reader) send(ctx context.Context, method, path string, arguments url.Values, body []byte, accept string) (*http.Response, error) {
	address := r.base + "/v1" + path
	if len(arguments) > 0 {
		address += "?" + arguments.Encode()
	}
	request, err := http.NewRequestWithContext(ctx, method, address, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if r.token != "" {
		request.Header.Set("Authorization", "Bearer "+r.token)
	}
	if accept != "" {
		request.Header.Set("Accept", accept)
	}
	answer, err := r.http.Do(request)
	if err != nil {
		return nil, fmt.Errorf("ask the engine: %w", err)
	}
	if answer.StatusCode < 300 {
		return answer, nil
	}
	defer answer.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(answer.Body, 16<<20))
	failed := &answerError{status: answer.StatusCode}
	if json.Unmarshal(text, failed) != nil || failed.Body.Message == "" {
		failed.Body.Message = fmt.Sprintf("%s %s: %s: %s", method, path, answer.Status, bytes.TrimSpace(text))
	}
	return nil, failed
}

// get decodes a JSON answer.
func (r *reader) get(ctx context.Context, path string, arguments url.Values, into any) error {
	answer, err := r.do(ctx, http.MethodGet, path, arguments)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if err := json.NewDecoder(answer.Body).Decode(into); err != nil {
		return fmt.Errorf("read the engine's answer to %s: %w", path, err)
	}
	return nil
}

// list gives every item of a list, page by page, as it came. It holds one item at a time: statistics come in one page of any length.
func (r *reader) list(ctx context.Context, path string, arguments url.Values, yield func(json.RawMessage) error) error {
	for {
		answer, err := r.do(ctx, http.MethodGet, path, arguments)
		if err != nil {
			return err
		}
		next, err := eachItem(answer.Body, yield)
		answer.Body.Close()
		if err != nil || next == "" {
			return err
		}
		arguments.Set("after", next)
	}
}

// eachItem reads {"items": [...], "next": ...}.
func eachItem(body io.Reader, yield func(json.RawMessage) error) (next string, err error) {
	in := json.NewDecoder(body)
	expect := func(want json.Delim) error {
		token, err := in.Token()
		if err == nil && token != want {
			err = fmt.Errorf("%v where %v should be", token, want)
		}
		if err != nil {
			return fmt.Errorf("read the engine's list: %w", err)
		}
		return nil
	}
	if err := expect('{'); err != nil {
		return "", err
	}
	for in.More() {
		name, err := in.Token()
		if err != nil {
			return "", fmt.Errorf("read the engine's list: %w", err)
		}
		if name != "items" {
			var value *string
			if err := in.Decode(&value); err != nil {
				return "", fmt.Errorf("read the engine's list: %v: %w", name, err)
			}
			if name == "next" && value != nil {
				next = *value
			}
			continue
		}
		if err := expect('['); err != nil {
			return "", err
		}
		for in.More() {
			var item json.RawMessage
			if err := in.Decode(&item); err != nil {
				return "", fmt.Errorf("read the engine's list: %w", err)
			}
			if err := yield(item); err != nil {
				return "", err
			}
		}
		if err := expect(']'); err != nil {
			return "", err
		}
	}
	return next, expect('}')
}

// maxEventBytes bounds a line of an event stream.
const maxEventBytes = 64 << 20

// events reads Server-Sent Events until the stream ends.
func (r *reader) events(ctx context.Context, method, path string, arguments url.Values, yield func(name string, data []byte) error) error {
	answer, err := r.send(ctx, method, path, arguments, nil, "text/event-stream")
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	lines := bufio.NewScanner(answer.Body)
	lines.Buffer(make([]byte, 64<<10), maxEventBytes)
	name := ""
	for lines.Scan() {
		field, value, _ := bytes.Cut(lines.Bytes(), []byte(": "))
		switch string(field) {
		case "event":
			name = string(value)
		case "data":
			if err := yield(name, value); err != nil {
				return err
			}
		}
	}
	if err := lines.Err(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}

var _ live.Names = (*recorder)(nil)

//go:build linux

package main

import (
	"context"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"dmi/internal/vfs"
	"dmi/ring"
)

// brokenDisk is the machine's file system, which does to changes what a test says.
type brokenDisk struct {
	vfs.FS
	mu    sync.Mutex
	fault func() error // nil: it works
}

func (d *brokenDisk) set(fault func() error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fault = fault
}

func (d *brokenDisk) change() error {
	d.mu.Lock()
	fault := d.fault
	d.mu.Unlock()
	if fault == nil {
		return nil
	}
	return fault()
}

func (d *brokenDisk) Create(name string, direct bool) (vfs.File, error) {
	if err := d.change(); err != nil {
		return nil, err
	}
	f, err := d.FS.Create(name, direct)
	return &brokenFile{f, d}, err
}

func (d *brokenDisk) Open(name string, write bool) (vfs.File, error) {
	f, err := d.FS.Open(name, write)
	if err != nil {
		return nil, err
	}
	return &brokenFile{f, d}, nil
}

func (d *brokenDisk) Rename(from, to string) error {
	if err := d.change(); err != nil {
		return err
	}
	return d.FS.Rename(from, to)
}

func (d *brokenDisk) SyncDir(name string) error {
	if err := d.change(); err != nil {
		return err
	}
	return d.FS.SyncDir(name)
}

type brokenFile struct {
	vfs.File
	disk *brokenDisk
}

func (f *brokenFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.disk.change(); err != nil {
		return 0, err
	}
	return f.File.WriteAt(p, off)
}

func (f *brokenFile) Sync() error {
	if err := f.disk.change(); err != nil {
		return err
	}
	return f.File.Sync()
}

// get asks the engine something by its local door, which has to answer whatever the disk does.
func get(t testing.TB, socket, path string) (status int, text string) {
	t.Helper()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	client := http.Client{Transport: transport, Timeout: patience}
	answer, err := client.Get("http://localhost" + path)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return answer.StatusCode, string(body)
}

// recentEvents is what an engine has told of late, as much as comes within a moment.
func recentEvents(t testing.TB, socket string) string {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost/v1/live/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	answer, err := transport.RoundTrip(request)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	defer time.AfterFunc(200*time.Millisecond, cancel).Stop()
	text, _ := io.ReadAll(answer.Body) // until the time is up
	return string(text)
}

// whole says whether an event of a code is there, to its end.
func whole(events, code string) bool {
	_, after, is := strings.Cut(events, `"`+code+`"`)
	return is && strings.Contains(after, "\n")
}

// metricOf is a metric without labels; NaN: there is none.
func metricOf(t testing.TB, socket, name string) float64 {
	t.Helper()
	_, text := get(t, socket, "/metrics")
	for line := range strings.Lines(text) {
		if value, is := strings.CutPrefix(line, name+" "); is {
			number, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				t.Fatal(err)
			}
			return number
		}
	}
	return math.NaN()
}

// The disk is full, read-only, failing, slow or hung for a while: the engine answers readers, says what to do in its state, its events and its metrics, calls nothing
// durable that is not, and goes on where it was once the disk works again. Nothing that was accepted is lost, in either mode.
func TestDisksThatBreak(t *testing.T) {
	refuse := func(err error) func(<-chan struct{}) func() error {
		return func(<-chan struct{}) func() error { return func() error { return err } }
	}
	for _, c := range []struct {
		name    string
		fault   func(mended <-chan struct{}) func() error
		says    string // what the operator is told; "": that the disk takes its time
		metrics map[string]float64
		event   string
		advises string // the event
		stall   string // seconds that an operation may take
	}{
		{"full", refuse(syscall.ENOSPC), "free space", map[string]float64{"dmi_store_failing": 1, "dmi_store_failures_total": 1}, "store_write", "free space", "60"},
		{"read-only", refuse(syscall.EROFS), "read-only", map[string]float64{"dmi_store_failing": 1, "dmi_store_failures_total": 1}, "store_write", "mount the file system for writing", "60"},
		{"failing", refuse(syscall.EIO), "dmesg", map[string]float64{"dmi_store_failing": 1, "dmi_store_failures_total": 1}, "store_write", "dmesg", "60"},
		{"slow", func(<-chan struct{}) func() error {
			return func() error { time.Sleep(250 * time.Millisecond); return nil }
		}, "", map[string]float64{"dmi_store_durable_lag_seconds": 0.4}, "store_lag", "give the store a faster disk", "60"},
		{"hung", func(mended <-chan struct{}) func() error {
			return func() error { <-mended; return nil }
		}, "iostat", map[string]float64{"dmi_store_failing": 1, "dmi_store_failures_total": 1, "dmi_store_stalled_seconds": 0.7}, "store_write", "iostat", "0.7"},
	} {
		for mode, name := range map[uint32]string{ring.ModeComplete: "complete", ring.ModeBestEffort: "best-effort"} {
			t.Run(c.name+"/"+name, func(t *testing.T) {
				t.Parallel() // they mostly wait
				dir := storeDir(t)
				disk := &brokenDisk{FS: vfs.OS{}}
				e := startOn(t, dir, disk, "store.stall_after_s", c.stall)
				p := newProducer(t, "s000000d1", mode)
				p.must(p.attach(e.Control, "", false))
				for range 20 {
					p.must(p.forward(3))
				}
				p.barrier("before")
				mended := make(chan struct{})
				mend := sync.OnceFunc(func() { disk.set(nil); close(mended) })
				t.Cleanup(mend)
				disk.set(c.fault(mended))
				publish := func() {
					if p.Lanes[0].Room() > 8 {
						p.must(p.forward(1))
					}
					time.Sleep(5 * time.Millisecond)
				}
				for begun := time.Now(); time.Since(begun) < time.Second; {
					publish()
				}
				if status, text := get(t, e.HTTPUnix, "/healthz"); status != http.StatusOK {
					t.Errorf("/healthz: %d %s", status, text)
				}
				get(t, e.HTTPUnix, "/v1/coverage")
				for metric, least := range c.metrics {
					waitFor(t, func() bool { publish(); return metricOf(t, e.HTTPUnix, metric) >= least })
				}
				events := ""
				waitFor(t, func() bool { events = recentEvents(t, e.HTTPUnix); return whole(events, c.event) })
				if !strings.Contains(events, c.advises) {
					t.Errorf("no event says %q:\n%s", c.advises, events)
				}
				if status, text := get(t, e.HTTPUnix, "/readyz"); c.says != "" && (status != http.StatusServiceUnavailable || !strings.Contains(text, c.says)) {
					t.Errorf("/readyz: %d %s, want %q", status, text, c.says)
				} else if c.says == "" && status != http.StatusOK {
					t.Errorf("/readyz: %d %s", status, text)
				}
				p.must(p.client.Send(map[string]any{"type": "barrier", "id": "during", "steps": map[string]any{"0": p.step - 1}}))
				if answer, err := p.client.Expect("durable", 400*time.Millisecond); err == nil && answer["error"] == nil && c.says != "" {
					t.Errorf("on a disk that is %s, the engine says durable: %v", c.name, answer)
				}
				mend()
				p.client.Close() // an answer may be half read
				p.must(waitDetached(e, p))
				p.must(p.attach(e.Control, "", true))
				for range 5 {
					p.must(p.forward(2))
				}
				p.barrier("after")
				waitFor(t, func() bool { status, _ := get(t, e.HTTPUnix, "/readyz"); return status == http.StatusOK })
				again := "writing succeeds again"
				if c.says == "" {
					again = "become durable again"
				}
				waitFor(t, func() bool { return strings.Contains(recentEvents(t, e.HTTPUnix), again) })
				p.bye()
				e.end(t)
				p.checkRows(dir)
				if out := mustDMI(t, "verify", "--store", dir); !strings.Contains(out, "ok") {
					t.Error(out)
				}
			})
		}
	}
}

// An engine that is told to stop while its disk hangs ends within its deadline, with an error that says so; what it had called durable is there.
func TestStopWhileTheDiskHangs(t *testing.T) {
	dir := storeDir(t)
	disk := &brokenDisk{FS: vfs.OS{}}
	e := startOn(t, dir, disk, "stop_timeout_s", "1", "store.stall_after_s", "0.7")
	p := newProducer(t, "s000000d2", ring.ModeBestEffort)
	p.must(p.attach(e.Control, "", false))
	p.must(p.forward(3))
	p.barrier("before")
	mended := make(chan struct{})
	mend := sync.OnceFunc(func() { disk.set(nil); close(mended) })
	t.Cleanup(mend)
	disk.set(func() error { <-mended; return nil })
	p.must(p.forward(3))
	e.stop()
	e.over = true
	select {
	case err := <-e.done:
		if err == nil || !strings.Contains(err.Error(), "the disk hangs; nothing durable is lost") {
			t.Errorf("it ended with: %v", err)
		}
	case <-time.After(patience):
		t.Fatal("the engine does not end")
	}
	mend()
	waitFor(t, func() bool { _, _, code := dmi(t, "verify", "--store", dir); return code == 0 })
	p.client.Close()
	p.rows = 3
	p.checkRows(dir, "--tokens", "0:3")
}

// barrier waits until all that was published is durable.
func (p *producer) barrier(id string) {
	p.t.Helper()
	p.must(p.client.Send(map[string]any{"type": "barrier", "id": id, "steps": map[string]any{"0": p.step - 1}}))
	for {
		answer, err := p.client.Expect("durable", patience)
		p.must(err)
		if answer["id"] == id {
			return
		}
	}
}

// waitDetached waits until the engine has noticed that the producer hung up.
func waitDetached(e *running, p *producer) error {
	waitFor(p.t, func() bool { _, text := get(p.t, e.HTTPUnix, "/v1/status"); return !strings.Contains(text, p.session) })
	return nil
}

// startOn runs an engine on a file system.
func startOn(t testing.TB, dir string, files vfs.FS, pairs ...string) *running {
	t.Helper()
	config, err := loadConfig("", nil, flagLayer(append([]string{"store.path", dir, "store.flush_age_ms", "20", "store.sync_age_ms", "30", "store.group_commit_ms", "5",
		"store.segment_age_s", "0.3", "store.lag_after_s", "0.4"}, pairs...)...))
	if err != nil {
		t.Fatal(err)
	}
	config.files = files
	ctx, stop := context.WithCancel(context.Background())
	r := &running{log: &logText{}, stop: stop, done: make(chan error, 1)}
	ready := make(chan announcement, 1)
	go func() {
		r.done <- runEngine(ctx, config, slog.New(slog.NewTextHandler(r.log, nil)), func(a announcement) error {
			ready <- a
			return nil
		})
	}()
	select {
	case r.announcement = <-ready:
		t.Cleanup(func() { r.end(t) })
	case err := <-r.done:
		stop()
		t.Fatal(err)
	}
	return r
}

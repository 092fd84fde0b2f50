//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"dmi/internal/leaks"
	"dmi/ring"
)

func TestMain(m *testing.M) {
	if os.Getenv(asCommand) != "" {
		main()
	}
	introduction = patience // where everything is slow, so may be who reads the socket
	leaks.Main(m)
}

// running is an engine in this process, as `dmi serve` runs it.
type running struct {
	announcement
	log  *logText
	stop context.CancelFunc
	done chan error
	over bool
}

// logText is what an engine has logged so far.
type logText struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logText) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// startEngine runs an engine over a store with configuration KEY, VALUE, ...
func startEngine(t testing.TB, dir string, pairs ...string) (*running, error) {
	t.Helper()
	config, err := loadConfig("", nil, flagLayer(append([]string{"store.path", dir}, pairs...)...))
	if err != nil {
		return nil, err
	}
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
		return r, nil
	case err := <-r.done:
		stop()
		return nil, err
	case <-time.After(patience):
		t.Fatal("the engine is not ready")
		return nil, nil
	}
}

func mustStart(t testing.TB, dir string, pairs ...string) *running {
	t.Helper()
	r, err := startEngine(t, dir, pairs...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// end stops the engine and waits; it may have ended.
func (r *running) end(t testing.TB) {
	t.Helper()
	r.stop()
	if r.over {
		return
	}
	r.over = true
	select {
	case err := <-r.done:
		if err != nil {
			t.Errorf("the engine ended with: %v\n%s", err, r.log)
		}
	case <-time.After(patience):
		t.Fatalf("the engine does not stop\n%s", r.log)
	}
}

// dmi runs the command line in this process.
func dmi(t testing.TB, arguments ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c := newCommand()
	var out, complaints bytes.Buffer
	c.SetOut(&out)
	c.SetErr(&complaints)
	c.SetArgs(arguments)
	err := c.ExecuteContext(ctx)
	if err != nil && !errors.Is(err, errQuiet) {
		fmt.Fprintln(&complaints, "dmi:", err)
	}
	return out.String(), complaints.String(), exitCode(err)
}

func mustDMI(t testing.TB, arguments ...string) string {
	t.Helper()
	out, complaints, code := dmi(t, arguments...)
	if code != 0 {
		t.Fatalf("dmi %s: exit code %d\n%s%s", strings.Join(arguments, " "), code, out, complaints)
	}
	return out
}

// floatsOf reads the values of a .npy file.
func floatsOf(t testing.TB, path string) (shape string, values []float32) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	head := int(binary.LittleEndian.Uint16(text[8:])) + 10
	_, after, _ := strings.Cut(string(text[:head]), "'shape': (")
	shape, _, _ = strings.Cut(after, ")")
	for at := head; at < len(text); at += 4 {
		values = append(values, math.Float32frombits(binary.LittleEndian.Uint32(text[at:])))
	}
	return shape, values
}

// checkRows reads every row of the producer's request through the command line.
func (p *producer) checkRows(dir string, flags ...string) {
	p.t.Helper()
	file := filepath.Join(p.t.TempDir(), "rows.npy")
	mustDMI(p.t, append([]string{"get", "--store", dir, "--request", p.request(), "--site", "resid_post", "--out", file}, flags...)...)
	shape, values := floatsOf(p.t, file)
	if want := fmt.Sprintf("%d, 4,", p.rows); shape != want {
		p.t.Fatalf("shape (%s), want (%s)", shape, want)
	}
	for i, v := range values {
		if v != value(i/4, i%4) {
			p.t.Fatalf("row %d dim %d: %v, want %v", i/4, i%4, v, value(i/4, i%4))
		}
	}
}

func storeDir(t testing.TB) string {
	dir, err := os.MkdirTemp("", "dmi") // short: Unix sockets lie in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// A tensor's way from shared memory to an answer, by every door.
func TestThroughTheWholeEngine(t *testing.T) {
	dir := storeDir(t)
	e := mustStart(t, dir, "http.address", "127.0.0.1:0", "admin.address", "127.0.0.1:0", "http.heartbeat_s", "0.1")
	p := newProducer(t, "s00000001", ring.ModeComplete)
	p.must(p.attach(e.Control, "", false))

	watched := make(chan string, 2)
	for _, what := range [][]string{{"tail", "--count", "3", "--json", "--site", "resid_post"}, {"tail", "--tensors", "--count", "1", "--json"}} {
		go func() {
			out, complaints, code := dmi(t, append(what, "--store", dir)...)
			watched <- fmt.Sprint(out, complaints, code)
		}()
	}
	waitFor(t, func() bool { return strings.Contains(mustDMI(t, "top", "--once", "--store", dir), "2 subscribers") })
	p.must(p.forward(3))
	for range 2 {
		if got := <-watched; !strings.HasSuffix(strings.TrimSpace(got), "0") || !strings.Contains(got, p.request()) {
			t.Errorf("tail: %s", got)
		}
	}
	p.must(p.forward(2))
	p.must(p.client.Send(map[string]any{"type": "barrier", "id": "b1", "steps": map[string]any{"0": 1}}))
	if _, err := p.client.Expect("durable", patience); err != nil {
		t.Fatal(err)
	}
	p.checkRows(dir)

	// The same by TCP, where a token is needed.
	t.Setenv("DMI_TOKEN", "")
	if _, complaints, code := dmi(t, "requests", "--store", dir, "--engine", e.HTTP); code != exitFailure || !strings.Contains(complaints, "token") {
		t.Errorf("without a token: %d %s", code, complaints)
	}
	token, err := os.ReadFile(filepath.Join(dir, "token"))
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("DMI_TOKEN", strings.TrimSpace(string(token)))
	if out := mustDMI(t, "requests", "--store", dir, "--engine", e.HTTP, "--json"); !strings.Contains(out, p.request()) {
		t.Errorf("requests over TCP: %s", out)
	}
	if out := mustDMI(t, "top", "--once", "--json", "--store", dir); !strings.Contains(out, `"session":"s00000001"`) {
		t.Errorf("top: %s", out)
	}
	for _, path := range []string{"/metrics", "/healthz", "/readyz", "/debug/pprof/"} {
		answer, err := http.Get(e.Admin + path)
		if err != nil || answer.StatusCode != 200 {
			t.Fatalf("%s: %v %v", path, answer, err)
		}
		answer.Body.Close()
	}
	http.DefaultClient.CloseIdleConnections()

	p.bye()
	if out := mustDMI(t, "tail", "--events", "--count", "2", "--json", "--store", dir); !strings.Contains(out, `"attach"`) || !strings.Contains(out, `"detach"`) {
		t.Errorf("events: %s", out)
	}
	e.end(t)
	for _, name := range []string{announcementName, "engine.sock", "http.sock"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there after a graceful stop (%v)", name, err)
		}
	}
	p.checkRows(dir) // now by reading the store in this process
	if out := mustDMI(t, "verify", "--store", dir); !strings.Contains(out, "5 rows produced, 5 on the books\nok") {
		t.Errorf("verify: %s", out)
	}
}

func waitFor(t testing.TB, happened func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !happened(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited in vain")
		}
	}
}

// Stopped under load, the engine loses nothing: what it took is there, what it did not take is still in the ring for the next one.
func TestGracefulStopUnderLoadLosesNothing(t *testing.T) {
	dir := storeDir(t)
	p := newProducer(t, "s00000002", ring.ModeComplete)
	for round := range 3 {
		e := mustStart(t, dir)
		p.must(p.attach(e.Control, "", round > 0))
		loaded := make(chan error)
		enough := make(chan struct{})
		go func() {
			for i := uint32(0); ; i++ {
				select {
				case <-enough:
					close(loaded)
					return
				default:
				}
				if p.Lanes[0].Room() < 8 { // the engine is gone: complete mode would wait
					time.Sleep(time.Millisecond)
					continue
				}
				if err := p.forward(1 + i%5); err != nil {
					loaded <- err
					return
				}
			}
		}()
		time.Sleep(100 * time.Millisecond)
		e.end(t)
		close(enough)
		if err := <-loaded; err != nil {
			t.Fatal(err)
		}
		p.client.Close()
	}
	e := mustStart(t, dir)
	p.must(p.attach(e.Control, "", true))
	p.must(p.forward(1))
	p.bye()
	p.checkRows(dir)
	e.end(t)
	p.checkRows(dir)
	out := mustDMI(t, "verify", "--store", dir, "--json")
	var report struct{ Produced, Booked uint64 }
	if err := json.Unmarshal([]byte(out), &report); err != nil || report.Produced != uint64(p.rows) || report.Booked != uint64(p.rows) {
		t.Errorf("%d rows were published; verify: %s", p.rows, out)
	}
	t.Logf("%d steps, %d rows", p.step, p.rows)
}

func TestExitWhenIdle(t *testing.T) {
	dir := storeDir(t)
	e := mustStart(t, dir, "exit_when_idle", "true", "exit_grace_s", "0.3")
	p := newProducer(t, "s00000003", ring.ModeBestEffort)
	p.must(p.attach(e.Control, "", false))
	p.must(p.forward(2))
	select {
	case err := <-e.done:
		t.Fatalf("it ended with a session attached: %v", err)
	case <-time.After(time.Second):
	}
	p.bye()
	select {
	case err := <-e.done:
		if err != nil {
			t.Fatal(err)
		}
		e.over = true
	case <-time.After(patience):
		t.Fatal("it does not end")
	}
	p.checkRows(dir)
}

func TestStartsThatCannotBe(t *testing.T) {
	dir := storeDir(t)
	e := mustStart(t, dir, "http.address", "127.0.0.1:0")
	occupied, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer occupied.Close()
	other := storeDir(t)
	file := filepath.Join(filepath.Dir(other), "file")
	write(t, file, "")
	newer := storeDir(t)
	mustStart(t, newer).end(t)
	text, err := os.ReadFile(filepath.Join(newer, "dmi.json"))
	if err != nil {
		t.Fatal(err)
	}
	changed := strings.Replace(string(text), `"version": 1`, `"version": 99`, 1)
	if changed == string(text) {
		changed = strings.Replace(string(text), `"version":1`, `"version":99`, 1)
	}
	if changed == string(text) {
		t.Fatalf("dmi.json has no version: %s", text)
	}
	write(t, filepath.Join(newer, "dmi.json"), changed)
	for _, c := range []struct {
		what string
		dir  string
		set  []string
		code int
		want []string
	}{
		{"a second engine", dir, []string{"control.socket", other + ".c", "http.socket", other + ".h"}, exitStore, []string{"another", dir}},
		{"a busy port", other, []string{"http.address", occupied.Addr().String()}, exitAddress, []string{"in use", occupied.Addr().String()}},
		{"a busy admin port", other, []string{"admin.address", occupied.Addr().String()}, exitAddress, []string{"in use"}},
		{"a socket of a living engine", other, []string{"http.socket", e.HTTPUnix}, exitAddress, []string{"another engine", e.HTTPUnix}},
		{"a socket's path that is a file", other, []string{"control.socket", file}, exitAddress, []string{"not a socket", file}},
		{"a long path", filepath.Join(other, strings.Repeat("x", 100)), nil, exitAddress, []string{"107", "bytes", "--http-socket"}},
		{"a long control socket", other, []string{"control.socket", "/tmp/" + strings.Repeat("x", 110)}, exitAddress, []string{"115 bytes", "--socket"}},
		{"a store that is a file", file, []string{"control.socket", other + ".c", "http.socket", other + ".h"}, exitStore, []string{file}},
		{"a store of a newer version", newer, nil, exitStore, []string{"99"}},
		{"reading a newer store", newer, []string{"read_only", "true"}, exitStore, []string{"99"}},
		{"reading no store", filepath.Join(other, "none"), []string{"read_only", "true"}, exitStore, []string{"none", "--store"}},
		{"no certificate", other, []string{"http.address", "0.0.0.0:0", "http.tls_cert_file", file, "http.tls_key_file", file}, exitUsage, []string{"certificate"}},
		{"no tokens", other, []string{"http.address", "127.0.0.1:0", "http.tokens_file", filepath.Join(other, "none")}, exitUsage, []string{"token file"}},
	} {
		_, err := startEngine(t, c.dir, c.set...)
		if err == nil {
			t.Errorf("%s: it starts", c.what)
			continue
		}
		if code := exitCode(err); code != c.code {
			t.Errorf("%s: exit code %d, want %d (%v)", c.what, code, c.code, err)
		}
		for _, part := range c.want {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%s: %q does not say %q", c.what, err, part)
			}
		}
	}
	// None of them has disturbed the living engine, or left a lock behind.
	if out := mustDMI(t, "top", "--once", "--store", dir); !strings.Contains(out, e.EngineID) {
		t.Errorf("the living engine: %s", out)
	}
	mustStart(t, other).end(t)
}

func TestProducersNeedTheTokenWhereItIsAsked(t *testing.T) {
	dir := storeDir(t)
	e := mustStart(t, dir, "control.admission", "token")
	p := newProducer(t, "s00000004", ring.ModeBestEffort)
	if err := p.attach(e.Control, "wrong", false); err == nil || !strings.Contains(err.Error(), "token") {
		t.Errorf("a wrong token: %v", err)
	}
	token, err := os.ReadFile(filepath.Join(dir, "token"))
	if err != nil {
		t.Fatal(err)
	}
	q := newProducer(t, "s00000005", ring.ModeBestEffort)
	q.must(q.attach(e.Control, strings.TrimSpace(string(token)), false))
	q.bye()
}

// Off loopback there is TLS, and scopes hold there as everywhere.
func TestTLS(t *testing.T) {
	dir := storeDir(t)
	folder := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"gpu7.example"}}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := write(t, filepath.Join(folder, "cert.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate})))
	secret := write(t, filepath.Join(folder, "key.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})))
	watcher := strings.Repeat("w", 32)
	tokens := write(t, filepath.Join(folder, "tokens"), "statistics "+watcher+"\n")
	e := mustStart(t, dir, "http.address", "0.0.0.0:0", "http.tls_cert_file", cert, "http.tls_key_file", secret, "http.tokens_file", tokens, "http.hosts", "gpu7.example")
	_, port, err := net.SplitHostPort(strings.TrimPrefix(e.HTTP, "https://"))
	if err != nil {
		t.Fatalf("%s: %v", e.HTTP, err)
	}
	roots := x509.NewCertPool()
	parsed, err := x509.ParseCertificate(certificate)
	if err != nil {
		t.Fatal(err)
	}
	roots.AddCert(parsed)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", "127.0.0.1:"+port)
	}}
	defer transport.CloseIdleConnections()
	for path, want := range map[string]int{"/v1/status": 200, "/v1/config": 403, "/metrics": 200} {
		request, _ := http.NewRequest("GET", "https://gpu7.example:"+port+path, nil)
		request.Header.Set("Authorization", "Bearer "+watcher)
		answer, err := transport.RoundTrip(request)
		if err != nil {
			t.Fatal(err)
		}
		answer.Body.Close()
		if answer.StatusCode != want {
			t.Errorf("%s: %d, want %d", path, answer.StatusCode, want)
		}
	}
	plain, err := http.Get("http://127.0.0.1:" + port + "/v1/status")
	if err == nil {
		plain.Body.Close()
		if plain.StatusCode != 400 {
			t.Errorf("without TLS: %d", plain.StatusCode)
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

// A dead engine's leavings do not stop the next one, nor do readers take them for a live engine.
func TestLeavingsOfADeadEngine(t *testing.T) {
	dir := storeDir(t)
	mustStart(t, dir).end(t)
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "http.sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	if err := writeAnnouncement(dir, announcement{EngineID: "e0000dead", HTTPUnix: filepath.Join(dir, "http.sock")}); err != nil {
		t.Fatal(err)
	}
	if out := mustDMI(t, "top", "--once", "--store", dir); !strings.Contains(out, "in-process") {
		t.Errorf("top: %s", out)
	}
	e := mustStart(t, dir)
	for _, socket := range []string{e.HTTPUnix, e.Control} {
		info, err := os.Stat(socket)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", socket, info.Mode(), err)
		}
	}
	if out := mustDMI(t, "top", "--once", "--store", dir); !strings.Contains(out, e.EngineID) {
		t.Errorf("top: %s", out)
	}
}

// Reading needs no write access and leaves no trace, whether or not an engine lives.
func TestReadOnlyEngine(t *testing.T) {
	dir := storeDir(t)
	first := mustStart(t, dir)
	p := newProducer(t, "s00000006", ring.ModeBestEffort)
	p.must(p.attach(first.Control, "", false))
	p.must(p.forward(4))
	p.bye()
	for _, alive := range []bool{true, false} {
		if !alive {
			first.end(t)
		}
		before := listing(t, dir)
		e := mustStart(t, dir, "read_only", "true")
		if !e.ReadOnly || e.Control != "" || strings.HasPrefix(e.HTTPUnix, dir) {
			t.Errorf("announced %+v", e.announcement)
		}
		file := filepath.Join(t.TempDir(), "x.npy")
		mustDMI(t, "get", "--store", dir, "--engine", "unix:"+e.HTTPUnix, "--request", p.request(), "--site", "resid_post", "--out", file)
		if shape, _ := floatsOf(t, file); shape != "4, 4," {
			t.Errorf("shape (%s)", shape)
		}
		if _, complaints, code := dmi(t, "tail", "--engine", "unix:"+e.HTTPUnix, "--store", dir); code != exitNotFound || !strings.Contains(complaints, "dmi.attach") {
			t.Errorf("tail of a store that nobody writes: %d %s", code, complaints)
		}
		e.end(t)
		if _, err := os.Stat(filepath.Dir(e.HTTPUnix)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("its folder is left behind: %v", err)
		}
		if after := listing(t, dir); !alive && !slices.Equal(before, after) {
			t.Errorf("reading changed the store: %v, then %v", before, after)
		}
	}
}

func listing(t testing.TB, dir string) (names []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		names = append(names, path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// The record of reads names a peer on the Unix socket by what the kernel says, and one over TCP by address and the store's token.
func TestReadsAreRecordedAtBothDoors(t *testing.T) {
	dir := storeDir(t)
	e := mustStart(t, dir, "http.address", "127.0.0.1:0")
	secret, err := os.ReadFile(filepath.Join(dir, "token"))
	if err != nil {
		t.Fatal(err)
	}
	request, _ := http.NewRequest("GET", e.HTTP+"/v1/config", nil)
	request.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(secret)))
	ask := func(client *http.Client, request *http.Request) {
		defer client.CloseIdleConnections()
		answer, err := client.Do(request)
		if err != nil || answer.StatusCode != 200 {
			t.Fatal(answer, err)
		}
		_, _ = io.Copy(io.Discard, answer.Body)
		answer.Body.Close()
	}
	ask(http.DefaultClient, request)
	overUnix, _ := http.NewRequest("GET", "http://engine/v1/config", nil)
	ask(&http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", e.HTTPUnix) }}}, overUnix)
	e.end(t)
	name := filepath.Join(dir, "audit", "audit-00000001.jsonl")
	if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatal(info, err)
	}
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"event":"open","engine":"` + e.EngineID, `"token":"store","scope":"admin","peer":"127.0.0.1:`,
		fmt.Sprintf(`"token":"local","scope":"admin","peer":"unix uid=%d gid=%d pid=%d"`, os.Getuid(), os.Getgid(), os.Getpid()), `"route":"GET /v1/config"`, `"event":"close"`} {
		if !strings.Contains(string(text), want) {
			t.Errorf("no %s in:\n%s", want, text)
		}
	}
	if _, err := startEngine(t, dir, "read_only", "true", "audit.required", "true"); err == nil || !strings.Contains(err.Error(), "audit.dir") {
		t.Errorf("a reader that must record, and not where: %v", err)
	}
}

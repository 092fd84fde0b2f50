//go:build linux

package test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

var (
	full     = flag.Float64("full", 0, "how much of the published counts to run: 1 is all of them; 0: a few, for every change")
	seedFlag = flag.Uint64("seed", 0, "repeat the run of this seed; 0: a new one")
	program  string
)

const patience = 3 * time.Minute // with what takes a moment, on a machine with other work

func TestMain(m *testing.M) {
	if os.Getenv(producerPlan) != "" {
		if err := beProducer(); err != nil {
			fmt.Fprintln(os.Stderr, "producer:", err)
			os.Exit(1)
		}
		return
	}
	flag.Parse()
	os.Exit(withEngine(m))
}

// withEngine builds the engine that is tested from the sources that are.
func withEngine(m *testing.M) int {
	dir, err := os.MkdirTemp("", "dmi-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "dmi")
	build := exec.Command("go", "build", "-trimpath", "-o", program, "dmi/cmd/dmi")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the engine: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// seeded is this test's source of chance.
func seeded(t *testing.T) *rand.Rand {
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d (repeat with -args -seed %d)", seed, seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// share is how often something is done: few times with every change, many in a soak.
func share(few, many int) int {
	return max(few, int(*full*float64(many)))
}

// progress says how far a test has come, at most every few seconds.
type progress struct {
	t     *testing.T
	begun time.Time
	next  time.Time
}

func newProgress(t *testing.T) *progress {
	now := time.Now()
	return &progress{t, now, now.Add(2 * time.Second)}
}

func (p *progress) say(format string, args ...any) {
	if now := time.Now(); now.After(p.next) {
		p.next = now.Add(5 * time.Second)
		fmt.Fprintf(os.Stderr, "%s %4.0f s: %s\n", p.t.Name(), now.Sub(p.begun).Seconds(), fmt.Sprintf(format, args...))
	}
}

// engine is a running `dmi serve`.
type engine struct {
	t       *testing.T
	cmd     *exec.Cmd
	Control string `json:"control"`
	HTTP    string `json:"http_unix"`
	log     logText
	ready   chan error
	ended   chan struct{}
}

// logText is what an engine writes to stderr; its end is kept.
type logText struct {
	mu   sync.Mutex
	text []byte
}

func (l *logText) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.text = append(l.text, b...); len(l.text) > 64<<10 {
		l.text = append([]byte(nil), l.text[len(l.text)-32<<10:]...)
	}
	return len(b), nil
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.text)
}

// launch starts an engine over a store with keys KEY=VALUE, and does not wait until it is ready.
func launch(t *testing.T, dir string, keys ...string) *engine {
	t.Helper()
	arguments := []string{"serve", "--store", dir, "--set", fmt.Sprint("stop_timeout_s=", patience.Seconds()/2)}
	for _, k := range keys {
		arguments = append(arguments, "--set", k)
	}
	e := &engine{t: t, cmd: exec.Command(program, arguments...), ready: make(chan error, 1), ended: make(chan struct{})}
	e.cmd.Env = cleanEnvironment()
	e.cmd.Stderr = &e.log
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := e.cmd.StdoutPipe()
	if err == nil {
		err = e.cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		line, err := bufio.NewReader(out).ReadBytes('\n')
		if err == nil {
			err = json.Unmarshal(bytes.TrimSpace(line), e)
		}
		e.ready <- err
		e.cmd.Wait()
		close(e.ended)
	}()
	t.Cleanup(e.kill)
	return e
}

func start(t *testing.T, dir string, keys ...string) *engine {
	t.Helper()
	e := launch(t, dir, keys...)
	select {
	case err := <-e.ready:
		if err != nil {
			t.Fatalf("the engine did not start: %v\n%s", err, &e.log)
		}
	case <-time.After(patience):
		t.Fatalf("the engine is not ready\n%s", &e.log)
	}
	return e
}

// cleanEnvironment is ours without what configures an engine.
func cleanEnvironment() (kept []string) {
	for _, pair := range os.Environ() {
		if len(pair) < 4 || pair[:4] != "DMI_" {
			kept = append(kept, pair)
		}
	}
	return kept
}

// kill ends the engine as kill -9 does, and waits until it is gone.
func (e *engine) kill() {
	e.cmd.Process.Kill()
	<-e.ended
}

// stop ends it in good order.
func (e *engine) stop() {
	e.t.Helper()
	e.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-e.ended:
	case <-time.After(patience):
		e.t.Fatalf("the engine does not stop\n%s", &e.log)
	}
	if code := e.cmd.ProcessState.ExitCode(); code != 0 {
		e.t.Fatalf("the engine ended with code %d\n%s", code, &e.log)
	}
}

// storeDir is a path for a store: short, as Unix sockets lie in it.
func storeDir(t *testing.T) string {
	dir, err := os.MkdirTemp("", "dmi")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			fmt.Fprintf(os.Stderr, "%s: the store is kept in %s\n", t.Name(), dir)
		} else if err := os.RemoveAll(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "s")
}

package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"dmi/inspect"

	"golang.org/x/sys/unix"
)

// terminal opens a pseudo-terminal: what is written to the file that it returns can be read from the other.
func terminal(t *testing.T) (inside, outside *os.File) {
	t.Helper()
	outside, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminal here: %v", err)
	}
	t.Cleanup(func() { outside.Close() })
	if err := unix.IoctlSetPointerInt(int(outside.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(int(outside.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	inside, err = os.OpenFile(filepath.Join("/dev/pts", fmt.Sprint(number)), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminal here: %v", err)
	}
	t.Cleanup(func() { inside.Close() })
	return inside, outside
}

// On a terminal, and after a second, a tool says how far it has come, and wipes that away before it prints.
func TestWaitingSaysHowFar(t *testing.T) {
	inside, outside := terminal(t)
	begun := time.Now().Add(-3 * time.Second)
	w := waiting{out: inside, begun: begun, lines: 1200}
	w.say("similarity", inspect.State{Stage: "reading", Share: 0.376, Bytes: 3 << 29})
	w.clear()
	w.clear() // there is nothing to wipe any more
	fmt.Fprint(inside, "end")
	var said []byte
	for part := make([]byte, 256); !bytes.Contains(said, []byte("end")); {
		n, err := outside.Read(part)
		if err != nil {
			t.Fatal(err)
		}
		said = append(said, part[:n]...)
	}
	if got, want := string(said), "\rsimilarity: reading, 37 % (1.5 GiB), 3 s, 1,200 lines so far\x1b[K\r\x1b[Kend"; regexp.MustCompile(`([3-9]|\d\d+) s,`).ReplaceAllString(got, "3 s,") != want { // it may be later
		t.Errorf("%q, want %q", got, want)
	}

	var file bytes.Buffer
	quiet := waiting{out: &file, begun: begun}
	quiet.say("similarity", inspect.State{})
	early := waiting{out: inside, begun: time.Now().Add(time.Minute)}
	early.say("similarity", inspect.State{})
	if file.Len() > 0 || early.stood {
		t.Errorf("off a terminal %q, before a second %v", file.String(), early.stood)
	}
}

// What a tool refuses comes as it does from every other question.
func TestInspectRefuses(t *testing.T) {
	dir, _ := sampleStore(t)
	_, complaints, code := dmi(t, "inspect", "stats", "--store", dir, "--run", "none")
	if code != exitNotFound || !strings.Contains(complaints, `run "none"`) {
		t.Errorf("exit code %d: %s", code, complaints)
	}
}

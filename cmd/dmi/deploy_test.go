//go:build linux

package main

import (
	"bufio"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A unit of Type=notify hears that the engine is ready, once it listens, that it lives as long as it answers, and that it stops.
func TestSupervisorIsTold(t *testing.T) {
	name := filepath.Join(t.TempDir(), "notify")
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	t.Setenv("NOTIFY_SOCKET", name)
	hear := func() string {
		b := make([]byte, 4096)
		socket.SetReadDeadline(time.Now().Add(patience))
		n, err := socket.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	e := mustStart(t, storeDir(t))
	if said := hear(); !strings.HasPrefix(said, "READY=1\n") {
		t.Errorf("at the start: %q", said)
	}
	if c, err := net.Dial("unix", e.Control); err != nil {
		t.Errorf("ready, and does not listen: %v", err)
	} else {
		c.Close()
	}
	e.end(t)
	if said := hear(); !strings.HasPrefix(said, "STOPPING=1\n") {
		t.Errorf("at the end: %q", said)
	}

	t.Setenv("WATCHDOG_USEC", "300000")
	begun := time.Now()
	e = mustStart(t, storeDir(t))
	hear() // ready
	for range 4 {
		if said := hear(); said != "WATCHDOG=1" {
			t.Errorf("while it runs: %q", said)
		}
	}
	if took := time.Since(begun); took < 200*time.Millisecond {
		t.Errorf("four signs of life within %v", took)
	}
	if err := os.Remove(e.HTTPUnix); err != nil { // it does not answer any more
		t.Fatal(err)
	}
	const unwell = "the engine does not answer itself"
	waitFor(t, func() bool { return strings.Contains(e.log.String(), unwell) })
	for silent := false; !silent; { // but for what it had said before
		socket.SetReadDeadline(time.Now().Add(600 * time.Millisecond))
		_, err := socket.Read(make([]byte, 100))
		silent = err != nil
	}
	e.end(t)
	for said := ""; !strings.HasPrefix(said, "STOPPING=1\n"); {
		said = hear()
	}
	t.Setenv("WATCHDOG_PID", "1") // of someone else
	if within := watchdogInterval(); within != 0 {
		t.Errorf("the watchdog of another process: %v", within)
	}

	t.Setenv("NOTIFY_SOCKET", name+"-that-is-not-there")
	e = mustStart(t, storeDir(t))
	e.end(t)
	if !strings.Contains(e.log.String(), "supervisor was not told") {
		t.Errorf("a supervisor that does not listen: %s", e.log)
	}
}

// The socket for producers is the owner's, or a group's where one is named, never anyone else's; the socket for readers stays the owner's.
func TestSocketsOfAGroup(t *testing.T) {
	mode := func(path string) os.FileMode {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return info.Mode().Perm()
	}
	e := mustStart(t, storeDir(t))
	if got := mode(e.Control); got != 0o600 {
		t.Errorf("without a group: %#o", got)
	}
	e.end(t)
	group := strconv.Itoa(os.Getgid())
	e = mustStart(t, storeDir(t), "control.group", group)
	info, _ := os.Stat(e.Control)
	if got := mode(e.Control); got != 0o660 || strconv.Itoa(int(info.Sys().(*syscall.Stat_t).Gid)) != group {
		t.Errorf("with group %s: %#o %+v", group, got, info.Sys())
	}
	if got := mode(e.HTTPUnix); got != 0o600 {
		t.Errorf("the readers' socket: %#o", got)
	}
	e.end(t)
	if _, err := startEngine(t, storeDir(t), "control.group", "no-such-group-here"); err == nil || !strings.Contains(err.Error(), "groupadd") {
		t.Errorf("a group that is not there: %v", err)
	}
}

// What deploy/ says is what this engine takes: every ExecStart, and every command of an image, is a command line that it accepts, with the configuration
// that lies beside it; and the unit is one that systemd accepts, where there is one to ask.
func TestDeployedCommandsAndConfigurationsAreOurs(t *testing.T) {
	for _, name := range []string{"systemd/dmi.yaml", "containers/dmi.yaml"} {
		name = filepath.Join("..", "..", "deploy", name)
		c, err := loadConfig(name, nil, source{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !c.Audit.Required && !strings.HasPrefix(c.Store.Path, "/") {
			t.Errorf("%s: the store's path is %q", name, c.Store.Path)
		}
	}
	unit := filepath.Join("..", "..", "deploy", "systemd", "dmi.service")
	file, err := os.Open(unit)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	keys := map[string]string{}
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if key, value, is := strings.Cut(lines.Text(), "="); is && !strings.HasPrefix(key, "#") {
			keys[key] = value
		}
	}
	command := strings.Fields(keys["ExecStart"])
	if keys["Type"] != "notify" || len(command) != 4 || !slices.Equal(command[1:3], []string{"serve", "--config"}) || command[3] != "/etc/dmi/dmi.yaml" {
		t.Errorf("the unit starts %q as Type=%s", command, keys["Type"])
	}
	for key, want := range map[string]string{"NoNewPrivileges": "yes", "ProtectSystem": "strict", "CapabilityBoundingSet": "", "LimitCORE": "0", "StateDirectoryMode": "0700", "UMask": "0077"} {
		if got, is := keys[key]; !is || got != want {
			t.Errorf("the unit says %s=%q", key, got)
		}
	}
	if watchdog, err := strconv.Atoi(keys["WatchdogSec"]); err != nil || watchdog < 30 {
		t.Errorf("the unit says WatchdogSec=%s: a busy machine may be silent for longer", keys["WatchdogSec"])
	}
	if stop, err := time.ParseDuration(keys["TimeoutStopSec"] + "s"); err != nil || stop <= seconds(2*defaultConfig().StopTimeout) {
		t.Errorf("the unit waits %v for an engine that may take twice %v s to stop: %v", stop, defaultConfig().StopTimeout, err)
	}
	analyse, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Log("systemd-analyze is not here: the unit's form is not checked by systemd itself")
		return
	}
	out, err := exec.Command(analyse, "verify", "--man=no", "--recursive-errors=no", unit).CombinedOutput()
	if text := string(out); err != nil && !strings.Contains(text, "is not executable") { // dmi need not be installed here
		t.Errorf("systemd-analyze verify: %v\n%s", err, text)
	}
}

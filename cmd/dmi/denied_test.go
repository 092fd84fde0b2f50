//go:build linux

package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// asCommand has the test binary be `dmi`: a process of its own can be another user's.
const asCommand = "DMI_TEST_AS_COMMAND"

const nobody = 65534

// unprivileged runs `dmi` as a user whom permissions bind: root they do not.
func unprivileged(t *testing.T, arguments ...string) (said string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c := exec.CommandContext(ctx, "/proc/self/exe", arguments...) // where the binary lies that user may not go
	c.Env = append(os.Environ(), asCommand+"=1", "HOME=/")
	c.Dir = "/"
	if os.Geteuid() == 0 {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	c.WaitDelay = patience
	out, err := c.CombinedOutput()
	var ended *exec.ExitError
	if err != nil && !errors.As(err, &ended) {
		if os.Geteuid() == 0 && (errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EINVAL)) {
			t.Skipf("root here may not become another user, and permissions do not bind root: %v", err)
		}
		t.Fatal(err)
	}
	return string(out), c.ProcessState.ExitCode()
}

// A store, or a part of one, that its permissions keep from this user: every command says on what, why, and what to do, and changes nothing.
func TestAStoreThatMayNotBeRead(t *testing.T) {
	dir, sample := sampleStore(t)
	mustStart(t, dir).end(t) // which leaves a token and a record of reads
	first := sample.Requests[0].ID
	if os.Geteuid() == 0 {
		err := filepath.WalkDir(filepath.Dir(dir), func(path string, _ fs.DirEntry, err error) error {
			return errors.Join(err, os.Chown(path, nobody, nobody))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if out, code := unprivileged(t, "runs", "--store", dir); code != 0 || !strings.Contains(out, sample.Run.ID) {
		t.Fatalf("whoever owns the store: exit code %d: %s", code, out)
	}
	segments, err := filepath.Glob(filepath.Join(dir, "segments", "*.safetensors"))
	if err != nil || len(segments) != 1 {
		t.Fatalf("%v %v", segments, err)
	}
	serve := []string{"serve", "--http-socket", dir + ".http", "--socket", dir + ".control"} // not in the folder that is closed
	for _, c := range []struct {
		closed string
		doing  [][]string
		code   int
	}{
		{filepath.Dir(dir), [][]string{{"runs"}, {"verify"}, {"policy", "get"}, {"serve", "--read-only"}, serve}, exitStore},
		{dir, [][]string{{"runs"}, {"verify"}, {"policy", "get"}, {"serve", "--read-only"}, serve, {"compact", dir}, {"repair", dir}}, exitStore},
		{filepath.Join(dir, "dmi.json"), [][]string{{"runs"}, {"serve", "--read-only"}, serve}, exitStore},
		{filepath.Join(dir, "segments"), [][]string{{"runs"}, {"get", "-r", first, "-s", "resid_post"}, serve}, exitStore},
		{filepath.Join(dir, "manifest"), [][]string{{"runs"}, serve}, exitStore},
		{filepath.Join(dir, "token"), [][]string{serve}, exitStore},
		{filepath.Join(dir, "audit"), [][]string{serve}, exitStore},
		{segments[0], [][]string{{"get", "-r", first, "-s", "resid_post"}, {"verify"}}, exitFailure},
	} {
		info, err := os.Stat(c.closed)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(c.closed, 0); err != nil {
			t.Fatal(err)
		}
		for _, arguments := range c.doing {
			said, code := unprivileged(t, append(arguments, "--store", dir)...)
			if code != c.code || !strings.Contains(said, c.closed) || !strings.Contains(said, "permission denied") || !strings.Contains(said, "run as the user who owns it") {
				t.Errorf("dmi %s with %s closed: exit code %d: %s", strings.Join(arguments, " "), c.closed, code, said)
			}
		}
		if err := os.Chmod(c.closed, info.Mode().Perm()); err != nil {
			t.Fatal(err)
		}
	}
	if out := mustDMI(t, "verify", "--store", dir); !strings.Contains(out, "36 rows produced, 36 on the books") || !strings.Contains(out, "ok") {
		t.Error(out)
	}
}

//go:build linux

package main

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestTheReadyPipeEndsWithTheProcess: whoever waits for an engine learns of its end from the pipe, and finds the reason in what it printed, not a moment later.
func TestTheReadyPipeEndsWithTheProcess(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, command := range [][]string{{"serve", "--store", file}, {"ui", file}, {"serve", "--store", file, "--read-only"}} {
		for range 5 {
			read, write, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			printed, err := os.Create(filepath.Join(t.TempDir(), "printed"))
			if err != nil {
				t.Fatal(err)
			}
			c := exec.CommandContext(t.Context(), "/proc/self/exe", append(command, "--ready-fd", "3")...)
			c.Env = append(os.Environ(), asCommand+"=1")
			c.Stderr, c.ExtraFiles = printed, []*os.File{write}
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			write.Close()
			said, err := io.ReadAll(read)
			text, _ := os.ReadFile(printed.Name())
			if err != nil || len(said) > 0 || !strings.Contains(string(text), file) {
				t.Errorf("%v: the pipe ended with %q, %v, when this was printed: %q", command, said, err, text)
			}
			_ = c.Wait() // it failed, as it was to
			read.Close()
			printed.Close()
		}
	}
}

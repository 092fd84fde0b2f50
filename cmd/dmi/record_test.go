//go:build linux

package main

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"dmi/internal/ringtape"
)

// A tape replays through a whole engine that records; the tape that makes replays into the same books as its original.
func TestRecordedSessionsReplay(t *testing.T) {
	tapes, err := filepath.Glob(filepath.Join("..", "..", "internal", "ringtape", "testdata", "*.tape"))
	if err != nil || len(tapes) == 0 {
		t.Fatal("no tapes in internal/ringtape/testdata", err)
	}
	for _, tape := range tapes {
		t.Run(filepath.Base(tape), func(t *testing.T) { replays(t, tape) })
	}
}

func replays(t *testing.T, tape string) {
	var books [2]string
	for i := range books {
		dir, tapes := storeDir(t), filepath.Join(t.TempDir(), "tapes")
		e := mustStart(t, dir, "control.record_dir", tapes)
		f, err := os.Open(tape)
		if err != nil {
			t.Fatal(err)
		}
		err = ringtape.Play(context.Background(), f, e.Control, "")
		f.Close()
		if err != nil {
			t.Fatalf("play %s: %v", tape, err)
		}
		e.end(t)
		mustDMI(t, "verify", "--store", dir)
		books[i] = mustDMI(t, "coverage", "--json", "--store", dir)
		made, err := filepath.Glob(filepath.Join(tapes, "*.tape"))
		if err != nil || len(made) != 1 {
			t.Fatalf("%d tapes were made: %v", len(made), err)
		}
		tape = made[0]
	}
	if books[0] != books[1] {
		t.Errorf("the second recording gives other books:\n%s\n%s", books[0], books[1])
	}
}

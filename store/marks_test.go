package store

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"dmi/tensor"
)

// A run's mark goes with what becomes of a request of it that has ended, is only in the catalogue, and was never marked itself; marks of others, and of nobody's rows, stay.
func TestMarkOfARunThatHasEnded(t *testing.T) {
	o := small()
	o.TidyEvery = time.Hour
	s := mustOpen(t, filepath.Join(t.TempDir(), "store"), o)
	l, err := newLoad(t, s, seeded(t), "s0000000a")
	must(t, err)
	must(t, s.PutRequests([]tensor.Request{{Key: l.key(1), Run: "r0000000a"}, {Key: l.key(2), Run: "r0000000b"}}))
	for range 5 {
		must(t, l.forward(1, 2))
	}
	must(t, s.PutRequests([]tensor.Request{{Key: l.key(1), Ended: time.Now()}, {Key: l.key(2), Ended: time.Now()}}))
	must(t, s.FinishRequest(l.key(1)))
	must(t, l.barrier())
	must(t, l.barrier())
	s.mu.Lock()
	resident := s.requests[l.key(1)] != nil
	s.mu.Unlock()
	if resident {
		t.Fatal("the request is still in memory: this tests nothing")
	}
	run, other := s.MarkRun("r0000000a"), s.MarkRequest(l.key(2), "r0000000b")
	if s.MarkRun("r0000000a") != run || s.MarkRequest(l.key(2), "r0000000b") != other {
		t.Error("a mark changed by itself")
	}
	if _, err := s.Delete(context.Background(), []tensor.RequestKey{l.key(1)}, nil); err != nil {
		t.Fatal(err)
	}
	if s.MarkRun("r0000000a") == run {
		t.Error("rows of a run were deleted, and it has the mark that it had")
	}
	if s.MarkRequest(l.key(2), "r0000000b") != other {
		t.Error("another's rows were deleted, and the mark is gone")
	}
	must(t, s.Close())
}

func TestMarksAreBounded(t *testing.T) {
	s := mustOpen(t, filepath.Join(t.TempDir(), "store"), small())
	seen := map[uint64]bool{}
	for i := range uint64(maxMarks + 1000) {
		a, b := s.MarkRequest(tensor.RequestKey{Session: 1, Request: i}, "r"), s.MarkRun(fmt.Sprint(i))
		if a == 0 || b == 0 || seen[a] || seen[b] || a == b {
			t.Fatalf("mark %d and %d of %d: given before, or none", a, b, i)
		}
		seen[a], seen[b] = true, true
	}
	if r, q := len(s.marks.requests), len(s.marks.runs); r != maxMarks || q != maxMarks {
		t.Errorf("%d and %d marks, %d are the bound", r, q, maxMarks)
	}
	must(t, s.Close())
}

package store

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"dmi/ring"
	"dmi/tensor"
)

const killedStore = "DMI_TEST_KILLED_STORE"

// TestKilledEngine kills a process that writes to a store on the machine's own disk, several times, and goes on with the store each time.
func TestKilledEngine(t *testing.T) {
	if dir := os.Getenv(killedStore); dir != "" {
		must(t, beKilled(dir))
		return
	}
	random := seeded(t)
	dir := filepath.Join(t.TempDir(), "store")
	for life := range 6 {
		command := exec.Command(os.Args[0], "-test.run", "^TestKilledEngine$")
		command.Env = append(os.Environ(), killedStore+"="+dir)
		out, err := command.StdoutPipe()
		must(t, err)
		must(t, command.Start())
		var session, durable uint32 // which session it is, and what of it: none, where it was killed before that
		deadline := time.AfterFunc(time.Minute, func() { command.Process.Kill() })
		moment := time.Duration(200+random.IntN(800)) * time.Millisecond
		if life%2 == 0 {
			deadline.Reset(moment)
		}
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if life%2 == 1 && session == 0 { // not before it works, however long that takes
				deadline.Reset(moment)
			}
			fmt.Sscanf(lines.Text(), "session %d durable %d", &session, &durable)
		}
		command.Wait()
		deadline.Stop()
		if command.ProcessState.ExitCode() >= 0 {
			t.Fatalf("the engine was not killed, it ended: %v", command.ProcessState)
		}
		r, err := OpenReadOnly(dir)
		if err != nil && session == 0 {
			continue // killed before there was a store
		}
		must(t, err)
		survives(t, r, session, durable)
		must(t, r.Close())
	}
	s := mustOpen(t, dir, Options{})
	selfBalanced(t, s)
	verified(t, s)
	must(t, s.Close())
}

// beKilled appends rows for ever, and says each time up to which position they are durable.
func beKilled(dir string) error {
	s, err := Open(dir, Options{BufferMiB: 4, HeaderKiB: 256, SegmentMiB: 8, GroupCommit: time.Millisecond, SyncMiB: 2})
	if err != nil {
		return err
	}
	sessions, _ := s.Sessions()
	session, err := s.BeginSession(tensor.Session{ID: fmt.Sprintf("s%08d", len(sessions)+1), Producer: "p", Mode: "complete"})
	if err != nil {
		return err
	}
	if err := s.AddSites(session, []tensor.Site{{Name: "a"}, {ID: 1, Name: "b"}}); err != nil {
		return err
	}
	fmt.Printf("session %d durable 0\n", session)
	key := tensor.RequestKey{Session: session, Request: 1}
	for step := uint64(0); ; step++ {
		first := uint32(step) * 16
		records, table := stepRecords(step, 2, []ring.Span{{Request: 1, Position: first, Count: 16}})
		if err := s.AppendStep(Step{Session: session, First: step * 2, Count: 2, Records: records, Tables: [][]byte{table}}); err != nil {
			return err
		}
		for site := range uint32(2) {
			var data []byte
			for i := range uint32(16) {
				data = append(data, goldenRow(goldenKey, site, 0, first+i, 512)...)
			}
			if err := s.AppendChunk(tensor.Chunk{Key: key, Site: site, First: first, Rows: 16, Step: step, LastStep: step, DType: tensor.U8, Shape: []int{512}, Data: data}); err != nil {
				return err
			}
		}
		if err := s.Book([]tensor.Entry{{Key: key, Sites: []uint32{0, 1}, First: first, Count: 16, Stride: 1, Step: step, Outcome: tensor.Captured}}); err != nil {
			return err
		}
		if step%64 == 63 {
			if err := s.Barrier(context.Background()); err != nil {
				return err
			}
			fmt.Printf("session %d durable %d\n", session, first+16)
		}
	}
}

// survives holds a session against what its killed engine had promised.
func survives(t *testing.T, s *Store, session, durable uint32) {
	t.Helper()
	selfBalanced(t, s)
	verified(t, s)
	key := tensor.RequestKey{Session: session, Request: 1}
	entries, err := s.Entries(key)
	must(t, err)
	for site := range uint32(2) {
		refs, err := s.Chunks(key, site, 0, ^uint32(0))
		must(t, err)
		next := uint32(0)
		for _, ref := range refs {
			data := make([]byte, ref.RowBytes()*int(ref.Rows))
			must(t, s.ReadRows(ref, 0, ref.Rows, data))
			for i := range ref.Rows {
				if !bytes.Equal(data[i*512:(i+1)*512], goldenRow(goldenKey, site, 0, ref.First+i, 512)) {
					t.Fatalf("session %d site %d row %d differs", session, site, ref.First+i)
				}
			}
			if ref.First == next {
				next += ref.Rows
			}
		}
		if next < durable {
			t.Fatalf("session %d site %d: %d rows were durable, %d are there", session, site, durable, next)
		}
		booked := uint32(0)
		for _, e := range entries {
			if e.Outcome == tensor.Captured {
				booked = max(booked, e.First+e.Count)
			}
		}
		t.Logf("session %d site %d: durable %d, there %d, booked captured %d", session, site, durable, next, booked)
	}
}

package store

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dmi/tensor"
)

// holds lists the files of a store that have one of some texts in them.
func holds(t *testing.T, dir string, texts ...[]byte) (found []string) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) { // sealed under another name meanwhile
			return nil
		}
		for _, text := range texts {
			if bytes.Contains(b, text) {
				found = append(found, filepath.Base(name)+" has "+string(text))
			}
		}
		return err
	}))
	return found
}

// TestDelete: nothing of a deleted request is in any file, its rows are on the books as expired, and everybody else's are as they were; while others write.
func TestDelete(t *testing.T) {
	random := seeded(t)
	dir := filepath.Join(t.TempDir(), "store")
	o := small()
	o.TidyEvery, o.SegmentTensors = time.Hour, 30
	s := mustOpen(t, dir, o)
	l, err := newLoad(t, s, random, "s0000000a")
	must(t, err)
	for range 30 {
		must(t, l.forward(uint64(random.IntN(4)), uint64(4+random.IntN(2))))
	}
	secret := "the quick brown fox of request one"
	prompt := []int64{918273645, 564738291}
	must(t, s.PutRequests([]tensor.Request{{Key: l.key(1), Text: secret, Tokens: prompt, Pieces: []string{"quickbrown"}}, {Key: l.key(2), Text: "another's", Tags: []string{"kept"}}}))
	rowsOf := func(request uint64) (rows [][]byte) { // long enough not to be there by chance
		for k, r := range l.rows {
			if k.request == request && len(r.data) >= 12 {
				rows = append(rows, r.data)
			}
		}
		return rows
	}
	mine := append(rowsOf(1), []byte(secret), []byte("918273645"), []byte("quickbrown"))
	if err := l.barrier(); err != nil {
		t.Fatal(err)
	}
	if len(holds(t, dir, mine...)) == 0 {
		t.Fatal("nothing is there to be deleted")
	}
	// Another session writes meanwhile.
	other, err := newLoad(t, s, seeded(t), "s0000000b")
	must(t, err)
	stop, stopped := make(chan bool), make(chan error, 1)
	go func() {
		var err error
		for err == nil {
			select {
			case <-stop:
				stopped <- err
				return
			default:
				err = other.forward(1, 2, 3)
			}
		}
		stopped <- err
	}()
	var steps int
	got, err := s.Delete(context.Background(), []tensor.RequestKey{l.key(1)}, func(DeletionProgress) { steps++ })
	must(t, err)
	close(stop)
	must(t, <-stopped)
	if got.Requests != 1 || got.Active != 1 || got.Prompts != 1 || got.Rows == 0 || got.Segments == 0 || steps == 0 {
		t.Errorf("%+v, %d times told", got, steps)
	}
	var rows uint64
	for k := range l.rows {
		if k.request == 1 {
			rows++
		}
	}
	if got.Rows != rows || s.Stats().ExpiredRows != rows || s.Stats().DeletedRows != rows {
		t.Errorf("%d rows deleted, %d expired; %d were there", got.Rows, s.Stats().ExpiredRows, rows)
	}
	left := func(when string) {
		t.Helper()
		if found := holds(t, dir, mine...); len(found) > 0 {
			t.Fatalf("%s: %s", when, found)
		}
		for site := range l.sites {
			refs, err := s.Chunks(l.key(1), uint32(site), 0, 1<<30)
			if err != nil || len(refs) > 0 {
				t.Fatalf("%s: site %d: %d chunks, %v", when, site, len(refs), err)
			}
		}
		r, found, err := s.RequestByID("1-1")
		if err != nil || !found || r.Text != "" || r.Tokens != nil || r.Pieces != nil {
			t.Fatalf("%s: %+v, %v, %v", when, r, found, err)
		}
		if r, _, _ := s.RequestByID("1-2"); r.Text != "another's" || r.Tags[0] != "kept" {
			t.Fatalf("%s: another's request %+v", when, r)
		}
		l.check(s, all)
		other.check(s, all)
		balanced(t, s, l.produced+other.produced)
		verified(t, s)
	}
	left("at once")
	again, err := s.Delete(context.Background(), []tensor.RequestKey{l.key(1)}, nil)
	if err != nil || again.Rows != 0 || again.Segments != 0 || again.Prompts != 0 {
		t.Errorf("again: %+v, %v", again, err)
	}
	must(t, s.Close())
	for _, end := range []string{"", "-wal", "-shm"} { // all of it has to come from the manifest again
		if err := os.Remove(filepath.Join(dir, "catalogue.sqlite") + end); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	s = mustOpen(t, dir, o)
	left("by the next engine, without a catalogue")
	must(t, s.Close())
}

// TestMovedWhileRead: what a reader found stays readable while segments are replaced; what is deleted is said to be gone.
func TestMovedWhileRead(t *testing.T) {
	o := small()
	o.TidyEvery = time.Hour
	s := mustOpen(t, t.TempDir(), o)
	l, err := newLoad(t, s, seeded(t), "s0000000a")
	must(t, err)
	for range 10 {
		must(t, l.forward(1, 2))
	}
	must(t, l.barrier())
	refs, err := s.Chunks(l.key(2), 1, 0, 1<<30)
	must(t, err)
	gone, err := s.Chunks(l.key(1), 0, 0, 1<<30)
	must(t, err)
	_, err = s.Delete(context.Background(), []tensor.RequestKey{l.key(1)}, nil)
	must(t, err)
	for _, ref := range refs {
		data := make([]byte, ref.RowBytes()*int(ref.Rows))
		must(t, s.ReadRows(ref, 0, ref.Rows, data))
		for i := range ref.Rows {
			l.equal(rowKey{2, 1, ref.Attempt, ref.First + i}, data[int(i)*ref.RowBytes():int(i+1)*ref.RowBytes()], ref)
		}
	}
	for _, ref := range gone {
		err := s.ReadRows(ref, 0, ref.Rows, make([]byte, ref.RowBytes()*int(ref.Rows)))
		if !errors.Is(err, ErrGone) || !strings.Contains(err.Error(), "segment") {
			t.Errorf("a deleted row is read: %v", err)
		}
	}
	must(t, s.Close())
}

package policy

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"strings"
	"testing"

	"dmi/internal/vfs"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// drive adds revisions until one fails, and returns those that were acknowledged.
func drive(l *Ledger, n int) (done []Revision, err error) {
	for i := range n {
		r := Revision{Why: fmt.Sprint("change ", i), Document: l.Current().Document, Lowered: map[string]string{"a": "off"}}
		if i%4 == 0 {
			r.Document, r.Text = 0, strings.Repeat(fmt.Sprintf("# %d\n", i), 700*(i%3)) // some are longer than a page
		}
		r, err := l.Add(r)
		if err != nil {
			return done, err
		}
		done = append(done, r)
	}
	return done, nil
}

// Whatever the moment of a power loss: what was acknowledged is there, and at most one more.
func TestLedgersSurvivePowerLoss(t *testing.T) {
	const n = 12
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 1))
	dry := vfs.NewMem()
	dry.MkdirAll("s")
	l, _ := OpenLedger(dry, "s", true)
	if _, err := drive(l, n); err != nil {
		t.Fatal(err)
	}
	for crash := 1; crash <= dry.Changes(); crash++ {
		for range 4 {
			disk := vfs.NewMem()
			disk.MkdirAll("s")
			disk.SyncDir("s")
			left := crash
			disk.Fault = func(op, name string) error {
				if left--; left <= 0 {
					return vfs.ErrCrashed // and whatever follows fails as well
				}
				return nil
			}
			l, err := OpenLedger(disk, "s", true)
			if err != nil {
				t.Fatal(err)
			}
			done, _ := drive(l, n)
			after := disk.AfterPowerLoss(func() bool { return random.IntN(2) == 0 })
			for _, write := range []bool{false, true} {
				again, err := OpenLedger(after, "s", write)
				if err != nil {
					t.Fatalf("seed %d, crash at %d: %v", seed, crash, err)
				}
				var got []Revision
				for _, r := range again.After(0, 100) {
					whole, _ := again.Find(r.Number)
					got = append(got, whole)
				}
				if len(got) < len(done) || len(got) > len(done)+1 {
					t.Fatalf("seed %d, crash at %d: %d revisions, %d were acknowledged", seed, crash, len(got), len(done))
				}
				if diff := cmp.Diff(done, got[:len(done)], cmpopts.EquateEmpty()); diff != "" {
					t.Fatalf("seed %d, crash at %d: %s", seed, crash, diff)
				}
				if write {
					next, err := again.Add(Revision{Why: "after", Document: again.Current().Document})
					if err != nil || next.Number != uint64(len(got))+1 {
						t.Fatal(next, err)
					}
				}
			}
		}
	}
}

// A write that fails changes nothing, and the next one succeeds in its place.
func TestLedgersSurviveFailingDisks(t *testing.T) {
	disk := vfs.NewMem()
	disk.MkdirAll("s")
	l, _ := OpenLedger(disk, "s", true)
	broken := errors.New("broken")
	want := []Revision(nil)
	for i := range 40 {
		fail := []string{"", "write", "sync", "create", "truncate"}[i%5]
		disk.Fault = func(op, name string) error {
			if op == fail {
				return broken
			}
			return nil
		}
		r, err := l.Add(Revision{Text: strings.Repeat("#\n", 5000/(i+1)), Why: fmt.Sprint(i)})
		if err == nil {
			want = append(want, r)
		} else if !errors.Is(err, broken) || len(want) > 0 && l.Current().Number != want[len(want)-1].Number {
			t.Fatal(err, l.Current())
		}
	}
	disk.Fault = nil
	again, err := OpenLedger(disk, "s", false)
	if err != nil || len(want) < 8 {
		t.Fatal(len(want), err)
	}
	for _, r := range want {
		if got, found := again.Find(r.Number); !found || !cmp.Equal(got, r) {
			t.Fatal(got, r)
		}
	}
	if _, err := again.Add(Revision{}); err == nil {
		t.Error("added to what was opened for reading")
	}
}

func TestLedgersForgetTheOldest(t *testing.T) {
	dir := t.TempDir()
	// As an engine would have left it, so that the bound is reached without a hundred thousand syncs.
	var text strings.Builder
	text.WriteString(`{"revision":1,"document":1,"text":"default: off","off":false,"lowered":null,"why":"first"}` + "\n")
	for n := 2; n <= 2*keptRevisions; n++ {
		fmt.Fprintf(&text, `{"revision":%d,"document":1,"text":"","off":false,"lowered":null,"why":""}`+"\n", n)
	}
	if err := os.WriteFile(path.Join(dir, LogName), []byte(text.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := OpenLedger(vfs.OS{}, dir, true)
	if err != nil {
		t.Fatal(err)
	}
	last, err := l.Add(Revision{Document: 1, Why: "one more"})
	if err != nil || last.Text != "default: off" {
		t.Fatal(last, err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if l, err = OpenLedger(vfs.OS{}, dir, true); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if r, found := l.Find(2); found {
		t.Error("revision 2 is still there:", r)
	}
	if r, found := l.Find(1); !found || r.Text != "default: off" {
		t.Error("the document in force is gone:", r, found)
	}
	if diff := cmp.Diff(last, l.Current()); diff != "" || len(l.After(0, 1<<30)) != keptRevisions+1 {
		t.Error(diff, len(l.After(0, 1<<30)))
	}
}

func TestLedgersThatLie(t *testing.T) {
	for name, text := range map[string]string{
		"order":   `{"revision":2,"document":2}` + "\n" + `{"revision":2,"document":2}` + "\n{}\n",
		"unknown": `{"revision":1,"document":1,"more":1}` + "\n{}\n",
		"noise":   "noise\n{}\n",
	} {
		dir := t.TempDir()
		os.WriteFile(path.Join(dir, LogName), []byte(text), 0o600)
		if _, err := OpenLedger(vfs.OS{}, dir, false); err == nil || !strings.Contains(err.Error(), "line ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

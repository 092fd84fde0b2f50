package store

import (
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"dmi/tensor"

	"github.com/google/go-cmp/cmp"
)

// answers is everything that a store of one load can be asked, as text; the tensors by their hashes.
func answers(t testing.TB, s *Store, l *load) map[string]string {
	t.Helper()
	all := map[string]string{}
	put := func(what string, v any, err error) {
		if err != nil {
			all[what] = "error: " + err.Error()
			return
		}
		all[what] = fmt.Sprintf("%+v", v)
	}
	sessions, err := s.Sessions()
	put("sessions", sessions, err)
	sites, err := s.Sites(l.session)
	put("sites", sites, err)
	runs, err := s.Runs()
	put("runs", runs, err)
	totals, err := s.SiteTotals(l.session)
	for i := range totals {
		if len(totals[i].Shape) > 1 { // a keyed site's is the latest row's, of which there may be several; and stored rows are as long as their chunk's last
			totals[i].Shape[len(totals[i].Shape)-1], totals[i].Bytes = -1, 0
		}
	}
	put("site totals", totals, err)
	put("books", s.Books(), nil)
	put("resume", s.Resume("producer-s0000000a", 0), nil)
	requests, err := s.Requests(RequestFilter{Hidden: true})
	put("requests", requests, err)
	for request, end := range l.next {
		entries, err := s.Entries(l.key(request))
		slices.SortFunc(entries, func(a, b tensor.Entry) int { return strings.Compare(fmt.Sprintf("%+v", a), fmt.Sprintf("%+v", b)) })
		put(fmt.Sprint("entries of ", request), entries, err)
		forwards, err := s.Forwards(t.Context(), l.key(request))
		put(fmt.Sprint("forwards of ", request), forwards, err)
		for site := range l.sites {
			refs, err := s.Chunks(l.key(request), uint32(site), 0, end)
			for i, ref := range refs {
				data := make([]byte, ref.RowBytes()*int(ref.Rows))
				err := s.ReadRows(ref, 0, ref.Rows, data)
				put(fmt.Sprintf("request %d site %d chunk %d", request, site, i), fmt.Sprintf("%d+%d %v %v %v %x", ref.First, ref.Rows, ref.DType, ref.Level, ref.Shape, sha256.Sum256(data)), err)
			}
			put(fmt.Sprintf("request %d site %d", request, site), len(refs), err)
		}
	}
	return all
}

// Whatever became of the catalogue, Repair gives every answer back; and again, when it is run again.
func TestRepair(t *testing.T) {
	mem, l, o := closedStore(t, 24)
	s, err := openReadOnly("store", o)
	must(t, err)
	before := answers(t, s, l)
	s.Close()
	change := func(statements ...string) func(string) {
		return func(file string) {
			db, err := sql.Open("sqlite", file)
			must(t, err)
			for _, statement := range statements {
				if _, err := db.Exec(statement); err != nil {
					t.Fatal(err)
				}
			}
			must(t, db.Close())
		}
	}
	for name, damage := range map[string]func(file string){
		"whole":     func(string) {},
		"missing":   func(file string) { must(t, os.Remove(file)) },
		"empty":     func(file string) { must(t, os.WriteFile(file, nil, 0o600)) },
		"rubbish":   func(file string) { must(t, os.WriteFile(file, []byte(strings.Repeat("rubbish ", 4096)), 0o600)) },
		"cut short": func(file string) { must(t, os.Truncate(file, 9000)) },
		"lies": change("UPDATE books SET count = count + 1", "DELETE FROM segment_requests WHERE request % 2 = 0", "UPDATE sessions SET produced = 7", "DELETE FROM requests",
			"UPDATE segments SET chunks = 1", "UPDATE totals SET rows = 1", "DELETE FROM site_totals"),
		"cut off before": func(file string) { // a repair that was killed has put the catalogue aside and begun another
			must(t, os.Rename(file, oldCatalogue(file)))
			change("CREATE TABLE part (one INTEGER)")(file)
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := o
			o.FS, o.Catalogue = mem.AfterKill(), copied(t, o.Catalogue)
			damage(o.Catalogue)
			for range 2 {
				var last Progress
				report, err := Repair("store", o, func(p Progress) {
					if p.Done < last.Done || p.Done > p.Total {
						t.Fatalf("progress goes from %+v to %+v", last, p)
					}
					last = p
				})
				must(t, err)
				if len(report.Problems) > 0 || report.Produced != l.produced || report.Booked != l.produced || report.Segments == 0 || last.Done == 0 {
					t.Errorf("%+v, progress %+v", report, last)
				}
				if _, err := os.Stat(oldCatalogue(o.Catalogue)); err == nil {
					t.Error("the catalogue before is still there")
				}
				s, err := openReadOnly("store", o)
				must(t, err)
				if diff := cmp.Diff(before, answers(t, s, l)); diff != "" {
					t.Errorf("answers differ (-before +after):\n%s", diff)
				}
				l.of(t).check(s, all)
				verified(t, s)
				must(t, s.Close())
			}
		})
	}
}

// A segment that is damaged, wherever, is reported, and what is in the others is served as before.
func TestRepairWithADamagedSegment(t *testing.T) {
	mem, l, o := closedStore(t, 24)
	s, err := openReadOnly("store", o)
	must(t, err)
	before := answers(t, s, l)
	in := map[string]uint64{} // the segment of each chunk's answer
	for request, end := range l.next {
		for site := range l.sites {
			refs, err := s.Chunks(l.key(request), uint32(site), 0, end)
			must(t, err)
			for _, ref := range refs {
				in[fmt.Sprintf("request %d site %d", request, site)] |= 1 << ref.segment
			}
		}
	}
	must(t, s.Close())
	const victim = 2
	for _, c := range []struct {
		name     string
		reported bool
		at       func(size int64) (from, to int64)
	}{
		{"its start", true, func(int64) (int64, int64) { return 0, 16 }},
		{"header and first batch", true, func(int64) (int64, int64) { return 0, 80 << 10 }},
		{"its directory", true, func(size int64) (int64, int64) { return size - 4096, size - 4000 }},
		{"everything", true, func(size int64) (int64, int64) { return 0, size }},
		{"a tensor", false, func(int64) (int64, int64) { return 64<<10 + 4096, 64<<10 + 4200 }}, // which is for verify to tell, and for readers
	} {
		t.Run(c.name, func(t *testing.T) {
			o := o
			o.FS, o.Catalogue = mem.AfterKill(), catalogueFile(t)
			name := fmt.Sprintf("store/segments/%08d.safetensors", victim)
			f, err := o.FS.Open(name, true)
			must(t, err)
			size, err := f.Size()
			must(t, err)
			from, to := c.at(size)
			_, err = f.WriteAt([]byte(strings.Repeat("?", int(to-from))), from)
			must(t, errors.Join(err, f.Close()))
			report, err := Repair("store", o, nil)
			must(t, err)
			said := slices.ContainsFunc(report.Problems, func(p Problem) bool { return strings.Contains(p.File, "00000002") })
			if said != c.reported || report.Booked != l.produced {
				t.Errorf("%+v", report)
			}
			s, err := openReadOnly("store", o)
			must(t, err)
			defer s.Close()
			after := answers(t, s, l)
			for what, want := range before {
				if segments, is := in[strings.Split(what, " chunk ")[0]]; is && segments&(1<<victim) != 0 || what == "site totals" {
					continue
				}
				if after[what] != want {
					t.Errorf("%s: %s, and before %s", what, after[what], want)
				}
			}
			reportsDamage(t, o, l.of(t), c.name)
		})
	}
}

func TestRepairRefuses(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	if _, err := Repair(dir, small(), nil); !errors.Is(err, ErrNotStore) {
		t.Errorf("where there is nothing: %v", err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("it made a store")
	}
	s := mustOpen(t, dir, small())
	if _, err := Repair(dir, small(), nil); !errors.Is(err, ErrInUse) {
		t.Errorf("in use: %v", err)
	}
	must(t, s.Close())
	db, err := sql.Open("sqlite", filepath.Join(dir, "catalogue.sqlite"))
	must(t, err)
	_, err = db.Exec(fmt.Sprintf("PRAGMA user_version = %d", catalogueVersion+1))
	must(t, errors.Join(err, db.Close()))
	if _, err := Repair(dir, small(), nil); !errors.Is(err, ErrNewer) {
		t.Errorf("a newer one's: %v", err)
	}
}

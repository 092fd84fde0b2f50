package store

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var makeGolden = flag.String("make-golden", "", "write a store of the formats of today to this directory, and with -killed behind its name the one that a kill leaves")

// golden is what a store answers. What stands in testdata/NAME.json was made by golden.py, which knows nothing of this package.
type golden struct {
	Formats  map[string]int           `json:"formats"`
	Sites    map[string][]string      `json:"sites"` // of sessions: names, aliases
	Runs     map[string][]string      `json:"runs"`  // tags, and labels as key=value
	Requests map[string]goldenRequest `json:"requests"`
	Produced uint64                   `json:"produced"`
	Books    []string                 `json:"books"` // SESSION OUTCOME REASON LEVEL ROWS
	Expired  map[string]uint64        `json:"expired"`
	Resume   map[string]uint64        `json:"resume"` // producers' records
}

type goldenRequest struct {
	Run    string                       `json:"run"`
	Tokens []int64                      `json:"tokens"`
	Text   string                       `json:"text"`
	Pieces []string                     `json:"pieces"`
	Reason string                       `json:"reason"`
	Rows   map[string]map[string]string `json:"rows"` // SITE LEVEL, POSITION@ATTEMPT: bytes
}

// answersOf asks a store for all that is in it.
func answersOf(t *testing.T, s *Store) golden {
	t.Helper()
	g := golden{Formats: Formats(), Sites: map[string][]string{}, Runs: map[string][]string{}, Requests: map[string]goldenRequest{}, Expired: map[string]uint64{}, Resume: map[string]uint64{}}
	sessions, err := s.Sessions()
	must(t, err)
	ids := map[uint32]string{}
	for _, session := range sessions {
		ids[session.Number] = session.ID
		g.Resume[session.Producer] = s.Resume(session.Producer, 0)
		sites, err := s.Sites(session.Number)
		must(t, err)
		for _, site := range sites {
			g.Sites[session.ID] = append(g.Sites[session.ID], strings.Join(append([]string{site.Name}, site.Aliases...), " "))
		}
	}
	runs, err := s.Runs()
	must(t, err)
	for _, r := range runs {
		g.Runs[r.ID] = r.Tags
		for k, v := range r.Labels {
			g.Runs[r.ID] = append(g.Runs[r.ID], k+"="+v)
		}
	}
	listed, err := s.Requests(RequestFilter{Hidden: true})
	must(t, err)
	for _, l := range listed {
		r, found, err := s.RequestByID(l.ID)
		if err != nil || !found {
			t.Fatalf("request %s: %v, %v", l.ID, found, err)
		}
		answer := goldenRequest{Run: r.Run, Tokens: r.Tokens, Text: r.Text, Pieces: r.Pieces, Reason: r.Reason, Rows: map[string]map[string]string{}}
		sites, err := s.Sites(r.Key.Session)
		must(t, err)
		for _, site := range sites {
			refs, err := s.Chunks(r.Key, site.ID, 0, 1<<31)
			must(t, err)
			for _, ref := range refs {
				under := fmt.Sprintf("%s %v", site.Name, ref.Level)
				if answer.Rows[under] == nil {
					answer.Rows[under] = map[string]string{}
				}
				row := make([]byte, ref.RowBytes())
				for i := range ref.Rows {
					must(t, s.ReadRows(ref, i, i+1, row))
					answer.Rows[under][fmt.Sprintf("%d@%d", ref.First+i, ref.Attempt)] = hex.EncodeToString(row)
				}
			}
		}
		g.Requests[r.ID] = answer
	}
	totals := s.Books()
	g.Produced = totals.Produced
	for _, l := range totals.Lines {
		g.Books = append(g.Books, fmt.Sprintf("%s %v %v %v %d", ids[l.Session], l.Outcome, l.Reason, l.Level, l.Rows))
	}
	for number, rows := range totals.Expired {
		g.Expired[ids[number]] = rows
	}
	return g
}

// goldenStores are those that testdata has, and what each answers.
func goldenStores(t *testing.T) map[string]golden {
	files, err := filepath.Glob("testdata/*.json")
	must(t, err)
	stores := map[string]golden{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		must(t, err)
		var g golden
		must(t, json.Unmarshal(text, &g))
		stores[strings.TrimSuffix(filepath.Base(file), ".json")] = g
	}
	return stores
}

// sameAnswers holds a store against what it is to answer.
func sameAnswers(t *testing.T, want golden, s *Store, err error) {
	t.Helper()
	must(t, err)
	got := answersOf(t, s)
	got.Formats = want.Formats // of the files, which formatsOf reads
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-expected +read)\n%s", d)
	}
	verified(t, s)
	must(t, s.Close())
}

// formatsOf reads the versions that the files of a store have, where they have them.
func formatsOf(t *testing.T, dir string) map[string]int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, identityFile))
	must(t, err)
	var id identity
	must(t, json.Unmarshal(text, &id))
	formats := map[string]int{"store": id.Version}
	logs, err := filepath.Glob(filepath.Join(dir, "manifest", "*.log"))
	must(t, err)
	for _, file := range logs {
		b, err := os.ReadFile(file)
		must(t, err)
		formats["manifest"] = max(formats["manifest"], int(binary.LittleEndian.Uint16(b[8:])))
	}
	sealed, err := filepath.Glob(filepath.Join(dir, "segments", "*.safetensors"))
	must(t, err)
	for _, file := range sealed {
		b, err := os.ReadFile(file)
		must(t, err)
		var header struct {
			Metadata map[string]string `json:"__metadata__"`
		}
		must(t, json.Unmarshal(b[8:8+binary.LittleEndian.Uint64(b)], &header))
		var version int
		fmt.Sscan(header.Metadata["dmi.version"], &version)
		formats["segment"] = max(formats["segment"], version)
	}
	c, err := readCatalogue(filepath.Join(dir, "catalogue.sqlite"), false)
	must(t, err)
	defer c.close()
	formats["catalogue"] = c.version
	return formats
}

// TestGoldenStores: stores of every format that ever was stay readable as they are, without their catalogue, by an engine, and repaired; and give what was written,
// as something else than this package says it.
func TestGoldenStores(t *testing.T) {
	current := false
	for name, want := range goldenStores(t) {
		current = current || maps.Equal(want.Formats, Formats())
		t.Run(name, func(t *testing.T) {
			copied := func() string { // nothing touches what is in testdata
				dir := filepath.Join(t.TempDir(), "store")
				must(t, os.CopyFS(dir, os.DirFS(filepath.Join("testdata", name))))
				return dir
			}
			dir, o := copied(), Options{HeaderKiB: 16}
			if d := cmp.Diff(want.Formats, formatsOf(t, dir)); d != "" {
				t.Errorf("formats (-expected +in the files)\n%s", d)
			}
			s, err := OpenReadOnly(dir)
			sameAnswers(t, want, s, err)
			s, err = Open(dir, o)
			sameAnswers(t, want, s, err)
			s, err = OpenReadOnly(dir)
			sameAnswers(t, want, s, err)

			dir = copied()
			for _, end := range []string{"", "-wal"} {
				must(t, os.RemoveAll(filepath.Join(dir, "catalogue.sqlite"+end)))
			}
			s, err = OpenReadOnly(dir)
			sameAnswers(t, want, s, err)
			s, err = Open(dir, o)
			sameAnswers(t, want, s, err)

			dir = copied()
			report, err := Repair(dir, o, nil)
			if err != nil || len(report.Problems) > 0 {
				t.Errorf("repair: %+v, %v", report.Problems, err)
			}
			s, err = OpenReadOnly(dir)
			sameAnswers(t, want, s, err)
		})
	}
	if !current {
		t.Errorf("testdata has no store of the formats %v: see testdata/README.md", Formats())
	}
}

// TestGoldenStoreIsGoneOnWith: this engine goes on with a store of the first formats, and with one that was killed, where it writes what it writes into a new one.
func TestGoldenStoreIsGoneOnWith(t *testing.T) {
	stores := goldenStores(t)
	for _, from := range []string{"v1", "nothing"} {
		for _, kind := range []string{"v4", "v4-killed"} {
			t.Run(from+" to "+kind, func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "store")
				if from == "nothing" {
					writeGolden(t, dir)
				} else {
					must(t, os.CopyFS(dir, os.DirFS(filepath.Join("testdata", from))))
				}
				goOnGolden(t, dir, kind == "v4-killed")
				s, err := OpenReadOnly(dir)
				sameAnswers(t, stores[kind], s, err)
			})
		}
	}
}

// TestMakeGolden is the recipe for stores of the formats of today.
func TestMakeGolden(t *testing.T) {
	if *makeGolden == "" {
		t.Skip("writes a golden store where -make-golden says, when formats have changed")
	}
	writeGolden(t, *makeGolden)
	goOnGolden(t, *makeGolden, strings.HasSuffix(*makeGolden, "-killed"))
}

// TestGoldenAnswers: what the stores are to answer is what golden.py says, and what the safetensors library finds in their sealed segments.
func TestGoldenAnswers(t *testing.T) {
	python := os.Getenv("DMI_PYTHON")
	if python == "" {
		python = filepath.Join("..", ".venv", "bin", "python")
	}
	if _, err := os.Stat(python); err != nil {
		t.Skipf("no Python with safetensors: %v; set DMI_PYTHON, or run make setup", err)
	}
	out, err := exec.CommandContext(t.Context(), python, "testdata/golden.py", "--check").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestCatalogueOpensWithSQLite asks the catalogue with the reference implementation, by the queries that docs/format/catalogue.md gives.
func TestCatalogueOpensWithSQLite(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	writeGolden(t, dir)
	const script = `
import sqlite3, sys
db = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True)
assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
print(db.execute("SELECT r.id, s.name, b.first, b.count, b.outcome, b.reason FROM books b JOIN site_sets x ON x.id = b.site_set, json_each(x.sites) j "
    "JOIN sites s ON s.session = b.session AND s.id = j.value JOIN requests r ON r.session = b.session AND r.request = b.request ORDER BY 2, 3").fetchall())
print(db.execute("SELECT outcome, SUM(rows) FROM totals GROUP BY outcome ORDER BY 1").fetchall(), db.execute("SELECT produced FROM sessions").fetchall())
print(db.execute("SELECT segment, chunks, rows FROM segment_requests").fetchall())
`
	python, err := exec.LookPath("python3")
	if err != nil {
		t.Skip("no python3, whose sqlite3 module is the reference implementation")
	}
	out, err := exec.CommandContext(context.Background(), python, "-c", script, filepath.Join(dir, "catalogue.sqlite")).CombinedOutput()
	want := `[('r00000001.0', 'blocks.0.attn.hook_pattern', 0, 3, 'captured', ''), ('r00000001.0', 'blocks.0.attn.hook_pattern', 3, 1, 'dropped', 'ring_full'), ` +
		`('r00000001.0', 'blocks.0.hook_resid_post', 0, 3, 'captured', ''), ('r00000001.0', 'blocks.0.hook_resid_post', 3, 1, 'dropped', 'ring_full'), ` +
		`('r00000001.0', 'expert', 1, 1, 'captured', '')]
[('captured', 7), ('dropped', 2)] [(9,)]
[(1, 3, 7)]
`
	if err != nil || string(out) != want {
		t.Fatalf("%v\n%s\nwant\n%s", err, out, want)
	}
}

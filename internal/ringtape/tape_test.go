package ringtape_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"dmi/control"
	"dmi/internal/leaks"
	"dmi/internal/ringtape"
	"dmi/ring"
	"dmi/store"
	"dmi/tensor"

	"github.com/google/go-cmp/cmp"
)

func TestMain(m *testing.M) { leaks.Main(m) }

// engine is the engine's whole way in, with a store of its own.
func engine(t *testing.T, recorder control.Recorder) (*store.Store, string, func()) {
	t.Helper()
	dir := t.TempDir()
	s, err := store.Open(filepath.Join(dir, "store"), store.Options{GroupCommit: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	server := control.New(control.Options{Store: s, Recorder: recorder, StopGrace: time.Minute})
	socket := filepath.Join(dir, "engine.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, listener) }()
	stopped := false
	stop := func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(func() { stop(); s.Close() })
	return s, socket, stop
}

// contents is everything in a store that does not depend on when it was written.
type contents struct {
	Sites    []tensor.Site
	Requests []string
	IDs      []string          // in the order they began
	Tokens   [][]int64         // of those whose tokens are known
	Rows     map[string][]byte // by request, site, attempt, position
	Books    map[string]uint64
	Fates    map[string]string
}

func contentsOf(t *testing.T, s *store.Store) contents {
	t.Helper()
	c := contents{Rows: map[string][]byte{}, Books: map[string]uint64{}, Fates: map[string]string{}}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	c.Sites, err = s.Sites(1)
	must(err)
	requests, err := s.Requests(store.RequestFilter{Hidden: true})
	must(err)
	for _, listed := range requests {
		r, _, err := s.RequestByID(listed.ID)
		must(err)
		c.Requests = append(c.Requests, fmt.Sprint(r.Key, r.ID, r.Run, r.Tokens, r.Text, r.Path, r.Reason))
		c.IDs = append(c.IDs, r.ID)
		if len(r.Tokens) > 0 {
			c.Tokens = append(c.Tokens, r.Tokens)
		}
		entries, err := s.Entries(r.Key)
		must(err)
		for _, e := range entries {
			for _, site := range e.Sites {
				for i := range e.Count {
					c.Fates[fmt.Sprint(r.Key, site, e.Attempt, e.First+i*e.Stride)] = fmt.Sprint(e.Outcome, e.Reason)
				}
			}
		}
		for _, site := range c.Sites {
			refs, err := s.Chunks(r.Key, site.ID, 0, 1<<31)
			must(err)
			for _, ref := range refs {
				size := ref.DType.Size()
				for _, d := range ref.Shape {
					size *= d
				}
				b := make([]byte, size*int(ref.Rows))
				must(s.ReadRows(ref, 0, ref.Rows, b))
				for i := range ref.Rows {
					row := b[int(i)*size : int(i+1)*size]
					if site.Keyed { // how far a row is padded depends on its neighbours
						keys := ref.Shape[len(ref.Shape)-1] * ref.DType.Size()
						own := int(ref.First+i+1) * ref.DType.Size()
						var cut []byte
						for at := 0; at < len(row); at += keys {
							cut = append(cut, row[at:at+own]...)
						}
						row = cut
					}
					c.Rows[fmt.Sprint(r.Key, site.ID, ref.Attempt, ref.First+i, ref.DType)] = row
				}
			}
		}
	}
	slices.Sort(c.Requests)
	totals := s.Books()
	sum := uint64(0)
	for _, l := range totals.Lines {
		c.Books[fmt.Sprint(l.Outcome, l.Reason)] += l.Rows
		sum += l.Rows
	}
	if sum != totals.Produced {
		t.Errorf("%d rows produced, %d booked", totals.Produced, sum)
	}
	return c
}

// play plays a tape into a store, recording it again.
func play(t *testing.T, tape []byte) (contents, []byte) {
	t.Helper()
	dir := t.TempDir()
	recorder, err := ringtape.NewRecorder(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	s, socket, stop := engine(t, recorder)
	if err := ringtape.Play(context.Background(), bytes.NewReader(tape), socket, ""); err != nil {
		t.Fatal(err)
	}
	stop()
	files, _ := filepath.Glob(filepath.Join(dir, "*.tape"))
	if len(files) != 1 {
		t.Fatalf("tapes: %v", files)
	}
	again, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	return contentsOf(t, s), again
}

// withBye copies a tape and lets its producer say bye.
func withBye(t *testing.T, tape []byte) []byte {
	t.Helper()
	dir := t.TempDir()
	recorder, err := ringtape.NewRecorder(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	r, err := ringtape.NewReader(bytes.NewReader(tape))
	if err != nil {
		t.Fatal(err)
	}
	hello, err := r.Next()
	if err != nil {
		t.Fatal(err)
	}
	header := make([]byte, ring.HeaderSize)
	r.Header.Encode(header)
	out, err := recorder.Begin("s00000000", header, hello.Body)
	if err != nil {
		t.Fatal(err)
	}
	said := false
	for {
		f, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case f.Record != nil:
			if !said { // before most of the records, as it comes when the engine is slower than the socket
				out.Message([]byte(`{"type":"bye"}`))
				said = true
			}
			out.Record(f.Lane, f.Record, f.Table, f.Payload)
		case f.Kind == 3:
			out.Sites(f.Body)
		default:
			out.Message(f.Body)
		}
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	files, _ := filepath.Glob(filepath.Join(dir, "*.tape"))
	b, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func tapes(t testing.TB) map[string][]byte {
	files, err := filepath.Glob("testdata/*.tape")
	if err != nil || len(files) == 0 {
		t.Fatal("no tapes in testdata", err)
	}
	out := map[string][]byte{}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		out[filepath.Base(f)] = b
	}
	return out
}

// Tapes of real models: played through every stage of the engine they leave what plain hooks saw when they were recorded (testdata/*.rows.safetensors), or what
// the engine stored then (testdata/*.want), and recorded again, the same once more.
func TestTapesOfRealSessions(t *testing.T) {
	for name, tape := range tapes(t) {
		t.Run(name, func(t *testing.T) {
			first, again := play(t, tape)
			if len(first.Rows) == 0 || len(first.Books) == 0 {
				t.Fatal("nothing came of it")
			}
			stem := filepath.Join("testdata", strings.TrimSuffix(name, ".tape"))
			if _, err := os.Stat(stem + ".want"); err == nil {
				sameAsRecorded(t, first, stem+".want")
			} else {
				sameAsSeen(t, first, stem+".rows.safetensors")
			}
			second, _ := play(t, again)
			if diff := cmp.Diff(first, second); diff != "" {
				t.Errorf("played again (-first +second):\n%s", diff)
			}
			polite, _ := play(t, withBye(t, tape))
			if diff := cmp.Diff(first, polite); diff != "" {
				t.Errorf("played with a bye (-without +with):\n%s", diff)
			}
		})
	}
}

func sameAsRecorded(t *testing.T, got contents, file string) {
	t.Helper()
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), summary(got)); diff != "" {
		t.Errorf("played (-recorded +played):\n%s", diff)
	}
}

// A tape that is damaged anywhere is found out, and plays nothing else than it was.
func TestDamagedTapes(t *testing.T) {
	for name, tape := range tapes(t) {
		for _, at := range []int{0, 9, 30, 190, 200, len(tape) / 3, len(tape) / 2, len(tape) - 3} {
			bad := slices.Clone(tape)
			bad[at] ^= 0x10
			if err := readAll(bad); err == nil {
				t.Errorf("%s: byte %d was changed, and nothing said", name, at)
			}
			if err := readAll(tape[:at]); err == nil {
				t.Errorf("%s: it was cut at %d, and nothing said", name, at)
			}
		}
		if err := readAll(tape); err != nil {
			t.Error(name, err)
		}
	}
}

func readAll(tape []byte) error {
	r, err := ringtape.NewReader(bytes.NewReader(tape))
	for err == nil {
		_, err = r.Next()
	}
	if err == io.EOF {
		return nil
	}
	return err
}

func FuzzTape(f *testing.F) {
	for _, tape := range tapes(f) {
		f.Add(tape[:min(len(tape), 8000)])
	}
	f.Fuzz(func(t *testing.T, tape []byte) { readAll(tape) })
}

// summary is contents in a form to keep beside a tape.
func summary(c contents) string {
	var b strings.Builder
	for _, s := range c.Sites {
		fmt.Fprintf(&b, "site %d %s\n", s.ID, s.Name)
	}
	for _, r := range c.Requests {
		fmt.Fprintf(&b, "request %s\n", r)
	}
	for _, k := range slices.Sorted(maps.Keys(c.Books)) {
		fmt.Fprintf(&b, "books %s %d\n", k, c.Books[k])
	}
	h := sha256.New()
	for _, k := range slices.Sorted(maps.Keys(c.Rows)) {
		fmt.Fprintf(h, "%s %x\n", k, c.Rows[k])
	}
	fmt.Fprintf(&b, "rows %d %x\n", len(c.Rows), h.Sum(nil))
	return b.String()
}

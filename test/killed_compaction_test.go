//go:build linux

package test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"dmi/ring"
	"dmi/store"
	"dmi/tensor"
)

// What is compacted: requests that were decoded together, each over all segments, in chunks of a few rows.
const (
	compactedRequests = 12
	compactedSites    = 6
	compactedRows     = 96
	compactedWidth    = 1024
	compactedBarrier  = 6 // rows between barriers, each of which ends every chunk
)

// scatteredStore makes it in a directory.
func scatteredStore(t *testing.T, dir string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	s, err := store.Open(dir, store.Options{SegmentMiB: 1, HeaderKiB: 128, GroupCommit: time.Millisecond})
	must(err)
	session, err := s.BeginSession(tensor.Session{ID: "s0000c0de", Producer: "p", Mode: "complete", Begun: time.Unix(1, 0)})
	must(err)
	sites, ids := make([]tensor.Site, compactedSites), make([]uint32, compactedSites)
	for i := range sites {
		sites[i], ids[i] = tensor.Site{ID: uint32(i), Name: fmt.Sprintf("blocks.%d.hook_resid_post", i), Layer: i}, uint32(i)
	}
	must(s.AddSites(session, sites))
	must(s.PutRun(tensor.Run{ID: "r0000c0de", Session: session, Begun: time.Unix(1, 0)}))
	var spans []ring.Span
	for request := range uint64(compactedRequests) {
		key := tensor.RequestKey{Session: session, Request: request}
		must(s.PutRequests([]tensor.Request{{Key: key, ID: fmt.Sprintf("r0000c0de.%d", request), Run: "r0000c0de", Begun: time.Unix(1, 0), Ended: time.Unix(2, 0)}}))
		spans = append(spans, ring.Span{Request: request, Count: 1})
	}
	for at := range uint32(compactedRows) {
		table := make([]byte, ring.TableSize+len(spans)*ring.SpanSize)
		header := ring.Table{Magic: ring.TableMagic, Bytes: uint32(len(table)), Step: uint64(at), Spans: uint32(len(spans))}
		header.Encode(table)
		for i := range spans {
			spans[i].Position = at
			spans[i].Encode(table[ring.TableSize+i*ring.SpanSize:])
		}
		record := make([]byte, ring.OpenRecordSize)
		open := ring.OpenRecord{Seq: uint64(at) + 1, Step: uint64(at), TableBytes: uint64(len(table)), Sites: compactedSites, Kind: ring.KindOpen, Rows: [3]uint32{compactedRequests}}
		open.Encode(record)
		must(s.AppendStep(store.Step{Session: session, First: uint64(at), Count: 1, Records: record, Tables: [][]byte{table}}))
		for request := range uint64(compactedRequests) {
			key := tensor.RequestKey{Session: session, Request: request}
			for _, site := range ids {
				must(s.AppendChunk(tensor.Chunk{Key: key, Site: site, First: at, Rows: 1, Step: uint64(at), LastStep: uint64(at), DType: tensor.U8, Shape: []int{compactedWidth},
					Data: compactedRow(request, site, at)}))
			}
			must(s.Book([]tensor.Entry{{Key: key, Sites: ids, First: at, Count: 1, Stride: 1, Step: uint64(at), Outcome: tensor.Captured}}))
		}
		if at%compactedBarrier == compactedBarrier-1 {
			must(s.Barrier(t.Context()))
		}
	}
	must(s.EndSession(session, time.Unix(3, 0)))
	must(s.Close())
}

func compactedRow(request uint64, site, position uint32) []byte {
	b := make([]byte, compactedWidth)
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], value(site, request, position)+uint64(i))
	}
	return b
}

// checkCompacted reads every row of it, and holds the books against them. It returns how many chunks there are.
func checkCompacted(t *testing.T, dir string) (chunks int) {
	t.Helper()
	s, err := store.OpenReadOnly(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	sessions, err := s.Sessions()
	if err != nil || len(sessions) != 1 {
		t.Fatalf("%d sessions, %v", len(sessions), err)
	}
	for request := range uint64(compactedRequests) {
		for site := range uint32(compactedSites) {
			refs, err := s.Chunks(tensor.RequestKey{Session: sessions[0].Number, Request: request}, site, 0, compactedRows)
			if err != nil {
				t.Fatalf("chunks of request %d at site %d: %v", request, site, err)
			}
			next := uint32(0)
			for _, ref := range refs {
				data := make([]byte, int(ref.Rows)*ref.RowBytes())
				if err := s.ReadRows(ref, 0, ref.Rows, data); err != nil {
					t.Fatalf("read request %d at site %d: %v", request, site, err)
				}
				if ref.First != next {
					t.Fatalf("request %d at site %d: row %d where row %d should be", request, site, ref.First, next)
				}
				for i := range ref.Rows {
					if !bytes.Equal(data[int(i)*compactedWidth:int(i+1)*compactedWidth], compactedRow(request, site, next)) {
						t.Fatalf("request %d at site %d: row %d is another", request, site, next)
					}
					next++
				}
			}
			if next != compactedRows {
				t.Fatalf("request %d at site %d: %d rows of %d", request, site, next, compactedRows)
			}
			chunks += len(refs)
		}
	}
	const rows = compactedRequests * compactedSites * compactedRows
	if b := booksOf(s, sessions[0].Number); b.produced != rows || b.lines[tensor.Captured] != rows || b.sum != rows {
		t.Fatalf("%+v, of %d rows", b, rows)
	}
	if report := verified(t, s); report.Produced != rows || report.Booked != rows {
		t.Fatalf("verify says %d produced and %d booked, of %d", report.Produced, report.Booked, rows)
	}
	return chunks
}

// segmentsOf are the names of the files that a store's rows are in.
func segmentsOf(t *testing.T, dir string) map[string]bool {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(dir, "segments"))
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, e := range entries {
		names[e.Name()] = true
	}
	return names
}

// TestKilledInCompaction kills who compacts a store at any moment, `dmi compact` and an engine that nothing comes to: every row and the whole of the books are there after each kill, nothing
// is corrupt, and the next one finishes it.
func TestKilledInCompaction(t *testing.T) {
	random := seeded(t)
	kills := share(5, 1000)
	say := newProgress(t)
	pristine := filepath.Join(t.TempDir(), "pristine")
	scatteredStore(t, pristine)
	scattered := checkCompacted(t, pristine)
	keys := []string{"store.segment_mib=1", "store.compact_mib_s=1048576"}
	compact := func(dir string) *exec.Cmd {
		arguments := []string{"compact", dir}
		for _, k := range keys {
			arguments = append(arguments, "--set", k)
		}
		c := exec.Command(program, arguments...)
		c.Env = cleanEnvironment()
		c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		return c
	}
	fresh := func() string {
		dir := filepath.Join(t.TempDir(), "store")
		if err := os.CopyFS(dir, os.DirFS(pristine)); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	whole := fresh()
	begun := time.Now()
	if out, err := compact(whole).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	took := time.Since(begun)
	compacted := checkCompacted(t, whole)
	if compacted >= scattered/2 {
		t.Fatalf("%d chunks became %d: nothing to show", scattered, compacted)
	}
	var done, amidst, untouched, over int
	more := func() bool { return !t.Failed() && (done < kills || amidst == 0 && done < 10*kills) }
	for more() {
		dir, finished := fresh(), false
		for !finished && more() {
			before := segmentsOf(t, dir)
			killed := lifeOfACompaction(t, random, dir, took, compact, keys)
			done++
			after := segmentsOf(t, dir)
			chunks := checkCompacted(t, dir)
			finished = chunks == compacted
			switch {
			case !killed || finished:
				over++
			case maps.Equal(before, after):
				untouched++
			default:
				amidst++
			}
			say.say("%d of %d kills, %d of them with compaction part done", done, kills, amidst)
		}
		if !finished { // the next one finishes it
			if out, err := compact(dir).CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if chunks := checkCompacted(t, dir); chunks != compacted {
				t.Errorf("%d chunks after all, and %d where nobody was killed", chunks, compacted)
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d kills: %d with compaction part done, %d before any file changed, %d when it was over; %d chunks become %d in %v", done, amidst, untouched, over, scattered, compacted,
		took.Round(time.Millisecond))
	if amidst == 0 {
		t.Error("no kill hit a compaction at work")
	}
	figures(t, "soak_compaction_kills", count("kills in compaction after which every row was there and right, and the books balanced", uint64(done)).For(">= 1000", done >= 1000),
		count("of these with compaction part done", uint64(amidst)), count("of these before any file changed", uint64(untouched)))
}

// lifeOfACompaction has a store compacted until it is killed, at some moment of the time that it takes, or until it is done.
func lifeOfACompaction(t *testing.T, random *rand.Rand, dir string, took time.Duration, compact func(string) *exec.Cmd, keys []string) (killed bool) {
	t.Helper()
	moment := time.Duration(random.Int64N(int64(took)))
	if random.IntN(2) == 0 {
		c := compact(dir)
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		kill := time.AfterFunc(moment, func() { c.Process.Kill() })
		defer kill.Stop()
		err := c.Wait()
		if err != nil && c.ProcessState.ExitCode() >= 0 {
			t.Fatalf("compact: %v", err)
		}
		return err != nil
	}
	e := launch(t, dir, append([]string{"store.tidy_every_s=0.01", "store.compact_after_s=0.01"}, keys...)...)
	select {
	case err := <-e.ready:
		if err != nil {
			t.Fatalf("the engine did not start: %v\n%s", err, &e.log)
		}
	case <-time.After(patience):
		t.Fatalf("the engine is not ready\n%s", &e.log)
	}
	time.Sleep(moment)
	e.kill()
	return true
}

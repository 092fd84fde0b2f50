package query

import (
	"bytes"
	"fmt"
	"sync"
	"testing"
	"time"

	"dmi/ring"
	"dmi/store"
	"dmi/tensor"
)

// meeting is a store whose readers of rows wait for each other: until so many are there, or nobody came for long.
type meeting struct {
	Source
	mu      sync.Mutex
	here    int
	most    int
	reads   int
	hints   []store.ChunkRef
	quorum  int
	arrived chan struct{}

	together sync.Once // that they first were
}

func (m *meeting) ReadRows(ref store.ChunkRef, from, to uint32, dst []byte) error {
	m.mu.Lock()
	m.here++
	m.reads++
	m.most = max(m.most, m.here)
	if m.here == m.quorum {
		m.together.Do(func() { close(m.arrived) })
	}
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		m.here--
		m.mu.Unlock()
	}()
	select {
	case <-m.arrived:
	case <-time.After(time.Minute):
		return fmt.Errorf("nobody else reads")
	}
	return m.Source.ReadRows(ref, from, to, dst)
}

func (m *meeting) WillRead(refs []store.ChunkRef) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hints = append(m.hints, refs...)
}

// TestHints: the disk is asked for what a tile needs and for readAhead bytes after it, for each chunk once.
func TestHints(t *testing.T) {
	m := &meeting{}
	p := plan{source: m}
	for i := range 100 {
		p.pieces = append(p.pieces, piece{ref: store.ChunkRef{Rows: 1 << 10, First: uint32(i) << 10, DType: tensor.U8, Shape: []int{1 << 10}}, count: 1 << 10, at: i << 10})
	}
	r := Reader{plan: &p}
	for tile := range 25 {
		r.hint(tile*4<<10, (tile+1)*4<<10)()
		want := min(100, (tile+1)*4+readAhead>>20)
		if len(m.hints) != want {
			t.Fatalf("tile %d: %d chunks of a MiB are asked for, want %d", tile, len(m.hints), want)
		}
	}
	for i, ref := range m.hints {
		if ref.First != uint32(i)<<10 {
			t.Errorf("chunk %d is asked for as number %d", ref.First>>10, i)
		}
	}
}

// TestChunksOfATileAreReadTogether: readsAtOnce of them, so that a tile of as many chunks takes the time of one, each once, and never more.
func TestChunksOfATileAreReadTogether(t *testing.T) {
	const chunks, width = 3 * readsAtOnce, 1000
	s, err := store.Open(t.TempDir(), store.Options{HeaderKiB: 64})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	session, err := s.BeginSession(tensor.Session{ID: "s00000001", Mode: "complete"})
	must(err)
	must(s.AddSites(session, []tensor.Site{{Name: "x"}}))
	key := tensor.RequestKey{Session: session}
	must(s.PutRun(tensor.Run{ID: "r", Session: session, Begun: time.Unix(1, 0)}))
	must(s.PutRequests([]tensor.Request{{Key: key, ID: "r.0", Run: "r", Begun: time.Unix(1, 0), Ended: time.Unix(2, 0)}}))
	table := make([]byte, ring.TableSize+ring.SpanSize)
	header, span := ring.Table{Magic: ring.TableMagic, Bytes: uint32(len(table)), Step: 1, Spans: 1}, ring.Span{Count: chunks}
	header.Encode(table)
	span.Encode(table[ring.TableSize:])
	record := make([]byte, ring.OpenRecordSize)
	open := ring.OpenRecord{Seq: 1, Step: 1, TableBytes: uint64(len(table)), Sites: 1, Kind: ring.KindOpen, Rows: [3]uint32{chunks}}
	open.Encode(record)
	must(s.AppendStep(store.Step{Session: session, Count: 1, Records: record, Tables: [][]byte{table}}))
	var want []byte
	for i := range uint32(chunks) { // a policy each, which keeps them from being put together
		row := bytes.Repeat([]byte{byte(i + 1)}, width)
		want = append(want, row...)
		must(s.AppendChunk(tensor.Chunk{Key: key, First: i, Rows: 1, Step: 1, LastStep: 1, DType: tensor.U8, Shape: []int{width}, Policy: uint64(i), Data: row}))
		must(s.Book([]tensor.Entry{{Key: key, Sites: []uint32{0}, First: i, Count: 1, Stride: 1, Step: 1, Outcome: tensor.Captured, Policy: uint64(i)}}))
	}
	must(s.Barrier(t.Context()))
	m := &meeting{Source: s, quorum: readsAtOnce, arrived: make(chan struct{})}
	answer, err := New(m).Tensor(t.Context(), TensorQuery{Request: "r.0", Site: SiteName{Name: "x"}})
	must(err)
	var got bytes.Buffer
	_, err = answer.Open(t.Context()).WriteTo(&got)
	must(err)
	if !bytes.Equal(got.Bytes(), want) {
		t.Error("other bytes")
	}
	if len(m.hints) != chunks {
		t.Errorf("the disk was asked for %d chunks ahead, want %d", len(m.hints), chunks)
	}
	if m.most != readsAtOnce || m.reads != chunks {
		t.Errorf("%d reads of %d chunks, %d at once; %d may be", m.reads, chunks, m.most, readsAtOnce)
	}
}

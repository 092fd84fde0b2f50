package pipeline_test

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"dmi/drain"
	"dmi/internal/ringtape"
	"dmi/ring"
	"dmi/tensor"

	"pgregory.net/rapid"
)

// producedSink counts, from the records that went into the manifest alone, how many rows have to be on the books.
type producedSink struct {
	mu       sync.Mutex
	sites    []trafficSite
	produced uint64
	booked   uint64
	free     uint64 // booked at sites that owe nothing
	captured uint64
	arrived  uint64
	wrong    []string
}

func (s *producedSink) AppendChunks(chunks []tensor.Chunk) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range chunks {
		elements := 1
		for _, d := range c.Shape {
			elements *= d
		}
		if len(c.Data) != int(c.Rows)*elements*c.DType.Size() || cap(c.Data) != len(c.Data) || !c.DType.Valid() || c.Rows == 0 {
			s.wrong = append(s.wrong, "a chunk whose bytes are not its rows")
		}
		s.arrived += uint64(c.Rows)
	}
	return len(chunks), nil
}

func (s *producedSink) Book(entries []tensor.Entry) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range entries {
		n := uint64(e.Count) * uint64(len(e.Sites))
		if n == 0 || e.Stride == 0 || !e.Outcome.Valid() || !e.Reason.Valid() {
			s.wrong = append(s.wrong, "an entry that the store refuses")
		}
		s.booked += n
		if e.Outcome == tensor.Captured {
			s.captured += n
		}
		if e.Outcome == tensor.Cached { // on top of what OPEN counts
			s.free += n
			continue
		}
		for _, site := range e.Sites {
			if int(site) < len(s.sites) && s.sites[site].Flags&ring.SiteOptional != 0 {
				s.free += uint64(e.Count)
			}
		}
	}
	return nil
}

func (s *producedSink) Append(lane int, first uint64, records []byte, tables [][]byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ; len(records) > 0; records = records[ring.RecordSize:] {
		switch records[ring.RecordKindOffset] {
		case ring.KindOpen:
			var o ring.OpenRecord
			o.Decode(records)
			for i := range o.Sites {
				if s.sites[i].Flags&ring.SiteOptional == 0 {
					s.produced += uint64(o.Rows[0])
				}
			}
			if o.TableBytes != 0 {
				tables = tables[1:]
			}
		case ring.KindGap:
			var g ring.GapRecord
			g.Decode(records)
			s.produced += g.Rows
		}
	}
	if len(tables) != 0 {
		s.wrong = append(s.wrong, "row tables too many")
	}
	return nil
}

func (s *producedSink) check(t interface{ Errorf(string, ...any) }) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.wrong {
		t.Errorf("%s", w)
	}
	if s.booked-s.free != s.produced {
		t.Errorf("%d rows were produced, and %d are on the books", s.produced, s.booked-s.free)
	}
	if s.captured > s.arrived {
		t.Errorf("%d rows are booked captured, and %d came", s.captured, s.arrived)
	}
}

// A producer that changes any byte of any record, row table, payload range or control word: the engine ends, does not crash, and its books balance
// with what it took.
func FuzzRing(f *testing.F) {
	for _, name := range []string{"record", "open", "close", "gap", "table", "span"} {
		b, err := os.ReadFile(filepath.Join("..", "abi", "golden", name+".bin"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint64(len(b)), b)
	}
	for seed := range uint64(64) {
		b := make([]byte, 48)
		for i := range b {
			b[i] = byte((seed*31 + uint64(i)*17) * 0x9e3779b97f4a7c15 >> 40)
		}
		f.Add(seed, b)
	}
	f.Fuzz(func(t *testing.T, seed uint64, lies []byte) {
		traffic, err := newTraffic(seed, uint32(seed%2), ringtape.Shape{Lanes: 2, RecordCapacity: 64, CommandCapacity: 8, SiteCapacity: 16, Payload: 1 << 17,
			Table: 4096, Staging: 1 << 16, Spill: (seed % 2) << 15})
		if err != nil {
			t.Fatal(err)
		}
		defer traffic.p.Close()
		traffic.deadline = 5 * time.Millisecond
		traffic.lie = func(b []byte) {
			if len(lies) < 4 || traffic.IntN(4) != 0 {
				return
			}
			at, how, v := int(lies[0])%len(b), lies[1]%6, binary.LittleEndian.Uint16(lies[2:])
			lies = lies[4:]
			switch how {
			case 0:
				b[at] ^= byte(v)
			case 1:
				b[at] = byte(v)
			case 2: // a word of one of the fields
				at = at / 4 * 4
				binary.LittleEndian.PutUint32(b[at:], uint32(v)<<(v%17))
			case 3:
				b[ring.RecordKindOffset%len(b)] = byte(v % 6)
			case 4:
				binary.LittleEndian.PutUint32(b[at/4*4:], ^uint32(v%4))
			case 5:
				*traffic.p.Control(uint64(at%10) * ring.WordSize) += uint64(v % 3)
			}
		}
		traffic.p.Lenient = true
		s := &producedSink{sites: traffic.sites}
		e := startEngine(t, traffic.p, s, func(level, code, message string) {}, drain.Options{TensorBytes: 1 << 20})
		traffic.p.StartPump()
		for range 12 {
			traffic.runStep(traffic.p.Lanes[traffic.IntN(2)], nil) // what finds no room any more is not sent
		}
		e.finish(20 * time.Millisecond)
		s.check(t)
	})
}

// Producers that are killed: their pump stops for good at any moment, steps are left open. What is booked captured has come, byte for byte, and every
// row is on the books once.
func TestKilledProducers(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		mode, shape := drawShape(t)
		traffic, err := newTraffic(rapid.Uint64().Draw(t, "seed"), mode, shape)
		if err != nil {
			t.Fatal(err)
		}
		defer traffic.p.Close()
		traffic.deadline = time.Duration(rapid.IntRange(1, 20).Draw(t, "patience")) * time.Millisecond
		s := newSink(traffic)
		counted := &producedSink{sites: traffic.sites}
		e := startEngine(t, traffic.p, both{s, counted}, func(level, code, message string) {
			if code == "corrupt" {
				t.Error(message)
			}
		}, drain.Options{})
		traffic.p.StartPump()
		steps := rapid.IntRange(1, 20).Draw(t, "steps")
		dies := rapid.IntRange(0, steps).Draw(t, "dies")
		left := map[int]bool{} // lanes whose step was left open: nothing more comes on them
		for i := range steps {
			if i == dies {
				traffic.p.StopPump()
			}
			lane := traffic.IntN(len(traffic.p.Lanes))
			if left[lane] {
				continue
			}
			if err := traffic.runStep(traffic.p.Lanes[lane], s); err != nil {
				left[lane] = true
			}
		}
		if err := e.finish(5 * time.Millisecond); err != nil {
			t.Fatal(err)
		}
		for _, w := range s.wrong {
			if !strings.Contains(w, "manifest") {
				t.Error(w)
			}
		}
		counted.check(t)
		for k, got := range s.booked {
			want, known := traffic.want[k]
			if known && got != want && got != (fate{tensor.Lost, tensor.ProducerExit}) {
				t.Errorf("%v: booked %v/%v, want %v/%v", k, got.outcome, got.reason, want.outcome, want.reason)
			}
		}
	})
}

// both is two sinks that are told the same.
type both struct {
	*sink
	counted *producedSink
}

func (b both) AppendChunks(chunks []tensor.Chunk) (int, error) {
	b.counted.AppendChunks(chunks)
	return b.sink.AppendChunks(chunks)
}

func (b both) Book(e []tensor.Entry) error {
	b.counted.Book(e)
	return b.sink.Book(e)
}

func (b both) Append(lane int, first uint64, records []byte, tables [][]byte) error {
	b.counted.Append(lane, first, records, tables)
	return b.sink.Append(lane, first, records, tables)
}

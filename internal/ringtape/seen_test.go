package ringtape_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"dmi/internal/ringtape"
	"dmi/ring"
	"dmi/tensor"

	"github.com/google/go-cmp/cmp"
)

// seen is what plain hooks saw of a recorded model: testdata/record.py writes it, with the reference safetensors library.
type seen struct {
	requests  []string
	tokens    [][]int64
	books     map[string]uint64
	positions map[string][]uint32
	tensors   map[string]seenTensor // REQUEST/SITE -> a row for each position
}

type seenTensor struct {
	DType  string `json:"dtype"`
	Shape  []int  `json:"shape"`
	Offset [2]int `json:"data_offsets"`
	bytes  []byte
}

func readSeen(t *testing.T, file string) seen {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	size := binary.LittleEndian.Uint64(b)
	header, data := b[8:8+size], b[8+size:]
	var s seen
	var all map[string]json.RawMessage
	var facts map[string]string
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(file, err)
		}
	}
	must(json.Unmarshal(header, &all))
	must(json.Unmarshal(all["__metadata__"], &facts))
	must(json.Unmarshal([]byte(facts["requests"]), &s.requests))
	must(json.Unmarshal([]byte(facts["tokens"]), &s.tokens))
	must(json.Unmarshal([]byte(facts["books"]), &s.books))
	must(json.Unmarshal([]byte(facts["positions"]), &s.positions))
	delete(all, "__metadata__")
	s.tensors = map[string]seenTensor{}
	for name, raw := range all {
		var x seenTensor
		must(json.Unmarshal(raw, &x))
		x.bytes = data[x.Offset[0]:x.Offset[1]]
		s.tensors[name] = x
	}
	return s
}

// rows are keyed as contents.Rows are. Of attention, a row has its own keys only, head by head.
func (s *seen) rows(t *testing.T, sites []tensor.Site) map[string][]byte {
	t.Helper()
	rows := map[string][]byte{}
	for name, x := range s.tensors {
		of, siteName, _ := strings.Cut(name, "/")
		var request uint64
		fmt.Sscan(of, &request)
		id := -1
		keyed := false
		for _, site := range sites {
			if site.Name == siteName {
				id, keyed = int(site.ID), site.Keyed
			}
		}
		if id < 0 {
			t.Fatalf("the store has no site %s", siteName)
		}
		if x.Shape[0] != len(s.positions[name]) {
			t.Fatalf("%s: %d rows for %d positions", name, x.Shape[0], len(s.positions[name]))
		}
		dtype, err := tensor.ParseDType(x.DType)
		if err != nil {
			t.Fatal(err)
		}
		size := len(x.bytes) / x.Shape[0]
		for i, position := range s.positions[name] {
			row := x.bytes[i*size : (i+1)*size]
			if keyed {
				heads, keys := x.Shape[1], x.Shape[2]
				head := size / heads
				var own []byte
				for h := range heads {
					own = append(own, row[h*head:h*head+head/keys*int(position+1)]...)
				}
				row = own
			}
			rows[fmt.Sprint(tensor.RequestKey{Session: 1, Request: request}, id, 0, position, dtype)] = row
		}
	}
	return rows
}

func sameAsSeen(t *testing.T, got contents, file string) {
	t.Helper()
	want := readSeen(t, file)
	if diff := cmp.Diff(want.requests, got.IDs); diff != "" {
		t.Errorf("requests (-seen +played):\n%s", diff)
	}
	if len(want.tokens) > 0 {
		if diff := cmp.Diff(want.tokens, got.Tokens); diff != "" {
			t.Errorf("tokens (-seen +played):\n%s", diff)
		}
	}
	if diff := cmp.Diff(want.books, got.Books); diff != "" {
		t.Errorf("books (-seen +played):\n%s", diff)
	}
	rows, left := want.rows(t, got.Sites), uint64(0)
	for _, key := range slices.Sorted(maps.Keys(got.Rows)) {
		if !bytes.Equal(rows[key], got.Rows[key]) {
			t.Fatalf("row %s: %x, the hook saw %x", key, got.Rows[key], rows[key])
		}
	}
	for key := range rows {
		if _, there := got.Rows[key]; !there {
			left++
		}
	}
	if uint64(len(got.Rows)) != want.books["captured "] || left != want.books["dropped ring_full"] {
		t.Errorf("%d rows came and %d did not; the books say %v", len(got.Rows), left, want.books)
	}
}

// The tapes cover what they are there for.
func TestWhatTheTapesCover(t *testing.T) {
	for name, covers := range map[string]func(s shape) bool{
		"wraps_and_drops.tape":    func(s shape) bool { return s.payload > 2*s.ring && s.dropped > 0 },
		"packed_chunks.tape":      func(s shape) bool { return s.packed > 2 },
		"padded_and_growing.tape": func(s shape) bool { return s.padded > 3 && len(s.keys) > 3 && s.packed == 0 },
		"llama_bf16_beams.tape":   func(s shape) bool { return len(s.keys) > 3 },
	} {
		tape, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		if s := shapeOf(t, tape); !covers(s) {
			t.Errorf("%s: %+v", name, s)
		}
	}
}

type shape struct {
	ring, payload, dropped uint64
	packed, padded         int             // steps with rows of several requests in one dimension, and with pads before a request's rows
	keys                   map[uint32]bool // how many there were
}

func shapeOf(t *testing.T, tape []byte) shape {
	t.Helper()
	r, err := ringtape.NewReader(bytes.NewReader(tape))
	if err != nil {
		t.Fatal(err)
	}
	s := shape{ring: r.Header.PayloadBytes, keys: map[uint32]bool{}}
	for {
		f, err := r.Next()
		if err == io.EOF {
			return s
		}
		if err != nil {
			t.Fatal(err)
		}
		if f.Record == nil {
			continue
		}
		switch f.Record[ring.RecordKindOffset] {
		case ring.KindOpen:
			var open ring.OpenRecord
			open.Decode(f.Record)
			open.TableBytes = uint64(len(f.Table))
			rows, err := ring.ParseRows(f.Table, &open)
			if err != nil {
				t.Fatal(err)
			}
			spans := rows.Spaces[ring.SpaceTokens].Spans
			if rows.Table.Flags&ring.TablePacked != 0 && len(spans) > 1 {
				s.packed++
			}
			if slices.ContainsFunc(spans, func(x ring.RowSpan) bool { return x.KeyFirst > 0 }) {
				s.padded++
			}
		case ring.KindCapture:
			var c ring.Record
			c.Decode(f.Record)
			s.payload += uint64(len(f.Payload))
			if c.Outcome == ring.OutcomeDropped {
				s.dropped += uint64(c.Rows)
			}
			for d := range c.NDim {
				if c.Role[d] == ring.RoleKey {
					s.keys[c.Size[d]] = true
				}
			}
		}
	}
}

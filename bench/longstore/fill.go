// Package longstore makes stores of the size that benchmarks of reading ask for: captures of a model of Qwen3-4B's shape, 36 layers of 2,560 and 32 heads.
package longstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"time"

	"dmi/ring"
	"dmi/store"
	"dmi/tensor"
)

const (
	layers      = 36
	heads       = 32
	hidden      = 2560 // of the long request
	narrow      = 64   // of the short ones
	shortTokens = 4
)

// What stores hold: requests of the residual stream, and one of attention.
const (
	LongRequest     = "r0000b1b1.0"
	AttendedRequest = "r0000a77e.0"
	ShortRequest    = "r0000cafe." // and a number
)

// ResidualBytes is how much is stored of the long request.
func ResidualBytes(tokens int) int64 { return 2 * layers * hidden * int64(tokens) }

// AttentionBytes is how much is stored of the request with attention: every row has room for the keys of the last.
func AttentionBytes(tokens int) int64 { return 2 * layers * heads * int64(tokens) * int64(tokens) }

// site is what a session captures at every layer: bfloat16.
type site struct {
	tensor.Site
	shape []int
	row   func(layer, position int, into []byte)
}

// Fill makes a store of up to three sessions: a request of `tokens` tokens, `requests` of a few, and one of `attended` with the attention of all heads.
func Fill(dir string, tokens, requests, attended int) error {
	s, err := store.Open(dir, store.Options{})
	if err != nil {
		return err
	}
	random := rand.New(rand.NewPCG(1, 2))
	if requests > 0 {
		err = session(s, "cafe", requests, shortTokens, residual(narrow, random), random)
	}
	if attended > 0 && err == nil {
		err = session(s, "a77e", 1, attended, attention(attended, random), random)
	}
	if tokens > 0 && err == nil {
		err = session(s, "b1b1", 1, tokens, residual(hidden, random), random)
	}
	return errors.Join(err, s.Close())
}

// residual is larger with depth.
func residual(width int, random *rand.Rand) site {
	return site{tensor.Site{Name: "blocks.%d.hook_resid_post"}, []int{width}, func(layer, position int, into []byte) {
		grown := float32(math.Exp(float64(layer)/10)) * (1 + 0.3*float32(math.Sin(float64(position)/50)))
		for i := range width {
			put(into, i, grown*(float32(random.Uint32N(65536))/32768-1))
		}
	}}
}

// attention looks at the token before with half of its weight, and at all others alike.
func attention(tokens int, random *rand.Rand) site {
	return site{tensor.Site{Name: "blocks.%d.attn.hook_pattern", RowAxis: 1, Keyed: true}, []int{heads, tokens}, func(layer, position int, into []byte) {
		for head := range heads {
			for key := range position + 1 {
				put(into, head*tokens+key, 0.5/float32(position+1))
			}
			before := max(0, position-1)
			put(into, head*tokens+before, 0.5+0.5/float32(position+1))
		}
	}}
}

func put(into []byte, i int, v float32) {
	binary.LittleEndian.PutUint16(into[2*i:], uint16(math.Float32bits(v)>>16))
}

// A forward takes this many rows at most, as a prefill in pieces does.
const forwardRows = 1024

func session(s *store.Store, id string, requests, tokens int, kind site, random *rand.Rand) error {
	begun := time.Now()
	run := "r0000" + id
	number, err := s.BeginSession(tensor.Session{ID: "s0000" + id, Producer: "bench", Mode: "complete", Text: "ids", Begun: begun, Model: []byte(`{"name":"synthetic"}`)})
	if err != nil {
		return err
	}
	var sites []tensor.Site
	for i := range layers {
		one := kind.Site
		one.ID, one.Name, one.Layer = uint32(i), fmt.Sprintf(kind.Name, i), i
		sites = append(sites, one)
	}
	if err := errors.Join(s.AddSites(number, sites), s.PutRun(tensor.Run{ID: run, Session: number, Begun: begun})); err != nil {
		return err
	}
	step := uint64(0)
	at := begun
	for i := range requests {
		at = at.Add(time.Millisecond)
		r := tensor.Request{Key: tensor.RequestKey{Session: number, Request: uint64(i)}, ID: fmt.Sprintf("%s.%d", run, i), Run: run, Begun: at, Ended: at.Add(time.Millisecond), Reason: "finished"}
		for range tokens {
			r.Tokens = append(r.Tokens, random.Int64N(150_000))
		}
		if err := s.PutRequests([]tensor.Request{r}); err != nil {
			return err
		}
		for first := 0; first < tokens; first += forwardRows {
			step++
			if err := forward(s, r.Key, step, first, min(forwardRows, tokens-first), kind); err != nil {
				return err
			}
		}
		if err := s.FinishRequest(r.Key); err != nil {
			return err
		}
		if i%1000 == 999 {
			fmt.Fprintf(os.Stderr, "\r%d requests", i+1)
		}
	}
	fmt.Fprintln(os.Stderr)
	return s.EndSession(number, time.Now())
}

func forward(s *store.Store, key tensor.RequestKey, step uint64, first, rows int, kind site) error {
	span := ring.Span{Request: key.Request, Count: uint32(rows), Position: uint32(first)}
	table := make([]byte, ring.TableSize+ring.SpanSize)
	header := ring.Table{Magic: ring.TableMagic, Bytes: uint32(len(table)), Step: step, Spans: 1}
	header.Encode(table)
	span.Encode(table[ring.TableSize:])
	records := make([]byte, 2*ring.RecordSize)
	open := ring.OpenRecord{Seq: 2*step - 1, Step: step, TableBytes: uint64(len(table)), Sites: layers, Kind: ring.KindOpen, Rows: [ring.Spaces]uint32{uint32(rows)}}
	open.Encode(records)
	closing := ring.CloseRecord{Seq: 2 * step, Step: step, Kind: ring.KindClose}
	closing.Encode(records[ring.RecordSize:])
	if err := s.AppendStep(store.Step{Session: key.Session, First: 2 * (step - 1), Count: 2, Records: records, Tables: [][]byte{table}}); err != nil {
		return err
	}
	width := 2
	for _, n := range kind.shape {
		width *= n
	}
	var ids []uint32
	for layer := range layers {
		data := make([]byte, rows*width)
		for row := range rows {
			kind.row(layer, first+row, data[row*width:(row+1)*width])
		}
		ids = append(ids, uint32(layer))
		if err := s.AppendChunk(tensor.Chunk{Key: key, Site: uint32(layer), First: uint32(first), Rows: uint32(rows), Step: step, LastStep: step, DType: tensor.BF16, Shape: kind.shape, Data: data}); err != nil {
			return err
		}
	}
	return s.Book([]tensor.Entry{{Key: key, Sites: ids, First: uint32(first), Count: uint32(rows), Stride: 1, Step: step, Outcome: tensor.Captured}})
}

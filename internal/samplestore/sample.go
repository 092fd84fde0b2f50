// Package samplestore fills a store with a few captures whose every value is known by a formula, for tests of those who read stores.
package samplestore

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"math"
	"time"

	"dmi/ring"
	"dmi/store"
	"dmi/tensor"
)

// Sites of the sample, by id: tokens, a residual of 4, a pattern of 2 heads, logits of 3 that only the last row of a forward has.
const (
	SiteTokens = iota
	SiteResid
	SitePattern
	SiteLogits
	Sites
)

// Sample is what was put in.
type Sample struct {
	Session  tensor.Session
	Run      tensor.Run
	Requests []tensor.Request // of 6 and 3 positions; of the second, position 1 of the residual was dropped
	Sites    []tensor.Site
	Rows     uint64 // produced
}

// Positions is how many positions the i-th request has.
func (*Sample) Positions(i int) int { return []int{6, 3}[i] }

// Resid is an element of the residual.
func Resid(request, position, dim int) float32 {
	return float32(100*request+10*position+dim) + 0.5
}

// Pattern is the weight of a key: every head attends to itself with 1/2, to the rest evenly; head 1 the other way round in time.
func Pattern(head, query, key int) float32 {
	if query == 0 {
		return 1
	}
	own := query
	if head == 1 {
		own = 0
	}
	if key == own {
		return 0.5
	}
	return 0.5 / float32(query)
}

// Token is the id at a position.
func Token(request, position int) int64 { return int64(70001 + 1000*request + position) }

type forward struct{ request, first, count int }

// Fill puts a sample into a store under a session id.
func Fill(s *store.Store, id string) (*Sample, error) {
	begun := time.Unix(1_700_000_000, 0).UTC()
	sample := &Sample{
		Session: tensor.Session{ID: id, Producer: "0123456789abcdef0123456789abcdef", Mode: "complete", Text: "text", Hooks: []string{"**"}, Begun: begun,
			Model: json.RawMessage(`{"name":"sample","n_layers":1}`), Versions: json.RawMessage(`{"dmi":"1"}`), Process: json.RawMessage(`{"pid":1}`)},
		Run: tensor.Run{ID: "r" + id[1:], Labels: map[string]string{"topic": "capitals"}, Tags: []string{"demo"}, Begun: begun},
		Sites: []tensor.Site{{ID: SiteTokens, Name: "tokens", Layer: tensor.NoLayer},
			{ID: SiteResid, Name: "blocks.0.hook_resid_post", Aliases: []string{"blocks.0.hook_out"}, Layer: 0},
			{ID: SitePattern, Name: "blocks.0.attn.hook_pattern", Layer: 0, RowAxis: 1, Keyed: true},
			{ID: SiteLogits, Name: "unembed.hook_out", Aliases: []string{"logits"}, Layer: tensor.NoLayer, Space: tensor.Logits}},
	}
	number, err := s.BeginSession(sample.Session)
	if err != nil {
		return nil, err
	}
	sample.Session.Number, sample.Run.Session = number, number
	for i, text := range []string{"The capital of France", "Hello"} {
		r := tensor.Request{Key: tensor.RequestKey{Session: number, Request: uint64(i)}, ID: sample.Run.ID + "." + string(rune('0'+i)), Run: sample.Run.ID, Text: text,
			Labels: map[string]string{"n": string(rune('0' + i))}, Begun: begun, Ended: begun.Add(time.Second), Reason: "finished"}
		for p := range sample.Positions(i) {
			r.Tokens = append(r.Tokens, Token(i, p))
		}
		sample.Requests = append(sample.Requests, r)
	}
	if err := errors.Join(s.AddSites(number, sample.Sites), s.PutRun(sample.Run), s.PutRequests(sample.Requests)); err != nil {
		return nil, err
	}
	for step, forwards := range [][]forward{{{0, 0, 5}, {1, 0, 3}}, {{0, 5, 1}}} {
		if err := s.AppendStep(records(number, uint64(step), forwards)); err != nil {
			return nil, err
		}
		for _, f := range forwards {
			sample.Rows += uint64(f.count * Sites)
			if err := put(s, number, uint64(step), f); err != nil {
				return nil, err
			}
		}
	}
	for _, r := range sample.Requests {
		if err := s.FinishRequest(r.Key); err != nil {
			return nil, err
		}
	}
	return sample, nil
}

// records is a step as the ring would have held it: OPEN with its row table, and CLOSE.
func records(session uint32, step uint64, forwards []forward) store.Step {
	spans := make([]ring.Span, len(forwards))
	rows := uint32(0)
	for i, f := range forwards {
		spans[i] = ring.Span{Request: uint64(f.request), Position: uint32(f.first), Count: uint32(f.count), Batch: uint32(i)}
		rows += uint32(f.count)
	}
	table := make([]byte, ring.TableSize+len(spans)*ring.SpanSize)
	header := ring.Table{Magic: ring.TableMagic, Bytes: uint32(len(table)), Step: step, Spans: uint32(len(spans))}
	header.Encode(table)
	for i := range spans {
		spans[i].Encode(table[ring.TableSize+i*ring.SpanSize:])
	}
	both := make([]byte, 2*ring.OpenRecordSize)
	open := ring.OpenRecord{Seq: 2*step + 1, Step: step, TableBytes: uint64(len(table)), Sites: Sites, Kind: ring.KindOpen, Rows: [3]uint32{rows}}
	open.Encode(both)
	closing := ring.CloseRecord{Seq: 2*step + 2, Step: step, Kind: ring.KindClose}
	closing.Encode(both[ring.OpenRecordSize:])
	return store.Step{Session: session, First: 2 * step, Count: 2, Records: both, Tables: [][]byte{table}}
}

// put stores the rows of one forward of one request, and books them.
func put(s *store.Store, session uint32, step uint64, f forward) error {
	key := tensor.RequestKey{Session: session, Request: uint64(f.request)}
	var booked []tensor.Entry
	book := func(site uint32, first, count int, outcome tensor.Outcome, reason tensor.Reason) {
		if count > 0 {
			booked = append(booked, tensor.Entry{Key: key, Sites: []uint32{site}, First: uint32(first), Count: uint32(count), Stride: 1, Step: step, Outcome: outcome, Reason: reason})
		}
	}
	chunk := func(site uint32, first, count int, d tensor.DType, shape []int, data []byte) error {
		book(site, first, count, tensor.Captured, tensor.ReasonNone)
		if count == 0 {
			return nil
		}
		return s.AppendChunk(tensor.Chunk{Key: key, Site: site, First: uint32(first), Rows: uint32(count), Step: step, LastStep: step, DType: d, Shape: shape, Data: data})
	}
	little := binary.LittleEndian
	var tokens, pattern []byte
	for p := f.first; p < f.first+f.count; p++ {
		tokens = little.AppendUint64(tokens, uint64(Token(f.request, p)))
		for head := range 2 {
			for k := range f.first + f.count {
				w := float32(0)
				if k <= p {
					w = Pattern(head, p, k)
				}
				pattern = little.AppendUint32(pattern, math.Float32bits(w))
			}
		}
	}
	resid := func(first, count int) error {
		var data []byte
		for p := first; p < first+count; p++ {
			for d := range 4 {
				data = little.AppendUint32(data, math.Float32bits(Resid(f.request, p, d)))
			}
		}
		return chunk(SiteResid, first, count, tensor.F32, []int{4}, data)
	}
	err := errors.Join(chunk(SiteTokens, f.first, f.count, tensor.I64, []int{}, tokens),
		chunk(SitePattern, f.first, f.count, tensor.F32, []int{2, f.first + f.count}, pattern),
		chunk(SiteLogits, f.first+f.count-1, 1, tensor.F16, []int{3}, []byte{0, 0x3c, 0, 0x40, 0, 0x42})) // 1, 2, 3
	if f.request == 1 {
		err = errors.Join(err, resid(0, 1), resid(2, 1))
		book(SiteResid, 1, 1, tensor.Dropped, tensor.RingFull)
	} else {
		err = errors.Join(err, resid(f.first, f.count))
	}
	book(SiteLogits, f.first, f.count-1, tensor.NotComputed, tensor.Engine)
	return errors.Join(err, s.Book(booked))
}

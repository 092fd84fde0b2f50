// Package traffic gives a store what an engine would: steps, chunks of their rows, and books.
package traffic

import (
	"fmt"

	"dmi/ring"
	"dmi/store"
	"dmi/tensor"
)

// Traffic is a session's.
type Traffic struct {
	Store   *store.Store
	Session uint32
	width   int // bytes of a row
	ids     []uint32
	payload []byte
	at      int
	step    uint64
	records uint64
}

// Begin begins a session with so many sites, of rows of so many bytes of bf16.
func Begin(s *store.Store, id string, sites, width int) (*Traffic, error) {
	session, err := s.BeginSession(tensor.Session{ID: id, Producer: id, Mode: "complete"})
	if err != nil {
		return nil, err
	}
	t := &Traffic{Store: s, Session: session, width: width, payload: make([]byte, 64<<20)} // as the engine's staging is: written before, not zero
	for i := range t.payload {
		t.payload[i] = byte(i * 31)
	}
	list := make([]tensor.Site, sites)
	for i := range list {
		list[i] = tensor.Site{ID: uint32(i), Name: fmt.Sprintf("blocks.%d.hook_resid_post", i), Layer: i}
		t.ids = append(t.ids, uint32(i))
	}
	return t, s.AddSites(session, list)
}

// Key is a request's.
func (t *Traffic) Key(request uint64) tensor.RequestKey {
	return tensor.RequestKey{Session: t.Session, Request: request}
}

// Step is one forward: of each request, so many rows from a position on, at every site. It returns their bytes.
func (t *Traffic) Step(requests []uint64, first, rows uint32) (int64, error) {
	t.step++
	if err := t.append(requests, first, rows); err != nil {
		return 0, err
	}
	n := int(rows) * t.width
	entries := make([]tensor.Entry, 0, len(requests))
	for _, r := range requests {
		for site := range t.ids {
			if t.at+n > len(t.payload) {
				t.at = 0
			}
			c := tensor.Chunk{Key: t.Key(r), Site: uint32(site), First: first, Rows: rows, Step: t.step, LastStep: t.step, DType: tensor.BF16, Shape: []int{t.width / 2},
				Data: t.payload[t.at : t.at+n : t.at+n]}
			t.at += n
			if err := t.Store.AppendChunk(c); err != nil {
				return 0, err
			}
		}
		entries = append(entries, tensor.Entry{Key: t.Key(r), Sites: t.ids, First: first, Count: rows, Stride: 1, Step: t.step, Outcome: tensor.Captured})
	}
	return int64(len(requests)) * int64(len(t.ids)) * int64(n), t.Store.Book(entries)
}

// append has the step in the manifest.
func (t *Traffic) append(requests []uint64, first, rows uint32) error {
	table := make([]byte, ring.TableSize+len(requests)*ring.SpanSize)
	header := ring.Table{Magic: ring.TableMagic, Bytes: uint32(len(table)), Step: t.step, Spans: uint32(len(requests))}
	header.Encode(table)
	for i, r := range requests {
		span := ring.Span{Request: r, Count: rows, Position: first}
		span.Encode(table[ring.TableSize+i*ring.SpanSize:])
	}
	n := 2 + len(t.ids)
	records := make([]byte, n*ring.RecordSize)
	open := ring.OpenRecord{Step: t.step, TableBytes: uint64(len(table)), Sites: uint32(len(t.ids)), Kind: ring.KindOpen, Rows: [3]uint32{uint32(len(requests)) * rows}}
	open.Encode(records)
	for i := range t.ids {
		capture := ring.Record{Step: t.step, Site: uint32(i), Rows: uint32(len(requests)) * rows, Kind: ring.KindCapture, Outcome: ring.OutcomeCaptured}
		capture.Encode(records[(1+i)*ring.RecordSize:])
	}
	closing := ring.CloseRecord{Step: t.step, Kind: ring.KindClose}
	closing.Encode(records[(n-1)*ring.RecordSize:])
	t.records += uint64(n)
	return t.Store.AppendStep(store.Step{Session: t.Session, First: t.records - uint64(n), Count: n, Records: records, Tables: [][]byte{table}})
}

package store

import (
	"errors"
	"fmt"

	"dmi/ring"
	"dmi/tensor"
)

const recordBytes = ring.OpenRecordSize

// opening is what an OPEN or GAP record says was produced: rows of the token space, for every site that then was.
type opening struct {
	step  uint64
	sites uint32
	spans []rowSpan
	rows  uint64 // of the token space, over all spans, or where there are none
	loose uint64 // rows x sites that cannot be attributed (GAP)
}

type rowSpan struct {
	request uint64
	first   uint32
	count   uint32
	attempt uint16
}

// openings reads the OPEN and GAP records of a step frame. It trusts nothing but the frame's own checksum: the producer wrote the rest. A row
// table that makes no sense leaves the rows that OPEN counts, of no request.
func openings(s *Step) ([]opening, error) {
	if len(s.Records) != s.Count*recordBytes {
		return nil, fmt.Errorf("%d bytes of records, for %d records of %d", len(s.Records), s.Count, recordBytes)
	}
	tables := s.Tables
	var found []opening
	for i := range s.Count {
		b := s.Records[i*recordBytes:][:recordBytes]
		switch b[ring.OpenRecordKindOffset] {
		case ring.KindGap:
			var gap ring.GapRecord
			gap.Decode(b)
			found = append(found, opening{step: gap.Step, loose: gap.Rows})
		case ring.KindOpen:
			var open ring.OpenRecord
			open.Decode(b)
			o := opening{step: open.Step, sites: min(open.Sites, maxSites), rows: uint64(open.Rows[tensor.Tokens])}
			if open.TableBytes != 0 {
				if len(tables) == 0 {
					return nil, fmt.Errorf("record %d opens step %d with a row table, and none is left", s.First+uint64(i), o.step)
				}
				if spans, err := tokenSpans(tables[0]); err == nil {
					o.spans, o.rows = spans, 0
					for _, sp := range o.spans {
						o.rows += uint64(sp.count)
					}
				}
				tables = tables[1:]
			}
			found = append(found, o)
		}
	}
	if len(tables) > 0 {
		return nil, fmt.Errorf("%d row tables too many", len(tables))
	}
	return found, nil
}

func tokenSpans(table []byte) ([]rowSpan, error) {
	var t ring.Table
	if len(table) >= ring.TableSize {
		t.Decode(table)
	}
	if t.Magic != ring.TableMagic || uint64(len(table)) < ring.TableSize+ring.SpanSize*uint64(t.Spans) {
		return nil, errors.New("no row table")
	}
	var spans []rowSpan
	for i := range int(t.Spans) {
		var s ring.Span
		s.Decode(table[ring.TableSize+i*ring.SpanSize:])
		if s.Space == uint32(tensor.Tokens) && s.Count > 0 && s.Flags&ring.SpanNoRows == 0 {
			spans = append(spans, rowSpan{request: s.Request, first: s.Position, count: s.Count, attempt: s.Attempt})
		}
	}
	return spans, nil
}

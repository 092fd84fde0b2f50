package ring

import (
	"math/rand/v2"
	"strings"
	"testing"
)

// Rows keep their request and position in the order of a selection; runs that lie are refused, naming the field.
func TestSelections(t *testing.T) {
	spans := []Span{{Request: 1, Count: 5, Position: 10}, {Request: 2, First: 5, Count: 4, Position: 3}}
	whole := func() []Run {
		return []Run{{First: 4, Count: 1, Stride: 1, Selection: 1, Level: LevelFull}, {First: 5, Count: 2, Stride: 3, Selection: 1, Level: LevelStats}, {First: 0, Count: 4, Stride: 1, Selection: 1, Level: LevelOff},
			{First: 6, Count: 2, Stride: 1, Selection: 1, Level: LevelOff}}
	}
	parse := func(runs []Run) (*Rows, error) {
		b := make([]byte, TableSize+len(spans)*SpanSize+len(runs)*RunSize)
		(&Table{Magic: TableMagic, Bytes: uint32(len(b)), Spans: uint32(len(spans))}).Encode(b)
		for i := range spans {
			spans[i].Encode(b[TableSize+i*SpanSize:])
		}
		for i := range runs {
			runs[i].Encode(b[TableSize+len(spans)*SpanSize+i*RunSize:])
		}
		return ParseRows(b, &OpenRecord{Rows: [Spaces]uint32{9}})
	}
	rows, err := parse(whole())
	if err != nil {
		t.Fatal(err)
	}
	list := rows.List(1, SpaceTokens)
	var positions []uint32
	for _, s := range list.Spans {
		for i := range s.Count {
			positions = append(positions, s.Position+i)
		}
	}
	for i, want := range []uint32{14, 3, 6, 10, 11, 12, 13, 4, 5} {
		if positions[i] != want {
			t.Fatal(positions)
		}
	}
	if !list.Has(0, 1, LevelFull) || list.Has(0, 2, LevelFull) || !list.Has(1, 2, LevelStats) || list.Has(2, 2, LevelStats) || list.Has(3, 1, LevelFull) {
		t.Error("levels of rows")
	}
	if rows.List(2, SpaceTokens) != nil || rows.List(2, SpaceLogits) == nil {
		t.Error("a selection that is not there")
	}
	for field, lie := range map[string]func([]Run) []Run{
		"run.space":     func(r []Run) []Run { r[0].Space = 3; return r },
		"run.selection": func(r []Run) []Run { r[1].Selection = 0; return r },
		"run.level":     func(r []Run) []Run { r[0].Level = LevelOff; return r },
		"run.stride":    func(r []Run) []Run { r[1].Stride = 0; return r },
		"run.count":     func(r []Run) []Run { r[1].Count = 1 << 31; return r },
		"have a level":  func(r []Run) []Run { return r[:3] },
		"twice":         func(r []Run) []Run { r[3].First = 2; return r },
	} {
		if _, err := parse(lie(whole())); err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 1))
	for range 20000 { // anything at all ends in rows or an error
		runs := whole()
		for range 1 + random.IntN(3) {
			r := &runs[random.IntN(len(runs))]
			*r = Run{First: random.Uint32() >> random.IntN(32), Count: random.Uint32() >> random.IntN(32), Stride: random.Uint32() >> random.IntN(32), Selection: uint16(random.IntN(3)),
				Space: uint8(random.IntN(4)), Level: uint8(random.IntN(7))}
		}
		if rows, err := parse(runs); err == nil && rows.List(1, SpaceTokens).Count != 9 {
			t.Fatalf("seed %d: %+v", seed, runs)
		}
	}
}

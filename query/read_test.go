package query

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"slices"
	"testing"

	"dmi/tensor"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// A wanted answer, by looking at every row.
type wanted struct {
	positions []uint32
	rows      [][]byte
	missing   int
	keys      int
}

func (w *world) want(r tensor.Request, s worldSite, tokens Range) wanted {
	length := 0
	for p := range uint32(20) {
		if len(w.lookup(r, s.ID, p)) > 0 {
			length = int(p) + 1
		}
	}
	from, to := 0, length
	if tokens != (Range{}) {
		if from = tokens.From; from < 0 {
			from = max(0, from+length)
		}
		if to = tokens.To; to == End {
			to = max(from, length)
		} else if to < 0 {
			to += length
		}
	}
	var a wanted
	for p := from; p < to; p++ {
		rows := w.lookup(r, s.ID, uint32(p))
		var latest *worldRow
		for i := range rows {
			if rows[i].outcome == tensor.Captured && rows[i].level == tensor.Full {
				latest = &rows[i]
			}
		}
		if latest != nil {
			a.positions = append(a.positions, uint32(p))
			a.rows = append(a.rows, latest.data)
		} else if len(rows) == 0 || owed(rows[len(rows)-1].outcome) {
			a.missing++
		}
		if p < length {
			a.keys = p + 1
		}
	}
	return a
}

// tensor lays the rows out in the reader's shape, an element at a time.
func (a wanted) tensor(s worldSite, heads []int, f32 bool) (shape []int, data []byte) {
	stored := slices.Clone(s.shape)
	if s.Keyed {
		stored[len(stored)-1] = a.keys
	}
	if heads != nil {
		stored[0] = len(heads)
	}
	shape = slices.Insert(slices.Clone(stored), s.RowAxis, len(a.rows))
	index := make([]int, len(shape))
	size := s.dtype.Size()
	for range product(shape) {
		row := index[s.RowAxis]
		inner := slices.Delete(slices.Clone(index), s.RowAxis, s.RowAxis+1)
		if heads != nil {
			inner[0] = heads[inner[0]]
		}
		own := slices.Clone(s.shape) // this row's
		missing := false
		if s.Keyed {
			own[len(own)-1] = int(a.positions[row]) + 1
			missing = inner[len(inner)-1] > int(a.positions[row])
		}
		element := s.Fill.Element(s.dtype)
		if !missing {
			at := 0
			for d, i := range inner {
				at = at*own[d] + i
			}
			element = a.rows[row][at*size : (at+1)*size]
		}
		if f32 && s.dtype != tensor.F32 {
			var v [1]float64
			s.dtype.Floats(v[:], element)
			element = binary.LittleEndian.AppendUint32(nil, math.Float32bits(float32(v[0])))
		}
		data = append(data, element...)
		for d := len(index) - 1; d >= 0; d-- {
			if index[d]++; index[d] < shape[d] {
				break
			}
			index[d] = 0
		}
	}
	return shape, data
}

func drawRange(t *rapid.T) Range {
	if rapid.IntRange(0, 2).Draw(t, "everything") == 0 {
		return Range{}
	}
	from := rapid.IntRange(-4, 8).Draw(t, "from")
	to := rapid.SampledFrom([]int{End, -1, 1, 2, 5, 9, 12}).Draw(t, "to")
	return Range{from, to}
}

func drawHeads(t *rapid.T, s worldSite) []int {
	if len(s.shape) < 2 || rapid.Bool().Draw(t, "all heads") {
		return nil
	}
	all := rapid.Permutation([]int{0, 1, 2}[:s.shape[0]]).Draw(t, "heads")
	return all[:rapid.IntRange(1, len(all)).Draw(t, "number of heads")]
}

func TestTensorEqualsRowByRowReference(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t, rapid.Bool().Draw(t, "whole"))
		engines := []*Engine{New(w.memory(t)), New(w.memory(t))} // cut differently
		r := rapid.SampledFrom(w.requests).Draw(t, "request")
		s := rapid.SampledFrom(w.sites).Draw(t, "site")
		q := TensorQuery{Request: r.ID, Site: SiteName{Name: s.Name}, Tokens: drawRange(t), Heads: drawHeads(t, s), Partial: rapid.Bool().Draw(t, "partial")}
		if rapid.IntRange(0, 3).Draw(t, "convert") == 0 {
			q.As = tensor.F32
		}
		want := w.want(r, s, q.Tokens)
		for _, e := range engines {
			e.MemoryBytes = rapid.SampledFrom([]int{1, 40, 100, 300, 1000, 1 << 20}).Draw(t, "memory")
			checkTensor(t, e, q, s, want)
		}
	})
}

func checkTensor(t *rapid.T, e *Engine, q TensorQuery, s worldSite, want wanted) {
	ctx := context.Background()
	got, err := e.Tensor(ctx, q)
	if len(want.rows) == 0 || want.missing > 0 && !q.Partial {
		if !errors.Is(err, ErrIncomplete) {
			t.Fatalf("%d rows missing, %d there: got %v, error %v", want.missing, len(want.rows), got, err)
		}
		var failure *Error
		if errors.As(err, &failure); failure.Coverage == nil || failure.Coverage.Complete != (want.missing == 0) {
			t.Fatalf("%d rows missing: coverage %+v", want.missing, failure.Coverage)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	shape, data := want.tensor(s, q.Heads, q.As == tensor.F32)
	if !slices.Equal(got.Shape, shape) || len(got.Axes) != len(shape) {
		t.Fatalf("shape %v %v, want %v", got.Shape, got.Axes, shape)
	}
	if d := cmp.Diff(want.positions, positions(got.Positions)); d != "" {
		t.Fatalf("positions (-want +got):\n%s", d)
	}
	if got.Missing != uint64(want.missing) || got.Complete != (want.missing == 0) {
		t.Fatalf("missing %d, complete %v, want %d", got.Missing, got.Complete, want.missing)
	}
	if got.Size() != int64(len(data)) {
		t.Fatalf("size %d, want %d", got.Size(), len(data))
	}
	var all bytes.Buffer
	if _, err := got.Open(ctx).WriteTo(&all); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(all.Bytes(), data) {
		t.Fatalf("streamed % x\nwant     % x", all.Bytes(), data)
	}
	reader := got.Open(ctx)
	for range 4 { // a client that asks for ranges
		from := rapid.IntRange(0, len(data)).Draw(t, "range from")
		part := make([]byte, rapid.IntRange(0, len(data)-from).Draw(t, "range length"))
		if n, err := reader.ReadAt(part, int64(from)); n != len(part) || err != nil && err != io.EOF {
			t.Fatalf("range of %d at %d: %d, %v", len(part), from, n, err)
		}
		if !bytes.Equal(part, data[from:from+len(part)]) {
			t.Fatalf("range of %d at %d: % x, want % x", len(part), from, part, data[from:from+len(part)])
		}
	}
}

func positions(all []Span) (list []uint32) {
	for _, s := range all {
		for p := s.First; uint64(p) < s.end(); p++ {
			list = append(list, p)
		}
	}
	return list
}

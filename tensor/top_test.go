package tensor

import (
	"encoding/binary"
	"math"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// The greatest elements against all of them sorted: through a reduced chunk, and through one that had more.
func TestGreatestElementsOfReducedRows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rows, heads, keys := rapid.IntRange(1, 3).Draw(t, "rows"), rapid.IntRange(1, 3).Draw(t, "heads"), rapid.IntRange(1, 9).Draw(t, "keys")
		first, keyed := uint32(rapid.IntRange(0, 9).Draw(t, "first")), rapid.Bool().Draw(t, "keyed")
		top, less := rapid.IntRange(1, MaxTop).Draw(t, "top"), rapid.IntRange(0, MaxTop).Draw(t, "less")
		// Few values, so that many are equal.
		value := rapid.SampledFrom([]float32{0, float32(math.Copysign(0, -1)), 1, 2, 2, -1, math.MaxFloat32, 1e-45, float32(math.NaN()), float32(math.Inf(1)), float32(math.Inf(-1))})
		c := Chunk{DType: F32, Shape: []int{heads, keys}, First: first, Rows: uint32(rows)}
		want := make([][]Element, rows)
		for row := range rows {
			own, index := keys, uint32(0)
			if keyed {
				own = min(keys, int(first)+row+1)
			}
			for i := range heads * keys {
				v := value.Draw(t, "value")
				c.Data = binary.LittleEndian.AppendUint32(c.Data, math.Float32bits(v))
				if i%keys >= own {
					continue
				}
				if !math.IsNaN(float64(v)) && !math.IsInf(float64(v), 0) {
					want[row] = append(want[row], Element{index, float64(v)})
				}
				index++
			}
			slices.SortStableFunc(want[row], func(a, b Element) int {
				if a.Value > b.Value {
					return -1
				}
				if a.Value < b.Value {
					return 1
				}
				return 0
			})
		}
		check := func(has int) {
			if c.Level != Stats || TopIn(c.Shape) != has || len(c.Data) != rows*RowBytes(Stats, c.DType, c.Shape) {
				t.Fatalf("%v %v, %d bytes", c.Level, c.Shape, len(c.Data))
			}
			for row := range rows {
				found := TopOf(c.Data[len(c.Data)/rows*row : len(c.Data)/rows*(row+1)])
				if diff := cmp.Diff(append([]Element{}, want[row][:min(has, len(want[row]))]...), found); diff != "" {
					t.Fatal(diff)
				}
			}
		}
		c.Reduce(Stats, top, keyed, FillZero)
		check(top)
		c.Reduce(Stats, less, keyed, FillZero)
		check(min(top, less))
	})
}

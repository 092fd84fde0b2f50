package tensor

import (
	"encoding/binary"
	"math"
	"testing"

	"pgregory.net/rapid"
)

// Values of reduced rows are within the bounds that docs/format/policy.md states, and what is not finite comes back as such.
func TestReducedRowsAreWithinTheirBounds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rows, n := rapid.IntRange(1, 4).Draw(t, "rows"), rapid.IntRange(1, 30).Draw(t, "elements")
		values := make([]float32, rows*n)
		data := make([]byte, 0, 4*len(values))
		for i := range values {
			values[i] = rapid.OneOf(rapid.Float32(), rapid.Float32Range(-4, 4), rapid.SampledFrom([]float32{0, float32(math.NaN()), float32(math.Inf(1)), float32(math.Inf(-1))})).Draw(t, "value")
			data = binary.LittleEndian.AppendUint32(data, math.Float32bits(values[i]))
		}
		level := rapid.SampledFrom([]Level{FP8, Int8, Stats}).Draw(t, "level")
		c := Chunk{DType: F32, Shape: []int{n}, Rows: uint32(rows), Data: data}
		c.Reduce(level, 0, false, FillZero)
		if c.Level != level || len(c.Data) != rows*RowBytes(c.Level, c.DType, c.Shape) {
			t.Fatalf("%v: %d bytes at level %v", level, len(c.Data), c.Level)
		}
		got := c.Dequantised()
		for row := range rows {
			own := values[row*n : (row+1)*n]
			if level == Stats {
				want, figures := RowStats(F32, data[4*n*row:4*n*(row+1)]), FiguresOf(c.Data[4*Figures*row:])
				near := func(a, b float64) bool {
					return a == b || math.IsNaN(a) && math.IsNaN(b) || math.Abs(a-b) <= 1e-6*math.Abs(b)+1e-37 || math.IsInf(a, 0) && math.Abs(b) > math.MaxFloat32
				}
				if figures.Count != want.Count || figures.NonFinite != want.NonFinite || !near(figures.Min, want.Min) || !near(figures.Max, want.Max) || !near(figures.L2(), want.L2()) {
					t.Fatalf("row %d: %+v, not %+v", row, figures, want)
				}
				continue
			}
			absmax := 0.0
			for _, v := range own {
				if a := math.Abs(float64(v)); !math.IsInf(a, 0) && a > absmax {
					absmax = a
				}
			}
			for i, v := range own {
				want := float64(v)
				x := float64(math.Float32frombits(binary.LittleEndian.Uint32(got.Data[4*(row*n+i):])))
				bound := max(absmax/126, 0x1p-126) * 0.5001
				if level == FP8 {
					bound = math.Abs(want)*0.06251 + max(absmax/416, 0x1p-126)*0x1.001p-10
				}
				switch {
				case want != want && x == x, math.IsInf(want, 0) && x != want, !math.IsInf(want, 0) && want == want && !(math.Abs(x-want) <= bound):
					t.Fatalf("%v: element %d is %v, came back as %v", level, i, want, x)
				}
			}
		}
	})
}

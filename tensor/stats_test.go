package tensor

import (
	"encoding/binary"
	"math"
	"math/big"
	"math/rand/v2"
	"testing"
)

// The oracle sums exactly, with arbitrary precision, over values decoded one by one.
func TestStatisticsAgainstExactSums(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for d := Bool; d.Valid(); d++ {
		if !d.Real() {
			continue
		}
		for range 20 {
			elements := random.IntN(1500)
			data := make([]byte, elements*d.Size())
			for i := range data {
				data[i] = byte(random.Uint32())
			}
			if d == F64 { // random bits overflow the squares: stay in the range of what models compute
				for i := range elements {
					v := random.NormFloat64() * 1e6
					if random.IntN(20) == 0 {
						v = []float64{math.NaN(), math.Inf(1), math.Inf(-1)}[random.IntN(3)]
					}
					binary.LittleEndian.PutUint64(data[8*i:], math.Float64bits(v))
				}
			}
			if d == F32 && random.IntN(2) == 0 {
				for i := range elements {
					binary.LittleEndian.PutUint32(data[4*i:], math.Float32bits(float32(random.NormFloat64())))
				}
			}
			checkStatistics(t, d, data, random)
		}
		if got := RowStats(d, nil); got != (Statistics{}) {
			t.Errorf("%s: statistics of nothing: %+v", d, got)
		}
	}
}

func checkStatistics(t *testing.T, d DType, data []byte, random *rand.Rand) {
	t.Helper()
	size := d.Size()
	elements := len(data) / size
	exact := func() *big.Float { return new(big.Float).SetPrec(4096) }
	sum, squares, magnitude := exact(), exact(), exact()
	least, greatest := math.NaN(), math.NaN()
	finite, nonfinite := 0, 0
	for i := range elements {
		var v [1]float64
		d.Floats(v[:], data[i*size:(i+1)*size])
		if math.IsNaN(v[0]) || math.IsInf(v[0], 0) {
			nonfinite++
			continue
		}
		finite++
		x := exact().SetFloat64(v[0])
		sum.Add(sum, x)
		magnitude.Add(magnitude, exact().Abs(x))
		squares.Add(squares, exact().Mul(x, x))
		if math.IsNaN(least) || v[0] < least {
			least = v[0]
		}
		if math.IsNaN(greatest) || v[0] > greatest {
			greatest = v[0]
		}
	}
	cut := 0
	if elements > 0 {
		cut = random.IntN(elements + 1)
	}
	merged := RowStats(d, data[:cut*size])
	merged.Merge(RowStats(d, data[cut*size:]))
	for how, s := range map[string]Statistics{"whole": RowStats(d, data), "merged": merged} {
		if s.Count != uint64(elements) || s.NonFinite != uint64(nonfinite) {
			t.Fatalf("%s %s: counted %d elements and %d non-finite, want %d and %d", d, how, s.Count, s.NonFinite, elements, nonfinite)
		}
		if a, b := s.Range(); !same(a+0, least+0) || !same(b+0, greatest+0) {
			t.Fatalf("%s %s: range %v to %v, want %v to %v", d, how, a, b, least, greatest)
		}
		near := func(what string, got, want, scale float64) {
			if math.Abs(got-want) > 1e-12*scale && !same(got, want) {
				t.Fatalf("%s %s: %s %v, want %v", d, how, what, got, want)
			}
		}
		wantSum, _ := sum.Float64()
		wantSquares, _ := squares.Float64()
		scale, _ := magnitude.Float64()
		if finite == 0 {
			if !math.IsNaN(s.Mean()) || !math.IsNaN(s.RMS()) || !math.IsNaN(s.AbsMax()) || s.L2() != 0 {
				t.Fatalf("%s %s: of no finite element: %v %v %v %v", d, how, s.Mean(), s.RMS(), s.AbsMax(), s.L2())
			}
			continue
		}
		n := float64(finite)
		near("mean", s.Mean(), wantSum/n, scale/n)
		near("rms", s.RMS(), math.Sqrt(wantSquares/n), math.Sqrt(wantSquares/n))
		near("l2", s.L2(), math.Sqrt(wantSquares), math.Sqrt(wantSquares))
		near("absmax", s.AbsMax(), max(math.Abs(least), math.Abs(greatest)), 0)
	}
}

func BenchmarkRowStatsBF16(b *testing.B) {
	data := make([]byte, 5120)
	for i := range data {
		data[i] = byte(i)
	}
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		RowStats(BF16, data)
	}
}

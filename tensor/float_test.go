package tensor

import (
	"bufio"
	"encoding/binary"
	"math"
	"os"
	"strconv"
	"strings"
	"testing"
)

func same(a, b float64) bool { return a == b && math.Signbit(a) == math.Signbit(b) || a != a && b != b }

func TestEightBitFloatsAgainstMLDtypes(t *testing.T) {
	file, err := os.Open("testdata/float8.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	checked := 0
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if strings.HasPrefix(lines.Text(), "#") {
			continue
		}
		fields := strings.Fields(lines.Text())
		d, err := ParseDType(fields[0])
		if err != nil {
			t.Fatal(err)
		}
		bits, _ := strconv.Atoi(fields[1])
		want, err := strconv.ParseFloat(fields[2], 64)
		if err != nil {
			t.Fatal(err)
		}
		var got [1]float64
		d.Floats(got[:], []byte{byte(bits)})
		if !same(got[0], want) {
			t.Errorf("%s %#02x: got %v, want %v", d, bits, got[0], want)
		}
		checked++
	}
	if checked != 5*256 {
		t.Fatalf("checked %d values, want %d", checked, 5*256)
	}
}

// A half is a float32 with fewer bits, so decoding can be checked against arithmetic on float32's own fields.
func TestHalvesAgainstFloat32Arithmetic(t *testing.T) {
	for i := range 1 << 16 {
		exponent, mantissa := i>>10&31, i&1023
		var want float64
		switch {
		case exponent == 31 && mantissa != 0:
			want = math.NaN()
		case exponent == 31:
			want = math.Inf(1)
		case exponent == 0:
			want = float64(mantissa) / (1 << 24)
		default:
			want = float64(math.Float32frombits(uint32(exponent+127-15)<<23 | uint32(mantissa)<<13))
		}
		if i>>15 == 1 {
			want = -want
		}
		var got [1]float64
		F16.Floats(got[:], binary.LittleEndian.AppendUint16(nil, uint16(i)))
		if !same(got[0], want) {
			t.Fatalf("%#04x: got %v, want %v", i, got[0], want)
		}
	}
}

func TestFloat32s(t *testing.T) {
	for d := Bool; d.Valid(); d++ {
		if !d.Real() {
			continue
		}
		data := make([]byte, 1200*d.Size()) // more than one block
		for i := range data {
			data[i] = byte(i * 7)
		}
		floats := make([]float64, 1200)
		d.Floats(floats, data)
		got := make([]byte, 4*1200)
		d.Float32s(got, data)
		for i, v := range floats {
			g := float64(math.Float32frombits(binary.LittleEndian.Uint32(got[4*i:])))
			if d == I64 || d == U64 { // 53 bits of v, 24 of g
				if math.Abs(g-v) > math.Abs(v)/(1<<23) {
					t.Fatalf("%s element %d: got %v, want %v", d, i, g, v)
				}
			} else if !same(g, float64(float32(v))) {
				t.Fatalf("%s element %d: got %v, want %v", d, i, g, v)
			}
		}
	}
}

func TestFillIsMinusInfinityOrTheLowestValue(t *testing.T) {
	for d := Bool; d.Valid(); d++ {
		data := make([]byte, 5*d.Size())
		FillNegInf.Over(data, d)
		if !d.Real() {
			continue
		}
		got := make([]float64, 5)
		d.Floats(got, data)
		lowest := math.Inf(1)
		if d.Size() == 1 { // few enough to look at every one
			for bits := range 256 {
				if d == Bool && bits > 1 {
					break
				}
				var v [1]float64
				d.Floats(v[:], []byte{byte(bits)})
				if v[0] < lowest {
					lowest = v[0]
				}
			}
		} else {
			lowest = map[DType]float64{U16: 0, U32: 0, U64: 0, I16: math.MinInt16, I32: math.MinInt32, I64: math.MinInt64,
				F16: math.Inf(-1), BF16: math.Inf(-1), F32: math.Inf(-1), F64: math.Inf(-1)}[d]
		}
		for _, v := range got {
			if v != lowest {
				t.Errorf("%s: fill %v, lowest value %v", d, v, lowest)
			}
		}
		FillZero.Over(data, d)
		for _, b := range data {
			if b != 0 {
				t.Fatalf("%s: zero fill left %v", d, data)
			}
		}
	}
}

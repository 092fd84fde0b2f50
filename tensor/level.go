package tensor

import (
	"encoding/binary"
	"math"
)

// Rows are stored as they left the device (enum dmi_level of abi/ring.h): a quantised row is its scale, a float32, a byte an element, and zeros up to a multiple
// of 4; of a row at level Stats there are its figures, which are the shape and dtype of its chunk: [Figures] of F32, or more.

// Figures is how many numbers say what is kept of a row at level Stats: mean, rms, min, max, absmax, l2, elements that are not finite, elements. Behind them
// may be its K greatest finite elements, and then the bits of their K indices, uint32: [Figures+2K] of F32.
const Figures = 8

// MaxTop is the most of the greatest elements that a row at level Stats has.
const MaxTop = 64

// StatsShape is that of a row at level Stats with so many of its greatest elements.
func StatsShape(top int) []int { return []int{Figures + 2*top} }

// TopIn is how many of the greatest elements rows of a shape at level Stats have.
func TopIn(shape []int) int {
	if len(shape) != 1 {
		return 0
	}
	return max(0, shape[0]-Figures) / 2
}

const scaleBytes = 4

// Quantised reports whether rows at a level have codes for elements.
func (l Level) Quantised() bool { return l == FP8 || l == Int8 }

// Elements reports whether rows at a level are their elements, one after the other.
func (l Level) Elements() bool { return l == Full || l == Sampled }

// Values reports whether rows at a level have values of elements.
func (l Level) Values() bool { return l.Elements() || l.Quantised() }

// RowBytes is the size of a stored row at a level: of elements of d, in this shape.
func RowBytes(l Level, d DType, shape []int) int {
	n := 1
	for _, dim := range shape {
		n *= dim
	}
	if l.Quantised() {
		return scaleBytes + (n+3)/4*4
	}
	return n * d.Size()
}

// Dequantise writes the elements of a stored row at a quantised level to dst, float32, little-endian, 4 bytes each.
func (l Level) Dequantise(dst, row []byte) {
	little := binary.LittleEndian
	scale := math.Float32frombits(little.Uint32(row))
	codes := row[scaleBytes : scaleBytes+len(dst)/4]
	table := codesOf(l)
	for i, code := range codes {
		little.PutUint32(dst[4*i:], math.Float32bits(table[code]*scale))
	}
}

// codesOf is what each code stands for, times the scale.
func codesOf(l Level) *[256]float32 {
	infinity := float32(math.Inf(1))
	var table [256]float32
	if l == FP8 {
		table = eighths()[0]
		table[0x7e], table[0xfe] = infinity, -infinity
		return &table
	}
	for i := range table {
		table[i] = float32(int8(i))
	}
	table[127], table[129], table[128] = infinity, -infinity, float32(math.NaN())
	return &table
}

// Code is that of an element which stands for a key a row did not have.
func (f Fill) Code(l Level) byte {
	switch {
	case f != FillNegInf:
		return 0
	case l == FP8:
		return 0xfe
	}
	return 129
}

// FiguresOf reads a stored row at level Stats back. What they say is rounded to float32.
func FiguresOf(row []byte) Statistics {
	at := func(i int) float64 {
		return float64(math.Float32frombits(binary.LittleEndian.Uint32(row[4*i:])))
	}
	s := Statistics{Count: uint64(at(7)), NonFinite: uint64(at(6))}
	if s.NonFinite >= s.Count {
		return Statistics{Count: s.Count, NonFinite: s.Count}
	}
	s.Sum = at(0) * float64(s.Count-s.NonFinite)
	s.Squares = at(5) * at(5)
	s.Min, s.Max = at(2), at(3)
	return s
}

// Reduce makes full rows those of a lower level, as a producer would have, and of Stats keeps so many of the greatest elements alone, if there are more. keyed: the last dimension counts keys, of which a row has those up to its own position. Elements
// without one real value stay as they are.
func (c *Chunk) Reduce(to Level, top int, keyed bool, fill Fill) {
	if c.Level == Stats && to == Stats {
		c.narrow(top)
		return
	}
	if c.Level != Full || !c.DType.Real() || !to.Quantised() && to != Stats {
		return
	}
	size := RowBytes(Full, c.DType, c.Shape)
	elements := size / c.DType.Size()
	line := elements
	if keyed && len(c.Shape) > 0 {
		line = c.Shape[len(c.Shape)-1]
	}
	values := make([]float64, elements)
	shape, dtype := c.Shape, c.DType
	if to == Stats {
		shape, dtype = StatsShape(top), F32
	}
	bytes := RowBytes(to, dtype, shape)
	out := make([]byte, int(c.Rows)*bytes)
	for i := range int(c.Rows) {
		c.DType.Floats(values, c.Data[i*size:(i+1)*size])
		own := line
		if keyed {
			own = min(line, int(c.First)+i+1)
		}
		row := out[i*bytes : (i+1)*bytes]
		if to == Stats {
			figures(row, values, line, own)
			putTop(row[4*Figures:], Greatest(values, line, own, top), top)
		} else {
			quantise(row, to, values, line, own, fill)
		}
	}
	c.Level, c.DType, c.Shape, c.Data = to, dtype, shape, out
}

// figures sums up the first elements of each line.
func figures(row []byte, values []float64, line, own int) {
	var s Statistics
	for at := 0; at < len(values); at += line {
		s.Merge(ofFloats(values[at : at+own]))
	}
	least, greatest := s.Range()
	for i, v := range [Figures]float64{s.Mean(), s.RMS(), least, greatest, s.AbsMax(), s.L2(), float64(s.NonFinite), float64(s.Count)} {
		binary.LittleEndian.PutUint32(row[4*i:], math.Float32bits(float32(v)))
	}
}

const leastScale = 0x1p-126

func quantise(row []byte, to Level, values []float64, line, own int, fill Fill) {
	var absmax float32
	for at := 0; at < len(values); at += line {
		for _, v := range values[at : at+own] {
			if f := float32(math.Abs(v)); f > absmax && !math.IsInf(float64(f), 0) {
				absmax = f
			}
		}
	}
	most := float32(126)
	if to == FP8 {
		most = 416
	}
	scale := max(absmax/most, leastScale)
	binary.LittleEndian.PutUint32(row, math.Float32bits(scale))
	codes := row[scaleBytes:]
	for i, v := range values {
		switch {
		case i%line >= own:
			codes[i] = fill.Code(to)
		case to == FP8:
			codes[i] = fp8Code(float32(v), 1/scale)
		default:
			codes[i] = int8Code(float32(v), 1/scale)
		}
	}
}

func int8Code(v, inverse float32) byte {
	switch {
	case v != v:
		return 0x80
	case math.IsInf(float64(v), 0):
		return byte(int8(math.Copysign(127, float64(v))))
	}
	return byte(int8(max(-126, min(126, math.RoundToEven(float64(v*inverse))))))
}

func fp8Code(v, inverse float32) byte {
	sign := byte(math.Float32bits(v) >> 31 << 7)
	s := float32(math.Abs(float64(v * inverse)))
	switch {
	case v != v:
		return 0x7f
	case math.IsInf(float64(v), 0):
		return sign | 0x7e
	case s < 0x1p-6: // subnormal: multiples of 2^-9
		return sign | byte(math.RoundToEven(float64(s*512)))
	}
	bits := math.Float32bits(min(s, 416))
	bits += 0x7ffff + bits>>20&1 // to the nearest, halves to even
	return sign | byte(bits>>23-120)<<3 | byte(bits>>20&7)
}

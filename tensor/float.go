package tensor

import (
	"encoding/binary"
	"math"
	"sync"
)

// Real reports whether an element of d is one real number.
func (d DType) Real() bool { return d.Valid() && d != C64 && d != C128 }

// Floats decodes the elements of data (little-endian, len(data) == len(dst) * d.Size()) into dst. Every dtype but the 64-bit
// integers is exact. It panics unless d.Real().
func (d DType) Floats(dst []float64, data []byte) {
	little := binary.LittleEndian
	data = data[:len(dst)*d.Size()]
	switch d {
	case Bool, U8:
		for i := range dst {
			dst[i] = float64(data[i])
		}
	case I8:
		for i := range dst {
			dst[i] = float64(int8(data[i]))
		}
	case U16:
		for i := range dst {
			dst[i] = float64(little.Uint16(data[2*i:]))
		}
	case I16:
		for i := range dst {
			dst[i] = float64(int16(little.Uint16(data[2*i:])))
		}
	case U32:
		for i := range dst {
			dst[i] = float64(little.Uint32(data[4*i:]))
		}
	case I32:
		for i := range dst {
			dst[i] = float64(int32(little.Uint32(data[4*i:])))
		}
	case U64:
		for i := range dst {
			dst[i] = float64(little.Uint64(data[8*i:]))
		}
	case I64:
		for i := range dst {
			dst[i] = float64(int64(little.Uint64(data[8*i:])))
		}
	case F16:
		table := halves()
		for i := range dst {
			dst[i] = float64(table[little.Uint16(data[2*i:])])
		}
	case BF16:
		for i := range dst {
			dst[i] = float64(math.Float32frombits(uint32(little.Uint16(data[2*i:])) << 16))
		}
	case F32:
		for i := range dst {
			dst[i] = float64(math.Float32frombits(little.Uint32(data[4*i:])))
		}
	case F64:
		for i := range dst {
			dst[i] = math.Float64frombits(little.Uint64(data[8*i:]))
		}
	case F8E4M3, F8E5M2, F8E4M3FNUZ, F8E5M2FNUZ, F8E8M0:
		table := &eighths()[d-F8E4M3]
		for i := range dst {
			dst[i] = float64(table[data[i]])
		}
	default:
		panic("tensor: elements of " + d.String() + " are not real numbers")
	}
}

// Float32s converts the elements of data into dst, 4 little-endian bytes each, rounding to the nearest. It panics unless d.Real().
func (d DType) Float32s(dst, data []byte) {
	little := binary.LittleEndian
	size := d.Size()
	elements := len(data) / size
	switch d {
	case F32:
		copy(dst, data)
	case I64: // not by way of float64, which would round twice
		for i := range elements {
			little.PutUint32(dst[4*i:], math.Float32bits(float32(int64(little.Uint64(data[8*i:])))))
		}
	case U64:
		for i := range elements {
			little.PutUint32(dst[4*i:], math.Float32bits(float32(little.Uint64(data[8*i:]))))
		}
	default:
		var block [512]float64
		for done := 0; done < elements; {
			n := min(len(block), elements-done)
			d.Floats(block[:n], data[done*size:(done+n)*size])
			for i, v := range block[:n] {
				little.PutUint32(dst[4*(done+i):], math.Float32bits(float32(v)))
			}
			done += n
		}
	}
}

// halves decodes every F16.
var halves = sync.OnceValue(func() *[1 << 16]float32 {
	var table [1 << 16]float32
	for i := range table {
		table[i] = minifloat(uint32(i), 5, 10, 15, func(exponent, mantissa, sign uint32) (float64, bool) {
			if exponent != 31 {
				return 0, false
			}
			if mantissa != 0 {
				return math.NaN(), true
			}
			return math.Inf(1), true
		})
	}
	return &table
})

// eighths decodes every 8-bit float, in the order of DType.
var eighths = sync.OnceValue(func() *[5][256]float32 {
	var table [5][256]float32
	negativeZeroIsNaN := func(exponent, mantissa, sign uint32) (float64, bool) {
		return math.NaN(), exponent == 0 && mantissa == 0 && sign == 1
	}
	for i := range uint32(256) {
		table[0][i] = minifloat(i, 4, 3, 7, func(exponent, mantissa, _ uint32) (float64, bool) {
			return math.NaN(), exponent == 15 && mantissa == 7
		})
		table[1][i] = minifloat(i, 5, 2, 15, func(exponent, mantissa, _ uint32) (float64, bool) {
			if mantissa == 0 {
				return math.Inf(1), exponent == 31
			}
			return math.NaN(), exponent == 31
		})
		table[2][i] = minifloat(i, 4, 3, 8, negativeZeroIsNaN)
		table[3][i] = minifloat(i, 5, 2, 16, negativeZeroIsNaN)
		table[4][i] = float32(math.Ldexp(1, int(i)-127))
	}
	table[4][255] = float32(math.NaN())
	return &table
})

// minifloat decodes sign, exponent and mantissa; special says which bit patterns are not numbers, and what they are.
func minifloat(bits uint32, exponentBits, mantissaBits, bias int, special func(exponent, mantissa, sign uint32) (float64, bool)) float32 {
	mantissa := bits & (1<<mantissaBits - 1)
	exponent := bits >> mantissaBits & (1<<exponentBits - 1)
	sign := bits >> (mantissaBits + exponentBits)
	value, isSpecial := special(exponent, mantissa, sign)
	switch {
	case isSpecial:
	case exponent == 0:
		value = math.Ldexp(float64(mantissa), 1-bias-mantissaBits)
	default:
		value = math.Ldexp(float64(mantissa|1<<mantissaBits), int(exponent)-bias-mantissaBits)
	}
	if sign == 1 {
		value = -value
	}
	return float32(value)
}

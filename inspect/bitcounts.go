package inspect

import (
	"encoding/binary"

	"dmi/query"
	"dmi/tensor"
)

// bitCounts counts elements of 16 bits by their bits, one increment each; a sketch's bin takes ten instructions. What depends on the elements alone and not on
// where they are is then computed of the patterns that occur. Memory: 512 KiB.
type bitCounts struct {
	dtype  tensor.DType
	counts [1 << 16]uint64
}

// countingPays is from how many elements on looking through all patterns in the end costs little beside them.
const countingPays = 1 << 20

// bitCountsOf gives room to count a selection's elements; nil where they are of another size, or too few.
func bitCountsOf(s *query.Selection) *bitCounts {
	dtype, shape, some := s.Form()
	if !some || dtype.Size() != 2 || !dtype.Real() || s.Site().Keyed {
		return nil
	}
	rows := 0
	for _, span := range s.Present() {
		rows += int(span.Count)
	}
	if rows*product(shape) < countingPays {
		return nil
	}
	return &bitCounts{dtype: dtype}
}

// count takes in a block's elements, and says whether it could: not where there is no p, or they are of another type.
func (p *bitCounts) count(b query.Block) bool {
	if p == nil || b.DType != p.dtype {
		return false
	}
	rest := b.Stored
	for ; len(rest) >= 8; rest = rest[8:] {
		four := binary.LittleEndian.Uint64(rest)
		p.counts[uint16(four)]++
		p.counts[uint16(four>>16)]++
		p.counts[uint16(four>>32)]++
		p.counts[uint16(four>>48)]++
	}
	for ; len(rest) >= 2; rest = rest[2:] {
		p.counts[binary.LittleEndian.Uint16(rest)]++
	}
	return true
}

// each yields the numbers that occurred, and how often.
func (p *bitCounts) each(yield func(v float64, n uint64) bool) {
	if p == nil {
		return
	}
	for bits, n := range p.counts {
		if n == 0 {
			continue
		}
		var v [1]float64
		p.dtype.Floats(v[:], []byte{byte(bits), byte(bits >> 8)})
		if !yield(v[0], n) {
			return
		}
	}
}

package inspect

import "math"

// sketch counts numbers by sign and magnitude, 64 bins to each power of two, so that quantiles of any amount of data are known to within
// 1/128 of their value, and any number of sketches merge into the one of all their data. Zero has a bin of its own; magnitudes beyond those of
// float32 (2^-149 to 2^128) share the outermost bins. Memory: 512 B for each sign and power of two that occurs.
type sketch struct {
	zeros   uint64
	octaves [2][octaves]*[binsPerOctave]uint64 // by sign (1: negative), exponent - leastExponent
}

const (
	binBits       = 6
	binsPerOctave = 1 << binBits
	leastExponent = -150
	octaves       = 128 - leastExponent
)

// addAll takes in numbers, all of them finite.
func (s *sketch) addAll(values []float64) {
	for _, v := range values {
		bits := math.Float64bits(v)
		if exponent := bits>>52&0x7ff - (1023 + leastExponent); exponent < octaves {
			if page := s.octaves[bits>>63][exponent]; page != nil {
				page[bits>>(52-binBits)&(binsPerOctave-1)]++
				continue
			}
		}
		s.add(v, 1)
	}
}

// add takes in a finite number, n times.
func (s *sketch) add(v float64, n uint64) {
	if v == 0 {
		s.zeros += n
		return
	}
	bits := math.Float64bits(v)
	exponent := min(max(int(bits>>52&0x7ff)-1023-leastExponent, 0), octaves-1)
	page := s.octaves[bits>>63][exponent]
	if page == nil {
		page = new([binsPerOctave]uint64)
		s.octaves[bits>>63][exponent] = page
	}
	page[bits>>(52-binBits)&(binsPerOctave-1)] += n
}

func (s *sketch) merge(o *sketch) {
	s.zeros += o.zeros
	for sign := range o.octaves {
		for e, from := range o.octaves[sign] {
			if from == nil {
				continue
			}
			if s.octaves[sign][e] == nil {
				s.octaves[sign][e] = new([binsPerOctave]uint64)
			}
			for i, n := range from {
				s.octaves[sign][e][i] += n
			}
		}
	}
}

// magnitudes is the sketch of the numbers without their signs.
func (s *sketch) magnitudes() *sketch {
	m := &sketch{}
	m.merge(s)
	unsigned := &sketch{}
	unsigned.octaves[0] = m.octaves[1]
	m.octaves[1] = [octaves]*[binsPerOctave]uint64{}
	m.merge(unsigned)
	return m
}

// each walks the bins that hold something from the least number to the greatest, until yield says false.
func (s *sketch) each(yield func(middle float64, n uint64) bool) {
	middle := func(e, i int) float64 { return math.Ldexp(1+(float64(i)+0.5)/binsPerOctave, e+leastExponent) }
	for e := octaves - 1; e >= 0; e-- {
		if page := s.octaves[1][e]; page != nil {
			for i := binsPerOctave - 1; i >= 0; i-- {
				if page[i] > 0 && !yield(-middle(e, i), page[i]) {
					return
				}
			}
		}
	}
	if s.zeros > 0 && !yield(0, s.zeros) {
		return
	}
	for e := range octaves {
		if page := s.octaves[0][e]; page != nil {
			for i, n := range page {
				if n > 0 && !yield(middle(e, i), n) {
					return
				}
			}
		}
	}
}

func (s *sketch) count() (n uint64) {
	s.each(func(_ float64, some uint64) bool {
		n += some
		return true
	})
	return n
}

// quantiles gives, for each q of an ascending list, the number with floor(q x (n-1)) numbers below it; NaN of nothing.
func (s *sketch) quantiles(qs ...float64) []float64 {
	values := make([]float64, len(qs))
	for i := range values {
		values[i] = math.NaN()
	}
	n := s.count()
	if n == 0 {
		return values
	}
	below, next := uint64(0), 0
	s.each(func(middle float64, some uint64) bool {
		below += some
		for next < len(qs) && uint64(qs[next]*float64(n-1)) < below {
			values[next] = middle
			next++
		}
		return next < len(qs)
	})
	return values
}

// histogramOctaves bounds how many powers of two on each side of zero a histogram tells apart.
const histogramOctaves = 24

// Histogram is exact counts between ascending edges, len(Edges) = len(Counts) + 1. Edges are powers of two and their negatives: a bin
// holds magnitudes from its inner edge, included, to its outer, excluded; the one around zero whatever is smaller than the smallest told apart.
type Histogram struct {
	Edges  []float64 `json:"edges"`
	Counts []uint64  `json:"counts"`
}

// histogram sums the bins up by powers of two, of which the greatest histogramOctaves are told apart; nil of nothing.
func (s *sketch) histogram() *Histogram {
	top, low := -1, octaves
	sums := [2][octaves]uint64{}
	for sign := range s.octaves {
		for e, page := range s.octaves[sign] {
			if page == nil {
				continue
			}
			for _, n := range page {
				sums[sign][e] += n
			}
			top, low = max(top, e), min(low, e)
		}
	}
	if top < 0 {
		if s.zeros == 0 {
			return nil
		}
		return &Histogram{[]float64{0, 0}, []uint64{s.zeros}}
	}
	low = max(low, top-histogramOctaves+1)
	edge := func(e int) float64 { return math.Ldexp(1, e+leastExponent) }
	h := &Histogram{}
	around := s.zeros
	for e := range low {
		around += sums[0][e] + sums[1][e]
	}
	h.Edges = append(h.Edges, -edge(top+1))
	for e := top; e >= low; e-- {
		h.Edges, h.Counts = append(h.Edges, -edge(e)), append(h.Counts, sums[1][e])
	}
	h.Edges, h.Counts = append(h.Edges, edge(low)), append(h.Counts, around)
	for e := low; e <= top; e++ {
		h.Edges, h.Counts = append(h.Edges, edge(e+1)), append(h.Counts, sums[0][e])
	}
	for len(h.Counts) > 1 && h.Counts[0] == 0 {
		h.Edges, h.Counts = h.Edges[1:], h.Counts[1:]
	}
	for len(h.Counts) > 1 && h.Counts[len(h.Counts)-1] == 0 {
		h.Edges, h.Counts = h.Edges[:len(h.Edges)-1], h.Counts[:len(h.Counts)-1]
	}
	return h
}

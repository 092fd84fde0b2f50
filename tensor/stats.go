package tensor

import "math"

// Statistics sums up elements. The zero value is that of none; Add and Merge extend it, so that statistics of a request or a
// site are those of its rows, merged, and not an average of averages. Non-finite elements are counted and left out of the rest.
type Statistics struct {
	Count     uint64 // elements, non-finite ones included
	NonFinite uint64
	Sum       float64
	Squares   float64 // sum of squares
	Min, Max  float64 // 0 while Count == NonFinite
}

// RowStats is the statistics of the elements of data. It panics unless d.Real().
func RowStats(d DType, data []byte) Statistics {
	var s Statistics
	s.Add(d, data)
	return s
}

// Add takes in the elements of data. It panics unless d.Real().
func (s *Statistics) Add(d DType, data []byte) {
	size := d.Size()
	elements := len(data) / size
	var block [512]float64 // small enough for the stack and the first-level cache
	for done := 0; done < elements; {
		n := min(len(block), elements-done)
		d.Floats(block[:n], data[done*size:(done+n)*size])
		s.Merge(ofFloats(block[:n]))
		done += n
	}
}

func ofFloats(values []float64) Statistics {
	s := Statistics{Count: uint64(len(values)), Min: math.Inf(1), Max: math.Inf(-1)}
	for _, v := range values {
		if v-v != 0 { // NaN and both infinities
			s.NonFinite++
			continue
		}
		s.Sum += v
		s.Squares += v * v
		if v < s.Min {
			s.Min = v
		}
		if v > s.Max {
			s.Max = v
		}
	}
	return s
}

// Merge takes in what another statistics has seen.
func (s *Statistics) Merge(o Statistics) {
	switch {
	case o.finite() == 0:
	case s.finite() == 0:
		s.Min, s.Max = o.Min, o.Max
	default:
		s.Min, s.Max = min(s.Min, o.Min), max(s.Max, o.Max)
	}
	s.Count += o.Count
	s.NonFinite += o.NonFinite
	s.Sum += o.Sum
	s.Squares += o.Squares
}

func (s Statistics) finite() uint64 { return s.Count - s.NonFinite }

// Mean, RMS, AbsMax and L2 are of the finite elements. Of none at all, L2 is 0 and the others are NaN.
func (s Statistics) Mean() float64 { return s.Sum / float64(s.finite()) }

func (s Statistics) RMS() float64 { return math.Sqrt(s.Squares / float64(s.finite())) }

func (s Statistics) L2() float64 { return math.Sqrt(s.Squares) }

func (s Statistics) AbsMax() float64 {
	if s.finite() == 0 {
		return math.NaN()
	}
	return max(math.Abs(s.Min), math.Abs(s.Max))
}

// Range gives the least and the greatest finite element, NaN of none.
func (s Statistics) Range() (least, greatest float64) {
	if s.finite() == 0 {
		return math.NaN(), math.NaN()
	}
	return s.Min, s.Max
}

// Named gives a statistic by the name that documents and addresses use: mean, rms, min, max, absmax, l2, nonfinite. Another name is the caller's mistake,
// and panics.
func (s Statistics) Named(name string) float64 {
	least, greatest := s.Range()
	switch name {
	case "mean":
		return s.Mean()
	case "rms":
		return s.RMS()
	case "min":
		return least
	case "max":
		return greatest
	case "absmax":
		return s.AbsMax()
	case "l2":
		return s.L2()
	case "nonfinite":
		return float64(s.NonFinite)
	}
	panic("tensor: no statistic is called " + name)
}

// ChunkStatistics gives the statistics of each row of a chunk, at whatever level. Of a keyed row only keys up to its own position count: it has no others. Nil where
// the elements are not real numbers.
func ChunkStatistics(site Site, c Chunk) []Statistics {
	if !c.DType.Real() || c.Rows == 0 {
		return nil
	}
	all := make([]Statistics, c.Rows)
	if c.Level == Stats {
		for i := range all {
			all[i] = FiguresOf(c.Data[len(c.Data)/int(c.Rows)*i:])
		}
		return all
	}
	c = c.Dequantised()
	bytes := len(c.Data) / int(c.Rows)
	for i := range all {
		row := c.Data[i*bytes : (i+1)*bytes]
		if !site.Keyed || len(c.Shape) == 0 {
			all[i].Add(c.DType, row)
			continue
		}
		line := c.Shape[len(c.Shape)-1] * c.DType.Size()
		keys := min(line, (int(c.First)+i+1)*c.DType.Size())
		for at := 0; line > 0 && at < len(row); at += line {
			all[i].Add(c.DType, row[at:at+keys])
		}
	}
	return all
}

// Dequantised gives the values of quantised rows, as float32; other chunks as they are.
func (c Chunk) Dequantised() Chunk {
	if !c.Level.Quantised() {
		return c
	}
	from, elements := RowBytes(c.Level, c.DType, c.Shape), RowBytes(Full, U8, c.Shape)
	values := make([]byte, 4*elements*int(c.Rows))
	for i := range int(c.Rows) {
		c.Level.Dequantise(values[4*elements*i:4*elements*(i+1)], c.Data[from*i:from*(i+1)])
	}
	c.Level, c.DType, c.Data = Full, F32, values
	return c
}

package inspect

import (
	"cmp"
	"context"
	"math"
	"slices"

	"dmi/query"
)

// OutliersQuery asks for dimensions that stand out.
type OutliersQuery struct {
	query.Scope
	Site      string // glob, alias or name; "": every site whose rows are vectors
	Layer     *int
	Threshold float64 // magnitude of an outlier; 0: 6
	Share     float64 // of rows in which a dimension has to reach it; 0: 0.06
	Tolerance float64 // magnitude up to which a neuron counts as silent
}

// Kinds of dimensions.
const (
	Massive = "massive"
	Outlier = "outlier"
	Dead    = "dead"
)

const (
	massiveMagnitude = 100.0
	massiveRatio     = 1000.0
)

// OutlierRow is a dimension that stands out. Of a row [heads, dim], dimensions count through all heads.
type OutlierRow struct {
	Site      string `json:"site"`
	Layer     *int   `json:"layer"`
	Dim       int    `json:"dim"`
	Kind      string `json:"kind"`
	Rows      uint64 `json:"rows"`
	Mean      Number `json:"mean"`
	Std       Number `json:"std"`
	RMS       Number `json:"rms"`
	AbsMax    Number `json:"absmax"`
	Share     Number `json:"share"` // of rows at the threshold or beyond
	Ratio     Number `json:"ratio"` // RMS over the median RMS of the site's dimensions
	NonFinite uint64 `json:"nonfinite"`
	Missing   uint64 `json:"missing"`
}

// dimensions sums up the finite values of each dimension, one array a sum: that of a row's neighbours lies beside it.
type dimensions struct {
	seen, beyond, nonfinite []uint64
	absmax                  []uint64 // bits of the greatest magnitude, which are ordered as magnitudes are
	sum, squares            []float64
	rows, missing           uint64
	values                  sketch // of all dimensions
}

// Outliers yields dimensions that are massive, outliers or dead, site by site, in the order of dimensions.
func Outliers(ctx context.Context, e *query.Engine, q OutliersQuery, yield func(OutlierRow) error) error {
	threshold, share := cmp.Or(q.Threshold, 6), cmp.Or(q.Share, 0.06)
	if !(threshold > 0) || !(share > 0 && share <= 1) || !(q.Tolerance >= 0) {
		return badArgument("say a threshold above 0, a share of rows above 0 and at most 1, and a tolerance of 0 or more",
			"outliers of threshold %v, share %v, tolerance %v", q.Threshold, q.Share, q.Tolerance)
	}
	survey, err := e.Survey(ctx, q.Scope, q.Site, q.Layer, query.Range{})
	if err != nil {
		return err
	}
	var sum *dimensions
	return eachSelection(ctx, survey, func(ctx context.Context, s *query.Selection) (*dimensions, error) {
		d, shape, some := s.Form()
		vectors := some && d.Real() && !s.Site().Keyed && s.Site().Name != "tokens" && product(shape) > 1
		if !vectors {
			if q.Site != "" && some {
				return nil, badArgument("name a site such as blocks.0.hook_resid_post", "outlier dimensions of site %s: its rows are not vectors", s.Site().Name)
			}
			return nil, nil
		}
		return sumDimensions(ctx, s, threshold)
	}, func(at place, d *dimensions) error {
		if d != nil {
			if sum == nil {
				sum = &dimensions{}
			}
			sum.merge(d)
		}
		if !at.last || sum == nil {
			return nil
		}
		whole := sum
		sum = nil
		return whole.lines(at.site, share, q.Tolerance, yield)
	})
}

func sumDimensions(ctx context.Context, s *query.Selection, threshold float64) (*dimensions, error) {
	all := &dimensions{missing: s.Missing()}
	bits := bitCountsOf(s)
	err := s.EachBlock(ctx, blockBytes, decodedBytes, func(b query.Block) error {
		all.grow(b.Width)
		finite := finite(b.Data)
		switch {
		case bits.count(b):
		case finite:
			all.values.addAll(b.Data)
		default:
			for _, v := range b.Data {
				if v-v == 0 {
					all.values.add(v, 1)
				}
			}
		}
		row := 0
		for ; finite && row+4 <= b.Rows; row += 4 {
			all.addFour(b.Data[row*b.Width:(row+4)*b.Width], threshold)
		}
		for ; row < b.Rows; row++ {
			all.add(b.Data[row*b.Width:(row+1)*b.Width], threshold)
		}
		all.rows += uint64(b.Rows)
		for i := range b.Width {
			all.seen[i] += uint64(b.Rows)
		}
		return nil
	})
	for v, n := range bits.each {
		if v-v == 0 {
			all.values.add(v, n)
		}
	}
	return all, err
}

// finite says whether all values are; where it says no, they may still be, and very large.
func finite(values []float64) bool {
	squares := dot(values, values)
	return squares-squares == 0
}

// magnitude is the bits of a number without its sign: ordered as the magnitudes are.
func magnitude(v float64) uint64 { return math.Float64bits(v) &^ (1 << 63) }

func (d *dimensions) add(row []float64, threshold float64) {
	least := magnitude(threshold)
	for i, v := range row {
		if v-v != 0 {
			d.nonfinite[i]++
			continue
		}
		a := magnitude(v)
		d.sum[i] += v
		d.squares[i] += v * v
		d.absmax[i] = max(d.absmax[i], a)
		if a >= least {
			d.beyond[i]++
		}
	}
}

// addFour adds four rows of finite numbers, one after the other: each sum is read and written once for all of them.
func (d *dimensions) addFour(rows []float64, threshold float64) {
	n := len(rows) / 4
	r0, r1, r2, r3 := rows[:n], rows[n : 2*n][:n], rows[2*n : 3*n][:n], rows[3*n:][:n]
	sum, squares, absmax, beyond := d.sum[:n], d.squares[:n], d.absmax[:n], d.beyond[:n]
	under := magnitude(threshold) - 1 // a greater magnitude, taken from it, leaves the highest bit set: there is no branch to mispredict
	for i := range n {
		a, b, c, e := r0[i], r1[i], r2[i], r3[i]
		sum[i] += (a + b) + (c + e)
		squares[i] += (a*a + b*b) + (c*c + e*e)
		x, y, z, w := magnitude(a), magnitude(b), magnitude(c), magnitude(e)
		absmax[i] = max(absmax[i], max(max(x, y), max(z, w)))
		beyond[i] += (under-x)>>63 + (under-y)>>63 + (under-z)>>63 + (under-w)>>63
	}
}

func (d *dimensions) grow(n int) {
	if more := n - len(d.sum); more > 0 {
		d.seen, d.beyond, d.nonfinite = append(d.seen, make([]uint64, more)...), append(d.beyond, make([]uint64, more)...), append(d.nonfinite, make([]uint64, more)...)
		d.absmax = append(d.absmax, make([]uint64, more)...)
		d.sum, d.squares = append(d.sum, make([]float64, more)...), append(d.squares, make([]float64, more)...)
	}
}

func (d *dimensions) merge(o *dimensions) {
	d.grow(len(o.sum))
	for i := range o.sum {
		d.seen[i] += o.seen[i]
		d.beyond[i] += o.beyond[i]
		d.nonfinite[i] += o.nonfinite[i]
		d.absmax[i] = max(d.absmax[i], o.absmax[i])
		d.sum[i] += o.sum[i]
		d.squares[i] += o.squares[i]
	}
	d.rows += o.rows
	d.missing += o.missing
	d.values.merge(&o.values)
}

func (d *dimensions) lines(site query.SurveyedSite, share, tolerance float64, yield func(OutlierRow) error) error {
	var rms []float64
	for i := range d.sum {
		if n := d.seen[i] - d.nonfinite[i]; n > 0 {
			rms = append(rms, math.Sqrt(d.squares[i]/float64(n)))
		}
	}
	typical := median(rms)
	middle := d.values.magnitudes().quantiles(0.5)[0]
	for i := range d.sum {
		if d.seen[i] == d.nonfinite[i] {
			continue
		}
		n, absmax := float64(d.seen[i]-d.nonfinite[i]), math.Float64frombits(d.absmax[i])
		kind := ""
		switch {
		case absmax > massiveMagnitude && absmax > massiveRatio*middle:
			kind = Massive
		case float64(d.beyond[i])/float64(d.rows) >= share:
			kind = Outlier
		case absmax <= tolerance:
			kind = Dead
		default:
			continue
		}
		mean, power := d.sum[i]/n, math.Sqrt(d.squares[i]/n)
		err := yield(OutlierRow{Site: site.Name, Layer: layerOf(site), Dim: i, Kind: kind, Rows: d.rows, Mean: Number(mean), Std: Number(math.Sqrt(max(0, d.squares[i]/n-mean*mean))),
			RMS: Number(power), AbsMax: Number(absmax), Share: Number(float64(d.beyond[i]) / float64(d.rows)), Ratio: Number(power / typical), NonFinite: d.nonfinite[i], Missing: d.missing})
		if err != nil {
			return err
		}
	}
	return nil
}

// median is the mean of the two in the middle; it reorders values. NaN of none.
func median(values []float64) float64 {
	if len(values) == 0 {
		return nan
	}
	slices.Sort(values)
	n := len(values)
	return (values[(n-1)/2] + values[n/2]) / 2
}

func product(dims []int) int {
	n := 1
	for _, d := range dims {
		n *= d
	}
	return n
}

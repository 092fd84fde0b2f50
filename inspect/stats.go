package inspect

import (
	"context"
	"math"
	"strconv"
	"strings"

	"github.com/viterin/vek"

	"dmi/query"
	"dmi/tensor"
)

// StatsQuery asks for distributions.
type StatsQuery struct {
	query.Scope
	Site   string // glob, alias or name; "": every site
	Layer  *int
	Tokens query.Range
	Per    query.Per // PerSite or PerRequest
}

// StatsRow is the distribution of the elements of a site, over all rows asked for or over those of one request. Figures are of the finite
// elements, null where there is none.
type StatsRow struct {
	Request   *string `json:"request"`
	Site      string  `json:"site"`
	Layer     *int    `json:"layer"`
	Rows      uint64  `json:"rows"`
	Missing   uint64  `json:"missing"` // rows owed that are not there
	Count     uint64  `json:"count"`   // elements
	NonFinite uint64  `json:"nonfinite"`
	NaN       uint64  `json:"nan"`
	Zeros     uint64  `json:"zeros"`
	Mean      Number  `json:"mean"`
	Std       Number  `json:"std"`
	RMS       Number  `json:"rms"`
	Min       Number  `json:"min"`
	Max       Number  `json:"max"`
	AbsMax    Number  `json:"absmax"`
	P01       Number  `json:"p01"`
	P05       Number  `json:"p05"`
	P25       Number  `json:"p25"`
	P50       Number  `json:"p50"`
	P75       Number  `json:"p75"`
	P95       Number  `json:"p95"`
	P99       Number  `json:"p99"`
	// Norm is the mean of the rows' L2 norms, NormMax the greatest; Growth is Norm over that of the same site one layer before.
	Norm      Number     `json:"norm"`
	NormMax   Number     `json:"norm_max"`
	Growth    Number     `json:"growth"`
	Histogram *Histogram `json:"histogram"`
}

// distribution is what a StatsRow is made of; distributions merge.
type distribution struct {
	rows, missing, nan uint64
	elements           tensor.Statistics
	bins               sketch
	norms, greatest    float64
}

func (d *distribution) add(row []float64) {
	d.addElements(row)
	d.addNorm(squaresOf(row))
}

// addNorm takes in a row by the sum of the squares of its finite elements.
func (d *distribution) addNorm(squares float64) {
	norm := math.Sqrt(squares)
	d.rows++
	d.norms += norm
	d.greatest = max(d.greatest, norm)
}

func (d *distribution) addElements(values []float64) {
	if len(values) == 0 {
		return
	}
	squares := dot(values, values)
	if squares-squares == 0 { // all finite
		d.elements.Merge(tensor.Statistics{Count: uint64(len(values)), Sum: vek.Sum(values), Squares: squares, Min: vek.Min(values), Max: vek.Max(values)})
		d.bins.addAll(values)
		return
	}
	for _, v := range values {
		d.addElement(v, 1)
	}
}

// addElement takes in an element that occurs n times.
func (d *distribution) addElement(v float64, n uint64) {
	if v-v != 0 { // NaN and both infinities
		if v != v {
			d.nan += n
		}
		d.elements.Merge(tensor.Statistics{Count: n, NonFinite: n})
		return
	}
	times := float64(n)
	d.elements.Merge(tensor.Statistics{Count: n, Sum: times * v, Squares: times * v * v, Min: v, Max: v})
	d.bins.add(v, n)
}

// squaresOf sums the squares of the finite elements up.
func squaresOf(row []float64) float64 {
	if sum := dot(row, row); sum-sum == 0 {
		return sum
	}
	sum := 0.0
	for _, v := range row {
		if v-v == 0 {
			sum += v * v
		}
	}
	return sum
}

func (d *distribution) merge(o *distribution) {
	d.rows += o.rows
	d.missing += o.missing
	d.nan += o.nan
	d.elements.Merge(o.elements)
	d.bins.merge(&o.bins)
	d.norms += o.norms
	d.greatest = max(d.greatest, o.greatest)
}

// blockBytes is how much of a chunk is read at a time by each core.
const blockBytes = 1 << 20

// decodedBytes is how many of a block's numbers are looked at together: they stay in a core's second-level cache meanwhile.
const decodedBytes = 256 << 10

// Stats yields distributions, site by site. Rows that are not there are no error: each line says how many it is of, and how many are missing.
func Stats(ctx context.Context, e *query.Engine, q StatsQuery, yield func(StatsRow) error) error {
	if q.Per != query.PerSite && q.Per != query.PerRequest {
		return badArgument("say per=site or request; /v1/stats has figures per row", "distributions per %s", q.Per)
	}
	survey, err := e.Survey(ctx, q.Scope, q.Site, q.Layer, q.Tokens)
	if err != nil {
		return err
	}
	growth := growths{}
	var sum *distribution // of the requests of a site so far
	return eachSelection(ctx, survey, func(ctx context.Context, s *query.Selection) (*distribution, error) {
		return distributionOf(ctx, s)
	}, func(at place, d *distribution) error {
		if q.Per == query.PerRequest {
			if d == nil || d.rows == 0 {
				return nil
			}
			line := d.line(at.site)
			line.Request = &survey.Requests[at.request].ID
			line.Growth = growth.of(*line.Request, at.site, line.Norm)
			return yield(line)
		}
		if sum == nil {
			sum = &distribution{}
		}
		if d != nil {
			sum.merge(d)
		}
		if !at.last {
			return nil
		}
		whole := sum
		sum = nil
		if whole.rows == 0 && whole.missing == 0 {
			return nil
		}
		line := whole.line(at.site)
		line.Growth = growth.of("", at.site, line.Norm)
		return yield(line)
	})
}

func distributionOf(ctx context.Context, s *query.Selection) (*distribution, error) {
	d := &distribution{missing: s.Missing()}
	if s.Site().Keyed {
		return d, s.EachRow(ctx, blockBytes, func(v query.Values) error {
			d.add(v.Data)
			return nil
		})
	}
	bits := bitCountsOf(s)
	err := s.EachBlock(ctx, blockBytes, decodedBytes, func(b query.Block) error {
		if !bits.count(b) {
			d.addElements(b.Data)
		}
		for i := range b.Rows {
			d.addNorm(squaresOf(b.Data[i*b.Width : (i+1)*b.Width]))
		}
		return nil
	})
	for v, n := range bits.each {
		d.addElement(v, n)
	}
	return d, err
}

func (d *distribution) line(site query.SurveyedSite) StatsRow {
	e := d.elements
	least, greatest := e.Range()
	mean := e.Mean()
	row := StatsRow{Site: site.Name, Layer: layerOf(site), Rows: d.rows, Missing: d.missing, Count: e.Count, NonFinite: e.NonFinite, NaN: d.nan, Zeros: d.bins.zeros,
		Mean: Number(mean), Std: Number(math.Sqrt(max(0, e.Squares/float64(e.Count-e.NonFinite)-mean*mean))), RMS: Number(e.RMS()), Min: Number(least), Max: Number(greatest),
		AbsMax: Number(e.AbsMax()), Norm: Number(d.norms / float64(d.rows)), NormMax: Number(d.greatest), Growth: Number(math.NaN()), Histogram: d.bins.histogram()}
	quantiles := d.bins.quantiles(0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
	for i, to := range []*Number{&row.P01, &row.P05, &row.P25, &row.P50, &row.P75, &row.P95, &row.P99} {
		*to = Number(min(max(quantiles[i], least), greatest))
	}
	if d.rows == 0 {
		row.NormMax = Number(math.NaN())
	}
	return row
}

// growths remembers, of each site and request, the norm in the layer last seen.
type growths map[string]struct {
	layer int
	norm  Number
}

// of gives the growth since the layer before, NaN where that was not looked at.
func (g growths) of(request string, site query.SurveyedSite, norm Number) Number {
	if site.Layer == tensor.NoLayer {
		return Number(math.NaN())
	}
	kind := request + "\x00" + strings.Replace(site.Name, "."+strconv.Itoa(site.Layer)+".", ".*.", 1)
	before, known := g[kind]
	g[kind] = struct {
		layer int
		norm  Number
	}{site.Layer, norm}
	if !known || before.layer != site.Layer-1 {
		return Number(math.NaN())
	}
	return norm / before.norm
}

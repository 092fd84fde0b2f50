package inspect

import (
	"cmp"
	"context"
	"fmt"
	"math"

	"github.com/viterin/vek"

	"dmi/query"
)

// SimilarityQuery asks how alike sites are, each with each.
type SimilarityQuery struct {
	query.Scope
	Site   string // glob; "": hook_resid_post of every layer
	Layer  *int
	Tokens query.Range
	Sample int // rows that CKA is computed of; 0: 512
}

// SimilarityRow is a pair of sites; A comes first in the model.
type SimilarityRow struct {
	SiteA     string `json:"site_a"`
	SiteB     string `json:"site_b"`
	LayerA    *int   `json:"layer_a"`
	LayerB    *int   `json:"layer_b"`
	Cosine    Number `json:"cosine"` // mean over rows; null where the sites' rows differ in length
	CKA       Number `json:"cka"`
	Rows      uint64 `json:"rows"`      // that every site has, and whose cosine counts
	Sampled   uint64 `json:"sampled"`   // of which CKA is
	NonFinite uint64 `json:"nonfinite"` // rows left out of the cosine because it is not a number
}

const (
	defaultSample = 512
	maxSample     = 4096
	tableBytes    = 80 << 20 // of stored rows of all sites at a time: as many as a chunk holds of each, lest chunks are read twice
	memoryBytes   = 1 << 30  // bound of all sites' Gram matrices, and of the sampled rows that they are made of
)

type cosines struct {
	sum             float64
	rows, nonfinite uint64
}

// Similarity yields every pair of sites, once all rows were read. It reads them once for the cosines; CKA keeps a Gram matrix a site.
func Similarity(ctx context.Context, e *query.Engine, q SimilarityQuery, yield func(SimilarityRow) error) error {
	n := cmp.Or(q.Sample, defaultSample)
	if n < 2 || n > maxSample {
		return badArgument("", "CKA of %d rows: say 2 to %d", n, maxSample)
	}
	survey, err := e.Survey(ctx, q.Scope, cmp.Or(q.Site, residuals), q.Layer, q.Tokens)
	if err != nil {
		return err
	}
	sites := len(survey.Sites)
	if need := int64(sites) * int64(n) * int64(n) * 8; need > memoryBytes {
		return tooMuch(fmt.Sprintf("matrices of %d sites and %d rows", sites, n), need, "name fewer sites, or a smaller sample")
	}
	s := &similarity{survey: survey, pairs: make([][]cosines, sites), grams: make([]gram, sites)}
	for i := range s.pairs {
		s.pairs[i] = make([]cosines, sites)
	}
	total, err := s.count(ctx)
	if err != nil {
		return err
	}
	s.total, s.sample = total, min(uint64(n), total)
	if err := s.read(ctx); err != nil {
		return err
	}
	if err := s.centre(ctx); err != nil {
		return err
	}
	for i, a := range survey.Sites {
		for j := i; j < sites; j++ {
			b, c := survey.Sites[j], s.pairs[i][j]
			row := SimilarityRow{SiteA: a.Name, SiteB: b.Name, LayerA: layerOf(a), LayerB: layerOf(b), Cosine: Number(c.sum / float64(c.rows)), CKA: Number(s.cka(i, j)),
				Rows: c.rows, Sampled: uint64(s.grams[i].n), NonFinite: c.nonfinite}
			if err := yield(row); err != nil {
				return err
			}
		}
	}
	return nil
}

type similarity struct {
	survey *query.Survey
	pairs  [][]cosines // [i][j], i <= j
	grams  []gram
	total  uint64 // rows that all sites have
	sample uint64 // of them, those that CKA is of: the k-th is row k*total/sample
}

// gram is inner products of a site's sampled rows, row by row.
type gram struct {
	n    int
	k    []float64
	norm float64
}

// selections finds a request at every site; nil where one of them has none of it.
func (s *similarity) selections(ctx context.Context, request int) ([]*query.Selection, error) {
	all := make([]*query.Selection, len(s.survey.Sites))
	for i := range all {
		one, err := s.survey.Select(ctx, i, request)
		if err != nil || one == nil {
			return nil, err
		}
		if one.Site().Keyed {
			return nil, badArgument("name sites such as "+residuals, "similarity of site %s: its rows grow with the request", one.Site().Name)
		}
		all[i] = one
	}
	return all, nil
}

func (s *similarity) count(ctx context.Context) (rows uint64, err error) {
	for r := range s.survey.Requests {
		selections, err := s.selections(ctx, r)
		if err != nil {
			return 0, err
		}
		for _, span := range together(selections) {
			rows += uint64(span[1] - span[0])
		}
	}
	return rows, nil
}

// read adds up cosines, and keeps the sampled rows of each site until it has their inner products.
func (s *similarity) read(ctx context.Context) error {
	sites := len(s.survey.Sites)
	sampled := make([][][]float32, sites)
	kept := 0
	at, next := uint64(0), uint64(0)
	var row []float64
	progress := progressOf(ctx)
	progress.begin(reading)
	for r := range s.survey.Requests {
		selections, err := s.selections(ctx, r)
		if err != nil {
			return err
		}
		if selections == nil {
			continue
		}
		err = eachTogether(ctx, selections, tableBytes, func(_ uint32, n int, tables []table) error {
			for i := range n {
				for ; next < s.sample && next*s.total/s.sample == at; next++ {
					for site := range tables {
						row = tables[site].row(i).Floats(row)
						sampled[site] = append(sampled[site], keep(row))
						kept += 4 * len(row)
					}
					if kept > memoryBytes {
						return tooMuch("sampled rows", int64(kept), "name fewer sites, or a smaller sample")
					}
				}
				at++
			}
			bytes := 0
			for i := range tables {
				bytes += len(tables[i].data)
			}
			progress.add(float64(n)/float64(s.total), bytes)
			return s.addCosines(ctx, n, tables)
		})
		if err != nil {
			return err
		}
	}
	progress.begin("computing CKA")
	return inOrder(ctx, sites, func(ctx context.Context, i int) (gram, error) {
		g, err := gramOf(ctx, sampled[i])
		sampled[i] = nil
		return g, err
	}, func(i int, g gram) error {
		s.grams[i] = g
		progress.add(1/float64(sites), 0)
		return nil
	})
}

func tooMuch(what string, need int64, hint string) error {
	return &query.Error{Code: query.OverLimit, Message: fmt.Sprintf("similarity: %s take %d MiB, over the limit of %d", what, need>>20, memoryBytes>>20), Hint: hint}
}

// keep is a row at float32's precision, to which all but float64 and wide integers are exact.
func keep(row []float64) []float32 {
	kept := make([]float32, len(row))
	for i, v := range row {
		kept[i] = float32(v)
	}
	return kept
}

func (s *similarity) addCosines(ctx context.Context, n int, tables []table) error {
	// Some rows at a time, and of each a few columns: what all sites have there stays near while it is multiplied with each other.
	const together, columns = 16, 512
	sites := len(tables)
	return inOrder(ctx, (n+together-1)/together, func(ctx context.Context, block int) ([]float64, error) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		found, products, rows := make([]float64, 0, together*sites*sites), make([]float64, sites*sites), make([][]float64, sites)
		for i := block * together; i < min(n, (block+1)*together); i++ {
			clear(products)
			width := 0
			for site := range tables {
				rows[site] = tables[site].row(i).Floats(rows[site])
				width = max(width, len(rows[site]))
			}
			for from := 0; from < width; from += columns {
				for a, x := range rows {
					part := x[min(from, len(x)):min(from+columns, len(x))]
					for b := a; b < sites; b++ {
						if y := rows[b]; len(y) == len(x) {
							products[a*sites+b] += dot(part, y[min(from, len(y)):][:len(part)])
						}
					}
				}
			}
			for a := range rows {
				for b := range rows {
					switch {
					case b < a || len(rows[a]) != len(rows[b]):
						found = append(found, apart)
					default:
						found = append(found, products[a*sites+b]/(math.Sqrt(products[a*sites+a])*math.Sqrt(products[b*sites+b])))
					}
				}
			}
		}
		return found, nil
	}, func(_ int, found []float64) error {
		// Row by row, so that the sums do not depend on how many rows were read at a time.
		for i, c := range found {
			pair := &s.pairs[i/sites%sites][i%sites]
			switch {
			case c == apart:
			case c-c != 0:
				pair.nonfinite++
			default:
				pair.sum += c
				pair.rows++
			}
		}
		return nil
	})
}

// apart stands for the cosine of rows that differ in length, which have none, and of a pair that is another's mirror image.
const apart = 2.0

// dot is what cosines, CKA and the logit lens cost; 0 of nothing.
func dot(x, y []float64) float64 {
	if len(x) == 0 {
		return 0
	}
	return vek.Dot(x, y)
}

func gramOf(ctx context.Context, rows [][]float32) (gram, error) {
	g := gram{n: len(rows), k: make([]float64, len(rows)*len(rows))}
	width := 0
	for _, row := range rows {
		if width = len(row); width != len(rows[0]) {
			return g, badArgument("name requests of one model", "similarity: rows of a site have %d and %d elements", len(rows[0]), len(row))
		}
	}
	// A few columns of some rows against some others: both stay in a core's own cache while each is multiplied with each.
	const columns, together = 512, 32
	wide := make([]float64, g.n*min(columns, width))
	for from := 0; from < width; from += columns {
		n := min(columns, width-from)
		for i, row := range rows {
			for d, v := range row[from : from+n] {
				wide[i*n+d] = float64(v)
			}
		}
		for top := 0; top < g.n; top += together {
			if err := ctx.Err(); err != nil {
				return g, err
			}
			for left := 0; left <= top; left += together {
				for i := top; i < min(top+together, g.n); i++ {
					for j := left; j < min(left+together, i+1); j++ {
						g.k[i*g.n+j] += dot(wide[i*n:(i+1)*n], wide[j*n:(j+1)*n])
					}
				}
			}
		}
	}
	for i := range g.n {
		for j := range i {
			g.k[j*g.n+i] = g.k[i*g.n+j]
		}
	}
	return g, nil
}

// centre leaves out the rows that are not finite at some site, and centres every Gram matrix: its features' means become 0.
func (s *similarity) centre(ctx context.Context) error {
	if len(s.grams) == 0 {
		return nil
	}
	var kept []int
	for i := range s.grams[0].n {
		finite := true
		for _, g := range s.grams {
			v := g.k[i*g.n+i]
			finite = finite && v-v == 0
		}
		if finite {
			kept = append(kept, i)
		}
	}
	return inOrder(ctx, len(s.grams), func(_ context.Context, i int) (gram, error) { return s.grams[i].centred(kept), nil }, func(i int, g gram) error {
		s.grams[i] = g
		return nil
	})
}

func (g gram) centred(kept []int) gram {
	n := len(kept)
	c := gram{n: n, k: make([]float64, n*n)}
	means, mean := make([]float64, n), 0.0
	for i, from := range kept {
		for j, to := range kept {
			c.k[i*n+j] = g.k[from*g.n+to]
			means[i] += c.k[i*n+j] / float64(n)
		}
		mean += means[i] / float64(n)
	}
	squares := 0.0
	for i := range n {
		for j := range n {
			c.k[i*n+j] += mean - means[i] - means[j]
			squares += c.k[i*n+j] * c.k[i*n+j]
		}
	}
	c.norm = math.Sqrt(squares)
	return c
}

func (s *similarity) cka(i, j int) float64 {
	return dot(s.grams[i].k, s.grams[j].k) / (s.grams[i].norm * s.grams[j].norm)
}

package query

import (
	"context"

	"dmi/tensor"
)

// TopQuery asks for the greatest elements of each row that is there.
type TopQuery struct {
	Scope
	Site   string // glob, alias or name; "": every site
	Layer  *int
	Tokens Range
	K      int // 0: 5
}

// TopRow is the greatest finite elements of a row, the greatest first and of equal ones that of the lower index; fewer than were asked for where fewer are finite.
type TopRow struct {
	Request  string           `json:"request"`
	Site     string           `json:"site"`
	Position uint32           `json:"position"`
	Level    string           `json:"level"` // of the row: its values are rounded as that level's are
	Elements []tensor.Element `json:"elements"`
}

// Top yields the rows of a scope that are there, by request, site and position; Coverage says what became of the others. Rows of which only statistics came have as many elements as their policy asked for: asking for more is an error.
func (e *Engine) Top(ctx context.Context, q TopQuery, yield func(TopRow) error) error {
	k := q.K
	if k == 0 {
		k = 5
	}
	if k < 1 || k > tensor.MaxTop {
		return badArgument("", "the %d greatest elements: ask for 1 to %d", k, tensor.MaxTop)
	}
	requests, err := e.requestsOf(ctx, q.Scope)
	if err != nil {
		return err
	}
	for _, r := range requests {
		sites, err := e.sitesOf(r.Key.Session, q.Site, q.Layer)
		if err != nil {
			return err
		}
		for _, site := range sites {
			s, err := e.choose(ctx, r, site, q.Tokens, Range{}, summable)
			if err != nil {
				return err
			}
			err = s.eachTop(ctx, e, k, func(position uint32, level tensor.Level, elements []tensor.Element) error {
				return yield(TopRow{r.ID, site.Name, position, level.String(), elements})
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *selection) eachTop(ctx context.Context, e *Engine, k int, yield func(position uint32, level tensor.Level, elements []tensor.Element) error) error {
	var values []float64
	var decoded []byte
	return s.eachStoredRow(ctx, e, func(position uint32, r run, row []byte) error {
		dtype, level, shape := r.ref.DType, r.ref.Level, r.ref.Shape
		if level == tensor.Stats {
			if has := tensor.TopIn(shape); has < k {
				return badArgument("ask for fewer, or choose positions or sites; a policy's level stats+K keeps K of them",
					"the %d greatest elements of request %s at site %s: of position %d statistics came with %d of them", k, s.request.ID, s.site.Name, position, has)
			}
			elements := tensor.TopOf(row)
			return yield(position, level, elements[:min(k, len(elements))])
		}
		if !dtype.Real() {
			return badArgument("leave the site out", "the greatest elements of site %s: elements of %s are not real numbers", s.site.Name, dtype)
		}
		if level.Quantised() {
			decoded = resize(decoded, product(shape)*tensor.F32.Size())
			level.Dequantise(decoded, row)
			row, dtype = decoded, tensor.F32
		}
		elements := len(row) / dtype.Size()
		values = append(values[:0], make([]float64, elements)...)
		dtype.Floats(values, row)
		line, own := elements, elements
		if s.site.Keyed && len(shape) > 0 {
			line = shape[len(shape)-1]
			own = min(line, int(position)+1)
		}
		top := tensor.Greatest(values, line, own, k)
		if top == nil {
			top = []tensor.Element{}
		}
		return yield(position, level, top)
	})
}

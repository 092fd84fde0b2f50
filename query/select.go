package query

import (
	"context"
	"slices"

	"dmi/tensor"
)

// Survey is the sites that a question over many requests is about, and the requests: what tools that look at all rows walk through.
type Survey struct {
	Sites    []SurveyedSite   // as they come in the model, each name once
	Requests []tensor.Request // in the order asked for, or that they began in

	engine *Engine
	tokens Range
}

// SurveyedSite is a site by name; sessions number it each in their own way.
type SurveyedSite struct {
	Name  string
	Layer int // tensor.NoLayer where it has none
	in    map[uint32]tensor.Site
}

// Survey finds the sites that a glob, name or alias means ("": every site) in the requests of a scope. It looks at no rows.
func (e *Engine) Survey(ctx context.Context, scope Scope, site string, layer *int, tokens Range) (*Survey, error) {
	requests, err := e.requestsOf(ctx, scope)
	if err != nil {
		return nil, err
	}
	s := &Survey{Requests: requests, engine: e, tokens: tokens}
	at := map[string]int{}
	seen := map[uint32]bool{}
	for _, r := range requests {
		if seen[r.Key.Session] {
			continue
		}
		seen[r.Key.Session] = true
		sites, err := e.sitesOf(r.Key.Session, site, layer)
		if err != nil {
			return nil, err
		}
		for _, found := range sites {
			i, known := at[found.Name]
			if !known {
				i = len(s.Sites)
				at[found.Name] = i
				s.Sites = append(s.Sites, SurveyedSite{found.Name, found.Layer, map[uint32]tensor.Site{}})
			}
			s.Sites[i].in[r.Key.Session] = found
		}
	}
	return s, nil
}

// Select finds the full rows of one of the requests at one of the sites; nil where its session lacks the site.
func (s *Survey) Select(ctx context.Context, site, request int) (*Selection, error) {
	r := s.Requests[request]
	at, has := s.Sites[site].in[r.Key.Session]
	if !has {
		return nil, nil
	}
	chosen, err := s.engine.choose(ctx, r, at, s.tokens, Range{}, FullOnly)
	if err != nil {
		return nil, err
	}
	return &Selection{chosen, s.engine}, nil
}

// Bytes is what was captured at each of the sites, of all the requests together; it costs their books, not their chunks.
func (s *Survey) Bytes(ctx context.Context) ([]uint64, error) {
	bytes := make([]uint64, len(s.Sites))
	for _, r := range s.Requests {
		var sites []tensor.Site
		for _, surveyed := range s.Sites {
			if site, has := surveyed.in[r.Key.Session]; has {
				sites = append(sites, site)
			}
		}
		sums := map[uint32]*siteSum{}
		if _, err := s.engine.addSums(ctx, sums, r, sites); err != nil {
			return nil, err
		}
		for i, surveyed := range s.Sites {
			if site, has := surveyed.in[r.Key.Session]; has && sums[site.ID] != nil {
				bytes[i] += sums[site.ID].bytes
			}
		}
	}
	return bytes, nil
}

// Selection is the rows of one request at one site that a question is about, found and not yet read.
type Selection struct {
	*selection
	engine *Engine
}

// Request says whose rows they are.
func (s *Selection) Request() tensor.Request { return s.request }

// Site says of which site.
func (s *Selection) Site() tensor.Site { return s.site }

// Present lists the positions of the rows, in order.
func (s *Selection) Present() []Span { return slices.Clone(s.present) }

// Missing counts the rows that were owed and are not there; Coverage says why.
func (s *Selection) Missing() uint64 { return s.missing.count() }

// Size is the bytes of the rows that are there, as stored.
func (s *Selection) Size() (bytes int64) {
	for _, r := range s.runs {
		bytes += int64(r.Count) * int64(rowBytes(r.ref))
	}
	return bytes
}

// Watch has f told of every read of the selection's rows from now on, how many bytes it brought.
func (s *Selection) Watch(f func(bytes int)) { s.watch = f }

// Form is the dtype and shape of the first row, as stored: of keyed sites the last dimension counts keys. None of no rows.
func (s *Selection) Form() (tensor.DType, []int, bool) {
	if len(s.runs) == 0 {
		return tensor.DTypeNone, nil, false
	}
	return s.runs[0].ref.DType, s.runs[0].ref.Shape, true
}

// Values is one row, decoded. It is valid during the call that it is handed to.
type Values struct {
	Position uint32
	Shape    []int // of the row. Keyed rows are cut to the keys that the row had: its own position and those before
	Data     []float64
}

// EachRow reads the rows in order, in blocks of about blockBytes, and hands each over as numbers.
func (s *Selection) EachRow(ctx context.Context, blockBytes int, yield func(Values) error) error {
	return s.eachStored(ctx, s.engine, blockBytes, s.decoding(yield))
}

// EachRowIn is EachRow of the positions [from, to) alone.
func (s *Selection) EachRowIn(ctx context.Context, blockBytes int, from, to uint32, yield func(Values) error) error {
	part := *s.selection
	part.runs = keep(s.runs, union(between(uint64(from), uint64(max(from, to)))))
	return part.eachStored(ctx, s.engine, blockBytes, s.decoding(yield))
}

func (s *Selection) decoding(yield func(Values) error) func(uint32, run, []byte) error {
	var v Values
	var of []int // v.Shape's, before keys were cut
	return s.storing(func(row Stored) error {
		if !slices.Equal(of, row.Shape) || of == nil {
			of = row.Shape
			v.Shape = slices.Clone(of)
		}
		if v.Position = row.Position; row.Keyed && len(of) > 0 {
			v.Shape[len(of)-1], _ = row.keys()
		}
		v.Data = row.Floats(v.Data)
		return yield(v)
	})
}

// Block is rows at consecutive positions: row i's numbers are Data[i*Width:(i+1)*Width]. It is valid during the call that it is handed to.
type Block struct {
	First       uint32
	Rows, Width int
	DType       tensor.DType
	Stored      []byte // the same elements, as they are stored
	Data        []float64
}

// EachBlock reads the rows in order, in reads of about readBytes, and hands them over in blocks of about decodedBytes of numbers, of four rows at least where there
// are as many: for what looks at all elements, once each. It is not for rows that grow with their position.
func (s *Selection) EachBlock(ctx context.Context, readBytes, decodedBytes int, yield func(Block) error) error {
	if s.site.Keyed {
		return badArgument("look at it row by row", "blocks of site %s: its rows differ in length", s.site.Name)
	}
	var b Block
	return s.eachBlock(ctx, s.engine, readBytes, func(first uint32, n int, r run, rows []byte) error {
		if err := s.real(r); err != nil {
			return err
		}
		b.DType, b.Width = r.ref.DType, product(r.ref.Shape)
		most := max(4, decodedBytes/8/max(1, b.Width)&^3)
		for from := 0; from < n; from += b.Rows {
			b.First, b.Rows = first+uint32(from), min(most, n-from)
			b.Stored = rows[from*b.Width*b.DType.Size() : (from+b.Rows)*b.Width*b.DType.Size()]
			b.Data = resizeFloats(b.Data, b.Rows*b.Width)
			b.DType.Floats(b.Data, b.Stored)
			if err := yield(b); err != nil {
				return err
			}
		}
		return nil
	})
}

// Stored is one row as it is stored. It is valid during the call that it is handed to.
type Stored struct {
	Position uint32
	DType    tensor.DType
	Shape    []int // of keyed rows, the last dimension has room for keys that the row does not have: those after its position
	Keyed    bool
	Data     []byte
}

// Float decodes one element.
func (s Stored) Float(element int) float64 {
	var v [1]float64
	s.DType.Floats(v[:], s.Data[element*s.DType.Size():(element+1)*s.DType.Size()])
	return v[0]
}

// keys is how many keys a keyed row has, and has room for.
func (s Stored) keys() (own, room int) {
	room = s.Shape[len(s.Shape)-1]
	return min(room, int(s.Position)+1), room
}

// Floats decodes the row into memory that it may use again: of a keyed row, the keys that it has.
func (s Stored) Floats(into []float64) []float64 {
	if !s.Keyed || len(s.Shape) == 0 {
		into = resizeFloats(into, product(s.Shape))
		s.DType.Floats(into, s.Data)
		return into
	}
	keys, room := s.keys()
	lines, size := product(s.Shape[:len(s.Shape)-1]), s.DType.Size()
	into = resizeFloats(into, lines*keys)
	for i := range lines {
		s.DType.Floats(into[i*keys:(i+1)*keys], s.Data[i*room*size:(i*room+keys)*size])
	}
	return into
}

// EachStored reads the rows in order, in reads of about readBytes: for what looks at a few elements of each, or at many rows at a time.
func (s *Selection) EachStored(ctx context.Context, readBytes int, yield func(Stored) error) error {
	return s.eachStored(ctx, s.engine, readBytes, s.storing(yield))
}

// EachStoredIn is EachStored of the positions [from, to) alone.
func (s *Selection) EachStoredIn(ctx context.Context, readBytes int, from, to uint32, yield func(Stored) error) error {
	part := *s.selection
	part.runs = keep(s.runs, union(between(uint64(from), uint64(max(from, to)))))
	return part.eachStored(ctx, s.engine, readBytes, s.storing(yield))
}

func (s *Selection) storing(yield func(Stored) error) func(uint32, run, []byte) error {
	return func(position uint32, r run, row []byte) error {
		if err := s.real(r); err != nil {
			return err
		}
		return yield(Stored{position, r.ref.DType, r.ref.Shape, s.site.Keyed, row})
	}
}

// Ends lists the positions after which other chunks begin: who reads up to one of them reads no chunk twice.
func (s *Selection) Ends() []uint32 {
	ends := make([]uint32, len(s.runs))
	for i, r := range s.runs {
		ends[i] = r.First + r.Count
	}
	return ends
}

func (s *selection) real(r run) error {
	if r.ref.DType.Real() {
		return nil
	}
	return badArgument("leave the site out", "look at site %s: elements of %s are not real numbers", s.site.Name, r.ref.DType)
}

func resizeFloats(v []float64, n int) []float64 {
	if cap(v) < n {
		return make([]float64, n)
	}
	return v[:n]
}

// Tokens gives a request's ids as its session kept them; nil where it did not, or this engine may not see them.
func (e *Engine) Tokens(request string) ([]int64, error) {
	r, err := e.requestByID(request)
	return r.Tokens, err
}

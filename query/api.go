package query

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"time"

	"dmi/tensor"
)

// Scope says which requests a question is about: exactly one field is set, or none for the whole store where a
// method allows it. Of a run or a session, hidden requests count in the books but are never listed.
type Scope struct {
	Requests []string // ids, in the order wanted
	Run      string
	Session  string
}

// End is an open end of a Range.
const End = math.MaxInt

// Range is half-open. Negative numbers count from the end, as in Python; To == End is an open end.
// The zero value means everything.
type Range struct{ From, To int }

// SiteName is what people type for a site: its canonical name, an alias, the end of either with or without "hook_"
// ("resid_post", "attn.q"), or a glob that matches one; Layer narrows it (negative: from the last layer).
type SiteName struct {
	Name  string
	Layer *int
}

// Level is the fidelity that a read accepts.
type Level uint8

const (
	FullOnly Level = iota // full rows or an error
	AnyLevel              // every row that holds values, with its level
	summable              // those of which there are statistics alone as well
)

// TensorQuery asks for the rows of one request at one site.
type TensorQuery struct {
	Request string
	Site    SiteName
	Tokens  Range // positions of the request, pads not counted
	Steps   Range // the request's forwards, counted from 0
	Heads   []int // nil: all. In the order wanted; refused at sites without a head axis
	Level   Level
	Partial bool         // return the rows that are there, with their positions, instead of ErrIncomplete
	As      tensor.DType // DTypeNone: as captured. F32: converted
	Limit   int64        // most bytes of the answer; 0: unlimited (it is streamed in any case)
}

// Tensor is an answer that is planned and not yet read: open it to stream its bytes, C order, little-endian.
type Tensor struct {
	Request   string // "" where rows of several requests are concatenated
	Site      tensor.Site
	DType     tensor.DType // of the answer
	Shape     []int        // reader's shape
	Axes      []string     // a name per dimension: token or query, head, key, dim
	Positions []Span       // of the rows, in their order
	Levels    []LevelSpan  // of the rows, in their order
	Complete  bool
	Missing   uint64 // rows asked for that are not there (partial answers only)

	plan plan
}

// Span is the half-open range of positions [First, First+Count).
type Span struct {
	First uint32 `json:"first"`
	Count uint32 `json:"count"`
}

// LevelSpan says that the next Count rows of an answer have a level.
type LevelSpan struct {
	Level tensor.Level `json:"level"`
	Count uint32       `json:"count"`
}

// RowsQuery asks for one site's rows over many requests, a page at a time.
type RowsQuery struct {
	Scope
	Site    SiteName
	After   string // cursor from the page before; "" at the start
	Limit   int    // rows; 0: 65536
	Partial bool
	As      tensor.DType
}

// Rows is one page: a tensor of [rows, row shape...] and whose rows they are.
type Rows struct {
	Tensor
	Requests []RequestRows
	Next     string // "" at the end
}

// RequestRows says that rows of a page are positions [First, First+Count) of a request.
type RequestRows struct {
	Request string `json:"request"`
	First   uint32 `json:"first"`
	Count   uint32 `json:"count"`
}

// CoverageQuery asks what became of rows. An empty Scope is the whole store, and then Site must be empty.
type CoverageQuery struct {
	Scope
	Site  string // glob, alias or name; "": every site
	Layer *int
}

// Coverage is the books of a scope. Rows counts every row of every attempt once; Complete says that every position
// owed has full values: those not computed by the engine, or rejected by speculation, are not owed.
type Coverage struct {
	Rows     uint64                       `json:"rows"`
	Expired  uint64                       `json:"expired"`  // of those captured: gone by retention or deletion
	Repeated uint64                       `json:"repeated"` // of those captured: their site gave them again in the same step, and what it gave first is kept
	Complete bool                         `json:"complete"`
	Outcomes map[string]map[string]uint64 `json:"outcomes"` // outcome -> reason ("captured" -> level) -> rows
	Ranges   []CoverageRange              `json:"ranges,omitempty"`
}

// CoverageRange is rows First, First+Stride, ... (Count of them) of one request and site that met the same fate.
type CoverageRange struct {
	Request string `json:"request"`
	Site    string `json:"site"`
	First   uint32 `json:"first"`
	Count   uint32 `json:"count"`
	Stride  uint32 `json:"stride"`
	Outcome string `json:"outcome"`
	Reason  string `json:"reason"`
	Level   string `json:"level"`
	Policy  uint64 `json:"policy"`
	Attempt uint16 `json:"attempt"`
	Expired int64  `json:"expired_unix_ns"` // since when retention or deletion took captured rows; 0: they are there
}

// Per says what one line of statistics is about.
type Per uint8

const (
	PerRow Per = iota
	PerRequest
	PerSite
)

// ParsePer is the inverse of String; "" is PerRow.
func ParsePer(s string) (Per, error) {
	switch s {
	case "", "row":
		return PerRow, nil
	case "request":
		return PerRequest, nil
	case "site":
		return PerSite, nil
	}
	return 0, badArgument("say per=row, request or site", "statistics per %q: no such grouping", s)
}

func (p Per) String() string { return [...]string{"row", "request", "site"}[p] }

// StatsQuery asks for statistics of the rows that are there.
type StatsQuery struct {
	Scope
	Site   string // glob, alias or name; "": every site
	Layer  *int
	Tokens Range
	Per    Per
}

// StatsRow is one line of statistics. Request is "" per site; Position is -1 unless per row; Layer is tensor.NoLayer where
// there is none. A line whose elements are all non-finite has NaN in its other figures, null in JSON.
type StatsRow struct {
	Request   string
	Site      string
	Layer     int
	Position  int64
	Rows      uint64 // how many rows the line sums up
	Mean      float64
	RMS       float64
	Min       float64
	Max       float64
	AbsMax    float64
	L2        float64
	NonFinite uint64
	Count     uint64 // elements, non-finite ones included
	Level     string // of the rows; mixed where they have several
}

// MarshalJSON writes NaN as null, and leaves out what a grouping does not have.
func (s StatsRow) MarshalJSON() ([]byte, error) {
	number := func(v float64) *float64 {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return nil
		}
		return &v
	}
	var layer *int
	if s.Layer != tensor.NoLayer {
		layer = &s.Layer
	}
	var position *int64
	if s.Position >= 0 {
		position = &s.Position
	}
	var request *string
	if s.Request != "" {
		request = &s.Request
	}
	return json.Marshal(struct {
		Request   *string  `json:"request"`
		Site      string   `json:"site"`
		Layer     *int     `json:"layer"`
		Position  *int64   `json:"position"`
		Rows      uint64   `json:"rows"`
		Mean      *float64 `json:"mean"`
		RMS       *float64 `json:"rms"`
		Min       *float64 `json:"min"`
		Max       *float64 `json:"max"`
		AbsMax    *float64 `json:"absmax"`
		L2        *float64 `json:"l2"`
		NonFinite uint64   `json:"nonfinite"`
		Count     uint64   `json:"count"`
		Level     string   `json:"level"`
	}{request, s.Site, layer, position, s.Rows, number(s.Mean), number(s.RMS), number(s.Min), number(s.Max), number(s.AbsMax), number(s.L2),
		s.NonFinite, s.Count, s.Level})
}

// TopKeysQuery asks which tokens the heads of an attention pattern attend to most.
type TopKeysQuery struct {
	Request string
	Site    SiteName
	Heads   []int // nil: all
	Query   *int  // position; nil: the mean over every query; it sums to 1 over the keys, as each query's weights do
	K       int   // 0: 5
}

// HeadKeys is a head's most attended keys, largest weight first.
type HeadKeys struct {
	Head int         `json:"head"`
	Keys []KeyWeight `json:"keys"`
}

// KeyWeight is how much a head attends to a position of the request.
type KeyWeight struct {
	Position int     `json:"position"`
	Token    *int64  `json:"token,omitempty"` // id, where the session kept ids
	Weight   float64 `json:"weight"`
}

// ExportQuery asks for a file. Formats: safetensors (named SITE, of several requests REQUEST/SITE), npy (one tensor),
// parquet (statistics per row).
type ExportQuery struct {
	Scope
	Site    string // glob, alias or name; "": every site
	Layer   *int
	Format  string
	As      tensor.DType
	Partial bool
}

// RunsQuery filters runs; fields left empty do not.
type RunsQuery struct {
	Session string
	Tag     string
	Labels  map[string]string
	After   string // id of the last run of the page before
	Limit   int    // 0: 1000; at most 10000
}

// RunInfo is a run as listed.
type RunInfo struct {
	ID       string            `json:"id"`
	Session  string            `json:"session"`
	Labels   map[string]string `json:"labels"`
	Tags     []string          `json:"tags"`
	Requests int               `json:"requests"`
	Begun    int64             `json:"begun_unix_ns"`
	Ended    int64             `json:"ended_unix_ns"` // 0: it goes on
	Rows     uint64            `json:"rows"`          // captured
	Bytes    uint64            `json:"bytes"`
}

// RequestsQuery filters requests; fields left empty do not.
type RequestsQuery struct {
	Run, Session, Tag string
	Labels            map[string]string
	Latest            int // the last n that match; 0: all
	Hidden            bool
	After             string // id of the last request of the page before
	Limit             int    // 0: 1000; at most 10000
}

// RequestInfo is a request as listed; Tokens, Text and Path only where one is asked for by id.
type RequestInfo struct {
	ID        string            `json:"id"`
	Run       string            `json:"run"`
	Session   string            `json:"session"`
	Labels    map[string]string `json:"labels"`
	Tags      []string          `json:"tags"`
	Begun     int64             `json:"begun_unix_ns"`
	Ended     int64             `json:"ended_unix_ns"` // 0: it goes on
	Reason    string            `json:"reason"`
	Hidden    bool              `json:"hidden,omitempty"`
	Positions uint32            `json:"positions"` // rows of the token space
	Rows      uint64            `json:"rows"`      // captured
	Bytes     uint64            `json:"bytes"`
	Tokens    []int64           `json:"tokens,omitempty"`
	Text      string            `json:"text,omitempty"`
	Pieces    []string          `json:"pieces,omitempty"`
	Path      []PathInfo        `json:"path,omitempty"`
}

// PathInfo says that positions [First, First+Count) of a request are those of another.
type PathInfo struct {
	Request string `json:"request"`
	First   uint32 `json:"first"`
	Count   uint32 `json:"count"`
}

// SitesQuery asks which sites a scope has. Scope: one request, a run or a session.
type SitesQuery struct {
	Scope
	Site  string // glob, alias or name; "": every site
	Layer *int
}

// SiteInfo is a site as listed. DType and RowShape are "" and null while nothing of it was captured; the key axis of a keyed
// site, which grows, is -1 in RowShape.
type SiteInfo struct {
	Name     string   `json:"name"`
	Aliases  []string `json:"aliases"`
	Layer    *int     `json:"layer"`
	Axes     []string `json:"axes"`
	DType    string   `json:"dtype"`
	RowShape []int    `json:"row_shape"`
	Rows     uint64   `json:"rows"` // captured
	Bytes    uint64   `json:"bytes"`
}

// Page is part of a list; Next is the After of the next part, "" at the end.
type Page[T any] struct {
	Items []T
	Next  string
}

// Code says what kind of failure an Error is.
type Code string

const (
	BadArgument Code = "bad_argument" // HTTP 400
	NotFound    Code = "not_found"    // 404: no such run, request, session or site
	Incomplete  Code = "incomplete"   // 409: rows asked for are not all there; Coverage says why
	OverLimit   Code = "over_limit"   // 413
)

// Error is every failure that the asker can do something about.
type Error struct {
	Code     Code
	Message  string // what was attempted, on what, why it failed
	Hint     string // what to do next; may be ""
	Coverage *Coverage
}

func (e *Error) Error() string {
	if e.Hint == "" {
		return "query: " + e.Message
	}
	return "query: " + e.Message + "; " + e.Hint
}

// Is makes errors.Is(err, ErrIncomplete) and its like work.
func (e *Error) Is(target error) bool {
	var other *Error
	return errors.As(target, &other) && other.Message == "" && e.Code == other.Code
}

// One of each code, for errors.Is.
var (
	ErrBadArgument = &Error{Code: BadArgument}
	ErrNotFound    = &Error{Code: NotFound}
	ErrIncomplete  = &Error{Code: Incomplete}
	ErrOverLimit   = &Error{Code: OverLimit}
)

func badArgument(hint, format string, args ...any) *Error {
	return &Error{Code: BadArgument, Message: fmt.Sprintf(format, args...), Hint: hint}
}

func notFound(hint, format string, args ...any) *Error {
	return &Error{Code: NotFound, Message: fmt.Sprintf(format, args...), Hint: hint}
}

func unixNano(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

package tensor

import "slices"

// Gate is what a producer is asked to give of a site, row by row: at least what is kept. The first clause that takes a row decides, else Level.
type Gate struct {
	Level   Level
	Stride  uint32 // of Sampled: rows at positions that are multiples of it, in full
	Top     uint8  // of all rows at Stats: so many of the greatest elements; at most MaxTop
	Clauses []GateClause

	// Rows in full beyond that. Bits are indices of watches.
	Watch uint64 // conditions that the site's rows are held against, whatever their level
	Keep  uint64 // where rows of a request met one of these in a step, its rows of the step come in full
	Offer bool   // rows below full are offered in full, to be fetched or not
}

// Watch is a condition on a row that a producer evaluates as it captures: exactly one of NonFinite, Figure and Probe is set.
type Watch struct {
	NonFinite    bool
	Figure       string // of a row at level Stats, by its name
	Probe        []float32
	Bias         float64
	Above, Below float64 // infinities where there is no such bound
}

// FigureNames are the figures of a row at level Stats in their order, but for the last, which counts elements.
var FigureNames = []string{"mean", "rms", "min", "max", "absmax", "l2", "nonfinite"}

// Off reports whether no row is asked for.
func (g *Gate) Off() bool {
	return g.Watch == 0 && g.Keep == 0 && !g.Offer && g.Level == Off && !slices.ContainsFunc(g.Clauses, func(c GateClause) bool { return c.Level != Off })
}

// Region of a request's positions that a clause counts in.
type Region uint8

// Regions. Of the generated ones the first goes into the model after the prompt's last token.
const (
	Everywhere Region = iota
	Prompt
	Generated
)

// Groups are the sets of requests that rules name by ids and tags. A producer, who has ids and tags, is told them, and tells the rows of one from others' by its place
// here, from 1 on.
type Groups struct {
	Name uint64  // made of what they are: equal groups have equal names; 0: there are none
	Sets []Group // at most MaxGroups
}

// Group is of requests one of whose ids fits one of IDs, as MatchText says (none given: all do), and that have all Tags, their own or their run's.
type Group struct {
	IDs  []string `json:"ids"`
	Tags []string `json:"tags"`
}

// MaxGroups that a producer can tell apart. UnknownGroup is of requests of which it has not said yet in which they are.
const (
	MaxGroups    = 64
	UnknownGroup = 255
)

// GateClause takes rows of requests in a sample, of one alone, or in a group, in some phases, at positions Start, Start + Step, ... below Stop of a region. Of those two, negative ones, in two's
// complement, count from the prompt's end.
type GateClause struct {
	Level       Level
	Stride      uint32
	Threshold   uint64 // the hashes of the requests are below it; 0: every request
	Seed        uint64 // of the hash
	One         bool   // of Request alone
	Request     uint64
	Group       uint8  // of Groups, from 1 on; 0: any request; UnknownGroup
	Groups      uint64 // the name of the groups, as producers were told them
	Phases      uint8  // a bit for each
	Region      Region
	Start, Stop uint64
	Step        uint32
}

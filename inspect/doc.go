// Package inspect finds structure in what was captured: distributions, attention heads of known kinds, outlier dimensions, what the
// residual stream would predict, where two runs part. docs/inspect.md gives each tool's formula and source.
//
// Every tool streams over the rows through package query, a site at a time, on all cores, and hands its answer out line by line: a run need
// not fit in memory, and the first lines come before the last rows are read. Numbers are computed in float64 from the values as they were captured.
package inspect

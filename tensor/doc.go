// Package tensor is DMI's vocabulary: what a site, a row, a dtype, a level and an outcome are.
// Every other package speaks in these nouns; this one imports none of them.
//
// The unit of everything is the row: one token of one request at one site. An attention pattern's row is
// one query with all its heads and keys. Rows of a request and a site are stored row-major, whatever shape a
// reader is given in the end (Site.RowAxis).
package tensor

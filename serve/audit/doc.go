// Package audit keeps the record of who read what: one line of JSON for each thing that happened, appended to numbered files of a bounded
// size in a folder of their own, the oldest of which goes when there are too many. docs/format/audit.md is the form of the lines.
//
// Nobody waits for the disk beyond a bound. A line that cannot be written is counted, told to the operator once, and its absence is a line
// itself as soon as writing works again: the record may have a gap, and never a gap that it does not show.
package audit

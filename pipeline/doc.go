// Package pipeline makes chunks and books of what a drain hands on: select leaves out what the policy does not want, slice cuts the rest into the rows of
// each request, book settles what became of every row, deliver hands both to live subscribers and to the store. Rows of a dense payload stay where they
// are, in staging, until these return. One goroutine per session, with others that share a step's sites where there is much to slice.
//
// A row of a site that fires more than once in a step is settled by the first firing. Further ones are not kept: its books say captured(repeated), and an event tells once.
package pipeline

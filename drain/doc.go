// Package drain turns the records of a ring into copy commands, and completed copies into items that its user owns, in the order of each
// lane. One goroutine per session does it.
//
// What it reads goes to the step manifest before a slot is given back. A record that does not fit the step it stands in ends that step:
// what the step still owes is lost(corrupt), the records up to the next OPEN are skipped, and nothing is ever attributed to another
// request. When the consumer is slow, staging stays leased, copies are not asked for, and the producer's rings fill: it then drops or waits, as its
// mode says.
package drain

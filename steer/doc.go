// Package steer puts policies into force: it keeps the ledger of a store, gives producers their gates, says what rules cost, and holds the
// brake.
package steer

package drain

import (
	"sync/atomic"

	"dmi/ring"
	"dmi/tensor"
)

// Kind says what an Item is.
type Kind uint8

const (
	Opened   Kind = iota + 1 // Step begins
	Captured                 // Data is the payload of Record
	Settled                  // the rows of Record have its Outcome and Reason, without data
	Closed                   // Step ends; Aborted says how
	Cut                      // Step ends without a CLOSE; what it owes is lost, and Reason says why
	Gap                      // GapRows row-outcomes that no step was opened for
	Offered                  // the rows of Offer can be fetched; what else becomes of them follows
	Mark                     // everything before is consumed when Done has been called for it on every lane
)

// Step is an open step of a lane.
type Step struct {
	Lane   int
	Number uint64
	Policy uint64      // revision in force
	Sites  []ring.Site // that exist at open; shared, not to be modified
	Gated  bool
	Tokens uint32     // rows of the token space
	Rows   *ring.Rows // nil: not known, of a gated or corrupt step
}

// Item is something that happened on a lane. The consumer calls Release for each.
type Item struct {
	Kind    Kind
	Lane    int
	Step    *Step
	Record  ring.Record
	Data    []byte // dense or strided as Record says; the consumer's to read until Release
	Aborted bool
	Reason  tensor.Reason
	GapStep uint64
	GapRows uint64
	GapSite uint32 // under which they are booked: which sites the steps had is not known
	Done    func() // of a Mark
	Offer   *Offer // of kind Offered
	Owner   any    // not nil: of rows that were fetched, or could not be, what Fetch was given

	lease *ring.Lease
	spill *spillUse
	owned []byte // memory for a payload outside staging
	drain *Drain
}

// spillUse is a spill range that the consumer reads in place, and what else a pass took of the spill.
type spillUse struct {
	at, bytes uint64
	pass      *spillPass
}

// spillPass counts the ranges of a pass that are in use, and the pass itself. Whoever is done with the last one wakes the drain, which may then give
// records back. To wake it for each would take the consumer longer than a little tensor does.
type spillPass struct{ left atomic.Int32 }

// Release ends the use of Data.
func (i *Item) Release() {
	i.Data = nil
	if i.lease != nil {
		if i.lease.Give() {
			i.drain.bell.Wake()
		}
		i.lease = nil
	}
	if memory := i.owned; memory != nil {
		i.owned = nil
		i.drain.spare.Store(&memory)
	}
	if i.spill != nil {
		i.drain.ring.Spilled.Free(i.spill.at, i.spill.bytes)
		if i.spill.pass.left.Add(-1) == 0 {
			i.drain.bell.Wake()
		}
		i.spill = nil
	}
}

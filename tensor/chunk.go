package tensor

import "cmp"

// RequestKey names a request within a store: the store's number for the session, and the session's for the request.
type RequestKey struct {
	Session uint32
	Request uint64
}

// Compare orders requests by session, then by when they began.
func (k RequestKey) Compare(o RequestKey) int {
	return cmp.Or(cmp.Compare(k.Session, o.Session), cmp.Compare(k.Request, o.Request))
}

// Chunk is a run of rows of one request at one site, dense and row-major, positions consecutive.
// It is what the pipeline hands to the store and to live subscribers, and what the store hands to a query.
type Chunk struct {
	Key      RequestKey
	Site     uint32 // Site.ID within the session
	Attempt  uint16
	First    uint32 // position of the first row in the request
	Rows     uint32
	Step     uint64 // of the first row
	LastStep uint64
	DType    DType
	Level    Level
	Policy   uint64 // revision in force
	Shape    []int  // of one row. Keyed sites: the last dimension counts keys from the request's position 0; keys that a row lacks hold Site.Fill
	Data     []byte // Rows x Shape x DType.Size bytes. Lent until the call that it is given to returns: whoever keeps a Chunk copies it. What a function returns is its caller's
}

// Entry is one line of the books: rows of a request whose fate at a set of sites was the same.
// Row positions are First, First+Stride, ... Count of them.
type Entry struct {
	Key     RequestKey // Request == NoRequest: rows whose request is not known (GAP records)
	Sites   []uint32   // interned: entries with equal sets share the slice; never modified
	Attempt uint16
	First   uint32
	Count   uint32
	Stride  uint32 // >= 1
	Step    uint64
	Outcome Outcome
	Reason  Reason
	Level   Level
	Policy  uint64
	Expired int64 // Unix ns at which retention or deletion took the rows; 0: it did not
}

// NoRequest stands for rows that cannot be attributed.
const NoRequest = ^uint64(0)

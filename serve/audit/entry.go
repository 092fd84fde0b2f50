package audit

import "time"

// Entry is a line of the record.
type Entry struct {
	Time   time.Time           `json:"time"`
	Event  string              `json:"event"`             // open, begin, end, refused, lost, close
	Read   string              `json:"read,omitempty"`    // joins a begin and its end
	Engine string              `json:"engine,omitempty"`  // of open
	Who    *Who                `json:"who,omitempty"`     // of begin and refused
	Kind   string              `json:"kind,omitempty"`    // statistics, tensors, text or admin: what the answer may hold
	Route  string              `json:"route,omitempty"`   // method and path as docs/api.md has it
	Path   string              `json:"path,omitempty"`    // where it is not the route's
	Args   map[string][]string `json:"args,omitempty"`    // as they were asked: request, site, tokens, ...
	Result *Result             `json:"result,omitempty"`  // of end and refused
	Lines  uint64              `json:"lines,omitempty"`   // of lost: how many
	Why    string              `json:"why,omitempty"`     // of lost
	Gone   string              `json:"removed,omitempty"` // of open: the file that made room
}

// Who asked.
type Who struct {
	Token string `json:"token"` // its name; "store" the store's own, "socket" whom a socket's permissions let in, "" where none was known
	Scope string `json:"scope"`
	Peer  string `json:"peer"` // address and port; of a Unix socket, "unix uid=... pid=..." as the kernel says
}

// Result is how a read ended.
type Result struct {
	Outcome string  `json:"outcome"` // answered, refused, failed, cut (the answer broke off), left (the reader went away)
	Status  int     `json:"status"`
	Code    string  `json:"code,omitempty"` // of the error
	Rows    uint64  `json:"rows"`           // that the answer holds; 0 where it has no rows
	Bytes   uint64  `json:"bytes"`          // of the answer's body that were handed to the connection
	Seconds float64 `json:"seconds"`
	Further uint64  `json:"further,omitempty"` // refusals just before this one that have no line of their own
}

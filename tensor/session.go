package tensor

import (
	"encoding/json"
	"time"
)

// Session is one attach of one model: the producer's side of a ring.
type Session struct {
	Number   uint32 `json:"number"` // the store's; 0 before it has one
	ID       string `json:"id"`     // "s" and 8 hex digits, minted by the producer
	Producer string `json:"producer"`
	Mode     string `json:"mode"` // complete or best-effort
	Text     string `json:"text"` // none, ids or text
	// Model, Versions, Process and Hooks are kept as the producer sent them (docs/format/control.md).
	Model    json.RawMessage `json:"model"`
	Versions json.RawMessage `json:"versions"`
	Process  json.RawMessage `json:"process"`
	Hooks    []string        `json:"hooks"`
	Begun    time.Time       `json:"begun"`
	Ended    time.Time       `json:"ended,omitzero"`
}

// Run groups requests for people: session.record(labels=..., tags=...), or the session's own.
type Run struct {
	ID      string            `json:"id"`
	Session uint32            `json:"session_number"`
	Labels  map[string]string `json:"labels"`
	Tags    []string          `json:"tags"`
	Begun   time.Time         `json:"begun"`
	Ended   time.Time         `json:"ended,omitzero"`
}

// Request is one sequence of tokens that the model worked on.
type Request struct {
	Key    RequestKey        `json:"-"`
	ID     string            `json:"id"` // what users see
	Run    string            `json:"run"`
	Labels map[string]string `json:"labels,omitempty"`
	Tags   []string          `json:"tags,omitempty"`
	Tokens []int64           `json:"tokens,omitempty"` // as Session.Text allows
	Text   string            `json:"text,omitempty"`
	Pieces []string          `json:"pieces,omitempty"` // of the text: what each token of Tokens is written as
	Hidden bool              `json:"hidden,omitempty"` // a beam's slot: not listed
	Path   []PathPart        `json:"path,omitempty"`   // not empty: this request's rows are those of others
	Begun  time.Time         `json:"begun"`
	Ended  time.Time         `json:"ended,omitzero"`
	Reason string            `json:"reason,omitempty"` // finished, aborted, error
}

// PathPart says that positions [First, First+Count) of a request are those of another request of the same session.
type PathPart struct {
	Request uint64 `json:"request"`
	First   uint32 `json:"first"`
	Count   uint32 `json:"count"`
}

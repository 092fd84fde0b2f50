package serve

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"

	"dmi/live"
	"dmi/query"
)

// failure is an error as a reader sees it: docs/api.md, "Errors".
type failure struct {
	status   int
	code     string
	message  string // what was attempted, on what, why it failed
	hint     string // what to do next
	coverage *query.Coverage
}

func (f *failure) Error() string { return f.message }

var statusOf = map[query.Code]int{
	query.BadArgument: http.StatusBadRequest,
	query.NotFound:    http.StatusNotFound,
	query.Incomplete:  http.StatusConflict,
	query.OverLimit:   http.StatusRequestEntityTooLarge,
}

// asFailure turns any error into what is answered. Those that the reader can do nothing about are the operator's: they become 500 and are logged.
func asFailure(err error) *failure {
	var f *failure
	var q *query.Error
	switch {
	case errors.As(err, &f):
		return f
	case errors.As(err, &q):
		return &failure{statusOf[q.Code], string(q.Code), q.Message, q.Hint, q.Coverage}
	case errors.Is(err, live.ErrTooMany):
		return &failure{http.StatusServiceUnavailable, "busy", err.Error(), "", nil}
	case errors.Is(err, live.ErrClosed):
		return &failure{http.StatusServiceUnavailable, "stopping", "the engine is stopping", "try again when it is back", nil}
	case errors.Is(err, context.DeadlineExceeded):
		return &failure{http.StatusServiceUnavailable, "timeout", err.Error(), "ask for less, or try again when the engine is less busy", nil}
	}
	return &failure{http.StatusInternalServerError, "internal", err.Error(), "the engine's log says more; `dmi verify` checks the store", nil}
}

func (f *failure) write(w http.ResponseWriter) {
	type body struct {
		Code    string `json:"code"`
		Message string `json:"message"`
		Hint    string `json:"hint"`
	}
	text, _ := json.Marshal(struct {
		Error    body            `json:"error"`
		Coverage *query.Coverage `json:"coverage,omitempty"`
	}{body{f.code, f.message, f.hint}, f.coverage})
	h := w.Header()
	for name := range h { // of an answer that did not come to be
		if name != "Allow" && name != "Connection" {
			delete(h, name)
		}
	}
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(text)+1))
	h.Set("X-Content-Type-Options", "nosniff")
	if f.status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", `Bearer realm="dmi"`)
	}
	w.WriteHeader(f.status)
	_, _ = w.Write(append(text, '\n'))
}

package control

import (
	"errors"
	"fmt"

	"dmi/store"
	"dmi/tensor"
)

// Ids of runs, and request ids of the forms RUN.N and SESSION.N, are known to whoever reads the store, so a producer could use another's. A name
// belongs to the session that began it: what another says under it is dropped, with an event, and its rows stay its own, under a name of its own.
// Ids of other forms are the serving engine's and need not be unique; who asks by one gets the latest request that has it.

// storeRun keeps a run that is this session's, or becomes it.
func (x *session) storeRun(run tensor.Run) error {
	if err := x.store.PutRun(run); err != nil {
		return err
	}
	x.mu.Lock()
	if len(x.owned) >= maxFinishes { // the store remembers them all
		clear(x.owned)
	}
	x.owned[run.ID] = true
	x.mu.Unlock()
	return nil
}

// owns makes sure that a run is this session's: nobody's becomes it.
func (x *session) owns(run string) error {
	x.mu.Lock()
	known := x.owned[run]
	x.mu.Unlock()
	if known {
		return nil
	}
	return x.storeRun(tensor.Run{ID: run, Session: x.number})
}

// ownNames takes away from a request what names another session's run, and gives it an id of its own.
func (x *session) ownNames(r *tensor.Request) {
	foreign := func(run string) bool {
		err := x.owns(run)
		if errors.Is(err, store.ErrForeign) {
			return true
		}
		_ = x.kept(err)
		return false
	}
	if r.Run != "" && foreign(r.Run) {
		x.event("error", "foreign", fmt.Sprintf("request %d of session %s is said to be of run %s, which another session began: it is kept outside any run", r.Key.Request, x.id, r.Run))
		r.Run = ""
	}
	taken := false
	switch prefix := idPrefix(r.ID); {
	case runID.MatchString(prefix):
		taken = foreign(prefix)
	case sessionID.MatchString(prefix):
		taken = prefix != x.id
	}
	if taken {
		own := fmt.Sprintf("%s.%d", x.id, r.Key.Request)
		x.event("error", "foreign", fmt.Sprintf("request %d of session %s is said to be %s, a name that belongs to another session: it is kept as %s", r.Key.Request, x.id, r.ID, own))
		r.ID = own
	}
}

// idPrefix is what stands before the dot of RUN.N; "" of other forms.
func idPrefix(id string) string {
	const n = len("r01234567")
	if len(id) > n && id[n] == '.' {
		return id[:n]
	}
	return ""
}

package query

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"dmi/store"
	"dmi/tensor"
)

// Source is what a query needs of a store; *store.Store is one, live or finished. All methods are safe for concurrent use.
//
// A row's chunk is there before Entries calls it captured.
type Source interface {
	Sessions() ([]tensor.Session, error)
	Runs() ([]tensor.Run, error)
	Requests(store.RequestFilter) ([]tensor.Request, error)
	RequestByID(id string) (tensor.Request, bool, error)
	Sites(session uint32) ([]tensor.Site, error)
	Chunks(key tensor.RequestKey, site uint32, from, to uint32) ([]store.ChunkRef, error)
	ReadRows(ref store.ChunkRef, from, to uint32, dst []byte) error
	WillRead(refs []store.ChunkRef) // a hint
	Entries(key tensor.RequestKey) ([]tensor.Entry, error)
	// As long as its mark is what it was before, what was read of a request's books holds, and of a run. 0: nothing may be kept.
	MarkRequest(key tensor.RequestKey, run string) uint64
	MarkRun(id string) uint64
	Forwards(ctx context.Context, key tensor.RequestKey) ([]store.Forward, error)
	Books() store.Totals
}

// Engine answers questions. Its methods are safe for concurrent use.
type Engine struct {
	source Source
	// MemoryBytes bounds what a reader holds, one row excepted: 64 MiB unless set before the first question. Attention is transposed
	// as it is read; what does not fit is read again, a group of heads at a time.
	MemoryBytes int

	mu    sync.Mutex
	forms map[formKey]form // as many as sites exist

	summed   recent[chunkKey, tensor.Statistics]
	pictured recent[pictureKey, float32]
	requests kept[sumKey, sum]
	runs     kept[string, runSum]
}

// New makes an engine over a source, which it does not close.
func New(source Source) *Engine {
	e := &Engine{source: source, MemoryBytes: 64 << 20, forms: map[formKey]form{}}
	e.summed.most, e.pictured.most = maxSummedRows, maxPixels
	return e
}

func (e *Engine) sessions() (map[uint32]tensor.Session, error) {
	list, err := e.source.Sessions()
	if err != nil {
		return nil, fmt.Errorf("query: list sessions: %w", err)
	}
	byNumber := map[uint32]tensor.Session{}
	for _, s := range list {
		byNumber[s.Number] = s
	}
	return byNumber, nil
}

func (e *Engine) sessionByID(id string) (tensor.Session, error) {
	list, err := e.source.Sessions()
	if err != nil {
		return tensor.Session{}, fmt.Errorf("query: list sessions: %w", err)
	}
	return byID(list, "session", id, func(s tensor.Session) string { return s.ID })
}

func (e *Engine) runByID(id string) (tensor.Run, error) {
	list, err := e.source.Runs()
	if err != nil {
		return tensor.Run{}, fmt.Errorf("query: list runs: %w", err)
	}
	return byID(list, "run", id, func(r tensor.Run) string { return r.ID })
}

func byID[T any](list []T, what, id string, idOf func(T) string) (T, error) {
	for _, item := range list {
		if idOf(item) == id {
			return item, nil
		}
	}
	var zero T
	ids := make([]string, len(list))
	for i, item := range list {
		ids[i] = idOf(item)
	}
	return zero, unknownID(what, id, ids)
}

// closeIDs bounds how many ids an unknown one is compared with.
const closeIDs = 1000

func unknownID(what, id string, ids []string) error {
	if len(ids) == 0 {
		return notFound("", "%s %q: the store has none", what, id)
	}
	ids = ids[max(0, len(ids)-closeIDs):]
	return notFound("did you mean "+joinNames(closest(ids, ids, id))+"?", "%s %q: the store has none of that id", what, id)
}

func (e *Engine) requestByID(id string) (tensor.Request, error) {
	r, found, err := e.source.RequestByID(id)
	if err != nil {
		return r, fmt.Errorf("query: look request %q up: %w", id, err)
	}
	if found {
		return r, nil
	}
	all, err := e.requestsIn("", "", false)
	if err != nil {
		return r, err
	}
	ids := make([]string, len(all))
	for i, other := range all {
		ids[i] = other.ID
	}
	return r, unknownID("request", id, ids)
}

// requestsOf lists the requests of a scope that people see.
func (e *Engine) requestsOf(ctx context.Context, s Scope) ([]tensor.Request, error) {
	all, err := e.everyRequestOf(ctx, s)
	if err != nil || len(s.Requests) > 0 {
		return all, err
	}
	return slices.DeleteFunc(all, func(r tensor.Request) bool { return r.Hidden }), nil
}

// everyRequestOf lists the requests of a scope, hidden ones too.
func (e *Engine) everyRequestOf(ctx context.Context, s Scope) ([]tensor.Request, error) {
	set := 0
	for _, is := range []bool{len(s.Requests) > 0, s.Run != "", s.Session != ""} {
		if is {
			set++
		}
	}
	if set != 1 {
		return nil, badArgument("name requests, or a run, or a session", "%d of requests, run and session named: exactly one says what is asked about", set)
	}
	if len(s.Requests) == 0 {
		return e.requestsIn(s.Run, s.Session, true)
	}
	all := make([]tensor.Request, len(s.Requests))
	for i, id := range s.Requests {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if slices.Contains(s.Requests[:i], id) {
			return nil, badArgument("name each request once", "request %q is named twice", id)
		}
		var err error
		if all[i], err = e.requestByID(id); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// requestsIn lists the requests of a run, of a session, or of the store, in the order they began.
func (e *Engine) requestsIn(run, session string, hidden bool) ([]tensor.Request, error) {
	filter, err := e.filterOf(run, session, hidden)
	if err != nil {
		return nil, err
	}
	all, err := e.source.Requests(filter)
	if err != nil {
		return nil, fmt.Errorf("query: list requests: %w", err)
	}
	return all, nil
}

func (e *Engine) filterOf(run, session string, hidden bool) (store.RequestFilter, error) {
	filter := store.RequestFilter{Run: run, Hidden: hidden}
	if run != "" {
		if _, err := e.runByID(run); err != nil {
			return filter, err
		}
	}
	if session != "" {
		s, err := e.sessionByID(session)
		if err != nil {
			return filter, err
		}
		filter.Session = s.Number
	}
	return filter, nil
}

func (e *Engine) siteOf(r tensor.Request, name SiteName) (tensor.Site, error) {
	sites, err := e.source.Sites(r.Key.Session)
	if err != nil {
		return tensor.Site{}, fmt.Errorf("query: sites of request %s: %w", r.ID, err)
	}
	return resolveSite(sites, name)
}

func (e *Engine) sitesOf(session uint32, pattern string, layer *int) ([]tensor.Site, error) {
	sites, err := e.source.Sites(session)
	if err != nil {
		return nil, fmt.Errorf("query: sites of session %d: %w", session, err)
	}
	return selectSites(sites, pattern, layer)
}

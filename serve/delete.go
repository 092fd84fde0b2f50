package serve

import (
	"context"
	"fmt"
	"math"
	"net/http"
	"slices"
	"time"

	"dmi/query"
	"dmi/store"
	"dmi/tensor"
)

// delete removes what is kept of requests: of all that have one of some ids; or of those with a tag, or begun before a time, or both.
func (s *Server) delete(w *writer, c *call) error {
	ids, tag, before := c.list("request"), c.text("tag"), c.number("before", 1, math.MaxInt64)
	if c.err != nil {
		return c.err
	}
	if len(ids) == 0 && tag == "" && before == 0 || len(ids) > 0 && (tag != "" || before != 0) {
		return badArgument("name requests with request=, or all of a kind with tag= or before= (Unix ns), or both", "delete: which requests?")
	}
	if s.options.Identity.ReadOnly {
		return &failure{http.StatusConflict, "read_only", "delete: this engine only reads the store", "stop it and run `dmi delete`, or ask the engine that captures", nil}
	}
	ctx, cancel := context.WithCancel(c.Context())
	defer cancel()
	defer context.AfterFunc(s.stop, cancel)()
	if s.options.Flush != nil { // what producers have published is to be found, and to go as well
		if err := s.options.Flush(ctx); err != nil {
			return fmt.Errorf("delete: flush what producers published: %w", err)
		}
	}
	keys, err := s.named(ids, tag, before)
	if err != nil {
		return err
	}
	stream, err := openEventStream(w)
	if err != nil {
		return err
	}
	var last time.Time
	deleted, err := s.options.Store.Delete(ctx, keys, func(p store.DeletionProgress) {
		if time.Since(last) < progressEvery {
			return
		}
		last = time.Now()
		if stream.send("progress", "", p) != nil || w.flush() != nil {
			cancel()
		}
	})
	return endStream(w, c, stream, deleted, err)
}

// named finds the requests that a deletion names, hidden ones too. An id that several sessions used names all of them; one that nobody used is an error.
func (s *Server) named(ids []string, tag string, before int64) ([]tensor.RequestKey, error) {
	known, err := s.options.Store.Requests(store.RequestFilter{Hidden: true})
	if err != nil {
		return nil, err
	}
	found := make(map[string]bool, len(ids))
	for _, id := range ids {
		found[id] = false
	}
	var keys []tensor.RequestKey
	for _, r := range known {
		var named bool
		if len(ids) > 0 {
			if _, named = found[r.ID]; named {
				found[r.ID] = true
			}
		} else {
			named = (tag == "" || slices.Contains(r.Tags, tag)) && (before == 0 || !r.Begun.IsZero() && r.Begun.UnixNano() < before)
		}
		if named {
			keys = append(keys, r.Key)
		}
	}
	for _, id := range ids {
		if !found[id] {
			return nil, &failure{http.StatusNotFound, string(query.NotFound), fmt.Sprintf("delete: request %q: the store has none of that id; nothing is deleted", id), "GET /v1/requests lists them", nil}
		}
	}
	return keys, nil
}

// endStream ends a stream of progress with its result or what went wrong: the answer has begun, so the failure is an event too.
func endStream(w *writer, c *call, stream *eventStream, result any, err error) error {
	if err == nil {
		if err = stream.send("result", "", result); err == nil {
			return w.flush()
		}
	}
	if c.Context().Err() != nil {
		return err
	}
	f := asFailure(err)
	if err := stream.send("error", "", map[string]string{"code": f.code, "message": f.message, "hint": f.hint}); err != nil {
		return err
	}
	return w.flush()
}

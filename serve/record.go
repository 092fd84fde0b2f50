package serve

import (
	"errors"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"dmi/query"
	"dmi/serve/audit"
	"dmi/tensor"
)

// reads numbers the recorded reads of a server, and bounds the record of refusals.
type reads struct {
	last atomic.Uint64

	mu       sync.Mutex
	second   int64 // in which refusals were last counted
	refusals int
	further  uint64 // refusals without a line since the last line
	prompts  tensor.Site
	looked   time.Time // when prompts was
}

// mostRefusals is how many lines a second of refusals may write: whoever has no token must not be able to push out what those did who have one.
const mostRefusals = 10

// record is a read under way; nil is one that is not recorded.
type record struct {
	log   *audit.Log
	id    string
	began time.Time
}

// kindOf says what an answer may hold: text where a prompt could be in it, whether or not it was kept.
func (s *Server) kindOf(route route, c *call) Scope {
	if route.scope == ScopeAdmin || c.scope < ScopeText || route.tells == tellsNoPrompt {
		return route.scope
	}
	if route.tells == tellsPromptBySite {
		matches, err := query.SiteMatcher(c.text("site"))
		prompts, failed := s.reads.promptSite(s.options.Store)
		if err == nil && failed == nil && !matches(prompts) {
			return route.scope
		}
	}
	return ScopeText
}

// promptSite is the site of prompts' ids under all the names that it has in any session. They are looked up once a second at most.
func (x *reads) promptSite(store Store) (tensor.Site, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if time.Since(x.looked) < time.Second {
		return x.prompts, nil
	}
	names := map[string]bool{}
	sessions, err := store.Sessions()
	for _, session := range sessions {
		sites, failed := store.Sites(session.Number)
		err = errors.Join(err, failed)
		for _, site := range sites {
			if holdsPrompt(site) {
				for _, alias := range site.Aliases {
					names[alias] = true
				}
			}
		}
	}
	if err != nil {
		return tensor.Site{}, err
	}
	x.prompts, x.looked = tensor.Site{Name: tokensSite, Aliases: slices.Collect(maps.Keys(names))}, time.Now()
	return x.prompts, nil
}

// beginRecord records that a read begins, where it is one that is recorded.
func (s *Server) beginRecord(route route, c *call) (*record, *failure) {
	o := &s.options
	if o.Audit == nil || route.open {
		return nil, nil
	}
	kind := s.kindOf(route, c)
	if kind < ScopeTensors && !o.AuditStatistics {
		return nil, nil
	}
	r := &record{o.Audit, o.Identity.ID + "-" + strconv.FormatUint(s.reads.last.Add(1), 10), time.Now()}
	e := s.entry("begin", route, c.Request, c.caller)
	e.Read, e.Kind, e.Args = r.id, kind.String(), c.values
	if err := o.Audit.Append(e); err != nil && o.AuditRequired { // who writes it tells of failures
		return nil, &failure{http.StatusServiceUnavailable, "audit", c.URL.Path + ": this read cannot be recorded, and audit.required says that it must be: " + err.Error(),
			"see the engine's log and the disk; or set audit.required to false", nil}
	}
	return r, nil
}

func (s *Server) entry(event string, route route, r *http.Request, who caller) audit.Entry {
	e := audit.Entry{Event: event, Route: route.method + " " + route.path, Who: &audit.Who{Token: who.token, Scope: who.scope.String(), Peer: r.RemoteAddr}}
	if r.URL.Path != route.path {
		e.Path = r.URL.Path
	}
	return e
}

// end records how a read ended. Only the first word counts.
func (r *record) end(w *writer, c *call, outcome string, f *failure) {
	if r == nil || r.log == nil {
		return
	}
	result := &audit.Result{Outcome: outcome, Status: w.status, Rows: c.rows, Bytes: w.bytes, Seconds: time.Since(r.began).Seconds()}
	if f != nil {
		result.Status, result.Code = f.status, f.code
		if w.started {
			result.Status = w.status
		} else {
			result.Rows = 0
		}
	}
	_ = r.log.Append(audit.Entry{Event: "end", Read: r.id, Result: result}) // it is too late to refuse; the log tells of failures
	r.log = nil
}

// recordRefusal records that someone was not let in, or not so far.
func (s *Server) recordRefusal(route route, r *http.Request, who caller, f *failure) {
	if s.options.Audit == nil {
		return
	}
	x := &s.reads
	x.mu.Lock()
	if now := time.Now().Unix(); now != x.second {
		x.second, x.refusals = now, 0
	}
	x.refusals++
	if x.refusals > mostRefusals {
		x.further++
		x.mu.Unlock()
		return
	}
	further := x.further
	x.further = 0
	x.mu.Unlock()
	e := s.entry("refused", route, r, who)
	e.Kind = route.scope.String()
	e.Result = &audit.Result{Outcome: "refused", Status: f.status, Code: f.code, Further: further}
	_ = s.options.Audit.Append(e)
}

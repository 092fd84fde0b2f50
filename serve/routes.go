package serve

import "net/http"

// route is a line of docs/api.md.
type route struct {
	method, path string
	scope        Scope
	takes        []string // parameters; with * those that may be repeated
	stream       bool     // goes on until the reader leaves
	open         bool     // for supervisors: no token, no limit, no arguments
	body         bool     // takes one; the others refuse it
	tells        tells    // to those who may see prompts
	handle       func(w *writer, c *call) error
}

// tells is whether an answer can hold a prompt, for the record of reads.
type tells uint8

const (
	tellsNoPrompt     tells = iota
	tellsPromptBySite       // where the site named is that of the prompt's ids, or none is named
	tellsPrompt
)

func (s *Server) routes() []route {
	get := func(path string, scope Scope, handle func(*writer, *call) error, takes ...string) route {
		return route{method: http.MethodGet, path: "/v1" + path, scope: scope, takes: takes, handle: handle}
	}
	post := func(path string, scope Scope, handle func(*writer, *call) error, takes ...string) route {
		return route{method: http.MethodPost, path: "/v1" + path, scope: scope, takes: takes, handle: handle}
	}
	stream := func(r route) route {
		r.stream = true
		return r
	}
	bySite := func(r route) route {
		r.tells = tellsPromptBySite
		return r
	}
	always := func(r route) route {
		r.tells = tellsPrompt
		return r
	}
	all := []route{
		get("/status", ScopeStatistics, s.status),
		get("/sessions", ScopeStatistics, s.sessions),
		get("/sessions/{id}", ScopeStatistics, s.session),
		get("/runs", ScopeStatistics, s.runs, "tag", "label*", "session", "limit", "after"),
		get("/requests", ScopeStatistics, s.requests, "run", "session", "tag", "label*", "latest", "hidden", "limit", "after"),
		always(get("/requests/{id}", ScopeStatistics, s.request)),
		get("/sites", ScopeStatistics, s.sites, "request*", "run", "session", "site", "layer"),
		get("/coverage", ScopeStatistics, s.coverage, "request*", "run", "session", "site", "layer"),
		bySite(get("/tensor", ScopeTensors, s.tensor, "request", "site", "layer", "tokens", "steps", "heads", "level", "partial", "as", "limit")),
		bySite(get("/rows", ScopeTensors, s.rows, "request*", "run", "session", "site", "layer", "partial", "as", "limit", "after")),
		bySite(get("/stats", ScopeStatistics, s.stats, "request*", "run", "session", "site", "layer", "tokens", "per", "format")),
		bySite(get("/topk", ScopeTensors, s.top, "request*", "run", "session", "site", "layer", "tokens", "k")),
		bySite(get("/grid", ScopeStatistics, s.grid, "request", "site", "layer", "tokens", "statistic")),
		get("/thumbnails", ScopeTensors, s.thumbnails, "request", "site", "layer", "size"),
		always(get("/topkeys", ScopeTensors, s.topKeys, "request", "site", "layer", "heads", "query", "k")),
		always(get("/export", ScopeTensors, s.export, "request*", "run", "session", "site", "layer", "format", "as", "partial")),
		bySite(stream(get("/live/stats", ScopeStatistics, s.liveStats, "site", "session", "request"))),
		bySite(stream(get("/live/map", ScopeStatistics, s.liveMap, "site", "session", "request"))),
		stream(get("/live/events", ScopeStatistics, s.liveEvents, "after")),
		bySite(stream(get("/live/tensors", ScopeTensors, s.liveTensors, "site", "session", "request"))),
		post("/flush", ScopeAdmin, s.flush),
		post("/verify", ScopeAdmin, s.verify),
		post("/delete", ScopeAdmin, s.delete, "request*", "tag", "before"),
		get("/policy", ScopeAdmin, s.steered(s.policy), "revision"),
		{method: http.MethodPut, path: "/v1/policy", scope: ScopeAdmin, body: true, handle: s.steered(s.setPolicy)},
		get("/policy/revisions", ScopeAdmin, s.steered(s.policyRevisions), "after", "limit"),
		get("/policy/explain", ScopeAdmin, s.steered(s.explainPolicy), "request", "site", "position", "phase"),
		post("/policy/off", ScopeAdmin, s.steered(s.brake(true))),
		post("/policy/on", ScopeAdmin, s.steered(s.brake(false))),
		get("/config", ScopeAdmin, s.config),
		get("/openapi.json", ScopeStatistics, s.openapi),
	}
	all = append(all, s.inspections(get, bySite, always)...)
	// What supervisors and Prometheus ask for, where they expect it and under /v1.
	for _, prefix := range []string{"", "/v1"} {
		all = append(all,
			route{method: http.MethodGet, path: prefix + "/healthz", open: true, handle: s.healthz},
			route{method: http.MethodGet, path: prefix + "/readyz", open: true, handle: s.readyz},
			route{method: http.MethodGet, path: prefix + "/metrics", scope: ScopeStatistics, handle: s.prometheus},
		)
	}
	return all
}

package serve

import (
	"fmt"
	"net/http"
)

// Forward puts a gate before an API that lets everybody in, such as a live engine's Unix socket. Every route passes only for a token that reaches its
// scope. The API behind does not know who asks, so it cannot leave prompts out: admit only tokens of at least ScopeText.
func Forward(g *Gate, to http.Handler) http.Handler {
	mux := http.NewServeMux()
	for _, route := range new(Server).routes() {
		mux.HandleFunc(route.method+" "+route.path, func(w http.ResponseWriter, r *http.Request) {
			var who caller
			var refused *failure
			if !route.open {
				who, refused = g.admit(r)
			}
			if needs := max(route.scope, ScopeText); refused == nil && who.scope < needs && !route.open {
				refused = &failure{http.StatusForbidden, "scope", fmt.Sprintf("%s %s: the token's scope is %s, this needs %s", r.Method, r.URL.Path, who.scope, needs),
					"use a token of a wider scope", nil}
			}
			if refused != nil {
				refused.write(w)
				return
			}
			to.ServeHTTP(w, r)
		})
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		(&failure{http.StatusNotFound, "not_found", fmt.Sprintf("%s %s: there is nothing at this path for this method", r.Method, r.URL.Path), "GET /v1/openapi.json lists what there is", nil}).write(w)
	})
	return mux
}

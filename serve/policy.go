package serve

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"

	"dmi/policy"
	"dmi/query"
	"dmi/steer"
)

// policyFailure turns what a change of the policy, or a question about it, may end with into an answer.
func policyFailure(doing string, err error) error {
	var parse *policy.ParseError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &parse):
		return &failure{http.StatusBadRequest, "policy", err.Error(), "docs/format/policy.md has the whole form; the policy in force is unchanged", nil}
	case errors.Is(err, steer.ErrReadOnly):
		return &failure{http.StatusConflict, "read_only", fmt.Sprintf("%s: %v", doing, err), "attach a model with dmi.attach(store=...), or start `dmi serve`", nil}
	case errors.Is(err, steer.ErrNoRequest):
		return &failure{http.StatusNotFound, "not_found", fmt.Sprintf("%s: %v", doing, err), "GET /requests or `dmi requests` lists them", nil}
	}
	return err
}

// steered is in front of every route that needs the policy.
func (s *Server) steered(handle func(*writer, *call) error) func(*writer, *call) error {
	return func(w *writer, c *call) error {
		if s.options.Policy == nil {
			return &failure{http.StatusInternalServerError, "policy", fmt.Sprintf("the store's policy cannot be read: %v", s.options.PolicyError), "see docs/format/policy.md", nil}
		}
		return handle(w, c)
	}
}

func (s *Server) policy(w *writer, c *call) error {
	text := c.text("revision")
	if text == "" {
		return writeJSON(w, s.options.Policy.Status())
	}
	number, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return badArgument("say a number, as chunks and coverage name it", "revision=%q is not one", text)
	}
	status, found, err := s.options.Policy.Find(number)
	if err == nil && !found {
		return &failure{http.StatusNotFound, "not_found", fmt.Sprintf("revision %d of the policy: there is none of that number, or it is forgotten", number), "GET /policy/revisions lists them", nil}
	}
	if err != nil {
		return err
	}
	return writeJSON(w, status)
}

func (s *Server) setPolicy(w *writer, c *call) error {
	text, err := io.ReadAll(http.MaxBytesReader(w, c.Body, policy.MaxBytes))
	if err != nil {
		var long *http.MaxBytesError
		if errors.As(err, &long) {
			return &failure{http.StatusRequestEntityTooLarge, "over_limit", fmt.Sprintf("set the policy: more than %d bytes", policy.MaxBytes), "write fewer rules", nil}
		}
		return badArgument("send the whole document", "set the policy: read the body: %v", err)
	}
	if len(bytes.TrimSpace(text)) == 0 {
		return badArgument("send the whole document; `default: full` captures everything", "set the policy: the body is empty")
	}
	status, err := s.options.Policy.Set(text, "set by "+c.token)
	if err != nil {
		return policyFailure("set the policy", err)
	}
	return writeJSON(w, status)
}

func (s *Server) brake(off bool) func(*writer, *call) error {
	return func(w *writer, c *call) error {
		why := "brake released by "
		if off {
			why = "brake put on by "
		}
		status, err := s.options.Policy.Brake(off, why+c.token)
		if err != nil {
			return policyFailure("move the brake", err)
		}
		return writeJSON(w, status)
	}
}

func (s *Server) policyRevisions(w *writer, c *call) error {
	after, limit := c.number("after", 0, 1<<62), int(c.number("limit", 1, 10000))
	if c.err != nil {
		return c.err
	}
	if limit == 0 {
		limit = 1000
	}
	list := s.options.Policy.Revisions(uint64(after), limit+1)
	var next *string
	if len(list) > limit {
		list = list[:limit]
		cursor := strconv.FormatUint(list[limit-1].Number, 10)
		next = &cursor
	}
	return writeJSON(w, map[string]any{"items": orNone(list), "next": next})
}

func (s *Server) explainPolicy(w *writer, c *call) error {
	q := steer.Question{Request: c.must("request", "name the request whose token is asked about"), Site: c.text("site"), Position: uint32(c.number("position", 0, 1<<32-1))}
	switch phase := c.text("phase"); phase {
	case "":
	case "decode", "prefill":
		p := map[string]policy.Phase{"decode": policy.Decode, "prefill": policy.Prefill}[phase]
		q.Phase = &p
	default:
		return badArgument("say prefill or decode", "phase=%q is neither", phase)
	}
	if c.err != nil {
		return c.err
	}
	// Which says what is near where a request or site is not.
	if _, err := c.query.Sites(c.Context(), query.SitesQuery{Scope: query.Scope{Requests: []string{q.Request}}, Site: q.Site}); err != nil {
		return err
	}
	list, err := s.options.Policy.Explain(c.Context(), q)
	if err != nil {
		return policyFailure("explain the policy", err)
	}
	return writeJSON(w, map[string]any{"items": list, "next": nil})
}

package query

import (
	"context"
	"fmt"
	"slices"

	"dmi/tensor"
)

// maxRanges bounds the ranges of one answer; the sums are exact in any case.
const maxRanges = 1 << 20

// Coverage sums the books up: of requests named (with ranges), of a run or session, or of the whole store.
func (e *Engine) Coverage(ctx context.Context, q CoverageQuery) (*Coverage, error) {
	if len(q.Requests) == 0 && q.Run == "" && q.Session == "" {
		if q.Site != "" || q.Layer != nil {
			return nil, badArgument("name a request, run or session, or no site", "coverage of the whole store by site")
		}
		return e.wholeStore()
	}
	c := &Coverage{Complete: true, Outcomes: map[string]map[string]uint64{}}
	if len(q.Requests) > 0 {
		requests, err := e.requestsOf(ctx, q.Scope)
		if err != nil {
			return nil, err
		}
		for _, r := range requests {
			if err := e.coverRequest(ctx, c, r, q, true); err != nil {
				return nil, err
			}
		}
		return c, nil
	}
	// Of a run or a session, the requests that have rows of their own, hidden ones too; those with a path would count twice.
	requests, err := e.everyRequestOf(ctx, q.Scope)
	if err != nil {
		return nil, err
	}
	for _, r := range requests {
		if len(r.Path) > 0 {
			continue
		}
		if err := e.coverRequest(ctx, c, r, q, false); err != nil {
			return nil, err
		}
	}
	if q.Session != "" {
		err = e.coverUnattributed(c, q)
	}
	return c, err
}

func (e *Engine) coverRequest(ctx context.Context, c *Coverage, r tensor.Request, q CoverageQuery, ranges bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	sites, err := e.sitesOf(r.Key.Session, q.Site, q.Layer)
	if err != nil {
		return err
	}
	parts, err := partsOf(r)
	if err != nil {
		return err
	}
	entries, err := e.entriesOf(parts)
	if err != nil {
		return fmt.Errorf("query: books of request %s: %w", r.ID, err)
	}
	start := len(c.Ranges)
	names := map[uint32]string{}
	for _, s := range sites {
		names[s.ID] = s.Name
	}
	perhaps := len(r.Path) > 0 // a path may leave positions out
	for _, entry := range entries {
		for _, id := range entry.Sites {
			if name, wanted := names[id]; wanted {
				c.add(entry, 1)
				perhaps = perhaps || owed(entry.Outcome) && (entry.Outcome != tensor.Captured || entry.Level != tensor.Full || entry.Expired != 0)
				if ranges {
					if len(c.Ranges) == maxRanges {
						return &Error{Code: OverLimit, Message: fmt.Sprintf("coverage of request %s: more than %d ranges", r.ID, maxRanges),
							Hint: "name fewer requests, or a site"}
					}
					c.Ranges = append(c.Ranges, rangeOf(r.ID, name, entry))
				}
			}
		}
	}
	if c.Complete && perhaps { // not if another attempt captured what one did not
		for _, s := range sites {
			if !fateOf(entries, s.ID).complete() {
				c.Complete = false
				break
			}
		}
	}
	c.Ranges = append(c.Ranges[:start], joined(c.Ranges[start:])...)
	return nil
}

// coverage is the books of what a selection asked for.
func (s *selection) coverage() *Coverage {
	c := &Coverage{Complete: len(s.missing) == 0, Outcomes: map[string]map[string]uint64{}}
	for _, entry := range s.books {
		if !slices.Contains(entry.Sites, s.site.ID) {
			continue
		}
		for _, span := range s.asked {
			if clipped, some := clip(entry, span); some && len(c.Ranges) < maxRanges {
				c.add(clipped, 1)
				c.Ranges = append(c.Ranges, rangeOf(s.request.ID, s.site.Name, clipped))
			}
		}
	}
	c.Ranges = joined(c.Ranges)
	return c
}

func rangeOf(request, site string, e tensor.Entry) CoverageRange {
	reason := e.Reason.String()
	return CoverageRange{request, site, e.First, e.Count, max(1, e.Stride), e.Outcome.String(), reason, e.Level.String(), e.Policy, e.Attempt, e.Expired}
}

func (c *Coverage) add(e tensor.Entry, sites uint64) {
	c.count(e, uint64(e.Count)*sites)
	if e.Expired != 0 {
		c.Expired += uint64(e.Count) * sites
	}
}

func (c *Coverage) count(e tensor.Entry, rows uint64) {
	outcome := e.Outcome.String()
	byReason := c.Outcomes[outcome]
	if byReason == nil {
		byReason = map[string]uint64{}
		c.Outcomes[outcome] = byReason
	}
	byReason[inner(e)] += rows
	c.Rows += rows
	if e.Reason == tensor.Repeated {
		c.Repeated += rows
	}
}

// inner is what stands in parentheses after an outcome: the level of what was captured, else the reason.
func inner(e tensor.Entry) string {
	if e.Outcome == tensor.Captured {
		return e.Level.String()
	}
	return e.Reason.String()
}

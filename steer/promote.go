package steer

import (
	"fmt"
	"slices"

	"dmi/policy"
	"dmi/trigger"
)

// MaxPromoted requests are promoted at once: beyond, the one that was promoted first is no more.
const MaxPromoted = 64

// Promote has a firing's request captured in full at the sites that its trigger promotes, from the next step on until the request ends, a document comes, or MaxPromoted others are. It does not wait.
func (h *Helm) Promote(f trigger.Firing) {
	select {
	case h.firings <- f:
	default:
		h.event("warning", "trigger", fmt.Sprintf("%d promotions wait already: request %s is not promoted", cap(h.firings), f.Request))
	}
}

// promote acts on firings that wait.
func (h *Helm) promote(first trigger.Firing) {
	h.mu.Lock()
	defer h.mu.Unlock()
	next := h.force
	next.revision.Promoted = slices.Clone(next.revision.Promoted)
	why := ""
	for f, more := first, true; more; {
		p := policy.Promoted{Session: f.Key.Session, Request: f.Key.Request, ID: f.Request, Trigger: f.Trigger}
		if next.revision.Document == f.Revision && !slices.Contains(next.revision.Promoted, p) { // else it is from a document that is not in force any more, or nothing new
			if len(next.revision.Promoted) == MaxPromoted {
				next.revision.Promoted = next.revision.Promoted[1:]
			}
			next.revision.Promoted = append(next.revision.Promoted, p)
			if why == "" {
				why = "promoted: " + f.String()
			} else if len(why) < 500 {
				why += "; " + f.String()
			}
		}
		select {
		case f = <-h.firings:
		default:
			more = false
		}
	}
	if why != "" {
		next.revision.Why = why
		h.put(next, "promote it")
	}
}

// release lets go of promotions whose requests have ended.
func (h *Helm) release() {
	h.mu.Lock()
	defer h.mu.Unlock()
	next, ended := h.force, ""
	if len(next.revision.Promoted) == 0 {
		return
	}
	next.revision.Promoted = slices.DeleteFunc(slices.Clone(next.revision.Promoted), func(p policy.Promoted) bool {
		r, found, err := h.options.Store.RequestByID(p.ID)
		over := err == nil && found && r.Key.Session == p.Session && !r.Ended.IsZero()
		if over {
			ended = p.ID
		}
		return over
	})
	if ended != "" {
		next.revision.Why = "no longer promoted: request " + ended + " has ended"
		h.put(next, "release it")
	}
}

func (h *Helm) put(next force, doing string) {
	if err := h.change(next, "trigger"); err != nil {
		h.event("error", "trigger", fmt.Sprintf("%s: could not %s: %v", next.revision.Why, doing, err))
	}
}

package policy

import (
	"fmt"
	"slices"
	"strings"

	"dmi/tensor"
)

// Labels of a request that say what it asks for itself. Values of the latter two are separated by blanks or commas.
const (
	CaptureLabel   = "dmi.capture"   // off: nothing of it
	SitesLabel     = "dmi.sites"     // globs, names, aliases or ends of one, as in a rule's hooks; one must fit
	PositionsLabel = "dmi.positions" // windows, as in a rule's tokens; one must fit
)

const maxChosen = 256 // patterns or windows

// Choice is what a request asks for of what the document gives it: never more, and whatever triggers promote.
type Choice struct {
	sites   []func(tensor.Site) bool // nil: all
	windows []Window                 // nil: all
	off     bool
}

// Nothing is the choice of a request that wants no rows kept.
var Nothing = &Choice{off: true}

// ChoiceOf reads the labels of a request. nil: it asks for nothing special. Where they cannot be understood it is Nothing, as to keep what was not wished is worse than not to.
func ChoiceOf(labels map[string]string) (*Choice, error) {
	capture, sites, positions := labels[CaptureLabel], words(labels[SitesLabel]), words(labels[PositionsLabel])
	switch {
	case capture == "off":
		return Nothing, nil
	case capture != "":
		return Nothing, fmt.Errorf("policy: label %s=%.80q: off is possible; sites and positions have labels of their own", CaptureLabel, capture)
	case len(sites) > maxChosen || len(positions) > maxChosen:
		return Nothing, fmt.Errorf("policy: a request asks for %d sites and %d positions: at most %d of each", len(sites), len(positions), maxChosen)
	case len(sites)+len(positions) == 0:
		return nil, nil
	}
	c := &Choice{}
	for _, pattern := range sites {
		fits, err := tensor.SiteMatcher(pattern)
		if err != nil {
			return Nothing, fmt.Errorf("policy: label %s: %w", SitesLabel, err)
		}
		c.sites = append(c.sites, fits)
	}
	for _, text := range positions {
		w, err := ParseWindow(text)
		if err != nil {
			return Nothing, fmt.Errorf("policy: label %s: %w", PositionsLabel, err)
		}
		c.windows = append(c.windows, w)
	}
	return c, nil
}

func words(text string) []string {
	return strings.FieldsFunc(text, func(c rune) bool { return c == ' ' || c == ',' || c == '\n' || c == '\t' })
}

// Site reports whether some rows of a site may be wanted. A nil Choice wants all.
func (c *Choice) Site(s Site) bool {
	return c == nil || !c.off && (c.sites == nil || slices.ContainsFunc(c.sites, func(fits func(tensor.Site) bool) bool { return fits(s) }))
}

// Token reports whether a row of a site that is wanted is.
func (c *Choice) Token(r Request, t Token) bool {
	return c == nil || c.windows == nil || slices.ContainsFunc(c.windows, func(w Window) bool { return w.Holds(r, t) })
}

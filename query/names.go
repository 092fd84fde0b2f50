package query

import (
	"fmt"
	"slices"
	"strings"

	"dmi/internal/nearest"
	"dmi/tensor"
)

// SiteMatcher is tensor.SiteMatcher, for those who watch sites that need not exist yet, with what to do about a pattern that is none.
func SiteMatcher(pattern string) (func(tensor.Site) bool, error) {
	fits, err := tensor.SiteMatcher(pattern)
	if err != nil {
		return nil, badArgument("write components between dots, with * for any part of one and ** for any number of them", "%v", err)
	}
	return fits, nil
}

// resolveSite finds the one site that a name means. Exact names win over aliases, aliases over ends of names.
func resolveSite(sites []tensor.Site, want SiteName) (tensor.Site, error) {
	pool, err := byLayer(sites, want.Layer)
	if err != nil {
		return tensor.Site{}, err
	}
	if want.Name == "" {
		return tensor.Site{}, badArgument("name one; GET /sites or `dmi ls` lists them", "no site named")
	}
	var found []tensor.Site
	if tensor.IsGlob(want.Name) {
		if found, err = globSites(pool, want.Name); err != nil {
			return tensor.Site{}, err
		}
	} else {
		for _, fits := range []func(tensor.Site) bool{
			func(s tensor.Site) bool { return s.Name == want.Name },
			func(s tensor.Site) bool { return slices.Contains(s.Aliases, want.Name) },
			func(s tensor.Site) bool { return tensor.EndsWith(s.Name, want.Name) },
			func(s tensor.Site) bool {
				return slices.ContainsFunc(s.Aliases, func(a string) bool { return tensor.EndsWith(a, want.Name) })
			},
		} {
			for _, s := range pool {
				if fits(s) {
					found = append(found, s)
				}
			}
			if len(found) > 0 {
				break
			}
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return tensor.Site{}, unknownSite(sites, pool, want)
	}
	hint := "name one of " + listNames(found)
	if want.Layer == nil && slices.ContainsFunc(found, func(s tensor.Site) bool { return s.Layer != found[0].Layer }) {
		hint = "add a layer, or " + hint
	}
	return tensor.Site{}, badArgument(hint, "site %q is ambiguous: %d sites fit", want.Name, len(found))
}

// selectSites finds every site that a glob, name or alias means; "" means all. None is an error.
func selectSites(sites []tensor.Site, pattern string, layer *int) ([]tensor.Site, error) {
	pool, err := byLayer(sites, layer)
	if err != nil {
		return nil, err
	}
	switch {
	case pattern == "":
		return pool, nil
	case tensor.IsGlob(pattern):
		found, err := globSites(pool, pattern)
		if err == nil && len(found) == 0 {
			err = unknownSite(sites, pool, SiteName{pattern, layer})
		}
		return found, err
	}
	site, err := resolveSite(sites, SiteName{pattern, layer})
	if err == nil {
		return []tensor.Site{site}, nil
	}
	// A name short of its layer means that site in every layer, where the ends agree.
	if found, _ := globSites(pool, pattern); len(found) > 1 {
		return found, nil
	}
	return nil, err
}

// globSites finds all that a pattern matches.
func globSites(pool []tensor.Site, pattern string) ([]tensor.Site, error) {
	fits, err := SiteMatcher(pattern)
	if err != nil {
		return nil, err
	}
	var found []tensor.Site
	for _, s := range pool {
		if fits(s) {
			found = append(found, s)
		}
	}
	return found, nil
}

func byLayer(sites []tensor.Site, layer *int) ([]tensor.Site, error) {
	if layer == nil {
		return sites, nil
	}
	last := tensor.NoLayer
	for _, s := range sites {
		last = max(last, s.Layer)
	}
	want := *layer
	if want < 0 {
		want += last + 1
	}
	var pool []tensor.Site
	for _, s := range sites {
		if s.Layer == want && want >= 0 {
			pool = append(pool, s)
		}
	}
	if len(pool) == 0 {
		if last == tensor.NoLayer {
			return nil, notFound("leave the layer out", "layer %d: no captured site is in a layer", *layer)
		}
		return nil, notFound("", "layer %d: nothing was captured there; the captured layers end at %d", *layer, last)
	}
	return pool, nil
}

func unknownSite(all, pool []tensor.Site, want SiteName) error {
	where := ""
	if want.Layer != nil {
		where = fmt.Sprintf(" in layer %d", *want.Layer)
	}
	if len(all) == 0 {
		return notFound("", "site %q%s: nothing was captured", want.Name, where)
	}
	return notFound("did you mean "+joinNames(closeSites(pool, want.Name))+"?", "site %q%s: no captured site has that name", want.Name, where)
}

const shownNames = 5

func listNames(sites []tensor.Site) string {
	names := make([]string, 0, shownNames)
	for _, s := range sites[:min(len(sites), shownNames)] {
		names = append(names, s.Name)
	}
	if more := len(sites) - len(names); more > 0 {
		names = append(names, fmt.Sprintf("%d more", more))
	}
	return strings.Join(names, ", ")
}

// closeSites gives the names nearest to what was typed, as names, aliases or their last components. Canonical names are given.
func closeSites(sites []tensor.Site, typed string) []string {
	var candidates, canonical []string
	for _, s := range sites {
		for _, name := range append([]string{s.Name, s.Name[strings.LastIndexByte(s.Name, '.')+1:]}, s.Aliases...) {
			candidates = append(candidates, name)
			canonical = append(canonical, s.Name)
		}
	}
	return closest(candidates, canonical, typed)
}

// closest gives at most shownNames of the answers whose candidates are nearest to what was typed, nearest first.
func closest(candidates, answers []string, typed string) []string {
	type scored struct{ distance, index int }
	typed = typed[:min(len(typed), tensor.MaxGlobBytes)]
	all := make([]scored, len(candidates))
	for i, c := range candidates {
		all[i] = scored{nearest.Distance(c, typed), i}
	}
	slices.SortStableFunc(all, func(a, b scored) int { return a.distance - b.distance })
	var near []string
	for _, s := range all {
		if answer := answers[s.index]; !slices.Contains(near, answer) {
			if near = append(near, answer); len(near) == shownNames {
				break
			}
		}
	}
	return near
}

func joinNames(names []string) string { return strings.Join(names, ", ") }

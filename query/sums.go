package query

import (
	"context"
	"fmt"
	"slices"

	"dmi/tensor"
)

// form is what a row of a site looks like: every row of a session's site has the same, as a rule. A key axis is -1.
type form struct {
	dtype tensor.DType
	shape []int
}

type formKey struct{ session, site uint32 }

// siteSum is what was captured of a site. Bytes are of the values themselves: a keyed row has as many keys as tokens up to its own,
// however chunks pad it.
type siteSum struct {
	form  form
	rows  uint64
	bytes uint64
}

// addSums adds the rows of a request that the books call captured with values, by site. It costs the request's books, not its chunks.
// end is one past the last position that is on them.
func (e *Engine) addSums(ctx context.Context, sums map[uint32]*siteSum, r tensor.Request, sites []tensor.Site) (end uint32, err error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	parts, err := partsOf(r)
	if err != nil {
		return 0, err
	}
	wanted := map[uint32]tensor.Site{}
	for _, s := range sites {
		wanted[s.ID] = s
	}
	for _, p := range parts {
		entries, err := e.source.Entries(p.key)
		if err != nil {
			return 0, fmt.Errorf("query: books of request %s: %w", r.ID, err)
		}
		for _, entry := range entries {
			entry, some := clip(entry, p.span)
			if some {
				end = max(end, entry.First+(entry.Count-1)*max(1, entry.Stride)+1)
			}
			if !some || entry.Outcome != tensor.Captured || entry.Expired != 0 || entry.Level >= tensor.Stats {
				continue
			}
			for _, id := range entry.Sites {
				site, ok := wanted[id]
				if !ok {
					continue
				}
				s := sums[id]
				if s == nil {
					f, found, err := e.formOf(p.key, site, entry)
					if err != nil {
						return 0, err
					}
					if !found {
						continue
					}
					s = &siteSum{form: f}
					sums[id] = s
				}
				s.rows += uint64(entry.Count)
				s.bytes += s.form.bytes(site, entry)
			}
		}
	}
	return end, nil
}

// bytes is the size of an entry's rows.
func (f form) bytes(site tensor.Site, e tensor.Entry) uint64 {
	size := uint64(f.dtype.Size())
	if !site.Keyed {
		return uint64(e.Count) * uint64(product(f.shape)) * size
	}
	lines := uint64(product(f.shape[:len(f.shape)-1]))
	n, stride := uint64(e.Count), uint64(max(1, e.Stride))
	keys := n*(uint64(e.First)+1) + stride*n*(n-1)/2
	return keys * lines * size
}

// formOf looks at a chunk of an entry the first time, and remembers.
func (e *Engine) formOf(key tensor.RequestKey, site tensor.Site, entry tensor.Entry) (form, bool, error) {
	at := formKey{key.Session, site.ID}
	e.mu.Lock()
	f, known := e.forms[at]
	e.mu.Unlock()
	if known {
		return f, true, nil
	}
	chunks, err := e.source.Chunks(key, site.ID, entry.First, entry.First+1)
	if err != nil {
		return f, false, fmt.Errorf("query: chunks at site %s: %w", site.Name, err)
	}
	if len(chunks) == 0 {
		return f, false, nil
	}
	f = form{chunks[0].DType, slices.Clone(chunks[0].Shape)}
	if site.Keyed && len(f.shape) > 0 {
		f.shape[len(f.shape)-1] = -1
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.forms[at] = f
	return f, true, nil
}

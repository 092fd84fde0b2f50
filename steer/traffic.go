package steer

import (
	"sync"
	"time"

	"dmi/control"
	"dmi/policy"
	"dmi/store"
	"dmi/tensor"
)

// traffic says how many tokens a second pass through each session's sites, and how long their rows are.
type traffic struct {
	mu       sync.Mutex
	at       time.Time
	sessions map[uint32]*flow
}

type flow struct {
	id       string
	produced uint64
	tokens   float64           // a second; of every site
	measured bool              // whether tokens is
	rows     []store.SiteTotal // by site: dtype and shape of the latest row; DTypeNone: never seen
}

// window is the time over which traffic is averaged, at least.
const window = time.Second

// measure is called from time to time.
func (t *traffic) measure(s Store, sessions []control.SessionStatus, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	elapsed := now.Sub(t.at)
	if elapsed < window {
		return
	}
	t.at = now
	books := s.Books()
	next := map[uint32]*flow{}
	for _, x := range sessions {
		sites, err := s.Sites(x.Number)
		if err != nil {
			continue
		}
		f := &flow{id: x.ID, produced: books.Sessions[x.Number], rows: make([]store.SiteTotal, len(sites))}
		owing := 0
		for _, site := range sites {
			if !site.Optional {
				owing++
			}
		}
		if before := t.sessions[x.Number]; before != nil && owing > 0 && f.produced >= before.produced {
			f.tokens = float64(f.produced-before.produced) / float64(owing) / elapsed.Seconds()
			f.measured = true
		}
		if totals, err := s.SiteTotals(x.Number); err == nil {
			for _, total := range totals {
				if int(total.Site) < len(f.rows) {
					f.rows[total.Site] = total
				}
			}
		}
		next[x.Number] = f
	}
	t.sessions = next
}

// of gives what is known of a session's traffic.
func (t *traffic) of(session uint32) (flow, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f := t.sessions[session]
	if f == nil {
		return flow{}, false
	}
	return *f, true
}

// cost is the bytes a second of a site at a level; known is false where no row of it was seen, so that
// nobody knows how long they are, or the session has only just come.
func (f *flow) cost(site uint32, level policy.Level) (bytes float64, known bool) {
	if level.Level == tensor.Off {
		return 0, true
	}
	if !f.measured || int(site) >= len(f.rows) || f.rows[site].DType == tensor.DTypeNone {
		return 0, false
	}
	row := &f.rows[site]
	switch level.Level {
	case tensor.Stats:
		return f.tokens * float64(tensor.RowBytes(tensor.Full, tensor.F32, tensor.StatsShape(int(level.Top)))), true
	case tensor.Sampled:
		return f.tokens * float64(tensor.RowBytes(tensor.Full, row.DType, row.Shape)) / float64(level.Stride), true
	}
	return f.tokens * float64(tensor.RowBytes(level.Level, row.DType, row.Shape)), true
}

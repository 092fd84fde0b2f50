package serve

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"dmi/live"
	"dmi/query"
	"dmi/tensor"
)

// mapEvery is the least time between two maps: what a page can show, however fast the model is.
const mapEvery = 100 * time.Millisecond

// mapAnswer is what came at every site since the map before.
type mapAnswer struct {
	Session string           `json:"session"`
	Sent    int64            `json:"sent_unix_ns"`
	Seconds float64          `json:"seconds"` // since the map before
	Tokens  uint64           `json:"tokens"`  // positions computed: the most rows that one site of it had
	Dropped uint64           `json:"dropped"` // rows that this reader was too slow for, of all sessions
	Sites   []query.StatsRow `json:"sites"`
}

type mapSite struct {
	site tensor.Site
	rows uint64
	sums tensor.Statistics
}

const (
	mostMapReaders = 1024 // at once, of all sources
	mapsKept       = 16   // for a reader that is slow; at the bound the oldest is dropped, and counted
)

// mapSource sums up what passes and hands that on to its readers: one page more costs a few of these summaries a second, not a share of every row.
type mapSource struct {
	subscription *live.Subscription
	hub          *live.Hub
	ended        chan struct{} // closed when run has returned
	cancel       context.CancelFunc

	mu      sync.Mutex
	readers map[*mapReader]struct{}
	err     error // why it has ended
}

type mapReader struct {
	news chan struct{} // holds one when there is something to take

	// Under the source's lock.
	queued  []mapAnswer
	dropped uint64 // rows, since the last map that was taken
}

// mapSources are those that readers share: everything that a scope may see.
type mapSources struct {
	mu     sync.Mutex
	shared map[bool]*mapSource // by whether prompts are seen
	count  int                 // of readers, of these and of others
}

// join gives a reader of what the arguments ask for, and how to leave.
func (s *Server) join(c *call) (*mapSource, *mapReader, func(), error) {
	all := c.text("site") == "" && c.text("session") == "" && c.text("request") == "" && c.err == nil
	prompts := c.scope >= ScopeText
	m := &s.maps
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.count >= mostMapReaders {
		return nil, nil, nil, fmt.Errorf("%w: %d read the map already; close one", live.ErrTooMany, m.count)
	}
	source := m.shared[prompts]
	if !all || source == nil || source.failed() {
		subscription, err := s.subscribe(c)
		if err != nil {
			return nil, nil, nil, err
		}
		ctx, cancel := context.WithCancel(context.Background())
		source = &mapSource{subscription: subscription, hub: s.options.Live, ended: make(chan struct{}), cancel: cancel, readers: map[*mapReader]struct{}{}}
		go source.run(ctx)
		if all {
			m.shared[prompts] = source
		}
	}
	r := &mapReader{news: make(chan struct{}, 1)}
	source.mu.Lock()
	source.readers[r] = struct{}{}
	source.mu.Unlock()
	m.count++
	return source, r, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.count--
		source.mu.Lock()
		delete(source.readers, r)
		last := len(source.readers) == 0
		source.mu.Unlock()
		if !last {
			return
		}
		if m.shared[prompts] == source {
			delete(m.shared, prompts)
		}
		source.cancel()
		source.subscription.Close()
		<-source.ended
	}, nil
}

func (m *mapSource) failed() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err != nil
}

// run sums up until ctx ends or the hub does.
func (m *mapSource) run(ctx context.Context) {
	defer close(m.ended)
	sums := map[string]map[string]*mapSite{} // by session and site
	var dropped uint64
	take := func(batch live.Batch) {
		dropped += batch.Dropped
		for _, f := range batch.Frames {
			bySite := sums[f.Session]
			if bySite == nil {
				bySite = map[string]*mapSite{}
				sums[f.Session] = bySite
			}
			at := bySite[f.Site.Name]
			if at == nil {
				at = &mapSite{site: f.Site}
				bySite[f.Site.Name] = at
			}
			for _, row := range f.Rows() {
				at.rows++
				at.sums.Merge(row)
			}
		}
	}
	last := time.Now()
	tell := func() {
		now := time.Now()
		for session, bySite := range sums {
			answer := mapAnswer{Session: session, Sent: now.UnixNano(), Seconds: now.Sub(last).Seconds(), Dropped: dropped}
			for _, at := range bySite {
				if at.rows > 0 {
					answer.Tokens = max(answer.Tokens, at.rows)
					answer.Sites = append(answer.Sites, query.SumRow(at.site, at.rows, at.sums))
				}
			}
			if len(answer.Sites) == 0 {
				continue
			}
			slices.SortFunc(answer.Sites, func(a, b query.StatsRow) int {
				return cmp.Or(cmp.Compare(a.Layer, b.Layer), cmp.Compare(a.Site, b.Site))
			})
			m.handOut(answer)
			dropped = 0
		}
		clear(sums)
		last = now
	}
	var err error
	for err == nil {
		var batch live.Batch
		if batch, err = m.subscription.Next(ctx); err != nil {
			break
		}
		take(batch)
		for until := last.Add(mapEvery); err == nil && time.Now().Before(until); {
			brief, done := context.WithDeadline(ctx, until)
			batch, err = m.subscription.Next(brief)
			done()
			if ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
				err = nil
			}
			take(batch)
		}
		tell()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = err
	for r := range m.readers {
		r.wake()
	}
}

// handOut queues an answer for every reader. It waits for none.
func (m *mapSource) handOut(answer mapAnswer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for r := range m.readers {
		if len(r.queued) == mapsKept {
			lost := uint64(0)
			for _, site := range r.queued[0].Sites {
				lost += site.Rows
			}
			r.dropped += lost + r.queued[0].Dropped // these were counted when they were lost
			m.hub.CountDropped(lost)
			r.queued = append(r.queued[:0], r.queued[1:]...)
		}
		r.queued = append(r.queued, answer)
		r.wake()
	}
}

func (r *mapReader) wake() {
	select {
	case r.news <- struct{}{}:
	default:
	}
}

// next waits for maps. Errors: ctx's, or why the source has ended once everything was taken.
func (m *mapSource) next(ctx context.Context, r *mapReader) ([]mapAnswer, error) {
	for {
		m.mu.Lock()
		answers, err := r.queued, m.err
		if len(answers) > 0 {
			r.queued = nil
			answers[0].Dropped += r.dropped
			r.dropped = 0
			m.mu.Unlock()
			return answers, nil
		}
		m.mu.Unlock()
		if err != nil {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-r.news:
		}
	}
}

// liveMap sends rows summed up by session and site, so that what a page gets does not grow with the model's speed.
func (s *Server) liveMap(w *writer, c *call) error {
	source, reader, leave, err := s.join(c)
	if err != nil {
		return err
	}
	defer leave()
	stream, err := openEventStream(w)
	if err != nil {
		return err
	}
	return s.follow(c, func(ctx context.Context) error {
		answers, err := source.next(ctx, reader)
		if err != nil {
			return err
		}
		for _, answer := range answers {
			if err := stream.send("map", "", answer); err != nil {
				return err
			}
		}
		return w.flush()
	}, stream.beat)
}

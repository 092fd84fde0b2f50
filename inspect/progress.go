package inspect

import (
	"context"
	"sync"

	"dmi/query"
)

// Progress is how far a tool has come, for whoever waits for it: it stands in the tool's context. Its methods are safe for concurrent use; those that tools call do nothing on nil.
type Progress struct {
	mu    sync.Mutex
	state State
}

// State is what Progress says.
type State struct {
	Stage string  `json:"stage"` // what is being done, in a word or two
	Share float64 `json:"share"` // how much of the stage is done, from 0 to 1; it never falls within one
	Bytes uint64  `json:"bytes"` // read so far, in all stages
}

// reading is the stage that every tool begins with, and most have no other.
const reading = "reading"

type progressKey struct{}

// WithProgress has the tools that are called with the context tell p how far they have come.
func WithProgress(ctx context.Context, p *Progress) context.Context {
	return context.WithValue(ctx, progressKey{}, p)
}

func progressOf(ctx context.Context) *Progress {
	p, _ := ctx.Value(progressKey{}).(*Progress)
	return p
}

// State is where the tool is now; without a stage before it has begun.
func (p *Progress) State() State {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state
}

// begin starts a stage.
func (p *Progress) begin(stage string) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.state.Stage, p.state.Share = stage, 0
}

// add brings the stage forward by a share of it, and counts what was read for that.
func (p *Progress) add(share float64, bytes int) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.state.Share = min(1, p.state.Share+share)
	p.state.Bytes += uint64(bytes)
}

// follow has the reads of a selection bring the stage forward, all together by a share of it; over does what is left of that, where not all rows were looked at.
func (p *Progress) follow(s *query.Selection, share float64) (over func()) {
	if p == nil {
		return func() {}
	}
	if s == nil {
		return func() { p.add(share, 0) }
	}
	left, size := share, float64(s.Size())
	s.Watch(func(bytes int) {
		step := min(left, share*float64(bytes)/size)
		left -= step
		p.add(step, bytes)
	})
	return func() { p.add(left, 0) }
}

// sharesOf weighs the sites of surveys, each request of which is to be read: how much of the stage one request at a site is, by what was captured there. It costs a look at the
// requests' books. Nobody asked: nothing.
func (p *Progress) sharesOf(ctx context.Context, surveys ...*query.Survey) ([][]float64, error) {
	shares := make([][]float64, len(surveys))
	if p == nil {
		for i, s := range surveys {
			shares[i] = make([]float64, len(s.Sites))
		}
		return shares, nil
	}
	total := 0.0
	for i, s := range surveys {
		bytes, err := s.Bytes(ctx)
		if err != nil {
			return nil, err
		}
		for _, n := range bytes {
			shares[i] = append(shares[i], float64(n))
			total += float64(n)
		}
	}
	for i, s := range surveys {
		for j := range shares[i] {
			shares[i][j] /= max(1, total) * float64(max(1, len(s.Requests)))
		}
	}
	return shares, nil
}

//go:build linux

package test

import (
	"math/rand/v2"

	"dmi/ring"
)

// script is a load that a seed determines: what is computed in each step, and what the producer does with each site. Two processes with the same
// seed play the same one, so that the books of one that was killed can be held against it.
type script struct {
	random   *rand.Rand
	load     load
	requests []*request
	begun    uint64
	step     uint64
}

// load says how large a script's steps are.
type load struct {
	Seed     uint64
	Lanes    int
	Sites    uint32
	Requests int    // at once
	Prompt   uint32 // most rows of a request's first step
	Length   uint32 // rows after which a request ends
}

type request struct {
	number uint64
	next   uint32 // position
}

// action is what the producer does with a site in a step.
type action uint8

const (
	capture action = iota
	halves         // two records
	skip           // the policy left it out
	silent         // it does not fire
)

// forward is one step of a script.
type forward struct {
	step    uint64
	lane    int
	spans   []ring.Span
	rows    uint32
	actions []action
	aborted bool
	begun   []uint64 // requests that are new
	ended   []uint64 // requests whose last step this is
}

func newScript(l load) *script {
	return &script{random: rand.New(rand.NewPCG(l.Seed, 1)), load: l}
}

// next makes the next step up. Some are prompts of many rows, most are a row for each request.
func (s *script) next() *forward {
	r := s.random
	f := &forward{step: s.step, lane: r.IntN(s.load.Lanes), actions: make([]action, s.load.Sites)}
	s.step++
	for len(s.requests) < 1+r.IntN(s.load.Requests) {
		s.begun++
		s.requests = append(s.requests, &request{number: s.begun})
		f.begun = append(f.begun, s.begun)
	}
	kept := s.requests[:0]
	for _, q := range s.requests {
		count := uint32(1)
		if q.next == 0 {
			count = 1 + r.Uint32N(s.load.Prompt)
		}
		f.spans = append(f.spans, ring.Span{Request: q.number, Position: q.next, First: f.rows, Count: count})
		f.rows += count
		if q.next += count; q.next < s.load.Length && r.IntN(50) > 0 {
			kept = append(kept, q)
		} else {
			f.ended = append(f.ended, q.number)
		}
	}
	s.requests = kept
	for i := range f.actions {
		switch n := r.IntN(40); {
		case n == 0:
			f.actions[i] = skip
		case n == 1 && r.IntN(10) == 0:
			f.actions[i] = silent
		case n < 5 && f.rows > 1:
			f.actions[i] = halves
		}
	}
	if r.IntN(60) == 0 { // the forward raised, somewhere
		f.aborted = true
		for i := r.IntN(len(f.actions)); i < len(f.actions); i++ {
			f.actions[i] = silent
		}
	}
	return f
}

// value is what a row holds: a function of which row it is, that both ends know.
func value(site uint32, request uint64, position uint32) uint64 {
	x := (uint64(site)<<44 ^ request<<22 ^ uint64(position)) + 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

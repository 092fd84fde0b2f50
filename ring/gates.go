package ring

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"sync/atomic"

	"dmi/tensor"
)

// control.policy holds the revision of the policy in force and, below it, how often the gates were written under that revision: sites come
// while a revision stays, and a lane looks at the gates again only where the word is another.
const (
	revisionShift = 16
	maxRevision   = 1<<(64-revisionShift) - 1
)

// Revision is the policy revision that a word of control.policy names, as open.policy repeats it. 0: none was ever written.
func Revision(word uint64) uint64 { return word >> revisionShift }

// SetGates gives sites, from the first on, their levels from the next step on, and the watches that they name. Revisions are those of one store. Calls must
// not overlap; they may come from another goroutine than the drain's.
func (r *Ring) SetGates(revision uint64, gates []tensor.Gate, watches []tensor.Watch) error {
	if revision > maxRevision {
		return fmt.Errorf("ring: gates: revision %d: at most %d is possible", revision, uint64(maxRevision))
	}
	if len(gates) > int(r.header.SiteCapacity) {
		return fmt.Errorf("ring: gates: %d for the %d sites that the ring can have", len(gates), r.header.SiteCapacity)
	}
	table, clauses, err := r.encodeGates(gates)
	if err != nil {
		return err
	}
	conditions, weights, err := encodeWatches(watches)
	if err != nil {
		return err
	}
	keeps := make([]byte, len(gates)*KeepSize)
	for i := range gates {
		keep := Keep{Watch: gates[i].Watch, Keep: gates[i].Keep}
		if gates[i].Offer {
			keep.Offer = 1
		}
		keep.Encode(keeps[i*KeepSize:])
	}
	word := r.control(ControlPolicyOffset)
	before := atomic.LoadUint64(word)
	next := revision<<revisionShift + 2
	if Revision(before) == revision { // the count wraps below the revision: it only has to differ from the one before
		next = revision<<revisionShift | (before&^1+2)&(1<<revisionShift-1)
	}
	atomic.StoreUint64(word, next|1) // pairs with the acquire of step open, which tries again while it is odd, or has changed since
	r.store(r.header.GatesOffset, table)
	at := r.header.GatesOffset + uint64(r.header.SiteCapacity)*GateSize
	r.store(at, clauses)
	at += MaxClauses * ClauseSize
	r.store(at, conditions)
	at += MaxWatches * WatchSize
	r.store(at, keeps)
	r.store(at+uint64(r.header.SiteCapacity)*KeepSize, weights)
	atomic.StoreUint64(word, next)
	return nil
}

// store writes whole words.
func (r *Ring) store(at uint64, b []byte) {
	for i := 0; i < len(b); i += 8 {
		atomic.StoreUint64(r.word(at+uint64(i)), binary.LittleEndian.Uint64(b[i:]))
	}
}

// encodeGates gives the bytes of the table and of its clauses, those that several gates have once. Where there are more than the ring has room for, a gate asks for everything
// that its rows may need.
func (r *Ring) encodeGates(gates []tensor.Gate) (table, clauses []byte, err error) {
	table = make([]byte, len(gates)*GateSize)
	known := map[string]uint16{}
	for i := range gates {
		g := &gates[i]
		own := make([]byte, len(g.Clauses)*ClauseSize)
		for n, c := range g.Clauses {
			if !c.Level.Valid() || c.Step == 0 || c.Stride > math.MaxUint16 {
				return nil, nil, fmt.Errorf("ring: gates: site %d: clause %d: level %v, step %d, stride %d", i, n, c.Level, c.Step, c.Stride)
			}
			one := uint8(0)
			if c.One {
				one = 1
			}
			(&Clause{Seed: c.Seed, Threshold: c.Threshold, Start: c.Start, Stop: c.Stop, Step: c.Step, Stride: uint16(max(1, c.Stride)), Level: uint8(c.Level), Region: uint8(c.Region),
				Phases: c.Phases, One: one, Group: c.Group, Request: c.Request, Groups: c.Groups}).Encode(own[n*ClauseSize:])
		}
		if !g.Level.Valid() || g.Stride > math.MaxUint16 || g.Top > MostTop {
			return nil, nil, fmt.Errorf("ring: gates: site %d: level %v, stride %d, top %d", i, g.Level, g.Stride, g.Top)
		}
		at, placed := known[string(own)]
		if !placed && len(clauses)+len(own) <= MaxClauses*ClauseSize {
			at, placed = uint16(len(clauses)/ClauseSize), true
			known[string(own)] = at
			clauses = append(clauses, own...)
		}
		gate := Gate{Level: uint8(g.Level), Top: g.Top, Stride: uint16(max(1, g.Stride)), Clause: at, Clauses: uint16(len(g.Clauses))}
		if !placed {
			gate = Gate{Level: LevelFull, Stride: 1}
			if g.Off() {
				gate.Level = LevelOff
			}
		}
		gate.Encode(table[i*GateSize:])
	}
	return table, clauses, nil
}

// encodeWatches gives the bytes of the table of watches, and of the weights of probes, which those that are equal have once.
func encodeWatches(watches []tensor.Watch) (table, weights []byte, err error) {
	if len(watches) > MaxWatches {
		return nil, nil, fmt.Errorf("ring: gates: %d watches: at most %d are possible", len(watches), MaxWatches)
	}
	table = make([]byte, len(watches)*WatchSize)
	known := map[string]uint32{}
	for i := range watches {
		w := &watches[i]
		watch := Watch{Above: math.Float64bits(w.Above), Below: math.Float64bits(w.Below), Bias: math.Float64bits(w.Bias), Elements: uint32(len(w.Probe))}
		figure := slices.Index(tensor.FigureNames, w.Figure)
		switch {
		case w.NonFinite:
			watch.Condition = ConditionNonfinite
		case len(w.Probe) > 0:
			watch.Condition = ConditionProbe
			own := make([]byte, 0, 4*len(w.Probe))
			for _, v := range w.Probe {
				own = binary.LittleEndian.AppendUint32(own, math.Float32bits(v))
			}
			at, placed := known[string(own)]
			if !placed {
				if len(weights)+len(own) > 4*ProbeFloats {
					return nil, nil, fmt.Errorf("ring: gates: watch %d: probes have more than %d weights together", i, ProbeFloats)
				}
				at = uint32(len(weights) / 4)
				known[string(own)] = at
				weights = append(weights, own...)
			}
			watch.Weight = at
		case figure >= 0:
			watch.Condition, watch.Statistic = ConditionStatistic, uint8(figure)
		}
		watch.Encode(table[i*WatchSize:])
	}
	if len(weights)%8 != 0 {
		weights = append(weights, 0, 0, 0, 0)
	}
	return table, weights, nil
}

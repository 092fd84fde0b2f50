package ring

import (
	"encoding/binary"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"dmi/tensor"
)

func gatedRing(t testing.TB) *Ring {
	h := goodHeader()
	h.Mode, h.SpillBytes, h.SpillOffset = ModeBestEffort, 0, h.TotalBytes
	r, err := over(make([]byte, h.TotalBytes), h)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// latch is step open's reading, as abi/ring.h describes it.
func latch(r *Ring, sites int) (word uint64, levels []uint8) {
	for {
		before := atomic.LoadUint64(r.control(ControlPolicyOffset))
		if before%2 != 0 {
			continue
		}
		levels = levels[:0]
		for i := range sites {
			var g Gate
			var b [GateSize]byte
			v := atomic.LoadUint64(r.word(r.header.GatesOffset + uint64(i)*GateSize))
			for n := range b {
				b[n] = byte(v >> (8 * n))
			}
			g.Decode(b[:])
			levels = append(levels, g.Level)
		}
		if atomic.LoadUint64(r.control(ControlPolicyOffset)) == before {
			return before, levels
		}
	}
}

func TestGatesSayTheRevision(t *testing.T) {
	r := gatedRing(t)
	if word, levels := latch(r, 8); word != 0 || Revision(word) != 0 || levels[0] != LevelFull {
		t.Fatal("a ring that nobody wrote:", word, levels)
	}
	last := uint64(0)
	for _, revision := range []uint64{0, 1, 1, 1, 7, 7, 3} { // a revision may be written again, and a ring may come from another store
		if err := r.SetGates(revision, []tensor.Gate{{Level: tensor.Off}, {Level: tensor.Full}, {Level: tensor.Off}}, nil); err != nil {
			t.Fatal(err)
		}
		word, levels := latch(r, 3)
		if Revision(word) != revision || word == last || levels[0] != LevelOff || levels[1] != LevelFull || levels[2] != LevelOff {
			t.Fatalf("revision %d: word %x after %x, %v", revision, word, last, levels)
		}
		last = word
	}
	for range 1 << revisionShift { // the count wraps without reaching into the revision
		if err := r.SetGates(3, nil, nil); err != nil {
			t.Fatal(err)
		}
		if word := atomic.LoadUint64(r.control(ControlPolicyOffset)); Revision(word) != 3 || word == last || word%2 != 0 {
			t.Fatalf("word %x after %x", word, last)
		} else {
			last = word
		}
	}
	for want, err := range map[string]error{
		"site 0: level":    r.SetGates(4, []tensor.Gate{{Level: 6}}, nil),
		"site 0: clause 0": r.SetGates(4, []tensor.Gate{{Clauses: make([]tensor.GateClause, 1)}}, nil),
		"9 for the":        r.SetGates(4, make([]tensor.Gate, 9), nil),
		"at most":          r.SetGates(maxRevision+1, nil, nil),
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q: %v", want, err)
		}
	}
	if word, _ := latch(r, 0); word != last {
		t.Error("what was refused has changed the word")
	}
}

// Whoever latches while gates are written sees one revision's levels, all of them.
func TestGatesAreSeenWhole(t *testing.T) {
	r := gatedRing(t)
	const revisions = 20000
	var group sync.WaitGroup
	group.Go(func() {
		for revision := range uint64(revisions) {
			levels := make([]tensor.Gate, 8)
			for i := range levels {
				if (revision>>i)&1 == 1 {
					levels[i].Level = tensor.Off
				}
			}
			if err := r.SetGates(revision, levels, nil); err != nil {
				t.Error(err)
			}
		}
	})
	for done := false; !done; {
		word, levels := latch(r, 8)
		for i, l := range levels {
			if (l == LevelOff) != (Revision(word)>>i&1 == 1) {
				t.Fatalf("revision %d: %v", Revision(word), levels)
			}
		}
		done = Revision(word) == revisions-1
	}
	group.Wait()
}

// What triggers keep is written beside the gates, which stay what the rules make them, for a device too.
func TestKeepsAreWrittenBesideGates(t *testing.T) {
	for _, device := range []uint32{DeviceCPU, DeviceCUDA} {
		r := gatedRing(t)
		r.header.Device = device
		gates := []tensor.Gate{{Level: tensor.Stats}, {Level: tensor.Stats, Offer: true}, {Level: tensor.Off, Keep: 5, Watch: 4}}
		if err := r.SetGates(1, gates, []tensor.Watch{{NonFinite: true}}); err != nil {
			t.Fatal(err)
		}
		if _, levels := latch(r, 3); !slices.Equal(levels, []uint8{LevelStats, LevelStats, LevelOff}) {
			t.Errorf("device %d: the gates are at %v", device, levels)
		}
		at := r.header.GatesOffset + uint64(r.header.SiteCapacity)*GateSize + MaxClauses*ClauseSize + MaxWatches*WatchSize
		for i, want := range []Keep{{}, {Offer: 1}, {Watch: 4, Keep: 5}} {
			var b [KeepSize]byte
			for n := 0; n < len(b); n += 8 {
				binary.LittleEndian.PutUint64(b[n:], atomic.LoadUint64(r.word(at+uint64(i*KeepSize+n))))
			}
			var got Keep
			if got.Decode(b[:]); got != want {
				t.Errorf("device %d: site %d keeps %+v, want %+v", device, i, got, want)
			}
		}
	}
}

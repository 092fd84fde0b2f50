//go:build linux

package test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"dmi/internal/ringtape"
	"dmi/store"
	"dmi/tensor"
)

// TestBooks sends random traffic of several producers through an engine that is stopped, killed, restarted and hung up on, until a hundred million
// rows were produced. What each producer counted itself is what the store says was produced, and the sum of what it says became of it.
func TestBooks(t *testing.T) {
	random := seeded(t)
	w := &world{t: t, dir: storeDir(t), target: uint64(share(2_000_000, 100_000_000))}
	say := newProgress(t)
	w.engine = start(t, w.dir)
	var working sync.WaitGroup
	for range 2 {
		seed := random.Uint64()
		working.Go(func() { w.work(rand.New(rand.NewPCG(seed, 0))) })
	}
	finished := make(chan struct{})
	go func() { working.Wait(); close(finished) }()
	for w.trouble(random, finished) {
		say.say("%d of %d rows, %d faults", w.produced.Load(), w.target, w.faults())
	}
	if t.Failed() {
		t.FailNow()
	}
	w.engine.stop()
	w.compare(random)
	t.Logf("%d rows in %v: %d sessions, %d of them without a kill, stop or hang-up; %d kills, %d stops, %d freezes, %d hang-ups", w.produced.Load(),
		time.Since(say.begun).Round(time.Second), len(w.witnesses), w.undisturbed, w.kills, w.stops, w.freezes, w.hangups.Load())
	figures(t, "soak_books", rowsOf("produced, as producers count; the store says the same, and what became of them sums to it", w.produced.Load()).For(">= 1e8", w.produced.Load() >= 100_000_000),
		count("sessions", uint64(len(w.witnesses))), count("of these without a kill, stop or hang-up, where every outcome agrees", uint64(w.undisturbed)), count("kills of the engine", uint64(w.kills)),
		count("stops of the engine", uint64(w.stops)), count("freezes of the engine", uint64(w.freezes)), count("hang-ups of producers", w.hangups.Load()))
}

// world is a store, the engine that has it at the moment, and what its producers know.
type world struct {
	t        *testing.T
	dir      string
	target   uint64
	produced atomic.Uint64 // of sessions that are over
	engine   *engine       // the test's goroutine's
	epoch    atomic.Uint64 // grows with everything that may lose rows
	hangups  atomic.Uint64

	kills, stops, freezes int
	undisturbed           int

	mu        sync.Mutex
	witnesses []witness
}

// witness is what a producer counted, kept after its end.
type witness struct {
	session   string
	tally     []uint64
	disturbed bool
}

func (w *world) faults() int { return w.kills + w.stops + w.freezes + int(w.hangups.Load()) }

// trouble lets a moment pass, and does something to the engine. It returns false when the work is done.
func (w *world) trouble(random *rand.Rand, finished <-chan struct{}) bool {
	select {
	case <-finished:
		return false
	case <-time.After(time.Duration(100+random.IntN(share(500, 2000))) * time.Millisecond):
	}
	if w.t.Failed() {
		return false
	}
	switch random.IntN(5) {
	case 0:
		w.epoch.Add(1)
		w.kills++
		w.engine.kill()
		w.epoch.Add(1) // for sessions that began meanwhile
	case 1:
		w.epoch.Add(1)
		w.stops++
		w.engine.stop()
		w.epoch.Add(1)
	default:
		w.freezes++
		w.engine.cmd.Process.Signal(syscall.SIGSTOP)
		time.Sleep(time.Duration(random.IntN(500)) * time.Millisecond)
		w.engine.cmd.Process.Signal(syscall.SIGCONT)
		return true
	}
	time.Sleep(time.Duration(random.IntN(300)) * time.Millisecond)
	w.engine = start(w.t, w.dir)
	return true
}

// work plays one session after another.
func (w *world) work(random *rand.Rand) {
	for w.produced.Load() < w.target && !w.t.Failed() {
		if err := w.session(random); err != nil {
			w.t.Errorf("a session: %v", err)
		}
	}
}

var booksRing = ringtape.Shape{RecordCapacity: 4096, CommandCapacity: 256, SiteCapacity: 128, Payload: 16 << 20, Table: 1 << 18, Staging: 8 << 20, Spill: 1 << 16}

func (w *world) session(random *rand.Rand) error {
	l := load{Seed: random.Uint64(), Lanes: 1 + random.IntN(3), Sites: 20 + random.Uint32N(80), Requests: 1 + random.IntN(24), Prompt: 1 + random.Uint32N(2000), Length: 2200}
	p, err := newProducer(newSession(random), l, random.Uint32N(2), booksRing, make([]uint64, tallyWords))
	if err != nil {
		return err
	}
	defer p.Close()
	epoch, hangups := w.epoch.Load(), 0
	quota := w.target/200 + random.Uint64N(w.target/20)
	over := make(chan struct{})
	var keeping sync.WaitGroup
	keeper := rand.New(rand.NewPCG(l.Seed, 3))
	keeping.Go(func() { hangups = w.keep(p, keeper, over) })
	for begun := p.tally[tallyProduced]; p.tally[tallyProduced]-begun < quota && err == nil; {
		if err = p.play(); !p.complete {
			time.Sleep(time.Duration(random.IntN(100)) * time.Microsecond) // a model takes its time
		}
		if p.client.Load() == nil && !p.complete {
			time.Sleep(5 * time.Millisecond)
		}
	}
	close(over)
	keeping.Wait()
	if err == nil {
		err = w.farewell(p)
	}
	if err != nil {
		return err
	}
	w.produced.Add(p.tally[tallyProduced])
	w.mu.Lock()
	defer w.mu.Unlock()
	w.witnesses = append(w.witnesses, witness{p.session, p.tally, hangups > 0 || w.epoch.Load() != epoch})
	return nil
}

// keep attaches the producer to whichever engine there is, and hangs up now and then.
func (w *world) keep(p *producer, random *rand.Rand, over <-chan struct{}) (hangups int) {
	for resume := false; ; resume = true {
		for p.attach(controlSocket(w.dir), resume) != nil {
			select {
			case <-over:
				return hangups
			case <-time.After(10 * time.Millisecond):
			}
		}
		for lives := 1 + random.IntN(20); ; lives-- {
			if _, err := p.barrier(patience); err != nil {
				break
			}
			select {
			case <-over:
				return hangups
			case <-time.After(100 * time.Millisecond):
			}
			if lives == 0 {
				hangups++
				w.hangups.Add(1)
				break
			}
		}
		if c := p.client.Swap(nil); c != nil {
			c.Close()
		}
	}
}

func controlSocket(dir string) string { return dir + "/engine.sock" }

// farewell says bye until an engine has answered it.
func (w *world) farewell(p *producer) (err error) {
	for begun := time.Now(); time.Since(begun) < patience; {
		if p.client.Load() == nil {
			if err = p.attach(controlSocket(w.dir), true); err != nil {
				time.Sleep(10 * time.Millisecond)
				continue
			}
		}
		if err = p.bye(); err == nil {
			return nil
		}
		p.client.Store(nil)
	}
	return fmt.Errorf("bye: %w", err)
}

// compare holds the store's books against the producers'.
func (w *world) compare(random *rand.Rand) {
	t := w.t
	s, err := store.OpenReadOnly(w.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	sessions, err := s.Sessions()
	if err != nil {
		t.Fatal(err)
	}
	if len(sessions) != len(w.witnesses) {
		t.Errorf("%d sessions, the store has %d", len(w.witnesses), len(sessions))
	}
	var total uint64
	for _, session := range sessions {
		i := slices.IndexFunc(w.witnesses, func(x witness) bool { return x.session == session.ID })
		if i < 0 {
			t.Errorf("session %s is nobody's", session.ID)
			continue
		}
		x, b := w.witnesses[i], booksOf(s, session.Number)
		total += b.produced
		if b.produced != x.tally[tallyProduced] || b.sum != b.produced {
			t.Errorf("session %s: its producer counted %d rows, the store says %d were produced, and what became of them sums to %d", session.ID, x.tally[tallyProduced], b.produced, b.sum)
		}
		if b.lines[tensor.Captured] > x.tally[tallyCaptured] {
			t.Errorf("session %s: %d rows are booked captured, and its producer captured %d", session.ID, b.lines[tensor.Captured], x.tally[tallyCaptured])
		}
		if x.disturbed {
			continue
		}
		w.undisturbed++ // then every outcome agrees, not only their sum
		for outcome, want := range map[tensor.Outcome]uint64{tensor.Captured: x.tally[tallyCaptured], tensor.Skipped: x.tally[tallySkipped],
			tensor.Dropped: x.tally[tallyDropped] + x.tally[tallyAborted], tensor.Lost: x.tally[tallySilent]} {
			if b.lines[outcome] != want {
				t.Errorf("session %s: %d rows are booked %v, its producer counts %d", session.ID, b.lines[outcome], outcome, want)
			}
		}
	}
	if total != w.produced.Load() {
		t.Errorf("%d rows were produced, the store says %d", w.produced.Load(), total)
	}
	report := verified(t, s)
	if report.Produced != total || report.Booked != total {
		t.Errorf("verify says %d produced and %d booked, of %d", report.Produced, report.Booked, total)
	}
	read := uint64(0)
	for range 200 {
		session := sessions[random.IntN(len(sessions))]
		n, err := sample(s, session.Number, 1+random.Uint64N(20), random.Uint32N(20))
		if err != nil {
			t.Error(err)
		}
		read += n
	}
	t.Logf("%d of the rows read again", read)
}

// sample reads a request's rows at a site.
func sample(s *store.Store, session uint32, request uint64, site uint32) (rows uint64, err error) {
	refs, err := s.Chunks(tensor.RequestKey{Session: session, Request: request}, site, 0, ^uint32(0))
	if errors.Is(err, store.ErrNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	for _, ref := range refs {
		b := make([]byte, 8*ref.Rows)
		if err := s.ReadRows(ref, 0, ref.Rows, b); err != nil {
			return rows, err
		}
		for i := range ref.Rows {
			if got, want := binary.LittleEndian.Uint64(b[8*i:]), value(site, request, ref.First+i); got != want {
				return rows, fmt.Errorf("session %d request %d site %d row %d holds %#x, not %#x", session, request, site, ref.First+i, got, want)
			}
			rows++
		}
	}
	return rows, nil
}

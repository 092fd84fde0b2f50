//go:build linux

package test

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"dmi/ring"
	"dmi/store"
)

// steady is a producer that captures at an even pace, and keeps an oracle of what it did: what others do to it shows in its books, its waits and its barriers.
type steady struct {
	*producer
	t      *testing.T
	oracle *oracle
	load   load
	played chan error
}

func newSteady(t *testing.T, random *rand.Rand, socket string, mode uint32) *steady {
	t.Helper()
	l := load{Seed: random.Uint64(), Lanes: 1, Sites: 8, Requests: 4, Prompt: 40, Length: 200}
	p, err := newProducer(newSession(random), l, mode, booksRing, make([]uint64, tallyWords))
	if err != nil {
		t.Fatal(err)
	}
	s := &steady{producer: p, t: t, oracle: newOracle(1), load: l, played: make(chan error, 1)}
	p.note = s.oracle.note
	if err := p.attach(socket, false); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() {
		p.stop.Store(true)
		p.abandon.Store(true)
		<-done
		p.Close()
	})
	go func() {
		defer close(done)
		for !p.stop.Load() {
			if err := p.play(); err != nil {
				s.played <- err
				return
			}
			time.Sleep(4 * time.Millisecond)
		}
		s.played <- nil
	}()
	return s
}

// barriers makes everything durable again and again for a while, and until enough has happened, and returns how long each took.
func (s *steady) barriers(during time.Duration, enough func() bool) (took []time.Duration) {
	s.t.Helper()
	for begun := time.Now(); time.Since(begun) < during || !enough() && time.Since(begun) < during+patience; time.Sleep(10 * time.Millisecond) {
		asked := time.Now()
		durable, err := s.barrier(patience)
		if err != nil {
			s.t.Fatal(err)
		}
		s.oracle.promise(durable)
		took = append(took, time.Since(asked))
	}
	slices.Sort(took)
	return took
}

func atOnce() bool { return true }

func middle(d []time.Duration) string {
	return fmt.Sprintf("%d barriers, median %v, longest %v", len(d), d[len(d)/2].Round(100*time.Microsecond), d[len(d)-1].Round(100*time.Microsecond))
}

// end says bye; nothing may be missing.
func (s *steady) end(e *engine) {
	s.t.Helper()
	s.stop.Store(true)
	if err := <-s.played; err != nil {
		s.t.Fatal(err)
	}
	if err := s.bye(); err != nil {
		s.t.Fatalf("%v\n%s", err, &e.log)
	}
	if n := s.tally[tallyDropped]; n > 0 { // of best effort; complete mode waits
		s.t.Errorf("%d of its rows found no room", n)
	}
}

// checkIn holds the store against it: every row that it captured is there.
func (s *steady) checkIn(kept *store.Store) {
	s.t.Helper()
	k := killedStore{producer: s.producer, t: s.t, load: s.load, oracle: s.oracle}
	k.checkIn(kept, true)
}

// Producers that flood, stall, talk nonsense, do not listen, or keep coming and going are nobody else's problem: one beside them loses no row, and what it asks for is durable in bounded time.
func TestBadNeighbours(t *testing.T) {
	random := seeded(t)
	dir := storeDir(t)
	e := start(t, dir)
	victim := newSteady(t, random, e.Control, ring.ModeComplete)
	alone := victim.barriers(time.Second, atOnce)

	var bad sync.WaitGroup
	var over atomic.Bool
	tallies := map[string][]uint64{}
	enter := func(stalled bool) *producer {
		l := load{Seed: random.Uint64(), Lanes: 2, Sites: 50, Requests: 16, Prompt: 500, Length: 1000}
		tally, session, make := make([]uint64, tallyWords), newSession(random), newProducer
		if stalled {
			make = newStalledProducer
		}
		p, err := make(session, l, ring.ModeBestEffort, booksRing, tally)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.Close)
		if err := p.attach(e.Control, false); err != nil {
			t.Fatal(err)
		}
		tallies[session] = tally
		return p
	}
	// One captures without pause, and talks without pause.
	flooder := enter(false)
	bad.Go(func() {
		for !over.Load() {
			if err := flooder.play(); err != nil {
				t.Error(err)
				return
			}
		}
	})
	bad.Go(func() {
		for !over.Load() {
			if _, err := flooder.barrier(patience); err != nil {
				t.Errorf("the flooder's barrier: %v", err)
				return
			}
		}
	})
	// One never copies what the engine asks it for.
	staller := enter(true)
	bad.Go(func() {
		for !over.Load() {
			if err := staller.play(); err != nil {
				t.Error(err)
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
	// One asks and does not listen to answers, until the engine has enough of it.
	deaf := enter(false)
	bad.Go(func() {
		for c := deaf.client.Load(); !over.Load(); time.Sleep(time.Millisecond) {
			if c.SendRaw([]byte(`{"type":"requests","requests":[{"request":1,"id":"x","run":"`+"r"+deaf.session[1:]+`"}]}`)) != nil || c.Send(map[string]any{"type": "barrier", "id": strings.Repeat("b", 128), "steps": map[string]any{}}) != nil {
				return
			}
		}
	})
	// One is half a hello, for ever; one comes and goes.
	half, err := net.Dial("unix", e.Control)
	if err != nil {
		t.Fatal(err)
	}
	defer half.Close()
	half.Write([]byte{9, 0})
	bad.Go(func() {
		for !over.Load() {
			c, err := net.Dial("unix", e.Control)
			if err != nil {
				t.Errorf("the engine does not listen: %v", err)
				return
			}
			c.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
			c.Close()
			time.Sleep(time.Millisecond)
		}
	})
	const flood = 100_000 // rows
	beside := victim.barriers(time.Duration(share(2, 30))*time.Second, func() bool { return atomic.LoadUint64(&flooder.tally[tallyProduced]) >= flood })
	over.Store(true)
	bad.Wait()
	t.Logf("alone: %s; beside bad neighbours: %s; waits: %d", middle(alone), middle(beside), victim.waits)
	if flooded := flooder.tally[tallyProduced]; flooded < flood {
		t.Errorf("the flooder produced %d rows: the test shows nothing", flooded)
	}
	victim.end(e)
	for _, p := range []*producer{flooder, staller, deaf} {
		p.client.Load().Close()
	}
	e.stop()
	s, err := store.OpenReadOnly(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	verified(t, s)
	victim.checkIn(s)
	sessions, err := s.Sessions()
	if err != nil {
		t.Fatal(err)
	}
	for _, session := range sessions {
		b := booksOf(s, session.Number)
		if b.sum != b.produced {
			t.Errorf("session %s: %d rows produced, and its books sum to %d", session.ID, b.produced, b.sum)
		}
		if tally := tallies[session.ID]; tally != nil && b.produced > tally[tallyProduced] {
			t.Errorf("session %s: %d rows produced, and its producer counts %d", session.ID, b.produced, tally[tallyProduced])
		}
	}
}

// Readers that ask for everything there is, all the time, do not slow the drain: a producer in best-effort mode, which drops where it is not kept up with, drops nothing beside them.
func TestGreedyReaders(t *testing.T) {
	random := seeded(t)
	dir := storeDir(t)
	e := start(t, dir, "store.segment_mib=16")
	// Something to read: what a flood leaves behind.
	l := load{Seed: random.Uint64(), Lanes: 2, Sites: 50, Requests: 16, Prompt: 2000, Length: 2100}
	past, err := newProducer(newSession(random), l, ring.ModeComplete, booksRing, make([]uint64, tallyWords))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(past.Close)
	if err := past.attach(e.Control, false); err != nil {
		t.Fatal(err)
	}
	for past.tally[tallyProduced] < uint64(share(4_000_000, 40_000_000)) {
		if err := past.play(); err != nil {
			t.Fatal(err)
		}
	}
	if err := past.bye(); err != nil {
		t.Fatal(err)
	}

	victim := newSteady(t, random, e.Control, ring.ModeBestEffort)
	alone := victim.barriers(2*time.Second, atOnce)
	var readers sync.WaitGroup
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var read, answers atomic.Int64
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", e.HTTP)
	}}}
	ask := func(method, path string) {
		request, err := http.NewRequestWithContext(ctx, method, "http://localhost/v1"+path, nil)
		if err != nil {
			t.Error(err)
			return
		}
		answer, err := client.Do(request)
		if err != nil {
			return // told to end
		}
		defer answer.Body.Close()
		if answer.StatusCode != http.StatusOK {
			text, _ := io.ReadAll(answer.Body)
			t.Errorf("%s: %d %s", path, answer.StatusCode, text)
			return
		}
		n, _ := io.Copy(io.Discard, answer.Body)
		read.Add(n)
		answers.Add(1)
	}
	for i := range 8 {
		readers.Go(func() {
			for ctx.Err() == nil && !t.Failed() {
				switch i % 3 {
				case 0:
					ask("POST", "/verify")
				case 1:
					ask("GET", "/stats?per=row&site=blocks.*.hook_resid_post&session="+past.session)
				case 2:
					ask("GET", "/rows?site="+siteName(uint32(i))+"&partial=true&session="+past.session)
				}
			}
		})
	}
	const much = 10 << 20 // bytes
	beside := victim.barriers(time.Duration(share(4, 60))*time.Second, func() bool { return read.Load() >= much })
	stop()
	readers.Wait()
	t.Logf("alone: %s; beside %d readers, who were given %.0f MB in %d whole answers: %s", middle(alone), 8, float64(read.Load())/1e6, answers.Load(), middle(beside))
	if read.Load() < much {
		t.Errorf("the readers were given %d bytes: the test shows nothing", read.Load())
	}
	victim.end(e)
	e.stop()
	s, err := store.OpenReadOnly(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	victim.checkIn(s)
}

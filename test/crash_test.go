//go:build linux

package test

import (
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"dmi/internal/ringtape"
	"dmi/store"
)

// smallFiles makes everything that happens to a store's files happen often.
var smallFiles = []string{"store.segment_mib=1", "store.segment_tensors=3000", "store.segment_age_s=0.2", "store.chunk_kib=16", "store.flush_age_ms=50", "store.sync_age_ms=30",
	"store.group_commit_ms=5", "store.buffer_mib=8"}

var smallRing = ringtape.Shape{RecordCapacity: 512, CommandCapacity: 64, SiteCapacity: 64, Payload: 1 << 17, Table: 1 << 14, Staging: 1 << 16, Spill: 1 << 14}

// TestEngineKilled kills a real engine under load, again and again, at any moment of its life: while it starts, recovers, admits, drains, writes, seals.
// Each time, what it had called durable can be read, and is right; the books balance; and the next engine goes on where it left.
func TestEngineKilled(t *testing.T) {
	random := seeded(t)
	rounds := share(4, 1000)
	say := newProgress(t)
	var total killTotals
	for done := 0; done < rounds; {
		life := newKilledStore(t, random)
		n := min(20, rounds-done)
		for i := range n {
			total.add(life.round(done+i, random))
			say.say("%d of %d kills, %d rows produced", done+i+1, rounds, total.produced+life.count(tallyProduced))
		}
		life.end()
		total.produced += life.count(tallyProduced)
		done += n
	}
	t.Logf("%d kills: %d before the engine was ready, %d while a producer attached, %d under load; %d rows produced, %d durable rows read after kills", rounds, total.starting,
		total.attaching, total.loaded, total.produced, total.durable)
	figures(t, "soak_engine_kills", count("kills after which everything durable was read and right, and the books balanced", uint64(rounds)).For(">= 1000", rounds >= 1000),
		count("of these before the engine was ready", uint64(total.starting)), count("of these while a producer attached", uint64(total.attaching)),
		count("of these under load", uint64(total.loaded)), rowsOf("produced", total.produced), rowsOf("read after kills, of those that were durable", total.durable))
}

type killTotals struct {
	starting, attaching, loaded int
	produced, durable           uint64
}

func (k *killTotals) add(r killTotals) {
	k.starting, k.attaching, k.loaded = k.starting+r.starting, k.attaching+r.attaching, k.loaded+r.loaded
	k.durable += r.durable
}

// killedStore is a store whose engines are killed, and the producer that outlives them.
type killedStore struct {
	*producer
	t      *testing.T
	dir    string
	load   load
	oracle *oracle
	played chan error
}

func newKilledStore(t *testing.T, random *rand.Rand) *killedStore {
	t.Helper()
	l := load{Seed: random.Uint64(), Lanes: 1 + random.IntN(3), Sites: 1 + random.Uint32N(12), Requests: 1 + random.IntN(8), Prompt: 40, Length: 200}
	p, err := newProducer(newSession(random), l, random.Uint32N(2), smallRing, make([]uint64, tallyWords))
	if err != nil {
		t.Fatal(err)
	}
	k := &killedStore{producer: p, t: t, dir: storeDir(t), load: l, oracle: newOracle(l.Lanes), played: make(chan error, 1)}
	p.note = k.oracle.note
	played := make(chan struct{})
	t.Cleanup(func() {
		p.stop.Store(true)
		p.abandon.Store(true)
		<-played
		p.Close()
	})
	go func() {
		defer close(played)
		pace := rand.New(rand.NewPCG(l.Seed, 2))
		for !p.stop.Load() {
			if err := p.play(); err != nil {
				k.played <- err
				return
			}
			time.Sleep(time.Duration(pace.IntN(1000)) * time.Microsecond)
		}
		k.played <- nil
	}()
	return k
}

// count reads what the producer counts while it runs.
func (k *killedStore) count(word int) uint64 { return atomic.LoadUint64(&k.tally[word]) }

// round lets an engine live for a moment.
func (k *killedStore) round(n int, random *rand.Rand) (r killTotals) {
	k.t.Helper()
	starting := random.IntN(4) == 0
	moment := time.Duration(random.IntN(250)) * time.Millisecond
	if starting {
		moment = time.Duration(random.IntN(120)) * time.Millisecond
	}
	e := launch(k.t, k.dir, smallFiles...)
	kill := make(chan struct{})
	if starting {
		time.AfterFunc(moment, func() { close(kill) })
	}
	phase := "starting"
	var talking sync.WaitGroup
	var attached atomic.Bool
	var barriers atomic.Int32
	defer talking.Wait()
	select {
	case <-kill:
		r.starting = 1
	case err := <-e.ready:
		if err != nil {
			k.t.Fatalf("round %d: the engine did not start: %v\n%s", n, err, &e.log)
		}
		if !starting {
			time.AfterFunc(moment, func() { close(kill) })
		}
		talking.Go(func() { // it ends when the engine does
			if k.attach(e.Control, true) != nil {
				return
			}
			attached.Store(true)
			for {
				durable, err := k.barrier(patience)
				if err != nil {
					return
				}
				k.oracle.promise(durable)
				barriers.Add(1)
			}
		})
		<-kill
		if phase = "attaching"; attached.Load() {
			phase, r.loaded = "loaded", 1
		} else {
			r.attaching = 1
		}
	}
	e.kill()
	talking.Wait()
	if c := k.client.Swap(nil); c != nil {
		c.Close()
	}
	r.durable = k.inspect(n)
	k.t.Logf("round %d: killed %v into %s; %d steps closed, %d barriers, %d rows durable", n, moment, phase, k.count(tallyClosed), barriers.Load(), r.durable)
	select {
	case err := <-k.played:
		k.t.Fatalf("round %d: the producer ended: %v", n, err)
	default:
	}
	return r
}

// inspect reads what a killed engine has left.
func (k *killedStore) inspect(round int) (durable uint64) {
	k.t.Helper()
	s, err := store.OpenReadOnly(k.dir)
	if errors.Is(err, store.ErrNotStore) {
		return 0
	}
	if err != nil {
		k.t.Fatalf("round %d: %v", round, err)
	}
	defer s.Close()
	verified(k.t, s)
	sessions, err := s.Sessions()
	if err != nil {
		k.t.Fatal(err)
	}
	for _, session := range sessions {
		if b := booksOf(s, session.Number); b.produced != b.sum || b.produced > k.count(tallyNext) {
			k.t.Fatalf("round %d: the producer counts %d rows, the store %d, and its books sum to %d", round, k.count(tallyProduced), b.produced, b.sum)
		}
		_, durable = k.oracle.check(k.t, s, session.Number, k.load.Sites, false)
	}
	return durable
}

// end resumes with an engine that is not killed, and expects the books to agree to the row.
func (k *killedStore) end() {
	k.t.Helper()
	e := start(k.t, k.dir, smallFiles...)
	if err := k.attach(e.Control, true); err != nil {
		k.t.Fatal(err)
	}
	before := k.count(tallyClosed)
	for begun := time.Now(); k.count(tallyClosed) < before+50; time.Sleep(time.Millisecond) {
		if time.Since(begun) > patience {
			k.t.Fatalf("it does not resume\n%s", &e.log)
		}
	}
	k.stop.Store(true)
	if err := <-k.played; err != nil {
		k.t.Fatal(err)
	}
	if err := k.bye(); err != nil {
		k.t.Fatalf("%v\n%s", err, &e.log)
	}
	e.stop()
	s, err := store.OpenReadOnly(k.dir)
	if err != nil {
		k.t.Fatal(err)
	}
	defer s.Close()
	verified(k.t, s)
	k.checkIn(s, true)
	k.Producer.Close()
}

// checkIn expects the store to agree with the producer to the row. everything: no row that it captured may be missing, but for those that engines
// had taken along when they were killed.
func (k *killedStore) checkIn(s *store.Store, everything bool) {
	k.t.Helper()
	sessions, err := s.Sessions()
	if err != nil {
		k.t.Fatal(err)
	}
	for _, session := range sessions {
		if session.ID != k.session {
			continue
		}
		b := booksOf(s, session.Number)
		if b.produced != k.count(tallyProduced) || b.sum != b.produced {
			k.t.Fatalf("the producer counts %d rows, the store %d, and its books sum to %d", k.count(tallyProduced), b.produced, b.sum)
		}
		k.oracle.check(k.t, s, session.Number, k.load.Sites, everything)
		return
	}
	k.t.Fatalf("session %s is not in the store", k.session)
}

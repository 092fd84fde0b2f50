package pipeline

import (
	"fmt"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"dmi/drain"
	"dmi/ring"
	"dmi/tensor"
)

// order is a Live whose one subscriber, and a Store, note whose turn it was.
type order struct {
	published chan struct{}
	turns     chan string
}

func (o order) Publish(uint32, []tensor.Chunk) { o.published <- struct{}{} }
func (o order) Heard() bool                    { return true }
func (o order) AppendChunks(c []tensor.Chunk) (int, error) {
	o.turns <- "store"
	return len(c), nil
}
func (o order) Book([]tensor.Entry) error { return nil }
func (o order) subscriber()               { <-o.published; o.turns <- "subscriber" }

// With one processor, who was woken by a chunk that no other follows at once has read it before the store gets it.
func TestSubscribersRunBeforeTheStore(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	const times = 100
	late := 0 // now and then the scheduler prefers who yielded, so that nobody starves
	for range times {
		o := order{make(chan struct{}, 1), make(chan string, 2)}
		p := New(Options{Store: o, Live: o})
		go o.subscriber()
		runtime.Gosched() // it waits now
		if _, err := p.deliver(make([]tensor.Chunk, 1), true, false); err != nil {
			t.Fatal(err)
		}
		if first, _ := <-o.turns, <-o.turns; first != "subscriber" {
			late++
		}
	}
	if late > times/10 {
		t.Errorf("the store had its turn before the subscriber %d times of %d", late, times)
	}
}

// tally is a Live and a Store that note what they are given, in order.
type tally struct{ got []string }

func (t *tally) Publish(_ uint32, chunks []tensor.Chunk) {
	for i := range chunks {
		t.got = append(t.got, fmt.Sprint("live ", chunks[i].Site))
	}
}
func (t *tally) Heard() bool { return true }
func (t *tally) AppendChunks(chunks []tensor.Chunk) (int, error) {
	for i := range chunks {
		t.got = append(t.got, fmt.Sprint("store ", chunks[i].Site))
	}
	return len(chunks), nil
}
func (t *tally) Book([]tensor.Entry) error { return nil }

// Subscribers have all of a token's tensors before the store has the first; what a site gives again, nobody has.
func TestSubscribersAreAhead(t *testing.T) {
	list := ring.RowList{Spans: []ring.RowSpan{{Span: ring.Span{Request: 1, Count: 1}}}, Count: 1}
	step := &drain.Step{Sites: make([]ring.Site, 3), Rows: &ring.Rows{}}
	step.Rows.Spaces[ring.SpaceTokens] = list
	for i := range step.Sites {
		step.Sites[i] = ring.Site{ID: uint32(i), NDim: 2, Role: [ring.MaxDims]uint8{ring.RoleRow, ring.RoleInner}}
	}
	batch := []*drain.Item{{Kind: drain.Opened, Step: step}}
	for _, site := range []uint32{0, 2, 1, 2} {
		batch = append(batch, &drain.Item{Kind: drain.Captured, Step: step, Data: make([]byte, 8), Record: ring.Record{Site: site, Rows: 1, Outcome: ring.OutcomeCaptured, PayloadBytes: 8,
			TensorBytes: 8, DType: ring.DTypeU8, NDim: 2, Size: [ring.MaxDims]uint32{1, 8}, Stride: [ring.MaxDims]uint32{8, 1}, Role: [ring.MaxDims]uint8{ring.RoleRow, ring.RoleInner},
			Flags: ring.RecordGathered}})
	}
	got := &tally{}
	in := make(chan []*drain.Item, 1)
	in <- append(batch, &drain.Item{Kind: drain.Closed, Step: step})
	close(in)
	New(Options{Store: got, Live: got}).Run(in)
	if want := []string{"live 0", "live 2", "store 0", "store 2", "live 1", "store 1"}; !slices.Equal(got.got, want) {
		t.Errorf("got %q, want %q", got.got, want)
	}
}

// slow is a Store that takes what a site has when it is let, and says of what others have.
type slow struct {
	let  chan struct{}
	came chan uint64 // steps
}

func (s slow) AppendChunks(chunks []tensor.Chunk) (int, error) {
	if chunks[0].Site == 0 {
		<-s.let
	} else {
		s.came <- chunks[0].Step
	}
	return len(chunks), nil
}
func (s slow) Book([]tensor.Entry) error { return nil }

// A step whose opening comes alone begins while a worker still has a site of the one before, in which there was much; and that holds up no other site, though there are
// more sites than workers.
func TestStepsGoOnBesideASlowSite(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4))
	const sites = 8
	s := slow{make(chan struct{}), make(chan uint64, 2*sites)}
	p := New(Options{Store: s, ShareBytes: 2 * rowBytes})
	in, done := make(chan []*drain.Item, 6), make(chan struct{})
	go func() {
		p.Run(in)
		close(done)
	}()
	for number := uint64(1); number <= 2; number++ {
		step := &drain.Step{Number: number, Sites: make([]ring.Site, sites), Rows: &ring.Rows{}}
		step.Rows.Spaces[ring.SpaceTokens] = ring.RowList{Spans: []ring.RowSpan{{Span: ring.Span{Request: 1, Count: 1}}}, Count: 1}
		var captured []*drain.Item
		for i := range step.Sites {
			step.Sites[i] = ring.Site{ID: uint32(i), NDim: 2, Role: [ring.MaxDims]uint8{ring.RoleRow, ring.RoleInner}}
			captured = append(captured, &drain.Item{Kind: drain.Captured, Step: step, Data: make([]byte, 8), Record: ring.Record{Step: number, Site: uint32(i), Rows: 1, Outcome: ring.OutcomeCaptured,
				PayloadBytes: 8, TensorBytes: 8, DType: ring.DTypeU8, NDim: 2, Size: [ring.MaxDims]uint32{1, 8}, Stride: [ring.MaxDims]uint32{8, 1},
				Role: [ring.MaxDims]uint8{ring.RoleRow, ring.RoleInner}, Flags: ring.RecordGathered}})
		}
		in <- []*drain.Item{{Kind: drain.Opened, Step: step}}
		in <- captured
		in <- []*drain.Item{{Kind: drain.Closed, Step: step}}
	}
	came := map[uint64]int{}
	for range 2 * (sites - 1) {
		select {
		case step := <-s.came:
			came[step]++
		case <-time.After(20 * time.Second):
			t.Fatalf("of %d sites beside the slow one came, by step, %v: the others wait for it", sites-1, came)
		}
	}
	if came[1] != sites-1 || came[2] != sites-1 {
		t.Errorf("of %d sites beside the slow one came, by step, %v", sites-1, came)
	}
	close(s.let)
	close(in)
	<-done
}

// As many workers begin as what waits for them asks for, two at least, and all of them end where nothing is left to do.
func TestWorkersAsStagingIsFull(t *testing.T) {
	for full, want := range map[float64]int{0: 2, 0.5: 2 + 4, 1: 8} {
		p := pool{most: 8, full: func() float64 { return full }}
		var working atomic.Int32
		let := make(chan struct{})
		p.work = func(ready func() *strand) {
			for s := ready(); s != nil; s = ready() {
				working.Add(1)
				<-let
			}
		}
		for range 50 {
			p.put(new(strand))
		}
		for end := time.Now().Add(20 * time.Second); int(working.Load()) < want && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(5 * time.Millisecond) // for one too many
		if got := int(working.Load()); got != want {
			t.Errorf("%d workers work where %.0f %% are full, and not %d", got, 100*full, want)
		}
		close(let)
		p.working.Wait()
		if working.Load() != 50 || p.running != 0 || len(p.ready) != 0 {
			t.Errorf("%d of 50 were worked on, %d workers are said to be running", working.Load(), p.running)
		}
	}
}

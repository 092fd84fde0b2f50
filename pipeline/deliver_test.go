package pipeline

import (
	"runtime"
	"testing"

	"dmi/tensor"
)

// order is a Live whose one subscriber, and a Store, note whose turn it was.
type order struct {
	published chan struct{}
	turns     chan string
}

func (o order) Publish(uint32, []tensor.Chunk) { o.published <- struct{}{} }
func (o order) AppendChunk(tensor.Chunk) error { o.turns <- "store"; return nil }
func (o order) Book([]tensor.Entry) error      { return nil }
func (o order) subscriber()                    { <-o.published; o.turns <- "subscriber" }

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
		if err := p.deliver(make([]tensor.Chunk, 1), true); err != nil {
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

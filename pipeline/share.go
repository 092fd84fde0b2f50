package pipeline

import (
	"runtime"
	"sync"
	"sync/atomic"

	"dmi/drain"
)

// Sites have nothing to do with each other until their step ends. So where there is much to slice, workers do it: any of them any site's, one item of a site at a time,
// so that its rows keep their order. A worker that is held up, by its processor or by the store, then holds up one site, and not all that would have been its own:
// staging is freed in the order it was filled in. Everything else that concerns a lane as a whole waits until they are through.
const (
	siteQueue  = 64 // items of a site that may wait for a worker before Run waits for one
	fewWorkers = 2  // that may work in any case
)

// strand is what a site has for workers.
type strand struct {
	tasks   chan task
	waiting atomic.Int32 // tasks, with the one at work: the strand is in pool.ready, or a worker has it, where there are any
}

// pool is the workers. One begins where there is more to do than those that there are ought to do alone, and ends where there is nothing.
type pool struct {
	most    int
	full    func() float64
	work    func(ready func() *strand)
	working sync.WaitGroup

	mu      sync.Mutex
	ready   []*strand // that have something, in turn: each once
	running int
}

// put makes a strand ready.
func (p *pool) put(s *strand) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ready = append(p.ready, s)
	if p.running < p.most && p.running < fewWorkers+int(float64(p.most)*p.full()) {
		p.running++
		p.working.Go(func() { p.work(p.take) })
	}
}

// take gives a worker the next one. nil: there is none, and the worker ends.
func (p *pool) take() *strand {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.ready) == 0 {
		p.running--
		return nil
	}
	s := p.ready[0]
	p.ready = p.ready[1:]
	return s
}

// task is an item of a site, with the books of its step.
type task struct {
	item *drain.Item
	book *book
}

// turn is a book's place among the steps of its lane that workers have: these end one after another.
type turn struct {
	left  atomic.Int32 // what it still waits for: items that workers have, its close, and the step before, where that was shared
	close *drain.Item
	next  *book
}

// mostWorkers leaves a quarter of the processors, where there are more than a few, to the model whose tensors these are. Sixteen read more than a copy engine gives.
func mostWorkers() int {
	n := runtime.GOMAXPROCS(0)
	return min(max(min(n, 2), n-n/4), 16)
}

func ofSite(i *drain.Item) bool {
	return i.Kind == drain.Captured || i.Kind == drain.Settled || i.Kind == drain.Offered
}

func siteOf(i *drain.Item) uint32 {
	if i.Kind == drain.Offered {
		return i.Offer.Record.Site
	}
	return i.Record.Site
}

// rowBytes is how many bytes are as much work as a row of none: finding its request and its stream, and booking it. Statistics have no more than that.
const rowBytes = 1 << 10

func weightOf(i *drain.Item) int {
	n := len(i.Data)
	if i.Kind == drain.Captured {
		n += rowBytes * int(i.Record.Rows)
	}
	return n
}

// much says whether there is much in a batch.
func (p *Pipeline) much(batch []*drain.Item) bool {
	n := 0
	for _, i := range batch {
		n += weightOf(i)
	}
	return n >= p.options.ShareBytes && mostWorkers() > 1
}

// goesOn says whether a step may begin while workers have the one before: where there is much in its batch, or was in that step. Its opening mostly comes alone, ahead of what it
// captured, and would have all workers wait for the slowest one.
func (p *Pipeline) goesOn(lane int, much bool) bool {
	was := p.weight[lane]
	p.weight[lane] = 0
	return much || was >= p.options.ShareBytes
}

// share gives an item to the workers, one of whom releases it.
func (p *Pipeline) share(i *drain.Item) {
	site := int(siteOf(i))
	for len(p.strands) <= site {
		p.strands = append(p.strands, &strand{tasks: make(chan task, siteQueue)})
	}
	b := p.books[i.Lane]
	p.sharing[i.Lane] = true
	p.shared[i.Lane].Add(1)
	b.turn.left.Add(1)
	s := p.strands[site]
	s.tasks <- task{item: i, book: b}
	if s.waiting.Add(1) == 1 {
		p.pool.put(s)
	}
}

// shareClose ends a step behind what workers have of it.
func (p *Pipeline) shareClose(i *drain.Item) {
	b, next := p.books[i.Lane], p.spare.Get().(*book)
	next.turn.left.Add(1) // this step
	b.turn.close, b.turn.next = i, next
	p.books[i.Lane] = next
	p.shared[i.Lane].Add(2) // the step's end, and our own part in it
	p.over(i.Lane, b)
}

// over takes away something that a step waits for. Where that was the last, it ends, and the steps behind it that have nothing else to wait for.
func (p *Pipeline) over(lane int, b *book) {
	done := 1
	for b.turn.left.Add(-1) == 0 {
		ended, i := b, b.turn.close
		b = b.turn.next
		ended.turn.close, ended.turn.next = nil, nil
		ended.turn.left.Store(1)
		if !p.close(ended, i) {
			p.spare.Put(ended)
		}
		i.Release()
		done++
	}
	p.shared[lane].Add(-done)
}

func (p *Pipeline) work(ready func() *strand) {
	s := slicer{session: p.options.Session}
	for strand := ready(); strand != nil; strand = ready() {
		t := <-strand.tasks
		p.site(&s, t.book, t.item)
		lane := t.item.Lane
		t.item.Release()
		if strand.waiting.Add(-1) > 0 {
			p.pool.put(strand)
		}
		p.over(lane, t.book)
	}
}

// rejoin returns when the workers have nothing of the lane any more.
func (p *Pipeline) rejoin(lane int) {
	if p.sharing[lane] {
		p.shared[lane].Wait()
		p.sharing[lane] = false
	}
}

// dismiss returns when the workers have ended.
func (p *Pipeline) dismiss() {
	for lane := range p.shared {
		p.rejoin(lane)
	}
	p.pool.working.Wait()
}

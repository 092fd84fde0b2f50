package pipeline

import (
	"runtime"
	"sync/atomic"

	"dmi/drain"
)

// Sites have nothing to do with each other until their step ends. So where there is much to slice, workers do it: each site always the same
// one, so that its rows keep their order. A step ends where the last worker comes to its end; the next may have begun by then, with books
// of its own. Everything else that concerns a lane as a whole waits until they are through.
const workerQueue = 64 // items a worker may have before Run waits for it

// task is an item for a worker, with the books of its step. A close goes to all of them.
type task struct {
	item *drain.Item
	book *book
	left *atomic.Int32 // of a close: workers that have not come to it
}

// mostWorkers leaves half of the processors, where there are more than a few, to the model whose tensors these are.
func mostWorkers() int {
	n := runtime.GOMAXPROCS(0)
	return min(n, max(2, n/2), 16)
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

// share gives an item to its site's worker, who releases it.
func (p *Pipeline) share(i *drain.Item) {
	if p.workers == nil {
		p.workers = make([]chan task, mostWorkers())
		for n := range p.workers {
			p.workers[n] = make(chan task, workerQueue)
			p.working.Add(1)
			go p.work(p.workers[n])
		}
	}
	p.sharing[i.Lane] = true
	p.shared[i.Lane].Add(1)
	p.workers[(int(siteOf(i))+i.Lane)%len(p.workers)] <- task{item: i, book: p.books[i.Lane]}
}

// shareClose ends a step behind what workers have of it.
func (p *Pipeline) shareClose(i *drain.Item) {
	t := task{item: i, book: p.books[i.Lane], left: new(atomic.Int32)}
	t.left.Store(int32(len(p.workers)))
	p.books[i.Lane] = p.spare.Get().(*book)
	p.shared[i.Lane].Add(1)
	for _, items := range p.workers {
		items <- t
	}
}

func (p *Pipeline) work(tasks <-chan task) {
	defer p.working.Done()
	s := slicer{session: p.options.Session}
	for t := range tasks {
		lane := t.item.Lane
		switch {
		case t.left == nil:
			p.site(&s, t.book, t.item)
		case t.left.Add(-1) > 0:
			continue
		default:
			if !p.close(t.book, t.item) {
				p.spare.Put(t.book)
			}
		}
		t.item.Release()
		p.shared[lane].Done()
	}
}

// rejoin returns when the workers have nothing of the lane any more.
func (p *Pipeline) rejoin(lane int) {
	if p.sharing[lane] {
		p.shared[lane].Wait()
		p.sharing[lane] = false
	}
}

// dismiss ends the workers, when they are through.
func (p *Pipeline) dismiss() {
	for _, items := range p.workers {
		close(items)
	}
	p.working.Wait()
	p.workers = nil
}

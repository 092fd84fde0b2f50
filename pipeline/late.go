package pipeline

import (
	"slices"
	"sync/atomic"

	"dmi/drain"
	"dmi/policy"
	"dmi/ring"
	"dmi/tensor"
)

// Triggers look at rows that pass.
type Triggers interface {
	// Look holds chunks against the triggers of the document that a revision brought in, or those in force now where that is 0 or forgotten. met is told of requests that met one
	// that keeps rows: the trigger's index in its document, and the revision that brought that in. Calls for one session do not overlap.
	Look(session uint32, chunks []tensor.Chunk, document uint64, met func(request uint64, trigger int, document uint64))
}

// Late selection. A producer that lays rows in its ring as an offer says before or after what becomes of them otherwise: statistics, or nothing. Statistics are looked at
// when they come, but neither stored nor booked: what they are of may come in full yet. When the step ends all of its statistics have been seen. Then those rows
// are fetched whose request met a trigger, at the sites that the trigger keeps; and the step's books are closed when they are here, behind those of later
// steps if need be.

// late is what a book knows of conditions, and of rows that wait for its step's end.
type late struct {
	keeps    []policy.Keep // by site; nil: nothing is kept
	document uint64        // whose triggers they name
	met      map[uint64]uint64
	offers   [][]*drain.Offer // by site; whoever has the site writes its own
	others   [][]drain.Item   // by site: what becomes of rows on offer otherwise
	held     atomic.Int64     // bytes of rows in full among them
}

func (l *late) begin(sites int, keeps []policy.Keep, document uint64) {
	l.keeps, l.document = keeps, document
	clear(l.met)
	l.held.Store(0)
	if l.offers = l.offers[:0]; keeps == nil {
		l.others = l.others[:0]
		return
	}
	l.offers = slices.Grow(l.offers, sites)[:sites]
	l.others = slices.Grow(l.others[:0], sites)[:sites]
	clear(l.offers)
	clear(l.others)
}

// by is the triggers that keep rows of a site.
func (l *late) by(site uint32) uint64 {
	if int(site) >= len(l.keeps) {
		return 0
	}
	return l.keeps[site].By
}

// look has triggers look at chunks of a step, all of one level. A trigger of another document than the step's keeps none of its rows; neither does one that quantised rows
// meet: their producer held the rows that they were made of against it, and said what that came to.
func (p *Pipeline) look(b *book, chunks []tensor.Chunk) {
	if p.options.Triggers == nil || len(chunks) == 0 {
		return
	}
	p.publishing.Lock()
	defer p.publishing.Unlock()
	quantised := chunks[0].Level.Quantised()
	p.options.Triggers.Look(p.options.Session, chunks, b.document, func(request uint64, trigger int, document uint64) {
		if b.keeps == nil || document != b.document || quantised {
			return
		}
		if b.met == nil {
			b.met = map[uint64]uint64{}
		}
		b.met[request] |= 1 << trigger
	})
}

// kept reports whether rows of a request at a site are wanted in full, by what was seen of its step so far.
func (p *Pipeline) kept(b *book, site uint32, request uint64) bool {
	by := b.by(site)
	if by == 0 {
		return false
	}
	p.publishing.Lock()
	defer p.publishing.Unlock()
	return b.met[request]&by != 0
}

// offered takes an offer of rows.
func (p *Pipeline) offered(b *book, i *drain.Item) {
	site := i.Offer.Record.Site
	if b.by(site) == 0 || b.step.Rows.Drafts { // the next step tells which drafts stay, and judges books that are closed
		i.Offer.Fetch(nil, nil)
		return
	}
	b.offers[site] = append(b.offers[site], i.Offer)
}

// mostHeld bounds the full rows of a step that wait here for its end; more of them are reduced at once.
const mostHeld = 64 << 20

// wait puts off what becomes of rows that are on offer, and of those that a producer gave in full where the policy asks for less, which is an offer as well. It reports whether it did.
func (p *Pipeline) wait(s *slicer, b *book, i *drain.Item) bool {
	r := &i.Record
	if int(r.Site) >= len(b.offers) || r.Flags&ring.RecordKept != 0 {
		return false
	}
	if !slices.ContainsFunc(b.offers[r.Site], func(o *drain.Offer) bool {
		return r.RowFirst < o.Record.RowFirst+o.Record.Rows && r.RowFirst+r.Rows > o.Record.RowFirst
	}) {
		less := func(v verdict) bool { return v.level != tensor.Full && !v.unwanted }
		if i.Kind != drain.Captured || r.Level != ring.LevelFull || !b.keeps[r.Site].Late || b.step.Rows.Drafts ||
			!slices.ContainsFunc(p.rules.verdicts(nil, b, r, r.RowFirst, r.RowFirst+r.Rows), less) || b.held.Add(int64(len(i.Data))) > mostHeld {
			return false
		}
	}
	b.selections[r.Site] = r.Selection
	copied := *i
	copied.Data = slices.Clone(i.Data)
	if i.Kind == drain.Captured {
		if chunks, err := s.cut(i.Step, r, i.Data, r.RowFirst, r.Rows); err == nil {
			p.look(b, chunks)
		}
	}
	b.others[r.Site] = append(b.others[r.Site], drain.Item{Kind: i.Kind, Lane: i.Lane, Step: i.Step, Record: i.Record, Data: copied.Data})
	return true
}

// ending is a step whose last rows are being fetched.
type ending struct {
	book     *book
	item     drain.Item // that ended it
	rest     fate
	complain bool
	left     int // items to come
	marks    []*mark
}

// mark waits for steps that are ending.
type mark struct {
	left int
	done func()
}

// choose decides about the offers of a step that ends, and reports whether rows of it are still to come.
func (p *Pipeline) choose(b *book, i *drain.Item, rest fate, complain bool) bool {
	type choice struct {
		offer *drain.Offer
		rows  []drain.Span
	}
	var choices []choice
	e := &ending{book: b, item: drain.Item{Kind: i.Kind, Lane: i.Lane, Step: i.Step, Aborted: i.Aborted, Reason: i.Reason}, rest: rest, complain: complain}
	for site := range b.offers {
		for _, o := range b.offers[site] {
			c := choice{offer: o}
			list := b.step.Rows.List(o.Record.Selection, b.step.Sites[site].Space)
			_ = spansOf(list, o.Record.RowFirst, o.Record.Rows, func(span *ring.RowSpan, first, count uint32) error {
				if span.Flags&ring.SpanChosen != 0 || !p.kept(b, uint32(site), span.Request) {
					return nil
				}
				from := span.Row + first
				if n := len(c.rows); n > 0 && c.rows[n-1].To == from {
					c.rows[n-1].To += count
				} else {
					c.rows = append(c.rows, drain.Span{From: from, To: from + count})
				}
				return nil
			})
			e.left += len(c.rows)
			choices = append(choices, c)
		}
	}
	if e.left > 0 {
		p.ending.Lock()
		p.endings[e] = true
		p.ending.Unlock()
	}
	for _, c := range choices {
		c.offer.Fetch(c.rows, e)
	}
	return e.left > 0
}

// fetched takes rows that a step waits for; with the last of them its books are closed.
func (p *Pipeline) fetched(i *drain.Item) {
	e := i.Owner.(*ending)
	r := &i.Record
	if i.Kind == drain.Captured {
		p.keep(&p.slicer, e.book, i, r.RowFirst, r.RowFirst+r.Rows, tensor.Full, 0, false)
	}
	if e.left--; e.left > 0 {
		return
	}
	p.others(e.book)
	p.end(e.book, &e.item, e.rest, e.complain)
	p.ending.Lock()
	delete(p.endings, e)
	p.ending.Unlock()
	for _, m := range e.marks {
		if m.left--; m.left == 0 {
			m.done()
		}
	}
	p.spare.Put(e.book)
}

// others has become of rows what becomes of them where they were not fetched.
func (p *Pipeline) others(b *book) {
	s := slicer{session: p.options.Session}
	for site := range b.others {
		for n := range b.others[site] {
			i := &b.others[site][n]
			if i.Kind == drain.Settled {
				p.settled(b, i)
			} else {
				p.selected(&s, b, i, false)
			}
		}
		b.others[site] = nil
	}
}

// marked calls done once everything before has been taken in.
func (p *Pipeline) marked(done func()) {
	p.ending.Lock()
	m := &mark{left: len(p.endings), done: done}
	for e := range p.endings {
		e.marks = append(e.marks, m)
	}
	p.ending.Unlock()
	if m.left == 0 {
		done()
	}
}

package pipeline

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"dmi/drain"
	"dmi/ring"
	"dmi/tensor"
)

// Store takes what is kept, and copies it: a chunk's data lies in staging, or in memory that is used again. AppendChunks may block: that is how a slow disk holds up its producers, and nobody else. Its chunks are
// of one site; it is called for several sites at once, never twice for one. On an error it has taken so many of them, the first.
type Store interface {
	AppendChunks([]tensor.Chunk) (taken int, err error)
	Book([]tensor.Entry) error
}

// Live takes what passes by. It never blocks, and copies what it keeps.
type Live interface {
	Publish(session uint32, chunks []tensor.Chunk)
	Heard() bool // whether anybody would get what is published
}

// Options of a Pipeline.
type Options struct {
	Session uint32 // the store's number
	Store   Store
	Live    Live                              // nil: nobody listens
	Event   func(level, code, message string) // must not block; nil: nobody is told
	Closed  func(lane int, step uint64)       // after everything of a step was delivered; nil: nobody asks
	// Full says which part is taken of where payload waits for us, 0 to 1: such a part of the workers that there may be work, besides two that may at any time. nil: all may.
	Full func() float64
	// ShareBytes is how much a batch must have for several goroutines to share it (1 MiB), a row being as much as rowBytes at least: below, handing it over costs more than it brings.
	ShareBytes int
	Rules      Rules    // nil: everything that comes is kept
	Triggers   Triggers // nil: nobody looks at what passes
}

// Pipeline works on one session. Run is its goroutine, with others that it starts; Status may be asked from any.
type Pipeline struct {
	options Options
	slicer  slicer
	showing slicer    // of ahead
	shown   []bool    // items of the batch that live subscribers have
	rules   *selector // nil: everything that comes is kept
	pool    pool
	strands []*strand                     // by site: what workers have to do
	shared  [ring.MaxLanes]sync.WaitGroup // items of the lane that workers have
	sharing [ring.MaxLanes]bool           // there may be such
	weight  [ring.MaxLanes]int            // of what workers have of its open step
	plain   [ring.MaxLanes]bool           // of the step before: no verdict on its rows depends on what is told of requests later
	books   [ring.MaxLanes]*book          // of its open step
	guesses [ring.MaxLanes]bool           // its last step has drafts
	drafts  [ring.MaxLanes][]tensor.Entry // of its last step that ended: booked when the next one says which were rejected
	spare   sync.Pool                     // of books
	ending  sync.Mutex                    // sets, told, endings
	endings map[*ending]bool
	sets    siteSets
	told    map[uint32]bool // sites that were reported not to fire

	chunks, bytes, repeated, refused atomic.Uint64
	publishing                       sync.Mutex // Live takes one call at a time
	mu                               sync.Mutex
	rows                             [8][tensor.Reasons]uint64 // by outcome, reason
	twice                            map[uint32]bool           // sites that were reported to fire more than once a step
}

// New makes the pipeline of a session.
func New(o Options) *Pipeline {
	if o.ShareBytes == 0 {
		o.ShareBytes = 1 << 20
	}
	if o.Full == nil {
		o.Full = func() float64 { return 1 }
	}
	p := &Pipeline{options: o, slicer: slicer{session: o.Session}, showing: slicer{session: o.Session}, told: map[uint32]bool{}, twice: map[uint32]bool{}, endings: map[*ending]bool{}}
	if o.Rules != nil {
		p.rules = newSelector(o.Rules)
	}
	p.pool.most, p.pool.full, p.pool.work = mostWorkers(), o.Full, p.work
	p.spare.New = func() any { return newBook() }
	for lane := range p.books {
		p.books[lane] = newBook()
	}
	return p
}

// Run works until in is closed.
func (p *Pipeline) Run(in <-chan []*drain.Item) {
	for batch := range in {
		much := p.much(batch)
		last := len(batch) - 1
		for last > 0 && batch[last].Kind != drain.Captured {
			last--
		}
		ahead := 0 // items before it were shown, or will not be
		for i, item := range batch {
			if much || p.sharing[item.Lane] {
				p.weight[item.Lane] += weightOf(item)
			}
			switch {
			case item.Owner != nil:
				p.slicer.last = i == last
				p.fetched(item)
				item.Release()
			case item.Kind == drain.Closed && p.sharing[item.Lane]:
				p.shareClose(item)
			case item.Kind == drain.Opened:
				plain, on := p.rules == nil || p.rules.keepsAll(item.Step), p.goesOn(item.Lane, much)
				if !(on && plain && p.plain[item.Lane]) || p.guesses[item.Lane] {
					p.rejoin(item.Lane)
					p.plain[item.Lane] = plain
				}
				p.take(item)
				item.Release()
			case !ofSite(item):
				p.rejoin(item.Lane)
				p.take(item)
				item.Release()
			case much || p.sharing[item.Lane]:
				p.share(item)
			default:
				if p.options.Live != nil && i >= ahead && item.Kind == drain.Captured {
					ahead = p.ahead(batch, i)
				}
				p.slicer.last, p.slicer.shown = i == last, i < ahead && p.shown[i]
				p.site(&p.slicer, p.books[item.Lane], item)
				p.slicer.shown = false
				item.Release()
			}
		}
	}
	p.dismiss()
	for lane := range p.drafts { // of which nobody said anything
		p.book(p.drafts[lane])
	}
}

// judge books the drafts of a lane's last step. Only where that had some has it ended for sure: a worker may else be about to end it.
func (p *Pipeline) judge(lane int, next *drain.Step) {
	had := p.guesses[lane]
	p.guesses[lane] = next.Rows != nil && next.Rows.Drafts
	if !had {
		return
	}
	drafts := p.drafts[lane]
	p.drafts[lane] = nil
	if next.Rows != nil {
		drafts = judged(drafts, next.Rows.Rejected)
	}
	p.book(drafts)
}

// take is what concerns a lane as a whole. Nothing of its open step is on its way.
func (p *Pipeline) take(i *drain.Item) {
	switch i.Kind {
	case drain.Opened:
		p.judge(i.Lane, i.Step)
		b := p.books[i.Lane]
		b.begin(i.Step)
		if p.rules != nil {
			p.rules.opened(i.Step)
			if b.plan = p.rules.of(i.Step); b.plan != nil && i.Step.Rows != nil {
				b.late.begin(len(i.Step.Sites), b.plan.Keeps, b.plan.Document)
			}
		}
	case drain.Closed:
		if p.close(p.books[i.Lane], i) {
			p.books[i.Lane] = p.spare.Get().(*book)
		}
	case drain.Cut:
		f := fate{tensor.Lost, i.Reason, tensor.Full}
		if i.Step.Gated {
			f = fate{tensor.Dropped, tensor.RecordsFull, tensor.Full}
		}
		if p.finish(p.books[i.Lane], i, f, false) {
			p.books[i.Lane] = p.spare.Get().(*book)
		}
	case drain.Gap:
		p.gap(i)
	case drain.Mark:
		p.marked(i.Done)
	}
}

// close ends a step that its producer has closed, and reports whether its books stay open for rows that are to come.
func (p *Pipeline) close(b *book, i *drain.Item) bool {
	f := fate{tensor.Lost, tensor.NotFired, tensor.Full}
	switch {
	case i.Step.Gated:
		f = fate{tensor.Dropped, tensor.RecordsFull, tensor.Full}
	case i.Aborted:
		f = fate{tensor.Dropped, tensor.Aborted, tensor.Full}
	}
	return p.finish(b, i, f, !i.Aborted && !i.Step.Gated)
}

func (p *Pipeline) finish(b *book, i *drain.Item, rest fate, complain bool) bool {
	if len(b.offers) > 0 {
		if p.choose(b, i, rest, complain) {
			return true
		}
		p.others(b)
	}
	p.end(b, i, rest, complain)
	return false
}

// site is what concerns one site of an open step.
func (p *Pipeline) site(s *slicer, b *book, i *drain.Item) {
	switch {
	case i.Kind == drain.Offered:
		p.offered(b, i)
	case p.wait(s, b, i):
	case i.Kind == drain.Captured:
		b.selections[i.Record.Site] = i.Record.Selection
		b.accounts[i.Record.Site].repeat(i.Record.RowFirst, i.Record.RowFirst+i.Record.Rows)
		if n := i.Record.Rows - p.selected(s, b, i, true); n > 0 {
			p.again(i, n)
		}
	default:
		if n := b.accounts[i.Record.Site].repeat(i.Record.RowFirst, i.Record.RowFirst+i.Record.Rows); n > 0 {
			p.again(i, n)
		}
		p.settled(b, i)
	}
}

// settled books rows that come without payload.
func (p *Pipeline) settled(b *book, i *drain.Item) {
	r := &i.Record
	b.selections[r.Site] = r.Selection
	b.accounts[r.Site].settle(r.RowFirst, r.RowFirst+r.Rows, fate{tensor.Outcome(r.Outcome), tensor.Reason(r.Reason), tensor.Level(r.Level)},
		func(uint32, uint32) bool { return true })
}

// selected keeps the rows of a payload that the policy selects, and those that a trigger keeps. It returns how many were not settled before. look: whether triggers
// have yet to look at them.
func (p *Pipeline) selected(s *slicer, b *book, i *drain.Item, look bool) (done uint32) {
	r := &i.Record
	from, to := r.RowFirst, r.RowFirst+r.Rows
	verdicts := append(s.verdicts[:0], verdict{from: from, to: to, level: tensor.Full})
	if p.rules != nil {
		verdicts = p.rules.verdicts(verdicts[:0], b, r, from, to)
	}
	s.verdicts = verdicts
	if b.by(r.Site) != 0 && r.Level == ring.LevelFull {
		verdicts, look = p.promoted(s, b, i, verdicts, look)
	}
	for _, v := range verdicts {
		if v.level != tensor.Off {
			top := v.top
			if v.level != tensor.Stats { // nobody said how many: as they come
				top = tensor.MaxTop
			}
			done += p.keep(s, b, i, v.from, v.to, levelOf(r, v.level), top, look)
			continue
		}
		b.accounts[r.Site].settle(v.from, v.to, fate{tensor.Skipped, tensor.Policy, tensor.Off}, func(from, to uint32) bool { done += to - from; return true })
	}
	return done
}

// promoted gives the verdicts on full rows of a site where triggers keep some. A producer that evaluates them marks such rows; of one that does not, or cannot tell what
// level they have otherwise, all come in full, and are looked at here.
func (p *Pipeline) promoted(s *slicer, b *book, i *drain.Item, verdicts []verdict, look bool) ([]verdict, bool) {
	r := &i.Record
	if r.Flags&ring.RecordKept != 0 {
		for n := range verdicts {
			if !verdicts[n].unwanted {
				verdicts[n].level = tensor.Full
			}
		}
		return verdicts, look
	}
	if !slices.ContainsFunc(verdicts, func(v verdict) bool { return v.level != tensor.Full }) {
		return verdicts, look
	}
	if look {
		if chunks, err := s.cut(i.Step, r, i.Data, r.RowFirst, r.Rows); err == nil {
			p.look(b, chunks)
		}
	}
	var all []verdict
	list := i.Step.Rows.List(r.Selection, i.Step.Sites[r.Site].Space)
	for _, v := range verdicts {
		_ = spansOf(list, v.from, v.to-v.from, func(span *ring.RowSpan, first, count uint32) error {
			part := verdict{span.Row + first, span.Row + first + count, v.level, v.top, v.unwanted}
			if !v.unwanted && p.kept(b, r.Site, span.Request) {
				part.level = tensor.Full
			}
			if last := len(all) - 1; last >= 0 && all[last].level == part.level && all[last].top == part.top && all[last].unwanted == part.unwanted {
				all[last].to = part.to
			} else {
				all = append(all, part)
			}
			return nil
		})
	}
	return all, false
}

// again counts rows that their site had given before in the same step, and says so once for each site.
func (p *Pipeline) again(i *drain.Item, rows uint32) {
	p.repeated.Add(uint64(rows))
	site := i.Record.Site
	p.mu.Lock()
	told := p.twice[site]
	p.twice[site] = true
	p.mu.Unlock()
	if !told {
		p.event("warning", "repeated", fmt.Sprintf("site %q fired more than once in step %d: each row keeps what the first firing gave, and %d rows of a later one are not kept, "+
			"here and in the steps to come: the books call such rows captured(repeated). Is the module shared, or called in a loop? Give each place a hook point of its own",
			i.Step.Sites[site].Text(), i.Step.Number, rows))
	}
}

// keep slices rows of a payload and delivers them, those that were settled before apart. It returns how many were not.
func (p *Pipeline) keep(s *slicer, b *book, i *drain.Item, from, to uint32, level tensor.Level, top uint8, look bool) (done uint32) {
	r := &i.Record
	account := &b.accounts[r.Site]
	// What cannot be sliced or stored gets another fate than what can, so runs are tried before they are booked.
	var apart []settled
	account.settle(from, to, fate{tensor.Captured, tensor.ReasonNone, level}, func(from, to uint32) bool {
		done += to - from
		chunks, err := s.cut(i.Step, r, i.Data, from, to-from)
		if err != nil {
			p.refused.Add(1)
			p.event("error", "corrupt", err.Error()+"; these rows are lost(corrupt)")
			apart = append(apart, settled{from, to, fate{tensor.Lost, tensor.Corrupt, tensor.Full}})
			return false
		}
		if look { // as they came, before they are reduced
			p.look(b, chunks)
		}
		if level != tensor.Level(r.Level) || level == tensor.Stats && int(top) < topOf(r) {
			site := &i.Step.Sites[r.Site]
			for n := range chunks {
				chunks[n].Reduce(level, int(top), site.Keyed(), tensor.Fill(site.Fill))
			}
		}
		if stored, err := p.deliver(chunks, s.last, s.shown); err != nil {
			p.event("error", "store", fmt.Sprintf("step %d, site %q: %d of %d rows cannot be stored: %v; they are lost(io)", r.Step, i.Step.Sites[r.Site].Text(), to-from-stored, to-from, err))
			apart = append(apart, settled{from, from + stored, fate{tensor.Captured, tensor.ReasonNone, level}}, settled{from + stored, to, fate{tensor.Lost, tensor.IO, tensor.Full}})
			return false
		}
		return true
	})
	for _, f := range apart {
		account.settle(f.from, f.to, f.fate, func(uint32, uint32) bool { return true })
	}
	return done
}

// levelOf is the level at which rows of a record are kept, where the policy asks for one: full rows can be reduced, others are what they are.
func levelOf(r *ring.Record, asked tensor.Level) tensor.Level {
	if came := tensor.Level(r.Level); came != tensor.Full || !tensor.DType(r.DType).Real() {
		return came
	}
	return asked
}

// end closes the books of a step.
func (p *Pipeline) end(b *book, i *drain.Item, rest fate, complain bool) {
	p.ending.Lock()
	defer p.ending.Unlock()
	entries, short := b.end(p.options.Session, &p.sets, rest)
	p.book(entries)
	if len(b.drafts) > 0 {
		p.drafts[i.Lane] = append(p.drafts[i.Lane], b.drafts...)
	}
	if complain && len(short) > 0 {
		p.complain(i.Step, short)
	}
	if p.options.Closed != nil {
		p.options.Closed(i.Lane, i.Step.Number)
	}
}

// complain tells of sites that did not fire, each once a session.
func (p *Pipeline) complain(step *drain.Step, short []uint32) {
	var names []string
	for _, s := range short {
		if !p.told[s] {
			p.told[s] = true
			names = append(names, step.Sites[s].Text())
		}
	}
	if len(names) == 0 {
		return
	}
	more := ""
	if n := len(names); n > 5 {
		names, more = names[:5], fmt.Sprintf(" and %d more", n-5)
	}
	p.event("warning", "not_fired", fmt.Sprintf("step %d closed and %s%s had not captured all its rows: they are lost(not_fired). Does the model skip the module, "+
		"or was it compiled before attach?", step.Number, strings.Join(names, ", "), more))
}

func (p *Pipeline) gap(i *drain.Item) {
	const most = 1 << 31
	var entries []tensor.Entry
	for rows := i.GapRows; rows > 0; {
		n := min(rows, most)
		entries = append(entries, tensor.Entry{Key: tensor.RequestKey{Session: p.options.Session, Request: tensor.NoRequest}, Sites: []uint32{i.GapSite}, Count: uint32(n), Stride: 1,
			Step: i.GapStep, Outcome: tensor.Dropped, Reason: tensor.RecordsFull})
		rows -= n
	}
	p.book(entries)
}

func (p *Pipeline) book(entries []tensor.Entry) {
	if len(entries) == 0 {
		return
	}
	p.mu.Lock()
	for i := range entries {
		e := &entries[i]
		p.rows[e.Outcome][e.Reason] += uint64(e.Count) * uint64(len(e.Sites))
	}
	p.mu.Unlock()
	if err := p.options.Store.Book(entries); err != nil {
		p.event("error", "store", fmt.Sprintf("the books of step %d cannot be kept: %v; what they lack is booked when the store is next opened", entries[0].Step, err))
	}
}

func (p *Pipeline) event(level, code, message string) {
	if p.options.Event != nil {
		p.options.Event(level, code, message)
	}
}

// Status is what a pipeline has done.
type Status struct {
	Chunks   uint64
	Bytes    uint64 // of chunks
	Repeated uint64 // rows that a site gave again in the same step, as often as it did: not kept
	Refused  uint64 // records whose layout made no sense
	Rows     map[tensor.Outcome]map[tensor.Reason]uint64
}

// Status is a copy.
func (p *Pipeline) Status() Status {
	s := Status{Chunks: p.chunks.Load(), Bytes: p.bytes.Load(), Repeated: p.repeated.Load(), Refused: p.refused.Load(), Rows: map[tensor.Outcome]map[tensor.Reason]uint64{}}
	p.mu.Lock()
	defer p.mu.Unlock()
	for o, reasons := range p.rows {
		for r, n := range reasons {
			if n > 0 {
				if s.Rows[tensor.Outcome(o)] == nil {
					s.Rows[tensor.Outcome(o)] = map[tensor.Reason]uint64{}
				}
				s.Rows[tensor.Outcome(o)][tensor.Reason(r)] = n
			}
		}
	}
	return s
}

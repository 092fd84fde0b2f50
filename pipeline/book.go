package pipeline

import (
	"encoding/binary"
	"slices"

	"dmi/drain"
	"dmi/policy"
	"dmi/ring"
	"dmi/tensor"
)

// fate is what becomes of rows.
type fate struct {
	outcome tensor.Outcome
	reason  tensor.Reason
	level   tensor.Level
}

// settled is rows [from, to) of a site's row list with one fate.
type settled struct {
	from, to uint32
	fate
}

// account is what is settled of one site in one step: sorted, nothing twice, neighbours of one fate made one.
type account []settled

// settle books rows that are not booked yet with a fate, and calls fresh for each run of them.
func (a *account) settle(from, to uint32, f fate, fresh func(from, to uint32) bool) {
	if n := len(*a); n == 0 || (*a)[n-1].to <= from { // in order, as sites are captured
		if from < to && fresh(from, to) {
			a.push(settled{from, to, f})
		}
		return
	}
	var added []settled
	at := from
	for _, s := range *a {
		if s.to <= at {
			continue
		}
		if s.from >= to {
			break
		}
		if at < s.from && fresh(at, s.from) {
			added = append(added, settled{at, s.from, f})
		}
		at = max(at, s.to)
	}
	if at < to && fresh(at, to) {
		added = append(added, settled{at, to, f})
	}
	all := append(slices.Clone(*a), added...)
	slices.SortFunc(all, func(x, y settled) int { return int(int64(x.from) - int64(y.from)) })
	*a = (*a)[:0]
	for _, s := range all {
		a.push(s)
	}
}

// repeat tells of rows that come once more which of them are captured already, and books those as given again. It returns how many they are.
func (a *account) repeat(from, to uint32) (rows uint32) {
	if n := len(*a); n == 0 || (*a)[n-1].to <= from {
		return 0
	}
	var all account
	for _, s := range *a {
		x, y := max(s.from, from), min(s.to, to)
		if s.outcome != tensor.Captured || x >= y {
			all.push(s)
			continue
		}
		rows += y - x
		before, again, after := s, s, s
		before.to, again.from, again.to, after.from = x, x, y, y
		again.reason = tensor.Repeated
		for _, part := range [...]settled{before, again, after} {
			if part.from < part.to {
				all.push(part)
			}
		}
	}
	*a = append((*a)[:0], all...)
	return rows
}

func (a *account) push(s settled) {
	if n := len(*a); n > 0 && (*a)[n-1].to == s.from && (*a)[n-1].fate == s.fate {
		(*a)[n-1].to = s.to
		return
	}
	*a = append(*a, s)
}

// book is the accounts of a lane's open step.
type book struct {
	step     *drain.Step
	plan     *policy.Plan   // that it came under; nil: everything is kept
	drafts   []tensor.Entry // of end: guesses, whose fate the next step tells
	accounts []account
	verdicts map[rowsOf][]verdict // of the policy on the step's rows
	// by site: what order the rows of its account are in. Whoever has the site writes its own
	selections []uint16
	key        []byte
	turn       turn
	late
}

func newBook() *book {
	b := new(book)
	b.turn.left.Store(1) // its close
	return b
}

// begin starts a step, with the memory of the one before.
func (b *book) begin(step *drain.Step) {
	b.step, b.plan, b.drafts = step, nil, nil
	b.late.begin(0, nil, 0)
	if b.verdicts == nil {
		b.verdicts = map[rowsOf][]verdict{}
	}
	clear(b.verdicts)
	b.accounts = slices.Grow(b.accounts[:0], len(step.Sites))[:len(step.Sites)]
	for i := range b.accounts {
		b.accounts[i] = b.accounts[i][:0]
	}
	b.selections = slices.Grow(b.selections[:0], len(step.Sites))[:len(step.Sites)]
	clear(b.selections)
}

// group is sites of one space whose accounts are equal.
type group struct {
	space     uint8
	selection uint16
	fates     account
	sites     []uint32
}

// end settles what is still owed and gives the step's entries, those of drafts apart. rest is the fate of owed rows; silent sites that may be silent owe nothing.
// It also returns which sites, that had to, did not settle all their rows.
func (b *book) end(session uint32, sets *siteSets, rest fate) (entries []tensor.Entry, short []uint32) {
	step := b.step
	if step.Rows == nil || step.Gated {
		return b.whole(session, sets, rest), nil
	}
	groups := map[string]*group{}
	var order []*group
	var last *group
	for i := range b.accounts {
		site := &step.Sites[i]
		a := &b.accounts[i]
		rows := step.Rows.Spaces[site.Space].Count
		if !site.Optional() {
			owed := false
			a.settle(0, rows, rest, func(uint32, uint32) bool { owed = true; return true })
			if owed {
				short = append(short, uint32(i))
			}
		}
		space := site.Space
		if site.Optional() {
			space |= 0x80 // owes nothing outside its space either
		}
		selection := b.selections[i]
		if last == nil || last.space != space || last.selection != selection || !slices.Equal(last.fates, *a) {
			key := b.keyOf(space, selection, *a)
			g := groups[string(key)]
			if g == nil {
				g = &group{space: space, selection: selection, fates: *a}
				groups[string(key)] = g
				order = append(order, g)
			}
			last = g
		}
		last.sites = append(last.sites, uint32(i))
	}
	for _, g := range order {
		entries = b.groupEntries(entries, session, sets.intern(g.sites), g)
	}
	return b.cached(entries, session, sets), short
}

// cached adds the rows that the model took from its prefix cache, at every site that owes rows.
func (b *book) cached(entries []tensor.Entry, session uint32, sets *siteSets) []tensor.Entry {
	if b.step.Rows == nil || len(b.step.Rows.Cached) == 0 {
		return entries
	}
	var owing []uint32
	for i := range b.step.Sites {
		if !b.step.Sites[i].Optional() {
			owing = append(owing, uint32(i))
		}
	}
	if len(owing) == 0 {
		return entries
	}
	sites, start := sets.intern(owing), len(entries)
	for i := range b.step.Rows.Cached {
		span := &b.step.Rows.Cached[i]
		entries = b.entry(entries, start, session, sites, span, span.Position, span.Count, fate{tensor.Cached, tensor.Prefix, tensor.Full})
	}
	return entries
}

func (b *book) keyOf(space uint8, selection uint16, a account) []byte {
	k := append(b.key[:0], space, byte(selection), byte(selection>>8))
	for _, s := range a {
		k = binary.LittleEndian.AppendUint32(k, s.from)
		k = binary.LittleEndian.AppendUint32(k, s.to)
		k = append(k, byte(s.outcome), byte(s.reason), byte(s.level))
	}
	b.key = k
	return k
}

func (b *book) groupEntries(entries []tensor.Entry, session uint32, sites []uint32, g *group) []tensor.Entry {
	step := b.step
	space := tensor.Space(g.space &^ 0x80)
	list := step.Rows.List(g.selection, uint8(space))
	for _, s := range g.fates {
		start := len(entries)
		guesses := len(b.drafts)
		_ = spansOf(list, s.from, s.to-s.from, func(span *ring.RowSpan, first, count uint32) error {
			if span.Flags&ring.SpanDraft != 0 {
				b.drafts = b.entry(b.drafts, guesses, session, sites, span, span.Position+first, count, s.fate)
			} else {
				entries = b.entry(entries, start, session, sites, span, span.Position+first, count, s.fate)
			}
			return nil
		})
	}
	if space != tensor.Tokens && g.space&0x80 == 0 {
		start, guesses := len(entries), len(b.drafts)
		for _, span := range step.Rows.Outside(space) {
			f := fate{tensor.NotComputed, tensor.Engine, tensor.Full}
			if span.Flags&ring.SpanDraft != 0 {
				b.drafts = b.entry(b.drafts, guesses, session, sites, &span, span.Position, span.Count, f)
			} else {
				entries = b.entry(entries, start, session, sites, &span, span.Position, span.Count, f)
			}
		}
	}
	return entries
}

// entry adds rows of a request, to the last entry where they go on from it, at whatever stride.
func (b *book) entry(entries []tensor.Entry, start int, session uint32, sites []uint32, span *ring.RowSpan, position, count uint32, f fate) []tensor.Entry {
	if n := len(entries); n > start {
		e := &entries[n-1]
		if e.Key.Request == span.Request && e.Attempt == span.Attempt && position > e.First {
			gap := position - (e.First + (e.Count-1)*e.Stride)
			if (e.Count == 1 || gap == e.Stride) && (count == 1 || gap == 1) {
				e.Stride = gap
				e.Count += count
				return entries
			}
		}
	}
	return append(entries, tensor.Entry{Key: tensor.RequestKey{Session: session, Request: span.Request}, Sites: sites, Attempt: span.Attempt,
		First: position, Count: count, Stride: 1, Step: b.step.Number, Outcome: f.outcome, Reason: f.reason, Level: f.level, Policy: b.step.Policy})
}

// whole gives every row of every site one fate: of a step that is gated, or whose rows are not known.
func (b *book) whole(session uint32, sets *siteSets, f fate) []tensor.Entry {
	step := b.step
	var all []uint32
	for i := range step.Sites {
		if step.Gated || !step.Sites[i].Optional() {
			all = append(all, uint32(i))
		}
	}
	if len(all) == 0 || step.Tokens == 0 {
		return nil
	}
	sites := sets.intern(all)
	if step.Rows == nil {
		unknown := ring.RowSpan{Span: ring.Span{Request: tensor.NoRequest}}
		return b.entry(nil, 0, session, sites, &unknown, 0, step.Tokens, f)
	}
	var entries []tensor.Entry
	for i := range step.Rows.Spaces[ring.SpaceTokens].Spans {
		span := &step.Rows.Spaces[ring.SpaceTokens].Spans[i]
		if span.Flags&ring.SpanDraft != 0 {
			b.drafts = b.entry(b.drafts, 0, session, sites, span, span.Position, span.Count, f)
		} else {
			entries = b.entry(entries, 0, session, sites, span, span.Position, span.Count, f)
		}
	}
	return b.cached(entries, session, sets)
}

const maxSets = 4096 // interned; beyond, interning starts anew

// siteSets makes equal sets of sites one slice.
type siteSets struct {
	sets map[string][]uint32
	key  []byte
}

func (s *siteSets) intern(sites []uint32) []uint32 {
	k := s.key[:0]
	for _, v := range sites {
		k = binary.LittleEndian.AppendUint32(k, v)
	}
	s.key = k
	if have, ok := s.sets[string(k)]; ok {
		return have
	}
	if s.sets == nil || len(s.sets) >= maxSets {
		s.sets = map[string][]uint32{}
	}
	sites = slices.Clone(sites)
	s.sets[string(k)] = sites
	return sites
}

// judged gives the entries of a step's drafts, once it is known which of them were rejected: whatever else became of those, they are not owed.
func judged(drafts []tensor.Entry, rejected []ring.RowSpan) []tensor.Entry {
	if len(rejected) == 0 {
		return drafts
	}
	wrong := map[uint64][]ring.RowSpan{}
	for _, span := range rejected {
		wrong[span.Request] = append(wrong[span.Request], span)
	}
	var entries []tensor.Entry
	for _, e := range drafts {
		spans := wrong[e.Key.Request]
		is := func(i uint32) bool {
			position := e.First + i*e.Stride
			return slices.ContainsFunc(spans, func(s ring.RowSpan) bool {
				return s.Attempt == e.Attempt && position >= s.Position && position-s.Position < s.Count
			})
		}
		for i := uint32(0); i < e.Count; {
			part, rejects := e, is(i)
			part.First, part.Count = e.First+i*e.Stride, 0
			for ; i < e.Count && is(i) == rejects; i++ {
				part.Count++
			}
			if rejects {
				part.Outcome, part.Reason, part.Level = tensor.Rejected, tensor.Speculation, tensor.Full
			}
			entries = append(entries, part)
		}
	}
	return entries
}

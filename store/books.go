package store

import (
	"encoding/binary"
	"maps"
	"slices"

	"dmi/tensor"
)

// books are the entries that are not yet, or may still change, in the catalogue; totals and what was produced are of the whole store.
// Guarded by Store.mu.
type books struct {
	open     map[tensor.RequestKey]*account
	dirty    map[*line]tensor.RequestKey
	removed  map[int64]bool // lines of the catalogue that a correction took apart
	removing map[int64]bool // those that the commit under way takes out: until it has, the catalogue still tells of them
	drops    uint64         // lines that ever were
	sets     map[string]*siteSet
	setByID  map[int64]*siteSet
	newSets  []*siteSet
	totals   map[Total]uint64 // keyed with Rows == 0
	produced map[uint32]uint64
	expired  map[uint32]uint64 // of those captured, by session: no longer there
	nextLine int64
	nextSet  int64
}

// siteSet is an interned set of sites of a session.
type siteSet struct {
	id      int64
	session uint32
	sites   []uint32
	weight  uint64 // bytes of a row of each of the sites together, as weigh last looked them up
	weighed uint64 // how often it was used
}

// account is the books of a request.
type account struct {
	lines []*line
	last  map[fate]*line // what a further entry may extend
}

// fate is what entries must share to become one.
type fate struct {
	set     *siteSet
	attempt uint16
	outcome tensor.Outcome
	reason  tensor.Reason
	level   tensor.Level
	policy  uint64
	expired int64
}

// line is an entry with its place in the catalogue.
type line struct {
	id  int64
	set *siteSet
	tensor.Entry
}

func newBooks() *books {
	return &books{open: map[tensor.RequestKey]*account{}, removed: map[int64]bool{}, dirty: map[*line]tensor.RequestKey{}, sets: map[string]*siteSet{}, setByID: map[int64]*siteSet{},
		totals: map[Total]uint64{}, produced: map[uint32]uint64{}, expired: map[uint32]uint64{}, nextLine: 1, nextSet: 1}
}

func (b *books) intern(session uint32, sites []uint32) *siteSet {
	s := b.sets[setKey(session, sites)]
	if s == nil {
		s = &siteSet{id: b.nextSet, session: session, sites: slices.Clone(sites)}
		b.know(s)
		b.newSets = append(b.newSets, s)
	}
	return s
}

func (b *books) know(s *siteSet) {
	b.sets[setKey(s.session, s.sites)] = s
	b.setByID[s.id] = s
	b.nextSet = max(b.nextSet, s.id+1)
}

func setKey(session uint32, sites []uint32) string {
	return string(appendSites(binary.AppendUvarint(nil, uint64(session)), sites))
}

func (b *books) account(key tensor.RequestKey) *account {
	a := b.open[key]
	if a == nil {
		a = &account{last: map[fate]*line{}}
		b.open[key] = a
	}
	return a
}

// add books an entry, extending one before it where they are of a kind.
func (b *books) add(e tensor.Entry) {
	b.totals[totalOf(&e)] += rowsOf(&e)
	if e.Expired != 0 {
		b.expired[e.Key.Session] += rowsOf(&e)
	}
	a := b.account(e.Key)
	set := b.intern(e.Key.Session, e.Sites)
	f := fate{set, e.Attempt, e.Outcome, e.Reason, e.Level, e.Policy, e.Expired}
	l := a.last[f]
	if l == nil || !l.extend(&e) {
		l = &line{id: b.nextLine, set: set, Entry: e}
		l.Sites = set.sites
		b.nextLine++
		a.lines = append(a.lines, l)
		a.last[f] = l
	}
	b.dirty[l] = e.Key
}

// extend takes in an entry that goes on where l ends.
func (l *line) extend(e *tensor.Entry) bool {
	if l.Key.Request == tensor.NoRequest {
		if uint64(l.Count)+uint64(e.Count) > 1<<31 { // positions of unknown requests mean nothing: only their number counts
			return false
		}
		l.First, l.Stride = 0, 1
		l.Count += e.Count
		return true
	}
	last := uint64(l.First) + uint64(l.Count-1)*uint64(l.Stride)
	if uint64(e.First) <= last {
		return false
	}
	gap := uint64(e.First) - last
	stride := uint64(l.Stride)
	if l.Count == 1 {
		stride = gap
	}
	if gap != stride || (e.Count > 1 && uint64(e.Stride) != stride) {
		return false
	}
	l.Stride = uint32(stride)
	l.Count += e.Count
	return true
}

// correct replaces what was booked of e's rows, in lines that the caller has made sure are all in memory.
func (b *books) correct(e tensor.Entry) {
	a := b.account(e.Key)
	var kept []*line
	var pieces []tensor.Entry
	for _, l := range a.lines {
		common := intersect(l.Sites, e.Sites)
		if l.Attempt != e.Attempt || len(common) == 0 || !touches(&l.Entry, &e) {
			kept = append(kept, l)
			continue
		}
		b.drop(l)
		if rest := subtract(l.Sites, e.Sites); len(rest) > 0 {
			p := l.Entry
			p.Sites = rest
			pieces = append(pieces, p)
		}
		for _, run := range without(&l.Entry, &e) {
			run.Sites = common
			pieces = append(pieces, run)
		}
	}
	a.lines = kept
	a.last = map[fate]*line{}
	for _, p := range pieces {
		b.add(p)
	}
	b.add(e)
}

// expire says of e's rows, where they are booked captured, that they are gone since a time. Their outcome stays. All lines are in memory.
func (b *books) expire(e tensor.Entry) {
	a := b.account(e.Key)
	var kept []*line
	var pieces []tensor.Entry
	for _, l := range a.lines {
		common := intersect(l.Sites, e.Sites)
		if l.Attempt != e.Attempt || l.Outcome != tensor.Captured || l.Expired != 0 || len(common) == 0 || !touches(&l.Entry, &e) {
			kept = append(kept, l)
			continue
		}
		b.drop(l)
		if rest := subtract(l.Sites, e.Sites); len(rest) > 0 {
			p := l.Entry
			p.Sites = rest
			pieces = append(pieces, p)
		}
		for _, run := range without(&l.Entry, &e) {
			run.Sites = common
			pieces = append(pieces, run)
		}
		for _, run := range within(&l.Entry, &e) {
			run.Sites, run.Expired = common, e.Expired
			pieces = append(pieces, run)
		}
	}
	a.lines = kept
	a.last = map[fate]*line{}
	for _, p := range pieces {
		b.add(p)
	}
}

// drop takes a line off the books, which its rows come back to in others.
func (b *books) drop(l *line) {
	b.totals[totalOf(&l.Entry)] -= rowsOf(&l.Entry)
	if l.Expired != 0 {
		b.expired[l.Key.Session] -= rowsOf(&l.Entry)
	}
	delete(b.dirty, l)
	b.removed[l.id] = true
	b.drops++
}

// stale are lines that the catalogue may have and that do not hold any more.
func (b *books) stale() map[int64]bool {
	ids := make(map[int64]bool, len(b.removed)+len(b.removing))
	maps.Copy(ids, b.removed)
	maps.Copy(ids, b.removing)
	return ids
}

// gone reports whether a line that the catalogue may have is one of them.
func (b *books) gone(id int64) bool { return b.removed[id] || b.removing[id] }

// missing calls each for each run of e's rows, at each of its sites, that no line books.
func (a *account) missing(e tensor.Entry, each func(site uint32, first, count uint32)) {
	for _, site := range e.Sites {
		rows := make([]bool, e.Count)
		for _, l := range a.lines {
			if _, found := slices.BinarySearch(l.Sites, site); found && l.Attempt == e.Attempt {
				mark(rows, e.First, &l.Entry)
			}
		}
		runsOf(rows, false, func(first, count uint32) { each(site, e.First+first, count) })
	}
}

// mark sets the rows, positions from first on, that an entry names.
func mark(rows []bool, first uint32, e *tensor.Entry) {
	for i := range e.Count {
		if p := uint64(e.First) + uint64(i)*uint64(e.Stride); p >= uint64(first) && p < uint64(first)+uint64(len(rows)) {
			rows[p-uint64(first)] = true
		}
	}
}

func runsOf(rows []bool, value bool, each func(first, count uint32)) {
	for i := 0; i < len(rows); {
		if rows[i] != value {
			i++
			continue
		}
		from := i
		for i < len(rows) && rows[i] == value {
			i++
		}
		each(uint32(from), uint32(i-from))
	}
}

func totalOf(e *tensor.Entry) Total {
	return Total{Session: e.Key.Session, Outcome: e.Outcome, Reason: e.Reason, Level: e.Level}
}

func rowsOf(e *tensor.Entry) uint64 { return uint64(e.Count) * uint64(len(e.Sites)) }

func touches(l, e *tensor.Entry) bool {
	for i := range l.Count {
		if contains(e, uint64(l.First)+uint64(i)*uint64(l.Stride)) {
			return true
		}
	}
	return false
}

func contains(e *tensor.Entry, position uint64) bool {
	if position < uint64(e.First) {
		return false
	}
	d := position - uint64(e.First)
	return d%uint64(e.Stride) == 0 && d/uint64(e.Stride) < uint64(e.Count)
}

// without gives l's rows that e does not name, as runs.
func without(l, e *tensor.Entry) []tensor.Entry { return named(l, e, false) }

// within gives l's rows that e names, as runs.
func within(l, e *tensor.Entry) []tensor.Entry { return named(l, e, true) }

func named(l, e *tensor.Entry, is bool) []tensor.Entry {
	rows := make([]bool, l.Count)
	for i := range rows {
		rows[i] = contains(e, uint64(l.First)+uint64(i)*uint64(l.Stride))
	}
	var runs []tensor.Entry
	runsOf(rows, is, func(first, count uint32) {
		p := *l
		p.First, p.Count = l.First+first*l.Stride, count
		runs = append(runs, p)
	})
	return runs
}

func intersect(a, b []uint32) []uint32 {
	var out []uint32
	for _, v := range a {
		if _, found := slices.BinarySearch(b, v); found {
			out = append(out, v)
		}
	}
	return out
}

func subtract(a, b []uint32) []uint32 {
	var out []uint32
	for _, v := range a {
		if _, found := slices.BinarySearch(b, v); !found {
			out = append(out, v)
		}
	}
	return out
}

// sum is the books as Books returns them.
func (b *books) sum() Totals {
	t := Totals{Sessions: maps.Clone(b.produced), Expired: maps.Clone(b.expired)}
	for _, p := range b.produced {
		t.Produced += p
	}
	for k, rows := range b.totals {
		if rows > 0 {
			k.Rows = rows
			t.Lines = append(t.Lines, k)
		}
	}
	slices.SortFunc(t.Lines, func(a, b Total) int {
		return slices.Compare([]int{int(a.Session), int(a.Outcome), int(a.Reason), int(a.Level)}, []int{int(b.Session), int(b.Outcome), int(b.Reason), int(b.Level)})
	})
	return t
}

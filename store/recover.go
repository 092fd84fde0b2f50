package store

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"dmi/store/segment"
	"dmi/tensor"
)

// recover brings the store to where its manifest and segments say it is, whatever ended the last engine: the catalogue is read, the manifest from its
// checkpoint on replayed, unsealed segments followed to their last whole batch. Then every row that was produced gets a fate: captured if it is in a
// segment, lost(engine_exit) if not. write: correct the files too. alone: no engine is at work on them.
func (s *Store) recover(write, alone bool) error {
	doing := "recover " + s.dir
	cp, err := s.loadCatalogue()
	if err != nil { // all that is in it can be had from the rest
		s.notice("catalogue.sqlite", -1, "it cannot be read: %v", err)
		if cp, err = s.startOver(write, err); err != nil {
			return explain(doing, err)
		}
	}
	dir := path.Join(s.dir, "manifest")
	files, err := manifestFiles(s.fs, dir)
	if err != nil {
		return explain(doing, err)
	}
	s.clean = cp.closed != 0 && len(files) > 0
	if s.clean {
		last := files[len(files)-1]
		size, err := s.fs.Stat(manifestName(dir, min(last, cp.applied.file)))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return explain(doing, err)
		}
		if last < cp.applied.file || size != cp.closed {
			s.notice(manifestName("manifest", last), -1, "the store was closed with its manifest ending at %d of file %d; now it ends at %d of file %d", cp.closed,
				cp.applied.file, size, min(last, cp.applied.file))
		}
		s.clean = last <= cp.applied.file // else an engine has opened it since, and was killed before the catalogue knew
	}
	if s.ahead(cp, files) {
		s.notice("catalogue.sqlite", -1, "it tells of more than the manifest does: manifest was lost, or one of them is of another time")
		if cp, err = s.startOver(write, errors.New("it tells of more than the manifest does")); err != nil {
			return explain(doing, err)
		}
	}
	s.nextSegment = max(s.nextSegment, cp.next)
	s.fresh = cp.applied == position{}
	if write {
		if err := removeUnfinished(s.fs, dir); err != nil {
			return explain(doing, err)
		}
	}
	if err := s.expect(files); err != nil {
		return explain(doing, err)
	}
	s.flight.detailed = true
	s.flight.synced = syncPoint{cp.segment, cp.end, cp.low}
	var tail uint64
	next := uint64(1)
	for _, n := range files {
		next = n + 1
		size, err := s.fs.Stat(manifestName(dir, n))
		if err != nil {
			return explain(doing, err)
		}
		if write {
			tail += uint64(size)
		}
		if n < cp.low.file {
			continue
		}
		from := int64(0)
		if n == cp.low.file {
			from = cp.low.offset
		}
		end, err := readManifest(s.fs, dir, s.id, n, from, func(at position, kind frameKind, payload []byte) error {
			s.came(manifestName("manifest", n), frameHeader+int64(len(payload)))
			return s.replay(at, kind, payload, !at.before(cp.applied))
		})
		s.rebuilt.ManifestFiles++
		s.logEnd.Store(&position{n, end})
		if errors.Is(err, errTorn) {
			err = s.torn(dir, n, end, n == files[len(files)-1], write, err)
			if end == 0 && n > cp.applied.file { // it never held a frame and is removed: its number is free, and skipped would look like a loss
				next = n
			}
		}
		if err != nil {
			return explain(doing, err)
		}
	}
	if err := s.findSegments(write); err != nil {
		return explain(doing, err)
	}
	if write {
		s.manifest = &manifest{fs: s.fs, dir: dir, store: s.id, limit: int64(s.opt.ManifestMiB) << 20}
		s.manifest.size.Store(tail)
		if err := s.manifest.begin(next); err != nil {
			return explain(doing+": begin a manifest file", err)
		}
		s.logMoved()
	}
	if alone {
		if err := s.settle(write); err != nil {
			return explain(doing, err)
		}
	}
	s.unsettled = !alone
	s.flight = newFlight()
	return nil
}

// ahead reports whether the catalogue tells of manifest that is not there: it is of another time, and of no use.
func (s *Store) ahead(cp checkpoint, files []uint64) bool {
	if cp.applied == (position{}) {
		return false
	}
	if !slices.Contains(files, cp.applied.file) {
		return true
	}
	size, err := s.fs.Stat(manifestName(path.Join(s.dir, "manifest"), cp.applied.file))
	return err != nil || size < cp.applied.offset
}

// startOver empties the catalogue.
func (s *Store) startOver(write bool, why error) (checkpoint, error) {
	fresh := newStore(s.dir, s.opt)
	s.sessions, s.byID, s.lanes, s.runs, s.requests, s.books, s.buffer, s.sealed, s.dirty = fresh.sessions, fresh.byID, fresh.lanes, fresh.runs, fresh.requests, fresh.books,
		fresh.buffer, fresh.sealed, fresh.dirty
	s.nextSeq = 0
	s.cat.close()
	var err error
	if write {
		s.cat, err = s.newCatalogue(s.cataloguePath(), why)
	} else {
		s.cat, err = memoryCatalogue()
	}
	return checkpoint{}, err
}

// notice keeps, for Verify, what is wrong and stands in nobody's way.
func (s *Store) notice(file string, offset int64, format string, args ...any) {
	p := Problem{file, offset, fmt.Sprintf(format, args...)}
	s.noticed = append(s.noticed, p)
	s.opt.Log("error", "damaged", fmt.Sprintf("%s: %s", file, p.What))
}

// torn deals with the end of a manifest file that a crash cut through.
func (s *Store) torn(dir string, number uint64, end int64, last, write bool, why error) error {
	name := manifestName(dir, number)
	if !last || end == 0 {
		if end == 0 && last { // not even its header: it never held a frame
			if write {
				return s.fs.Remove(name)
			}
			return nil
		}
		s.notice(manifestName("manifest", number), end, "damaged; what it told after that is not known: %v", why)
		return nil
	}
	if !write {
		return nil
	}
	f, err := s.fs.Open(name, true)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(end), f.Sync(), f.Close())
}

// segmentFiles lists the store's segments.
func (s *Store) segmentFiles() (open, sealed []uint64, err error) {
	names, err := s.fs.ReadDir(path.Join(s.dir, "segments"))
	if err != nil {
		return nil, nil, err
	}
	s.mu.Lock()
	gone := maps.Clone(s.gone)
	s.mu.Unlock()
	known := func(number uint64) bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		_, is := s.sealed[number]
		return is || s.made[number]
	}
	for _, n := range names {
		digits, end, _ := strings.Cut(n, ".")
		number, err := strconv.ParseUint(digits, 10, 63)
		switch {
		case err != nil:
		case end == "open":
			open = append(open, number)
		case end == "safetensors" && !gone[number]:
			sealed = append(sealed, number)
		case end == "made" && known(number): // and has not got its name yet
			sealed = append(sealed, number)
		}
	}
	slices.Sort(open)
	slices.Sort(sealed)
	sealed = slices.Compact(sealed)
	return open, sealed, nil
}

// findSegments takes in segments that the catalogue does not know.
func (s *Store) findSegments(write bool) error {
	if write {
		if err := errors.Join(s.settleFiles(), s.removeUnmade()); err != nil {
			return err
		}
	}
	open, sealed, err := s.segmentFiles()
	if err != nil {
		return err
	}
	for _, n := range sealed {
		s.nextSegment = max(s.nextSegment, n+1)
		if _, known := s.sealed[n]; known {
			continue
		}
		if err := s.takeSealed(n); err != nil {
			return err
		}
	}
	for n := range s.sealed {
		s.nextSegment = max(s.nextSegment, n+1)
		if _, found := slices.BinarySearch(sealed, n); !found {
			s.notice(s.segmentPath(n, true), -1, "the catalogue knows this segment, and it is not there")
		}
	}
	for _, n := range open {
		s.nextSegment = max(s.nextSegment, n+1)
		if err := s.takeOpen(n, write); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) takeSealed(n uint64) error {
	name := s.sealedPath(n)
	g, chunks, err := s.contents(name)
	s.came(name, g.bytes)
	if errors.Is(err, segment.ErrEmpty) {
		s.notice(name, -1, "not a segment of this store, or damaged at its start; it is left alone")
		return nil
	}
	if err != nil {
		return err
	}
	g.number = n
	s.addSealed(g)
	s.rebuilt.Segments++
	s.rebuilt.Chunks += uint64(g.chunks)
	if s.fresh {
		s.counted(chunks)
	}
	return nil
}

func (s *Store) takeOpen(n uint64, write bool) error {
	name := s.segmentPath(n, false)
	f, err := s.fs.Open(name, false)
	if err != nil {
		return err
	}
	defer f.Close()
	c, err := segment.Scan(f)
	if errors.Is(err, segment.ErrEmpty) {
		if write {
			return s.fs.Remove(name)
		}
		return nil
	}
	if err != nil {
		return err
	}
	durable := int64(0)
	if p := s.flight.synced; n < p.segment {
		durable = c.End
	} else if n == p.segment {
		durable = p.end
	}
	if c.End < durable {
		s.notice(name, c.End, "it was durable up to %d, and can be read up to here", durable)
	}
	end, err := c.Intact(f, durable)
	if err != nil {
		return err
	}
	c.Cut(end)
	o := &openSegment{number: n, path: name, end: end, created: c.Identity.Created, chunks: map[tensor.RequestKey][]*segment.Chunk{}, count: len(c.Chunks)}
	for i := range c.Chunks {
		k := &c.Chunks[i]
		o.chunks[k.Key] = append(o.chunks[k.Key], k)
	}
	s.open = append(s.open, o)
	s.came(name, end)
	s.rebuilt.Segments++
	s.rebuilt.Chunks += uint64(o.count)
	if s.fresh {
		s.counted(c.Chunks)
	}
	return nil
}

// settle gives every row its fate.
func (s *Store) settle(write bool) error {
	book := func(kind frameKind, entries []tensor.Entry) error {
		if len(entries) == 0 {
			return nil
		}
		for _, e := range entries {
			if e.Outcome == tensor.Lost {
				s.metrics.RecoveredLost += rowsOf(&e)
			}
		}
		if write {
			if _, err := s.manifest.append(kind, encodeEntries(entries)); err != nil {
				return err
			}
			s.logMoved()
		} else if kind != frameCorrect {
			for _, e := range entries {
				s.settledHere[e.Key.Session] += rowsOf(&e)
				if kind == frameAdopt {
					s.adoptedHere[e.Key.Session] += rowsOf(&e)
				}
			}
		}
		for _, e := range entries {
			if err := s.loadAccount(e.Key); err != nil {
				return err
			}
		}
		switch kind {
		case frameCorrect:
			s.applyCorrect(entries)
		case frameAdopt:
			s.applyAdopt(entries)
		default:
			for _, e := range entries {
				s.enter(e)
			}
		}
		return nil
	}
	// What is in segments does not change meanwhile, and the rows of a request come up many times.
	known := map[tensor.RequestKey]map[uint32][]ChunkRef{}
	present := func(key tensor.RequestKey) (map[uint32][]ChunkRef, error) {
		if there := known[key]; there != nil {
			return there, nil
		}
		there := map[uint32][]ChunkRef{}
		known[key] = there
		return there, s.gather(key, nil, func(r ChunkRef) { there[r.Site] = append(there[r.Site], r) })
	}
	if err := s.settleCaptured(present, book); err != nil {
		return err
	}
	if err := s.settleProduced(present, book); err != nil {
		return err
	}
	if err := s.adoptOrphans(book); err != nil {
		return err
	}
	if n := s.metrics.RecoveredLost; n > 0 && write {
		s.opt.Log("warning", "engine_exit", fmt.Sprintf("the last engine ended without closing the store: %d rows were on their way and are booked lost(engine_exit)", n))
	}
	for key := range s.books.open {
		s.finished = append(s.finished, key) // nothing more will come of them but through their sessions
	}
	s.oldest = time.Time{}
	return nil
}

type (
	booker func(frameKind, []tensor.Entry) error
	finder func(tensor.RequestKey) (map[uint32][]ChunkRef, error) // a request's chunks in segments, by site
)

const mostCorrected = 4096 // entries in one frame

// settleCaptured corrects what was booked captured and did not reach a segment.
func (s *Store) settleCaptured(present finder, book booker) error {
	for _, key := range slices.SortedFunc(maps.Keys(s.flight.captured), tensor.RequestKey.Compare) {
		there, err := present(key)
		if err != nil {
			return err
		}
		var entries []tensor.Entry
		for _, c := range s.flight.captured[key] {
			entries = append(entries, c.lost(there)...)
		}
		for some := range slices.Chunk(entries, mostCorrected) {
			if err := book(frameCorrect, some); err != nil {
				return err
			}
		}
	}
	return nil
}

// lost gives what of a booking is in no chunk of its request, as rows that were lost.
func (c booking) lost(there map[uint32][]ChunkRef) []tensor.Entry {
	var lost siteRuns
	for _, site := range c.Sites {
		refs := there[site]
		missing := make([]bool, c.Count)
		for i := range missing {
			p := uint64(c.First) + uint64(i)*uint64(c.Stride)
			missing[i] = !slices.ContainsFunc(refs, func(r ChunkRef) bool {
				return r.Attempt == c.Attempt && p >= uint64(r.First) && p < uint64(r.First)+uint64(r.Rows)
			})
		}
		runsOf(missing, true, func(first, count uint32) { lost.add(site, c.First+first*c.Stride, count) })
	}
	var entries []tensor.Entry
	lost.each(func(sites []uint32, first, count uint32) {
		e := c.Entry
		e.Sites, e.First, e.Count = sites, first, count
		e.Outcome, e.Reason = tensor.Lost, tensor.EngineExit
		entries = append(entries, e)
	})
	return entries
}

// settleProduced books rows that a step produced and nobody booked.
func (s *Store) settleProduced(present finder, book booker) error {
	keys := make([]stepKey, 0, len(s.flight.steps))
	for k := range s.flight.steps {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b stepKey) int { return cmp.Or(cmp.Compare(a.session, b.session), cmp.Compare(a.step, b.step)) })
	for _, k := range keys {
		f := s.flight.steps[k]
		left := f.rows
		for _, span := range f.spans {
			e := tensor.Entry{Key: tensor.RequestKey{Session: k.session, Request: span.request}, Sites: f.required, Attempt: span.attempt, First: span.first,
				Count: span.count, Stride: 1, Step: k.step}
			entries, err := s.fates(e, present)
			if err != nil {
				return err
			}
			for _, e := range entries {
				left -= int64(rowsOf(&e))
			}
			if err := book(frameBook, entries); err != nil {
				return err
			}
		}
		if err := s.settleLoose(k, f, left, book); err != nil {
			return err
		}
	}
	return nil
}

// settleLoose books rows of a step that no request is known for.
func (s *Store) settleLoose(k stepKey, f *inFlight, left int64, book booker) error {
	if left <= 0 || (len(f.spans) > 0 && f.loose == 0) {
		return nil
	}
	loose := func(sites []uint32, count int64) tensor.Entry {
		return tensor.Entry{Key: tensor.RequestKey{Session: k.session, Request: tensor.NoRequest}, Sites: sites, Count: uint32(count), Stride: 1, Step: k.step,
			Outcome: tensor.Lost, Reason: tensor.EngineExit}
	}
	var entries []tensor.Entry
	if n := int64(len(f.required)); n > 0 && left >= n && f.loose == 0 {
		entries = append(entries, loose(f.required, left/n))
		left %= n
	}
	for left > 0 { // how a GAP's rows divide among sites nobody knows: they go on the books of the first
		n := min(left, 1<<31)
		entries = append(entries, loose([]uint32{0}, n))
		left -= n
	}
	return book(frameBook, entries)
}

// fates are entries for the rows of e that are not on the books: captured if they are in a segment, else lost.
func (s *Store) fates(e tensor.Entry, present finder) ([]tensor.Entry, error) {
	if err := s.loadAccount(e.Key); err != nil {
		return nil, err
	}
	there, err := present(e.Key)
	if err != nil {
		return nil, err
	}
	var lost siteRuns
	var entries []tensor.Entry
	s.books.account(e.Key).missing(e, func(site, first, count uint32) {
		rows := make([]bool, count)
		for _, r := range there[site] {
			a, b := max(r.First, first), min(uint64(r.First)+uint64(r.Rows), uint64(first)+uint64(count))
			if r.Attempt != e.Attempt || uint64(a) >= b {
				continue
			}
			runsOf(rows[a-first:b-uint64(first)], false, func(from, n uint32) {
				got := e
				got.Sites, got.First, got.Count = []uint32{site}, a+from, n
				got.Outcome, got.Level, got.Policy = tensor.Captured, r.Level, r.Policy
				entries = append(entries, got)
			})
			for i := uint64(a); i < b; i++ {
				rows[i-uint64(first)] = true
			}
		}
		runsOf(rows, false, func(from, n uint32) { lost.add(site, first+from, n) })
	})
	lost.each(func(sites []uint32, first, count uint32) {
		l := e
		l.Sites, l.First, l.Count = sites, first, count
		l.Outcome, l.Reason = tensor.Lost, tensor.EngineExit
		entries = append(entries, l)
	})
	return entries, nil
}

// adoptOrphans books rows that are in a segment though the manifest does not tell of them: a power loss can take the one and leave the other.
func (s *Store) adoptOrphans(book booker) error {
	after := s.flight.synced
	var chunks []*segment.Chunk
	for _, o := range s.open {
		for _, list := range o.chunks {
			for _, c := range list {
				if o.number > after.segment || (o.number == after.segment && c.Offset >= after.end) {
					chunks = append(chunks, c)
				}
			}
		}
	}
	for _, g := range s.pending {
		if g.number < after.segment {
			continue
		}
		for _, group := range g.groups {
			list, err := s.chunksOf(g.number, group)
			if err != nil {
				return err
			}
			for _, c := range list {
				if g.number > after.segment || c.Offset >= after.end {
					chunks = append(chunks, c)
				}
			}
		}
	}
	slices.SortFunc(chunks, func(a, b *segment.Chunk) int { return a.Compare(b) })
	var loaded tensor.RequestKey // whose chunks follow each other: to look its books up for each took most of a start after a kill
	for i, c := range chunks {
		if s.sessions[c.Key.Session] == nil {
			s.opt.Log("error", "session_unknown", fmt.Sprintf("a segment holds rows of session %d, of which the manifest knows nothing", c.Key.Session))
			continue
		}
		e := tensor.Entry{Key: c.Key, Sites: []uint32{c.Site}, Attempt: c.Attempt, First: c.First, Count: c.Rows, Stride: 1, Step: c.Step, Outcome: tensor.Captured,
			Level: c.Level, Policy: c.Policy}
		if i == 0 || c.Key != loaded {
			if err := s.loadAccount(c.Key); err != nil {
				return err
			}
			loaded = c.Key
		}
		var entries []tensor.Entry
		s.books.account(c.Key).missing(e, func(_, first, count uint32) {
			found := e
			found.First, found.Count = first, count
			entries = append(entries, found)
		})
		if err := book(frameAdopt, entries); err != nil {
			return err
		}
	}
	return nil
}

// siteRuns gathers runs of rows that are the same at several sites.
type siteRuns struct {
	runs  [][2]uint32
	sites map[[2]uint32][]uint32
}

func (r *siteRuns) add(site, first, count uint32) {
	k := [2]uint32{first, count}
	if r.sites == nil {
		r.sites = map[[2]uint32][]uint32{}
	}
	if r.sites[k] == nil {
		r.runs = append(r.runs, k)
	}
	r.sites[k] = append(r.sites[k], site)
}

func (r *siteRuns) each(f func(sites []uint32, first, count uint32)) {
	for _, k := range r.runs {
		slices.Sort(r.sites[k])
		f(r.sites[k], k[0], k[1])
	}
}

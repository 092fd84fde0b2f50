package store

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"dmi/internal/vfs"
	"dmi/store/segment"
	"dmi/tensor"
)

// Store is a directory of captured tensors. Its methods are safe for concurrent use.
//
// Locks, in the order they are taken: rewriting, log, mu, then those of the buffer, which are all that rows take to come in. What writes files without log and mu is the
// one goroutine of write.go.
type Store struct {
	dir      string
	id       string
	opt      Options
	fs       vfs.FS
	ongoing  *ongoing
	readOnly bool
	lock     vfs.Closer
	cat      *catalogue
	cache    *chunkCache
	way      way

	log      sync.Mutex // serialises the manifest's frames with taking them in
	manifest *manifest

	mu           sync.Mutex
	room         *sync.Cond               // AppendChunks waits on it for the buffer to shrink
	logEnd       atomic.Pointer[position] // of the manifest; changed with mu held
	sessions     map[uint32]*sessionState
	byID         map[string]uint32
	lanes        map[laneKey]uint64 // records in the manifest
	runs         map[string]*runState
	requests     map[tensor.RequestKey]*requestState // not yet, or perhaps not finally, in the catalogue
	finished     []tensor.RequestKey                 // to be forgotten once they are
	books        *books
	marks        marks
	flight       *flight
	buffer       *buffer
	open         []*openSegment // not sealed; the last may be being written
	pending      []sealedSegment
	sealed       map[uint64]sealedSegment
	dirty        dirty
	nextSeq      int64 // of runs and requests
	failure      error // why writing does not succeed at present
	failing      time.Time
	closed       atomic.Bool // set with mu held
	nextSegment  uint64
	beginning    uint64          // number of a segment whose file is being made, or waits to be the current one; 0: none
	gone         map[uint64]bool // segments that the catalogue may still know
	newGone      []goneSegment   // that it has to forget
	replacements []replacement   // whose files may not have their final names
	generation   uint64          // counts replacements
	oldest       time.Time       // of what is in files, not durable, and not in the sync under way; zero: all is
	oldestInSync time.Time       // of what the sync under way makes durable, if it succeeds; zero: none
	metrics      Metrics

	// Of a store opened for reading, unchanging: rows that Open had to settle without writing it down, and that it could not, because
	// an engine was at work.
	settledHere map[uint32]uint64
	adoptedHere map[uint32]uint64
	made        map[uint64]bool // and Open: segments that replacements in the manifest name, which the catalogue may not know
	unsettled   bool
	clean       bool      // the last engine closed it in order
	noticed     []Problem // while opening it
	fresh       bool      // there was no catalogue: all comes from manifest and segments
	rebuilding  Progress  // Repair's
	rebuilt     Report

	// Of the writing goroutine, and of Open before it starts.
	current  *openSegment
	sealing  *openSegment      // by a goroutine of its own, which answers on sealedOne
	upcoming chan *openSegment // gives the next segment, or nil where it could not be made; nil: none is being made
	syncing  bool              // likewise, on synced
	lastSync time.Time
	unsynced int64 // bytes
	retry    time.Time
	failed   atomic.Bool // a write did not succeed; found out before the Writer's owner asks

	wake      chan struct{}
	barriers  chan *barrier
	synced    chan error
	sealedOne chan error
	stop      chan struct{}
	stopped   chan struct{}

	rewriting sync.Mutex // one at a time replaces segments; taken before log
	tidied    chan struct{}
	watched   chan struct{}
	spared    map[uint64]bool // damaged segments that compaction leaves; the holder's of rewriting
	retained  struct {
		bytes uint64
		age   time.Duration
	} // what Retain said; under mu
	kept     map[uint64]bool // those that retention leaves, because nobody can tell what is in them; likewise
	urgent   atomic.Int32    // deletions that wait for rewriting
	arrivals atomic.Uint64   // steps and chunks that came: what idle compaction makes way for
}

type sessionState struct {
	tensor.Session
	sites    map[uint32]tensor.Site
	optional []uint32              // ascending
	totals   map[uint32]*siteTotal // what they point to is guarded by the lock of the site's shard of the buffer
	busy     bool                  // rows of it came since the store was opened: more may
}

type siteTotal struct {
	SiteTotal
	dirty bool // the next commit is going to be told of it
}

type laneKey struct {
	session uint32
	lane    int
}

type runState struct {
	tensor.Run
	seq int64
}

type requestState struct {
	tensor.Request
	seq int64
}

// dirty is what the next commit has to write, apart from the books' own.
type dirty struct {
	sessions map[uint32]bool
	sites    map[streamKeyOfSite]bool
	totals   map[streamKeyOfSite]bool
	lanes    map[laneKey]bool
	runs     map[string]bool
	requests map[tensor.RequestKey]bool
	produced map[uint32]bool
	sums     map[Total]bool
	expired  map[uint32]bool
}

type streamKeyOfSite struct{ session, site uint32 }

func newDirty() dirty {
	return dirty{map[uint32]bool{}, map[streamKeyOfSite]bool{}, map[streamKeyOfSite]bool{}, map[laneKey]bool{}, map[string]bool{}, map[tensor.RequestKey]bool{},
		map[uint32]bool{}, map[Total]bool{}, map[uint32]bool{}}
}

// openSegment is a segment that is not sealed, with what is in it so far.
type openSegment struct {
	number  uint64
	path    string
	writer  *segment.Writer // the writing goroutine's, or the sealing one's; nil if another process made it
	end     int64           // of its last whole batch
	created int64
	chunks  map[tensor.RequestKey][]*segment.Chunk
	count   int
	busy    time.Duration // of writer.Busy, already counted
	active  bool          // more may be written. Guarded by Store.mu
}

type sealedSegment struct {
	number     uint64
	bytes      int64 // of the file
	data       int64 // where its chunks begin
	chunks     int
	rows       uint64
	chunkBytes uint64
	created    int64
	groups     []segment.Group
}

// Dir is the store's directory, ID its name for itself.
func (s *Store) Dir() string { return s.dir }
func (s *Store) ID() string  { return s.id }

// record appends a frame and, if that succeeds, takes it in.
func (s *Store) record(doing string, kind frameKind, payload []byte, apply func(position)) error {
	return s.recordAfter(nil, doing, kind, payload, apply)
}

// recordAfter does the same once prepare, with log held, has succeeded.
func (s *Store) recordAfter(prepare func() error, doing string, kind frameKind, payload []byte, apply func(position)) error {
	if s.readOnly {
		return fmt.Errorf("store: %s: opened for reading only", doing)
	}
	s.log.Lock()
	defer s.log.Unlock()
	if s.closed.Load() {
		return fmt.Errorf("store: %s: %w", doing, ErrClosed)
	}
	if prepare != nil {
		if err := prepare(); err != nil {
			if errors.Is(err, ErrForeign) {
				return fmt.Errorf("store: %s: another session began it: %w", doing, err)
			}
			return explain(doing+": read the catalogue", err)
		}
	}
	at, err := s.manifest.append(kind, payload)
	if err != nil {
		err = explain(doing+": write the manifest in "+s.manifest.dir, err)
		s.fail(err)
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.logMoved()
	if s.oldest.IsZero() {
		s.oldest = time.Now()
	}
	apply(at)
	return nil
}

// logMoved takes note of where the manifest ends. With log and mu held.
func (s *Store) logMoved() {
	end := s.manifest.position()
	s.logEnd.Store(&end)
}

// fail notes that writing does not succeed, once per failure.
func (s *Store) fail(err error) {
	s.mu.Lock()
	first := s.failure == nil
	if first {
		s.failing = time.Now()
		s.metrics.Failures++
	}
	s.failure = err
	s.room.Broadcast()
	s.mu.Unlock()
	if first {
		s.opt.Log("error", "store_write", err.Error())
	}
}

func (s *Store) recovered() {
	s.mu.Lock()
	was := s.failure
	s.failure = nil
	s.mu.Unlock()
	if was != nil {
		s.opt.Log("info", "store_write", "writing succeeds again")
	}
}

// BeginSession makes a session known, durably, and returns the store's number for it. The same ID, after a reconnection, has the same number.
func (s *Store) BeginSession(t tensor.Session) (uint32, error) {
	if t.ID == "" {
		return 0, errors.New("store: begin a session without an id")
	}
	s.mu.Lock()
	if t.Number = s.byID[t.ID]; t.Number != 0 && s.sessions[t.Number].Producer != t.Producer {
		s.mu.Unlock()
		return 0, fmt.Errorf("store: begin session %s: another producer's has this id: %w", t.ID, ErrForeign)
	} else if t.Number == 0 {
		for n := range s.sessions {
			t.Number = max(t.Number, n)
		}
		t.Number++
		s.byID[t.ID] = t.Number // taken, so that another goroutine's session gets the next
		s.sessions[t.Number] = &sessionState{Session: t, sites: map[uint32]tensor.Site{}, totals: map[uint32]*siteTotal{}}
	}
	s.mu.Unlock()
	doing := "begin session " + t.ID
	if err := s.record(doing, frameSession, encodeJSON(t), func(position) { s.applySession(t) }); err != nil {
		return 0, err
	}
	return t.Number, s.syncManifest(doing)
}

func (s *Store) syncManifest(doing string) error {
	s.log.Lock()
	number := s.manifest.number
	s.log.Unlock()
	return explain(doing+": sync the manifest", s.syncManifestFile(number))
}

// EndSession says that nothing more will come of a session.
func (s *Store) EndSession(number uint32, at time.Time) error {
	e := sessionEnd{number, at}
	return s.record("end a session", frameSessionEnd, encodeJSON(e), func(position) { s.applySessionEnd(e) })
}

// AddSites makes sites of a session known, before the first step that has them. Known ones may be given again, with more aliases.
func (s *Store) AddSites(session uint32, sites []tensor.Site) error {
	f := sitesFrame{session, sites}
	if err := s.record("add sites", frameSites, encodeJSON(f), func(position) { s.applySites(f) }); err != nil {
		return err
	}
	return s.syncManifest("add sites")
}

// PutRun adds a run or changes it; fields at their zero value stay as they were. A run is its session's: another's is ErrForeign.
func (s *Store) PutRun(r tensor.Run) error {
	load := func() error {
		if err := s.loadRun(r.ID); err != nil {
			return err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if known := s.runs[r.ID]; known != nil && known.Session != 0 && r.Session != 0 && known.Session != r.Session {
			return ErrForeign
		}
		return nil
	}
	return s.recordAfter(load, "note run "+r.ID, frameRun, encodeJSON(r), func(position) { s.applyRun(r) })
}

// PutRequests adds requests or changes them; fields at their zero value stay as they were.
func (s *Store) PutRequests(requests []tensor.Request) error {
	frames := make([]requestFrame, len(requests))
	for i, r := range requests {
		frames[i] = requestFrame{r.Key.Session, r.Key.Request, r}
	}
	load := func() error {
		for _, r := range requests {
			if err := s.loadRequest(r.Key); err != nil {
				return err
			}
		}
		return nil
	}
	return s.recordAfter(load, "note requests", frameRequests, encodeJSON(frames), func(position) { s.applyRequests(frames) })
}

// AppendStep appends records and their row tables to the step manifest: call it before the ring's slots are released. The write is buffered by the
// operating system, so that it outlives this process at once, and the machine's power at the next Barrier. From then on the rows that OPEN
// and GAP records tell of count as produced, and will be on the books whatever happens. While the disk refuses writes it fails, for a session in complete mode
// after Options.FullDiskWait: keep the slots and try again.
func (s *Store) AppendStep(step Step) error {
	opened, err := openings(&step)
	if err != nil {
		return fmt.Errorf("store: append a step of session %d, lane %d: %w", step.Session, step.Lane, err)
	}
	payload := step.encode()
	doing := fmt.Sprintf("append a step of session %d", step.Session)
	for waited := time.Duration(0); ; waited += retryEvery {
		err = s.record(doing, frameStep, payload, func(at position) { s.applyStep(at, &step, opened) })
		if err == nil || !s.patient(step.Session) || waited >= s.opt.FullDiskWait || errors.Is(err, ErrClosed) {
			return err
		}
		time.Sleep(min(retryEvery, s.opt.FullDiskWait))
	}
}

const retryEvery = 200 * time.Millisecond

// patient reports whether a session would rather wait than lose rows.
func (s *Store) patient(session uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.sessions[session]
	return t != nil && t.Mode == "complete"
}

// poke wakes the writing goroutine.
func (s *Store) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// EntriesAtOnce is how many Book enters whole or not at all; of more, some may be entered where it fails.
const EntriesAtOnce = 1 << 14

// Book enters rows' fates. Rows of one step should come under its number (Entry.Step), in one call or several.
func (s *Store) Book(entries []tensor.Entry) error {
	for i := range entries {
		if err := checkEntry(&entries[i]); err != nil {
			return fmt.Errorf("store: book rows of request %d: %w", entries[i].Key.Request, err)
		}
	}
	for part := range slices.Chunk(entries, EntriesAtOnce) { // frames are bounded
		if err := s.record("book rows", frameBook, encodeEntries(part), func(at position) { s.applyBook(at, part) }); err != nil {
			return err
		}
	}
	return nil
}

// FinishRequest has a request's rows written soon.
func (s *Store) FinishRequest(key tensor.RequestKey) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	session := s.sessions[key.Session]
	if session == nil {
		return fmt.Errorf("store: finish a request of session %d: %w", key.Session, ErrNotFound)
	}
	for site := range session.sites {
		s.buffer.finish(streamKey{key, site})
	}
	s.poke()
	return nil
}

// Resume tells an engine that a producer comes back to how many records of a lane are in the manifest: those before it must not be appended
// again. The rows of the steps that they open are settled: Open has booked captured what is in a segment, and lost(engine_exit) what was on its way. They are
// not to be booked or appended again either, so a step whose OPEN lies before the returned index is to be passed over to its end.
func (s *Store) Resume(producer string, lane int) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	var records uint64
	for n, t := range s.sessions {
		if t.Producer == producer {
			records = max(records, s.lanes[laneKey{n, lane}])
		}
	}
	return records
}

// Close writes what is buffered, seals the segment and commits.
func (s *Store) Close() error {
	s.log.Lock()
	s.mu.Lock()
	if s.closed.Swap(true) {
		s.mu.Unlock()
		s.log.Unlock()
		return nil
	}
	s.room.Broadcast()
	s.mu.Unlock()
	s.log.Unlock()
	var err error
	if !s.readOnly {
		close(s.stop)
		<-s.stopped
		<-s.tidied
		<-s.watched
		s.mu.Lock()
		err = s.failure
		s.mu.Unlock()
		s.manifest.close()
	}
	err = cmp.Or(err, explain("close the catalogue", s.cat.close()))
	if s.lock != nil {
		s.lock.Close()
	}
	return err
}

// Books sums up every row's fate.
func (s *Store) Books() Totals {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.books.sum()
}

// Stats is the store's condition.
func (s *Store) Stats() Metrics {
	free, err := s.fs.Free(s.dir)
	if err != nil {
		free = math.MaxUint64 // unknown is not full
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.metrics
	m.DiskFree = free
	if s.manifest != nil {
		m.ManifestBytes = s.manifest.size.Load()
	}
	m.Segments = len(s.sealed)
	for _, g := range s.sealed {
		m.SegmentBytes += uint64(g.bytes)
		m.Chunks += uint64(g.chunks)
	}
	m.SegmentBytes += uint64(s.openBytes())
	for _, o := range s.open {
		m.Chunks += uint64(o.count)
	}
	m.Streams, m.BufferBytes, m.BufferBound = s.buffer.streams(), uint64(s.buffer.held.Load()), uint64(s.buffer.bound)
	m.DurableLag, m.Stalled = s.lagging(), s.ongoing.waiting()
	for _, rows := range s.books.expired {
		m.ExpiredRows += rows
	}
	if s.failure != nil {
		m.Failure = s.failure.Error()
	}
	m.CatalogueBehind = uint64(len(s.books.dirty) + len(s.dirty.requests))
	return m
}

package store

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"
	"time"

	"dmi/internal/crc32c"
	"dmi/internal/vfs"
	"dmi/store/segment"
	"dmi/tensor"
)

// identity is dmi.json: what makes a directory a store.
type identity struct {
	Format  string    `json:"format"` // "dmi store"
	Version int       `json:"version"`
	ID      string    `json:"id"` // 32 hex digits
	Created time.Time `json:"created"`
	CRC     string    `json:"crc32c"` // of the text with this field empty, 8 hex digits
}

func (i identity) text() []byte {
	i.CRC = ""
	b, err := json.MarshalIndent(i, "", "  ")
	if err != nil {
		panic(err)
	}
	i.CRC = fmt.Sprintf("%08x", crc32c.Checksum(b))
	b, _ = json.MarshalIndent(i, "", "  ")
	return append(b, '\n')
}

const identityFile = "dmi.json"

// Open opens a store for an engine, making it where there is none, and settles what the last one left behind. Only one may have it open.
func Open(dir string, o Options) (*Store, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	s := newStore(dir, o)
	doing := "open " + dir
	for _, d := range []string{dir, path.Join(dir, "segments"), path.Join(dir, "manifest")} {
		if d == dir {
			if err := s.mayBecomeStore(); err != nil {
				return nil, err
			}
		}
		if err := s.fs.MkdirAll(d); err != nil {
			return nil, explain(doing, err)
		}
	}
	if s.lock, err = s.fs.Lock(path.Join(dir, "lock")); err != nil {
		return nil, explain(doing, err)
	}
	fail := func(err error) (*Store, error) {
		if s.cat != nil {
			s.cat.close()
		}
		if s.manifest != nil {
			s.manifest.close()
		}
		s.lock.Close()
		return nil, err
	}
	if err := s.identify(true); err != nil {
		return fail(err)
	}
	file := s.cataloguePath()
	if o.rebuild != nil {
		if s.cat, err = s.putAside(file); err != nil {
			return fail(explain("put aside "+file, err))
		}
	} else if s.cat, err = openCatalogue(file); err != nil {
		if errors.Is(err, segment.ErrVersion) {
			return fail(explain("open "+file, err))
		}
		if s.cat, err = s.newCatalogue(file, err); err != nil {
			return fail(explain("open "+file, err))
		}
	}
	if err := s.recover(true, true); err != nil {
		return fail(err)
	}
	s.stop, s.stopped = make(chan struct{}), make(chan struct{})
	s.wake, s.barriers = make(chan struct{}, 1), make(chan *barrier)
	s.synced, s.sealedOne = make(chan error, 1), make(chan error, 1)
	if err := errors.Join(s.sync(false), s.rollOver(time.Now(), false)); err != nil {
		return fail(fmt.Errorf("store: open %s: settle what the last engine left: %w", dir, err))
	}
	s.tidied, s.watched = make(chan struct{}), make(chan struct{})
	go s.work()
	go s.tidy()
	go s.watch()
	return s, nil
}

// OpenReadOnly opens a store to read what is in its files. It changes nothing, so that it works where nothing may be changed. Of a store that an engine has open it shows
// what was on disk at this moment; ask the engine for more.
func OpenReadOnly(dir string) (*Store, error) {
	return openReadOnly(dir, Options{})
}

func openReadOnly(dir string, o Options) (*Store, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	s := newStore(dir, o)
	s.readOnly = true
	if err := s.identify(false); err != nil {
		return nil, err
	}
	alone := !s.locked()
	s.marks.none = !alone
	file := s.cataloguePath()
	if s.cat, err = readCatalogue(file, alone); err != nil {
		if errors.Is(err, segment.ErrVersion) {
			return nil, explain("open "+file, err)
		}
		if s.cat, err = memoryCatalogue(); err != nil {
			return nil, explain("open "+dir, err)
		}
	}
	if err := s.recover(false, alone); err != nil {
		s.cat.close()
		return nil, err
	}
	return s, nil
}

func newStore(dir string, o Options) *Store {
	waiting := &ongoing{tasks: map[*diskTask]struct{}{}}
	s := &Store{dir: path.Clean(dir), opt: o, fs: watchedFS{o.FS, waiting}, ongoing: waiting, cache: &chunkCache{}, sessions: map[uint32]*sessionState{}, byID: map[string]uint32{},
		lanes: map[laneKey]uint64{}, runs: map[string]*runState{}, requests: map[tensor.RequestKey]*requestState{}, books: newBooks(), marks: newMarks(), flight: newFlight(),
		buffer: newBuffer(int64(o.ChunkKiB)<<10, int64(o.BufferMiB)<<20), sealed: map[uint64]sealedSegment{}, dirty: newDirty(), nextSegment: 1, settledHere: map[uint32]uint64{}, adoptedHere: map[uint32]uint64{},
		gone: map[uint64]bool{}, made: map[uint64]bool{}, spared: map[uint64]bool{}, kept: map[uint64]bool{}}
	s.room = sync.NewCond(&s.mu)
	s.logEnd.Store(&position{})
	return s
}

func (s *Store) cataloguePath() string {
	if s.opt.Catalogue != "" {
		return s.opt.Catalogue
	}
	return path.Join(s.dir, "catalogue.sqlite")
}

// mayBecomeStore refuses directories that hold something else.
func (s *Store) mayBecomeStore() error {
	if _, err := s.fs.Stat(path.Join(s.dir, identityFile)); err == nil {
		return nil
	}
	names, err := s.fs.ReadDir(s.dir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return explain("open "+s.dir, err)
	}
	for _, n := range names {
		known := n == "lock" || n == "segments" || n == "manifest" || n == identityFile+".new" || n == "token" || n == "http.sock" || strings.HasPrefix(n, "engine.")
		if !known { // else a creation cut short, or an engine's own files, made before
			return fmt.Errorf("store: open %s: it holds %s and no %s: %w", s.dir, n, identityFile, ErrNotStore)
		}
	}
	return nil
}

// identify reads dmi.json, or writes it.
func (s *Store) identify(create bool) error {
	name := path.Join(s.dir, identityFile)
	f, err := s.fs.Open(name, false)
	if errors.Is(err, fs.ErrNotExist) {
		if !create {
			return fmt.Errorf("store: open %s: %s is missing: %w", s.dir, identityFile, ErrNotStore)
		}
		return explain("make a store of "+s.dir, s.create(name))
	}
	if err != nil {
		return explain("open "+name, err)
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return explain("read "+name, err)
	}
	b := make([]byte, min(size, 1<<16))
	if _, err := f.ReadAt(b, 0); err != nil && err != io.EOF {
		return explain("read "+name, err)
	}
	var id identity
	err = json.Unmarshal(b, &id)
	if err == nil && id.Format == "dmi store" && id.Version > Version { // whatever else it then says
		return fmt.Errorf("store: open %s: it has format %d, and this version knows up to %d: %w", s.dir, id.Version, Version, ErrNewer)
	}
	if err == nil && !bytes.Equal(b, id.text()) {
		err = errors.New("its text and its checksum do not match")
	}
	if err != nil || id.Format != "dmi store" || len(id.ID) != 32 {
		return fmt.Errorf("store: open %s: it is not what DMI writes (%v): %w", name, err, ErrCorrupt) //nolint:errorlint // there may be none
	}
	s.id = id.ID
	return nil
}

func (s *Store) create(name string) error {
	var b [16]byte
	rand.Read(b[:])
	id := identity{Format: "dmi store", Version: Version, ID: hex.EncodeToString(b[:]), Created: time.Now().UTC()}
	temporary := name + ".new"
	s.fs.Remove(temporary)
	f, err := s.fs.Create(temporary, false)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(id.text(), 0)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := s.fs.Rename(temporary, name); err != nil {
		return err
	}
	s.id = id.ID
	return s.fs.SyncDir(s.dir)
}

// newCatalogue puts a damaged catalogue out of the way: all that is in it can be had from the rest.
func (s *Store) newCatalogue(file string, why error) (*catalogue, error) {
	s.opt.Log("warning", "catalogue_rebuilt", fmt.Sprintf("%s cannot be used and is made again from manifest and segments: %v", file, why))
	for _, end := range []string{"", "-wal", "-shm"} {
		if err := os.Remove(file + end); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	return openCatalogue(file)
}

// Held reports whether an engine has the store at dir open.
func Held(dir string) bool {
	return (&Store{fs: vfs.OS{}, dir: dir}).locked()
}

// locked reports whether an engine has the store open.
func (s *Store) locked() bool {
	if _, err := s.fs.Stat(path.Join(s.dir, "lock")); err != nil {
		return false
	}
	l, err := s.fs.Lock(path.Join(s.dir, "lock"))
	if err != nil {
		return errors.Is(err, vfs.ErrLocked)
	}
	l.Close()
	return false
}

// loadCatalogue brings into memory what is always there.
func (s *Store) loadCatalogue() (checkpoint, error) {
	cp, err := s.cat.checkpoint()
	if err != nil {
		return cp, err
	}
	sessions, produced, err := s.cat.sessions()
	if err != nil {
		return cp, err
	}
	sites, err := s.cat.sites()
	if err != nil {
		return cp, err
	}
	totals, err := s.cat.siteTotals()
	if err != nil {
		return cp, err
	}
	s.books.produced = produced
	for _, t := range sessions {
		state := &sessionState{Session: t, sites: map[uint32]tensor.Site{}, totals: totals[t.Number]}
		if state.totals == nil {
			state.totals = map[uint32]*siteTotal{}
		}
		for _, site := range sites[t.Number] {
			state.sites[site.ID] = site
			if site.Optional {
				state.optional = append(state.optional, site.ID)
			}
		}
		s.sessions[t.Number] = state
		s.byID[t.ID] = t.Number
	}
	if s.lanes, err = s.cat.lanes(); err != nil {
		return cp, err
	}
	if s.books.totals, err = s.cat.totals(); err != nil {
		return cp, err
	}
	if s.books.expired, err = s.cat.expired(); err != nil {
		return cp, err
	}
	sets, err := s.cat.sets()
	if err != nil {
		return cp, err
	}
	for _, set := range sets {
		s.books.know(set)
	}
	if s.sealed, err = s.cat.segments(); err != nil {
		return cp, err
	}
	line, err := s.cat.top("id", "books")
	if err != nil {
		return cp, err
	}
	s.books.nextLine = line + 1
	for _, table := range []string{"runs", "requests"} {
		seq, err := s.cat.top("seq", table)
		if err != nil {
			return cp, err
		}
		s.nextSeq = max(s.nextSeq, seq)
	}
	return cp, nil
}

package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"dmi/store/segment"
)

// Repair makes the catalogue of a store that no engine has open anew, from its manifest and segments, and reports what it found: damage that leaves rows out is
// among Report.Problems, and the rest is served. It says nothing of the tensors' bytes; Verify does. The catalogue that was there is put aside (.old) until the new one
// is durable, and stays there only where the manifest, too, is damaged: then it may know more. Cut off, it is to be run again; nothing else depends on it. progress may be nil.
func Repair(dir string, o Options, progress func(Progress)) (Report, error) {
	if progress == nil {
		progress = func(Progress) {}
	}
	o.rebuild = progress
	o.RetainMiB, o.RetainAge = 0, 0 // for the engine to see to
	checked, err := o.withDefaults()
	if err != nil {
		return Report{}, err
	}
	if err := newStore(dir, checked).identify(false); err != nil {
		return Report{}, err // where there is no store, Open would make one
	}
	s, err := Open(dir, o)
	if err != nil {
		return Report{}, err
	}
	report := s.rebuilt
	totals := s.Books()
	report.Produced = totals.Produced
	for _, line := range totals.Lines {
		report.Booked += line.Rows
	}
	report.Problems = s.noticed
	if len(s.noticed) == 0 {
		err = s.removeOldCatalogue()
	}
	return report, errors.Join(err, s.Close())
}

// putAside gives a catalogue's files another name, and makes an empty one.
func (s *Store) putAside(file string) (*catalogue, error) {
	if known, err := readCatalogue(file, false); errors.Is(err, segment.ErrVersion) {
		return nil, err
	} else if err == nil {
		known.close()
	}
	if _, err := os.Stat(oldCatalogue(file)); errors.Is(err, fs.ErrNotExist) { // else an attempt before this was cut off: the catalogue is a part of a new one
		for _, end := range catalogueFiles {
			if err := os.Rename(file+end, oldCatalogue(file)+end); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
		}
	}
	return s.newCatalogue(file, errors.New("a repair was asked for"))
}

// catalogueFiles are what SQLite makes of one, by the ends of their names.
var catalogueFiles = [...]string{"", "-wal", "-shm"}

func oldCatalogue(file string) string { return file + ".old" }

// removeOldCatalogue removes what a repair put aside: it may hold what has been deleted since.
func (s *Store) removeOldCatalogue() error {
	for _, end := range catalogueFiles {
		if err := os.Remove(oldCatalogue(s.cataloguePath()) + end); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return explain("remove the catalogue that was put aside", err)
		}
	}
	return nil
}

// came tells of so many bytes that were read of a file to make the catalogue anew.
func (s *Store) came(file string, bytes int64) {
	if s.opt.rebuild != nil {
		s.rebuilding.File = file
		s.rebuilding.Done += uint64(bytes)
		s.rebuilt.Bytes += uint64(bytes)
		s.opt.rebuild(s.rebuilding)
	}
}

// expect finds how much there is to read.
func (s *Store) expect(manifests []uint64) error {
	if s.opt.rebuild == nil {
		return nil
	}
	open, sealed, err := s.segmentFiles()
	if err != nil {
		return err
	}
	var names []string
	for _, n := range manifests {
		names = append(names, manifestName(s.dir+"/manifest", n))
	}
	for _, n := range sealed {
		names = append(names, s.sealedPath(n))
	}
	for _, n := range open {
		names = append(names, s.segmentPath(n, false))
	}
	for _, name := range names {
		if size, err := s.fs.Stat(name); err == nil {
			s.rebuilding.Total += uint64(size)
		}
	}
	return nil
}

// counted adds what a segment holds to what is known of sites, where there was no catalogue that knew. Of rows that are gone nothing is known.
func (s *Store) counted(chunks []segment.Chunk) {
	for i := range chunks {
		c := &chunks[i]
		if session := s.sessions[c.Key.Session]; session != nil {
			h := s.buffer.shard(streamKeyOfSite{session.Number, c.Site})
			h.mu.Lock()
			h.count(session.Number, session.total(c.Site), c.DType, c.Level, c.Shape, c.Rows, uint64(c.Length))
			h.mu.Unlock()
		}
	}
}

// contents lists a sealed segment without reading its chunks; where its directory is damaged, by what index blocks there are.
func (s *Store) contents(name string) (found sealedSegment, chunks []segment.Chunk, err error) {
	f, err := s.fs.Open(name, false)
	if err != nil {
		return found, nil, err
	}
	defer f.Close()
	if found.bytes, err = f.Size(); err != nil {
		return found, nil, err
	}
	id, data, idErr := segment.Identify(f)
	listed, listErr := segment.Directory(f)
	if idErr != nil || listErr != nil {
		c, err := segment.Scan(f)
		if err != nil {
			return found, nil, err
		}
		s.notice(name, -1, "its structure is damaged (%v); %d chunks of it are found", errors.Join(idErr, listErr), len(c.Chunks))
		if c.Identity.Store != s.id {
			return found, nil, fmt.Errorf("of store %s: %w", c.Identity.Store, segment.ErrEmpty)
		}
		found.data, found.chunks, found.created, found.groups = c.Data, len(c.Chunks), c.Identity.Created, c.Groups()
		return found, c.Chunks, nil
	}
	if id.Store != s.id {
		return found, nil, fmt.Errorf("of store %s: %w", id.Store, segment.ErrEmpty)
	}
	found.data, found.created = data, id.Created
	for _, l := range listed {
		found.groups = append(found.groups, l.Group)
		found.chunks += len(l.Chunks)
		chunks = append(chunks, l.Chunks...)
	}
	return found, chunks, nil
}

package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"path"
	"slices"
	"strings"

	"dmi/store/segment"
	"dmi/tensor"
)

// How sealed segments go, and others take their place: for retention, deletion and compaction alike.
//
//  1. The new segments are written whole, sealed and synced under names that nobody looks for (NNNNNNNN.made).
//  2. A frame of the manifest names the old ones and the new; once it is durable, it is done.
//  3. The new get their final names, the old are unlinked, the directory is synced.
//
// A crash before 2 leaves files that the next engine removes; after it, names that it corrects. Until they are correct, no sync point and no
// checkpoint lets the frame be forgotten. Numbers are never given twice.

// replacement is such a frame.
type replacement struct {
	at       position
	old, new []uint64
}

// goneSegment is a segment that the catalogue has to forget.
type goneSegment struct {
	number uint64
	keys   []tensor.RequestKey // whose chunks it held; nil: not known
}

func (r replacement) encode() []byte {
	var b []byte
	for _, list := range [...][]uint64{r.old, r.new} {
		b = binary.AppendUvarint(b, uint64(len(list)))
		for _, n := range list {
			b = binary.AppendUvarint(b, n)
		}
	}
	return b
}

func decodeReplacement(b []byte) (replacement, error) {
	r := reader{b: b}
	var p replacement
	for _, list := range [...]*[]uint64{&p.old, &p.new} {
		for range r.uint(uint64(len(r.b))) {
			*list = append(*list, r.uint(math.MaxInt64))
		}
	}
	return p, r.end()
}

// replace lets segments go, for others that are sealed under their temporary names.
func (s *Store) replace(old []goneSegment, made []sealedSegment) error {
	var r replacement
	for _, g := range old {
		r.old = append(r.old, g.number)
	}
	for _, m := range made {
		r.new = append(r.new, m.number)
	}
	doing := fmt.Sprintf("replace %d segments by %d", len(r.old), len(r.new))
	err := s.record(doing, frameReplace, r.encode(), func(at position) {
		r.at = at
		s.applyReplace(r, old)
		for _, m := range made {
			s.addSealed(m)
		}
	})
	if err != nil {
		return err
	}
	if err := s.syncManifest(doing); err != nil { // not known to be durable: the files stay until it is
		return err
	}
	return s.settleFiles()
}

// applyReplace is what the frame changes, but for the new segments. With mu held.
func (s *Store) applyReplace(r replacement, old []goneSegment) {
	for _, g := range old {
		delete(s.sealed, g.number)
		s.gone[g.number] = true
		s.newGone = append(s.newGone, g)
	}
	for _, n := range append(slices.Clip(r.old), r.new...) {
		s.nextSegment = max(s.nextSegment, n+1)
	}
	s.replacements = append(s.replacements, r)
	s.generation++
}

// replayReplace takes the frame in again, whether or not the catalogue knows of it: the files may not.
func (s *Store) replayReplace(at position, r replacement) {
	r.at = at
	var old []goneSegment
	for _, n := range r.old {
		old = append(old, goneSegment{number: n})
		delete(s.made, n)
	}
	for _, n := range r.new {
		s.made[n] = true
	}
	s.applyReplace(r, old)
}

// removeUnmade removes what replacements wrote that never came to be.
func (s *Store) removeUnmade() error {
	dir := path.Join(s.dir, "segments")
	names, err := s.fs.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if strings.HasSuffix(name, ".made") || strings.HasSuffix(name, ".making") {
			if err := s.fs.Remove(path.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// settleFiles gives files the names that replacements in the manifest say they have, and removes the others.
func (s *Store) settleFiles() error {
	s.mu.Lock()
	pending := slices.Clone(s.replacements)
	s.mu.Unlock()
	if len(pending) == 0 {
		return nil
	}
	doing := "rename and remove segments in " + path.Join(s.dir, "segments")
	for _, r := range pending {
		if err := s.syncManifestFile(r.at.file); err != nil {
			return explain(doing+": sync the manifest", err)
		}
		for _, n := range r.new {
			if err := s.fs.Rename(s.madePath(n), s.segmentPath(n, true)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return explain(doing, err)
			}
		}
	}
	if err := s.fs.SyncDir(path.Join(s.dir, "segments")); err != nil { // what replaces is there before what it replaces is not
		return explain(doing, err)
	}
	for _, r := range pending {
		for _, n := range r.old {
			for _, name := range [...]string{s.segmentPath(n, true), s.madePath(n)} {
				if err := s.fs.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return explain(doing, err)
				}
			}
			s.cache.forget(n)
		}
	}
	if err := s.fs.SyncDir(path.Join(s.dir, "segments")); err != nil {
		return explain(doing, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.replacements = s.replacements[len(pending):]
	return nil
}

// lowReplacement is the first position of the manifest that tells of files that are not yet settled. With mu held.
func (s *Store) lowReplacement(end position) position {
	for _, r := range s.replacements {
		if r.at.before(end) {
			end = r.at
		}
	}
	return end
}

// madePath is where a segment is before the manifest says that it takes others' place.
func (s *Store) madePath(number uint64) string {
	return path.Join(s.dir, "segments", fmt.Sprintf("%08d.made", number))
}

// sealedPath is where a sealed segment now is.
func (s *Store) sealedPath(number uint64) string {
	name := s.segmentPath(number, true)
	if _, err := s.fs.Stat(name); errors.Is(err, fs.ErrNotExist) {
		if made := s.madePath(number); s.exists(made) {
			return made
		}
	}
	return name
}

func (s *Store) exists(name string) bool {
	_, err := s.fs.Stat(name)
	return err == nil
}

func keysOf(listed []segment.Listed) []tensor.RequestKey {
	keys := make([]tensor.RequestKey, 0, len(listed))
	for i := range listed {
		keys = append(keys, listed[i].Key)
	}
	return keys
}

package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"

	"dmi/internal/crc32c"
	"dmi/store/segment"
)

// How what rewrites and removes files gets along with damaged ones: it does what can be done, and leaves what cannot be made out as it is.

// leavable reports whether an error is one file's, so that the others can be gone on with.
func leavable(err error) bool {
	return errors.Is(err, ErrCorrupt) || errors.Is(err, ErrGone) || errors.Is(err, ErrDevice)
}

// listed is everything that a sealed segment holds: by its directory, or where that is damaged by its index blocks, or where those are by the lists that the catalogue has. With an
// error it is what can be made out of it.
func (s *Store) listed(number uint64) ([]segment.Listed, error) {
	s.mu.Lock()
	g := s.sealed[number]
	s.mu.Unlock()
	f, err := s.openSegmentFile(number)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	whole := func(groups []segment.Listed) bool {
		chunks, rows := 0, uint64(0)
		for i := range groups {
			chunks += groups[i].Group.Chunks
			rows += groups[i].Rows
		}
		return chunks == g.chunks && rows == g.rows
	}
	groups, err := segment.Directory(f)
	if err == nil && whole(groups) {
		return groups, nil
	}
	if contents, scanned := segment.Scan(f); scanned == nil {
		if groups = contents.Listed(); whole(groups) {
			return groups, nil
		}
	}
	elsewhere, failure := s.listedElsewhere(number)
	if failure != nil {
		return groups, failure
	}
	groups = slices.DeleteFunc(groups, func(l segment.Listed) bool {
		return slices.ContainsFunc(elsewhere, func(other segment.Listed) bool { return other.Key == l.Key })
	})
	groups = append(groups, elsewhere...)
	slices.SortFunc(groups, func(a, b segment.Listed) int { return a.Key.Compare(b.Key) })
	if whole(groups) {
		return groups, nil
	}
	if err == nil {
		err = fmt.Errorf("its directory and its index blocks do not list the %d chunks that it had", g.chunks)
	}
	return groups, explain(fmt.Sprintf("list segment %d", number), fmt.Errorf("%w: %w", err, ErrCorrupt))
}

// listedElsewhere is what catalogue and memory have of a segment's lists.
func (s *Store) listedElsewhere(number uint64) (listed []segment.Listed, err error) {
	groups, err := s.cat.groupsOf(number)
	if err != nil {
		return nil, explain(fmt.Sprintf("list segment %d by the catalogue", number), err)
	}
	s.mu.Lock()
	for _, g := range s.pending {
		if g.number == number {
			groups = g.groups
		}
	}
	s.mu.Unlock()
	for _, g := range groups {
		if l, err := segment.ParseListed([]byte(g.List), g.Offset); err == nil && l.Group == g {
			listed = append(listed, l)
		}
	}
	return listed, nil
}

// redactDamaged takes prompts out of a file of the manifest that is damaged: out of every frame that is whole, wherever it lies. Everything else stays as it was. lost is how many
// bytes are in no such frame. Memory: the file.
func (d *deletion) redactDamaged(dir string, n uint64) (lost int, err error) {
	name := manifestName(dir, n)
	f, err := d.fs.Open(name, false)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return 0, err
	}
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil {
		return 0, err
	}
	changed := false
	lost, err = wholeFrames(b, func(frame []byte) error {
		if frameKind(binary.LittleEndian.Uint32(frame[4:])) != frameRequests {
			return d.ctx.Err()
		}
		redacted, err := d.without(frame[frameHeader:])
		if err != nil || redacted == nil {
			return err
		}
		number := binary.LittleEndian.Uint32(frame[8:])
		copy(frame[frameHeader:], redacted)
		putFrameHeader(frame, frameRequests, number, redacted)
		changed = true
		return nil
	})
	if err != nil || !changed {
		return lost, err
	}
	temporary := name + ".new"
	if err := d.fs.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return lost, err
	}
	out, err := d.fs.Create(temporary, false)
	if err != nil {
		return lost, err
	}
	_, err = out.WriteAt(b, 0)
	if err = errors.Join(err, out.Sync(), out.Close()); err == nil {
		err = d.fs.Rename(temporary, name)
	}
	if err != nil {
		d.fs.Remove(temporary)
		return lost, err
	}
	return lost, d.fs.SyncDir(path.Dir(name))
}

// wholeFrames calls each for the frames of a file of the manifest, those behind damage as well, and returns how many bytes after the header are in none.
func wholeFrames(file []byte, each func(frame []byte) error) (lost int, err error) {
	little := binary.LittleEndian
	for at, next := manifestHeader, uint32(0); at < len(file); {
		b := file[at:]
		if len(b) >= frameHeader && little.Uint32(b[4:])-1 < uint32(frameKinds)-1 && little.Uint32(b[8:]) >= next && uint64(little.Uint32(b)) <= uint64(len(b)-frameHeader) {
			frame := b[:frameHeader+int(little.Uint32(b))]
			if crc32c.Update(crc32c.Checksum(frame[:12]), frame[frameHeader:]) == little.Uint32(frame[12:]) {
				next = little.Uint32(frame[8:]) + 1
				at += len(frame)
				if err := each(frame); err != nil {
					return lost, err
				}
				continue
			}
		}
		lost++
		at++
	}
	return lost, nil
}

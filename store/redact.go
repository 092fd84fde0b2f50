package store

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"

	"dmi/internal/crc32c"
	"dmi/internal/vfs"
	"dmi/tensor"
)

// How token ids and text of requests leave the manifest and the catalogue. A frame says that they are forgotten; then the files of the manifest that have them
// are written anew, the text of their frames replaced by blanks, so that every frame stays where positions say it is, and renamed over the old.

// forgetFrame names a request whose prompt is no longer kept.
type forgetFrame struct {
	Session uint32 `json:"session"`
	Number  uint64 `json:"request"`
}

// applyForget is what the frame changes. With mu held, and the requests in memory.
func (s *Store) applyForget(frames []forgetFrame) {
	for _, f := range frames {
		key := tensor.RequestKey{Session: f.Session, Request: f.Number}
		if r := s.requests[key]; r != nil {
			r.Tokens, r.Text, r.Pieces = nil, "", nil
			s.dirty.requests[key] = true
		}
	}
}

// forget has the catalogue forget prompts, and its file as well.
func (d *deletion) forget() error {
	var frames []forgetFrame
	flush := func() error {
		if len(frames) == 0 {
			return nil
		}
		part := frames
		frames = nil
		load := func() error {
			for _, f := range part {
				key := tensor.RequestKey{Session: f.Session, Request: f.Number}
				d.mu.Lock()
				resident := d.requests[key] != nil || d.books.open[key] != nil
				d.mu.Unlock()
				if err := d.loadRequest(key); err != nil {
					return err
				}
				if !resident {
					d.mu.Lock()
					d.finished = append(d.finished, key)
					d.mu.Unlock()
				}
			}
			return nil
		}
		return d.recordAfter(load, "forget prompts", frameForget, encodeJSON(part), func(position) { d.applyForget(part) })
	}
	for key := range d.keys {
		r, err := d.requestState(key)
		if err != nil {
			return err
		}
		if r == nil {
			continue
		}
		if r.Tokens != nil || r.Text != "" || r.Pieces != nil {
			d.result.Prompts++
		}
		if frames = append(frames, forgetFrame{key.Session, key.Request}); len(frames) == expiredAtOnce {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	if err := flush(); err != nil {
		return err
	}
	if err := errors.Join(d.Barrier(d.ctx), d.removeOldCatalogue()); err != nil {
		return err
	}
	return d.cat.scrub()
}

// redact takes prompts out of the manifest's files, all but one that is begun for what follows.
func (d *deletion) redact() error {
	last, err := d.nextManifestFile()
	if err != nil {
		return err
	}
	dir := path.Join(d.dir, "manifest")
	files, err := manifestFiles(d.fs, dir)
	if err != nil {
		return err
	}
	d.done.ManifestTotal = len(files)
	for _, n := range files {
		if err := d.ctx.Err(); err != nil {
			return err
		}
		if n < last {
			found, err := d.namesPrompts(dir, n)
			if errors.Is(err, errTorn) {
				var lost int
				if lost, err = d.redactDamaged(dir, n); err == nil && lost > 0 {
					d.left = append(d.left, fmt.Errorf("%s: prompts are taken out of every frame that is whole, and %d of its bytes are in none: %w", manifestName(dir, n), lost, ErrCorrupt))
				}
			} else if err == nil && found {
				err = d.redactFile(dir, n)
			}
			if err != nil {
				return fmt.Errorf("take prompts out of %s: %w", manifestName(dir, n), err)
			}
		}
		d.done.ManifestFiles++
		d.progress(d.done)
	}
	return nil
}

// nextManifestFile begins a file, so that those before it do not change any more.
func (s *Store) nextManifestFile() (uint64, error) {
	s.log.Lock()
	defer s.log.Unlock()
	if s.closed.Load() {
		return 0, ErrClosed
	}
	if m := s.manifest; m.torn {
		if err := m.file.Truncate(m.end); err != nil {
			return 0, err
		}
		m.torn = false
	}
	if err := s.manifest.file.Sync(); err != nil {
		return 0, err
	}
	if err := s.manifest.begin(s.manifest.number + 1); err != nil {
		return 0, err
	}
	s.mu.Lock()
	s.logMoved()
	s.mu.Unlock()
	return s.manifest.number, nil
}

// namesPrompts reports whether a file has a prompt of the requests.
func (d *deletion) namesPrompts(dir string, n uint64) (bool, error) {
	found := false
	_, err := readManifest(d.fs, dir, d.id, n, 0, func(_ position, kind frameKind, payload []byte) error {
		if err := d.ctx.Err(); err != nil {
			return err
		}
		if kind == frameRequests && !found {
			redacted, err := d.without(payload)
			found = redacted != nil
			return err
		}
		return nil
	})
	return found, err
}

// without is the payload of a frame of requests without the prompts of those that are deleted, as long as it was; nil where it has none.
func (d *deletion) without(payload []byte) ([]byte, error) {
	var known []forgetFrame
	if err := json.Unmarshal(payload, &known); err != nil {
		return nil, err
	}
	var hit bool
	for _, k := range known {
		hit = hit || d.keys[tensor.RequestKey{Session: k.Session, Request: k.Number}]
	}
	if !hit {
		return nil, nil
	}
	var frames []map[string]json.RawMessage
	if err := json.Unmarshal(payload, &frames); err != nil {
		return nil, err
	}
	hit = false
	for i, k := range known {
		if !d.keys[tensor.RequestKey{Session: k.Session, Request: k.Number}] {
			continue
		}
		for _, field := range [...]string{"tokens", "text", "pieces"} {
			if _, has := frames[i][field]; has {
				delete(frames[i], field)
				hit = true
			}
		}
	}
	if !hit {
		return nil, nil
	}
	b := encodeJSON(frames)
	if len(b) > len(payload) {
		return nil, fmt.Errorf("a frame of %d bytes would grow to %d", len(payload), len(b))
	}
	return append(b, bytes.Repeat([]byte(" "), len(payload)-len(b))...), nil
}

// redactFile writes a file anew, each frame where it was, and puts it in the place of the old one.
func (d *deletion) redactFile(dir string, n uint64) (err error) {
	name := manifestName(dir, n)
	temporary := name + ".new"
	if err := d.fs.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := d.fs.Create(temporary, false)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			d.fs.Remove(temporary)
		}
	}()
	if err = errors.Join(d.copyFrames(dir, n, f), f.Close()); err != nil {
		return err
	}
	if err = d.fs.Rename(temporary, name); err != nil {
		return err
	}
	return d.fs.SyncDir(dir)
}

func (d *deletion) copyFrames(dir string, n uint64, to vfs.File) error {
	out := frameCopy{to: to}
	from, err := d.fs.Open(manifestName(dir, n), false)
	if err != nil {
		return err
	}
	defer from.Close()
	var header [manifestHeader]byte
	if _, err := from.ReadAt(header[:], 0); err != nil {
		return err
	}
	if err := out.write(header[:]); err != nil {
		return err
	}
	number := uint32(0)
	_, err = readManifest(d.fs, dir, d.id, n, 0, func(_ position, kind frameKind, payload []byte) error {
		if err := d.ctx.Err(); err != nil {
			return err
		}
		if kind == frameRequests {
			redacted, err := d.without(payload)
			if err != nil {
				return err
			}
			if redacted != nil {
				payload = redacted
			}
		}
		var h [frameHeader]byte
		putFrameHeader(h[:], kind, number, payload)
		number++
		return errors.Join(out.write(h[:]), out.write(payload))
	})
	if err != nil {
		return err
	}
	return errors.Join(out.flush(), to.Sync())
}

func putFrameHeader(h []byte, kind frameKind, number uint32, payload []byte) {
	little := binary.LittleEndian
	little.PutUint32(h, uint32(len(payload)))
	little.PutUint32(h[4:], uint32(kind))
	little.PutUint32(h[8:], number)
	little.PutUint32(h[12:], crc32c.Update(crc32c.Checksum(h[:12]), payload))
}

// frameCopy writes a file from front to back, a megabyte at a time.
type frameCopy struct {
	to  vfs.File
	at  int64
	buf []byte
}

func (c *frameCopy) write(b []byte) error {
	if c.buf = append(c.buf, b...); len(c.buf) < 1<<20 {
		return nil
	}
	return c.flush()
}

func (c *frameCopy) flush() error {
	_, err := c.to.WriteAt(c.buf, c.at)
	c.at += int64(len(c.buf))
	c.buf = c.buf[:0]
	return err
}

package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"sync"
	"time"

	"dmi/internal/vfs"
)

// Revision is what was in force from its time on, until the next. Chunks and books name it.
type Revision struct {
	Number   uint64            `json:"revision"` // 0: before anybody said anything
	Time     time.Time         `json:"time,omitzero"`
	Document uint64            `json:"document"` // the revision that brought the document in
	Text     string            `json:"text"`     // of the document; in the file only where it is new
	Off      bool              `json:"off"`      // the brake: nothing is captured, whatever the document says
	Lowered  map[string]string `json:"lowered"`  // rules below their level, and the level they are at
	Promoted []Promoted        `json:"promoted,omitempty"`
	Why      string            `json:"why"`
}

// Promoted is a request that a trigger has promoted.
type Promoted struct {
	Session uint32 `json:"session"` // the store's number
	Request uint64 `json:"number"`  // the session's
	ID      string `json:"request"`
	Trigger string `json:"trigger"`
}

// LogName is the ledger's file in a store's folder.
const LogName = "policy.log"

// Bounds of the ledger. Beyond twice as much the oldest revisions are forgotten: what rows captured then were selected by is not known any more.
const (
	keptRevisions = 1 << 16
	keptBytes     = 64 << 20
)

// Ledger is every revision of a store, in memory and in its file. Its methods may be called from any goroutine.
type Ledger struct {
	fs   vfs.FS
	dir  string
	file vfs.File // nil: reads only, or nothing was ever said

	mu        sync.Mutex
	revisions []Revision // oldest first; Text where it is new
	end       int64      // of what is whole in the file
	write     bool
	dirty     bool // what lies behind end is of a write that failed
}

// OpenLedger reads the ledger of a store, which exists. What a crash left half-written at the end is cut off when write is set, and passed
// over otherwise.
func OpenLedger(files vfs.FS, dir string, write bool) (*Ledger, error) {
	l := &Ledger{fs: files, dir: dir, write: write}
	file, err := files.Open(path.Join(dir, LogName), write)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if err != nil {
		return nil, l.wrap("open", err)
	}
	if err := l.read(file); err != nil {
		file.Close()
		return nil, err
	}
	if !write {
		return l, file.Close()
	}
	l.file = file
	return l, nil
}

func (l *Ledger) wrap(doing string, err error) error {
	return fmt.Errorf("policy: %s %s: %w", doing, path.Join(l.dir, LogName), err)
}

func (l *Ledger) read(file vfs.File) error {
	size, err := file.Size()
	if err != nil {
		return l.wrap("read", err)
	}
	if size > 4*(keptBytes+MaxBytes) {
		return l.wrap("read", fmt.Errorf("it has %d bytes: an engine keeps it below %d. Move it away to start anew", size, 2*(keptBytes+MaxBytes)))
	}
	text := make([]byte, size)
	if _, err := file.ReadAt(text, 0); err != nil && size > 0 {
		return l.wrap("read", err)
	}
	for n := 1; len(text) > 0; n++ {
		line, rest, whole := bytes.Cut(text, []byte("\n"))
		if !whole {
			break
		}
		var r Revision
		in := json.NewDecoder(bytes.NewReader(line))
		in.DisallowUnknownFields()
		err := in.Decode(&r)
		if err == nil && (r.Number == 0 || len(l.revisions) > 0 && r.Number <= l.last().Number) {
			err = fmt.Errorf("revision %d after %d", r.Number, l.last().Number)
		}
		if err != nil {
			if len(rest) == 0 { // the end of a file whose last write did not all reach the disk
				break
			}
			return l.wrap("read", fmt.Errorf("line %d: %w. Move it away to start anew; rows keep the numbers of their revisions", n, err))
		}
		l.revisions = append(l.revisions, r)
		l.end += int64(len(line)) + 1
		text = rest
	}
	if l.write && l.end < size {
		if err := file.Truncate(l.end); err != nil {
			return l.wrap("cut the torn end off", err)
		}
	}
	return nil
}

// last is the current revision, its text perhaps elsewhere.
func (l *Ledger) last() Revision {
	if len(l.revisions) == 0 {
		return Revision{}
	}
	return l.revisions[len(l.revisions)-1]
}

// Current is what is in force.
func (l *Ledger) Current() Revision {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.whole(l.last())
}

// Find gives a revision; false: there is none of that number, or it is forgotten.
func (l *Ledger) Find(number uint64) (Revision, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if number == 0 {
		return Revision{}, true
	}
	i, found := slices.BinarySearchFunc(l.revisions, number, func(r Revision, n uint64) int {
		switch {
		case r.Number < n:
			return -1
		case r.Number > n:
			return 1
		}
		return 0
	})
	if !found {
		return Revision{}, false
	}
	return l.whole(l.revisions[i]), true
}

// After lists at most n revisions that follow one, without the texts of their documents.
func (l *Ledger) After(number uint64, n int) []Revision {
	l.mu.Lock()
	defer l.mu.Unlock()
	var list []Revision
	for _, r := range l.revisions {
		if r.Number > number && len(list) < n {
			r.Text = ""
			list = append(list, r)
		}
	}
	return list
}

// whole adds the text of a revision's document.
func (l *Ledger) whole(r Revision) Revision {
	for i := range l.revisions {
		if l.revisions[i].Number == r.Document {
			r.Text = l.revisions[i].Text
		}
	}
	return r
}

// Add makes r the current revision, with the next number, and durable: no row names it before. Text counts where r.Document is 0: then the
// document is new. An error leaves everything as it was.
func (l *Ledger) Add(r Revision) (Revision, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.write {
		return Revision{}, l.wrap("write", errors.New("opened for reading"))
	}
	current := l.last()
	r.Number = current.Number + 1
	stored := r
	if r.Document == 0 {
		r.Document, stored.Document = r.Number, r.Number
	} else {
		stored.Text = ""
	}
	line, err := json.Marshal(stored)
	if err != nil {
		return Revision{}, err
	}
	if err := l.append(append(line, '\n')); err != nil {
		return Revision{}, l.wrap("write", err)
	}
	l.revisions = append(l.revisions, stored)
	if len(l.revisions) > 2*keptRevisions || l.end > 2*keptBytes {
		_ = l.forget() // at worst the file stays long; the next revision tries again
	}
	return l.whole(stored), nil
}

func (l *Ledger) append(line []byte) error {
	if l.file == nil {
		file, err := l.fs.Create(path.Join(l.dir, LogName), false)
		if err != nil {
			return err
		}
		l.file = file
		if err := l.fs.SyncDir(l.dir); err != nil {
			return err
		}
	}
	if l.dirty {
		if err := l.file.Truncate(l.end); err != nil {
			return err
		}
	}
	l.dirty = true
	if _, err := l.file.WriteAt(line, l.end); err != nil {
		return err
	}
	if err := l.file.Sync(); err != nil {
		return err
	}
	l.end, l.dirty = l.end+int64(len(line)), false
	return nil
}

// forget writes the file anew with the latest revisions, and the document in force.
func (l *Ledger) forget() error {
	kept := slices.Clone(l.revisions[max(0, len(l.revisions)-keptRevisions):])
	bytesLeft := keptBytes
	for i := len(kept) - 1; i >= 0; i-- {
		if bytesLeft -= len(kept[i].Text) + 256; bytesLeft < 0 {
			kept = kept[i+1:]
			break
		}
	}
	if len(kept) == 0 {
		kept = []Revision{l.last()}
	}
	if first := kept[0].Document; first != kept[0].Number {
		for _, r := range l.revisions {
			if r.Number == first {
				kept = slices.Insert(kept, 0, r)
			}
		}
	}
	var text bytes.Buffer
	for _, r := range kept {
		line, err := json.Marshal(r)
		if err != nil {
			return err
		}
		text.Write(append(line, '\n'))
	}
	name := path.Join(l.dir, LogName)
	_ = l.fs.Remove(name + ".new") // of an attempt cut short
	file, err := l.fs.Create(name+".new", false)
	if err != nil {
		return l.wrap("shorten", err)
	}
	if _, err = file.WriteAt(text.Bytes(), 0); err == nil {
		if err = file.Sync(); err == nil {
			if err = l.fs.Rename(name+".new", name); err == nil {
				err = l.fs.SyncDir(l.dir)
			}
		}
	}
	if err != nil {
		file.Close()
		return l.wrap("shorten", err)
	}
	l.file.Close()
	l.file, l.revisions, l.end = file, kept, int64(text.Len())
	return nil
}

// Close closes the file.
func (l *Ledger) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	file := l.file
	l.file, l.write = nil, false
	return file.Close()
}

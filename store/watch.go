package store

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"dmi/internal/vfs"
)

// How a disk is noticed that does not fail, and does not work either: changes to files that it does not answer, and rows that do not become durable.

// ErrStalled is a disk that says nothing.
var ErrStalled = errors.New("the disk hangs, or others keep it busy: see dmesg and iostat; what was accepted waits in memory, and is written when it answers")

// ongoing are the changes to files that are not answered yet.
type ongoing struct {
	mu    sync.Mutex
	tasks map[*diskTask]struct{}
}

type diskTask struct {
	verb, name string
	begun      time.Time
	looks      int // of watch that it has outlasted: time in which this process was stopped is not the disk's
}

// begin notes a change; call what it returns when it is over.
func (o *ongoing) begin(verb, name string) (end func()) {
	t := &diskTask{verb: verb, name: name, begun: time.Now()}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.tasks[t] = struct{}{}
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		delete(o.tasks, t)
	}
}

// look counts a look, and returns the task that has outlasted most.
func (o *ongoing) look() (oldest diskTask) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for t := range o.tasks {
		if t.looks++; t.looks > oldest.looks {
			oldest = *t
		}
	}
	return oldest
}

// waiting is for how long the oldest has not been answered.
func (o *ongoing) waiting() (longest time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for t := range o.tasks {
		longest = max(longest, time.Since(t.begun))
	}
	return longest
}

// watch tells when the disk has not answered for Options.StallAfter, which then counts as a failure until something was written, and when rows have not become durable for
// Options.LagAfter, and again when they do.
func (s *Store) watch() {
	defer close(s.watched)
	every := max(time.Millisecond, min(time.Second, s.opt.StallAfter/5, s.opt.LagAfter/5))
	tick := time.NewTicker(every)
	defer tick.Stop()
	late := 0
	for {
		select {
		case <-s.stop:
			return
		case <-tick.C:
		}
		if t := s.ongoing.look(); time.Duration(t.looks-1)*every >= s.opt.StallAfter && s.condition() == nil {
			s.fail(fmt.Errorf("store: %s %s: no answer for %v: %w", t.verb, t.name, time.Since(t.begun).Round(every), ErrStalled))
		}
		if s.condition() != nil {
			s.room.Broadcast() // who waits in AppendChunks looks at the time; a disk that hangs makes no sound
		}
		lag := s.durableLag()
		switch {
		case lag >= s.opt.LagAfter && s.condition() == nil:
			if late++; late == 2 { // twice: not because this process was stopped
				s.opt.Log("warning", "store_lag", fmt.Sprintf("rows of %v ago are not durable yet: the disk takes less than is captured; give the store a faster disk, or capture less (dmi policy)", lag.Round(every)))
			}
		case lag < s.opt.LagAfter/2:
			if late >= 2 {
				s.opt.Log("info", "store_lag", fmt.Sprintf("rows become durable again within %v", s.opt.LagAfter))
			}
			late = 0
		}
	}
}

// durableLag is the age of the oldest row that is not yet durable.
func (s *Store) durableLag() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lagging()
}

func (s *Store) lagging() time.Duration {
	since := earlier(earlier(s.oldestInSync, s.oldest), s.buffer.oldest())
	if since.IsZero() {
		return 0
	}
	return time.Since(since)
}

// watchedFS is a file system whose changes are noted while they are under way. Reads are not: a reader that waits is seen by who asked.
type watchedFS struct {
	vfs.FS
	ongoing *ongoing
}

func (w watchedFS) Create(name string, direct bool) (vfs.File, error) {
	defer w.ongoing.begin("create", name)()
	f, err := w.FS.Create(name, direct)
	if err != nil {
		return nil, err
	}
	return watchedFile{f, name, w.ongoing}, nil
}

func (w watchedFS) Open(name string, write bool) (vfs.File, error) {
	f, err := w.FS.Open(name, write)
	if err != nil {
		return nil, err
	}
	return watchedFile{f, name, w.ongoing}, nil
}

func (w watchedFS) Remove(name string) error {
	defer w.ongoing.begin("remove", name)()
	return w.FS.Remove(name)
}

func (w watchedFS) Rename(from, to string) error {
	defer w.ongoing.begin("rename to", to)()
	return w.FS.Rename(from, to)
}

func (w watchedFS) SyncDir(name string) error {
	defer w.ongoing.begin("sync", name)()
	return w.FS.SyncDir(name)
}

type watchedFile struct {
	vfs.File
	name    string
	ongoing *ongoing
}

func (f watchedFile) WriteAt(p []byte, off int64) (int, error) {
	defer f.ongoing.begin("write", f.name)()
	return f.File.WriteAt(p, off)
}

func (f watchedFile) Truncate(size int64) error {
	defer f.ongoing.begin("truncate", f.name)()
	return f.File.Truncate(size)
}

func (f watchedFile) Sync() error {
	defer f.ongoing.begin("sync", f.name)()
	return f.File.Sync()
}

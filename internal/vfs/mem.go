package vfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"
)

// ErrCrashed is what every call on a Mem returns once it has crashed.
var ErrCrashed = errors.New("vfs: the machine has crashed")

// Mem is a file system in memory that knows what a power loss would leave: the bytes that were synced, under the names whose directories were.
// What was written after that survives in pieces, a page each, as chance has it.
//
// Fault, where set, is asked before every call that changes anything (op: create, write, sync, syncdir, rename, remove, truncate) and may
// fail it. A write that fails may have been done in part: half of it is.
type Mem struct {
	Fault func(op, name string) error

	mu      sync.Mutex
	names   map[string]*inode // as a running system sees them
	durable map[string]*inode
	locks   map[string]bool
	crashed bool
	changes int
}

type inode struct {
	data   []byte // as a running system sees it
	synced []byte
	dirty  map[int64]bool // pages written since
}

// NewMem returns an empty file system.
func NewMem() *Mem {
	return &Mem{names: map[string]*inode{}, durable: map[string]*inode{}, locks: map[string]bool{}}
}

// Changes counts the calls so far that changed something: the points at which a test can crash.
func (m *Mem) Changes() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.changes
}

// Crash makes every later call fail, as if the process were dead.
func (m *Mem) Crash() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.crashed = true
}

// AfterKill is what the next process finds after this one was killed: everything written.
func (m *Mem) AfterKill() *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := NewMem()
	for name, f := range m.names {
		c := &inode{data: slices.Clone(f.data), synced: slices.Clone(f.synced), dirty: maps.Clone(f.dirty)}
		n.names[name] = c
		if m.durable[name] == f {
			n.durable[name] = c
		}
	}
	return n
}

// AfterPowerLoss is what the next process finds after the machine lost power. keep decides the fate of each page that was written and not
// synced, and of each name not synced.
func (m *Mem) AfterPowerLoss(keep func() bool) *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := NewMem()
	survivor := map[*inode]*inode{}
	settle := func(f *inode) *inode {
		if s, ok := survivor[f]; ok {
			return s
		}
		data := slices.Clone(f.synced)
		for _, page := range slices.Sorted(maps.Keys(f.dirty)) {
			from, to := page*Align, min((page+1)*Align, int64(len(f.data)))
			if from >= to || !keep() {
				continue
			}
			if int64(len(data)) < to {
				data = append(data, make([]byte, to-int64(len(data)))...)
			}
			copy(data[from:to], f.data[from:to])
		}
		s := &inode{data: data, synced: slices.Clone(data), dirty: map[int64]bool{}}
		survivor[f] = s
		return s
	}
	moved := map[*inode]bool{} // renamed, durably or not: it has one of its names, never both or none
	for _, name := range slices.Sorted(maps.Keys(m.durable)) {
		f := m.durable[name]
		switch to := m.nameOf(f); {
		case to == "" && m.names[name] != nil && !moved[m.names[name]]: // another was renamed over it: one of the two is there
			if other := m.names[name]; keep() {
				n.names[name] = settle(other)
			} else {
				n.names[name] = settle(f)
			}
			moved[m.names[name]] = true
		case to == name, to == "" && keep(): // removed, and that has not reached the disk
			n.names[name] = settle(f)
		case to != "":
			moved[f] = true
			if keep() {
				name = to
			}
			n.names[name] = settle(f)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(m.names)) {
		if f := m.names[name]; m.durable[name] != f && !moved[f] && keep() {
			n.names[name] = settle(f)
		}
	}
	n.durable = maps.Clone(n.names)
	return n
}

func (m *Mem) nameOf(f *inode) string {
	for name, other := range m.names {
		if other == f {
			return name
		}
	}
	return ""
}

// change counts a change, and fails it where the file system has crashed or Fault says so.
func (m *Mem) change(op, name string) error {
	if m.crashed {
		return ErrCrashed
	}
	m.changes++
	if m.Fault != nil {
		if err := m.Fault(op, name); err != nil {
			if errors.Is(err, ErrCrashed) {
				m.crashed = true
			}
			return &fs.PathError{Op: op, Path: name, Err: err}
		}
	}
	return nil
}

func (m *Mem) Create(name string, direct bool) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.change("create", name); err != nil {
		return nil, err
	}
	if m.names[name] != nil {
		return nil, &fs.PathError{Op: "create", Path: name, Err: fs.ErrExist}
	}
	f := &inode{dirty: map[int64]bool{}}
	m.names[name] = f
	return &memFile{fs: m, name: name, inode: f, write: true, direct: direct}, nil
}

func (m *Mem) Open(name string, write bool) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.names[name]
	switch {
	case m.crashed:
		return nil, ErrCrashed
	case f == nil:
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return &memFile{fs: m, name: name, inode: f, write: write}, nil
}

func (m *Mem) Remove(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.change("remove", name); err != nil {
		return err
	}
	if m.names[name] == nil {
		return &fs.PathError{Op: "remove", Path: name, Err: fs.ErrNotExist}
	}
	delete(m.names, name)
	return nil
}

func (m *Mem) Rename(from, to string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.change("rename", from); err != nil {
		return err
	}
	if m.names[from] == nil {
		return &fs.PathError{Op: "rename", Path: from, Err: fs.ErrNotExist}
	}
	m.names[to] = m.names[from]
	delete(m.names, from)
	return nil
}

// MkdirAll does nothing: directories are wherever names are.
func (m *Mem) MkdirAll(string) error { return nil }

func (m *Mem) ReadDir(name string) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.crashed {
		return nil, ErrCrashed
	}
	var names []string
	for n := range m.names {
		if path.Dir(n) == path.Clean(name) {
			names = append(names, path.Base(n))
		}
	}
	slices.Sort(names)
	return names, nil
}

func (m *Mem) Stat(name string) (int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f := m.names[name]; f != nil {
		return int64(len(f.data)), nil
	}
	for n := range m.names {
		if strings.HasPrefix(n, name+"/") {
			return 0, nil
		}
	}
	return 0, &fs.PathError{Op: "stat", Path: name, Err: fs.ErrNotExist}
}

func (m *Mem) SyncDir(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.change("syncdir", name); err != nil {
		return err
	}
	in := func(n string) bool { return path.Dir(n) == path.Clean(name) }
	maps.DeleteFunc(m.durable, func(n string, _ *inode) bool { return in(n) })
	for n, f := range m.names {
		if in(n) {
			m.durable[n] = f
		}
	}
	return nil
}

func (m *Mem) Lock(name string) (Closer, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.locks[name] {
		return nil, fmt.Errorf("lock %s: %w", name, ErrLocked)
	}
	m.locks[name] = true
	return memLock{m, name}, nil
}

type memLock struct {
	fs   *Mem
	name string
}

func (l memLock) Close() error {
	l.fs.mu.Lock()
	defer l.fs.mu.Unlock()
	delete(l.fs.locks, l.name)
	return nil
}

// Free is always plenty.
func (m *Mem) Free(string) (uint64, error) { return 1 << 40, nil }

type memFile struct {
	fs     *Mem
	name   string
	inode  *inode
	write  bool
	direct bool
}

func (f *memFile) Direct() bool { return f.direct }
func (f *memFile) Close() error { return nil }

func (f *memFile) Size() (int64, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	return int64(len(f.inode.data)), nil
}

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.fs.crashed {
		return 0, ErrCrashed
	}
	if off >= int64(len(f.inode.data)) {
		return 0, io.EOF
	}
	n := copy(p, f.inode.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if !f.write {
		return 0, &fs.PathError{Op: "write", Path: f.name, Err: fs.ErrPermission}
	}
	if f.direct && (off%Align != 0 || len(p)%Align != 0) {
		return 0, &fs.PathError{Op: "write", Path: f.name, Err: fmt.Errorf("%d bytes at %d: not aligned", len(p), off)}
	}
	if f.fs.crashed {
		return 0, ErrCrashed
	}
	failure := f.fs.change("write", f.name)
	if failure != nil {
		p = p[:len(p)/2]
	}
	f.inode.put(p, off)
	return len(p), failure
}

func (i *inode) put(p []byte, off int64) {
	if end := off + int64(len(p)); end > int64(len(i.data)) {
		i.data = append(i.data, make([]byte, end-int64(len(i.data)))...)
	}
	copy(i.data[off:], p)
	for page := off / Align; page*Align < off+int64(len(p)); page++ {
		i.dirty[page] = true
	}
}

func (f *memFile) Truncate(size int64) error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if err := f.fs.change("truncate", f.name); err != nil {
		return err
	}
	if size < int64(len(f.inode.data)) {
		f.inode.data = f.inode.data[:size:size]
	} else {
		f.inode.data = append(f.inode.data, make([]byte, size-int64(len(f.inode.data)))...)
	}
	return nil
}

func (f *memFile) WillRead(int64, int64) {}

func (f *memFile) Sync() error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if err := f.fs.change("sync", f.name); err != nil {
		return err
	}
	f.inode.synced = slices.Clone(f.inode.data)
	f.inode.dirty = map[int64]bool{}
	return nil
}

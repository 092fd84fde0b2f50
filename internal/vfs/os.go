package vfs

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// OS is the machine's file system.
type OS struct{}

type osFile struct {
	*os.File
	direct bool
}

func (f osFile) Direct() bool { return f.direct }

func (f osFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (f osFile) Sync() error { return dataSync(f.File) }

func (OS) Create(name string, direct bool) (File, error) {
	flags := os.O_RDWR | os.O_CREATE | os.O_EXCL
	if direct && directFlag != 0 {
		f, err := os.OpenFile(name, flags|directFlag, 0o600)
		if err == nil {
			return osFile{f, true}, nil
		}
		if !errors.Is(err, syscall.EINVAL) { // EINVAL: a file system without it, such as tmpfs
			return nil, err
		}
		os.Remove(name) // some kernels create the file before they refuse the flag
	}
	f, err := os.OpenFile(name, flags, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f, false}, nil
}

func (OS) Open(name string, write bool) (File, error) {
	flags := os.O_RDONLY
	if write {
		flags = os.O_RDWR
	}
	f, err := os.OpenFile(name, flags, 0)
	if err != nil {
		return nil, err
	}
	return osFile{f, false}, nil
}

func (OS) Remove(name string) error     { return os.Remove(name) }
func (OS) Rename(from, to string) error { return os.Rename(from, to) }
func (OS) MkdirAll(name string) error   { return os.MkdirAll(name, 0o700) }

func (OS) ReadDir(name string) ([]string, error) {
	entries, err := os.ReadDir(name)
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, err
}

func (OS) Stat(name string) (int64, error) {
	info, err := os.Stat(name)
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (OS) SyncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func (OS) Lock(name string) (Closer, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", name, ErrLocked)
		}
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	return f, nil
}

func (OS) Free(name string) (uint64, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(name, &s); err != nil {
		return 0, err
	}
	return s.Bavail * uint64(s.Bsize), nil
}

func aligned(n int) []byte {
	b := make([]byte, n+Align)
	skip := int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (Align - 1))
	return b[skip : skip+n : skip+n]
}

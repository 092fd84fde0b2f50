// Package vfs is the little of a file system that the store needs, so that crashes, power losses and failing disks can be tested
// without any: OS is the machine's, Mem forgets what was not synced.
package vfs

// FS is a file system. Names are slash-separated paths; errors wrap fs.ErrNotExist and the like, as package os's do. Implementations are
// safe for concurrent use.
type FS interface {
	// Create makes a file for reading and writing, mode 0600; it must not exist. With direct, writes bypass the page cache where
	// the file system can, and must then be aligned to Align in address, offset and length.
	Create(name string, direct bool) (File, error)
	// Open opens a file that exists; for writing as well where write is set.
	Open(name string, write bool) (File, error)
	Remove(name string) error
	Rename(from, to string) error
	MkdirAll(name string) error // mode 0700
	ReadDir(name string) ([]string, error)
	Stat(name string) (size int64, err error)
	// SyncDir makes creations, renames and removals in a directory durable.
	SyncDir(name string) error
	// Lock takes an exclusive lock on a file, which is created; ErrLocked if another holds it. Closing releases it.
	Lock(name string) (Closer, error)
	// Free is the bytes that may still be written.
	Free(name string) (uint64, error)
}

// File is an open file. ReadAt and WriteAt may be used concurrently.
type File interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	Truncate(size int64) error
	Size() (int64, error)
	// WillRead has the system fetch bytes that are soon read, where it can. It does not wait for them, and says nothing of failures: reading them does.
	WillRead(off, n int64)
	Sync() error // data, and what is needed to find them again
	Close() error
	// Direct reports whether writes bypass the page cache.
	Direct() bool
}

// Closer ends something.
type Closer interface{ Close() error }

// Align is what direct writes are aligned to.
const Align = 4096

// ErrLocked is that another process holds a lock.
var ErrLocked error = lockedError{}

type lockedError struct{}

func (lockedError) Error() string { return "locked by another process" }

// Aligned returns n bytes at an address that is a multiple of Align. n is a multiple of Align.
func Aligned(n int) []byte { return aligned(n) }

// Buffer is memory that is written from again and again. It has huge pages where the system does: of 8 MiB the kernel then pins 4 pages for a direct write and not 2,048, and sends the disk
// fewer and larger requests. Such memory is not the garbage collector's.
type Buffer struct {
	Bytes []byte // aligned to Align
	unmap func()
}

// NewBuffer makes one of n bytes, a multiple of Align. Whoever has it frees it.
func NewBuffer(n int) *Buffer {
	bytes, unmap, err := mapBuffer(n)
	if err != nil {
		return &Buffer{Bytes: Aligned(n)}
	}
	return &Buffer{bytes, unmap}
}

// Free gives the memory back. Nobody may use Bytes from then on.
func (b *Buffer) Free() {
	if b.unmap != nil {
		b.unmap()
	}
	b.Bytes, b.unmap = nil, nil
}

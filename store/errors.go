package store

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"

	"dmi/internal/vfs"
	"dmi/store/segment"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// What errors of this package wrap, for errors.Is. Their messages say what to do.
var (
	ErrNotStore = errors.New("not a DMI store; name a directory that DMI made, or an empty one")
	ErrNewer    = errors.New("written by a later version of DMI; use that version, or another store")
	ErrInUse    = errors.New("another engine has it open; attach to that one, or stop it first")
	ErrDiskFull = errors.New("the disk is full; free space: writing resumes by itself")
	ErrReadOnly = errors.New("it cannot be written; mount the file system for writing, or use another store")
	ErrDenied   = errors.New("this user may not; run as the user who owns it, or give it to this one (chown)")
	ErrFileSize = errors.New("files may not grow to that size; raise the limit of the engine (ulimit -f, LimitFSIZE=) or of the file system")
	ErrDevice   = errors.New("the disk reported an error; check it (dmesg) before you trust it again")
	ErrCorrupt  = errors.New("it is damaged; run `dmi verify` for the extent")
	ErrNotFound = errors.New("not in this store")
	ErrGone     = errors.New("its segment was removed since")
	ErrClosed   = errors.New("the store is closed")
	ErrForeign  = errors.New("it belongs to whoever began it")
)

// Passing reports whether an error is the disk's, and may be over when it is tried again.
func Passing(err error) bool {
	return errors.Is(err, ErrDiskFull) || errors.Is(err, ErrFileSize) || errors.Is(err, ErrReadOnly) || errors.Is(err, ErrDenied) || errors.Is(err, ErrDevice)
}

// explain adds what an error of the file system means for an operator.
func explain(doing string, err error) error {
	kind := error(nil)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, vfs.ErrLocked):
		kind = ErrInUse
	case errors.Is(err, segment.ErrVersion):
		kind = ErrNewer
	case errors.Is(err, segment.ErrChecksum):
		kind = ErrCorrupt
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		kind = ErrDiskFull
	case errors.Is(err, syscall.EFBIG):
		kind = ErrFileSize
	case errors.Is(err, syscall.EROFS):
		kind = ErrReadOnly
	case errors.Is(err, fs.ErrPermission):
		kind = ErrDenied
	case errors.Is(err, syscall.EIO):
		kind = ErrDevice
	default:
		kind = explainCatalogue(err)
	}
	if kind == nil {
		return fmt.Errorf("store: %s: %w", doing, err)
	}
	return fmt.Errorf("store: %s: %w: %w", doing, err, kind)
}

// explainCatalogue does the same for SQLite's own errors, which hide those of the file system.
func explainCatalogue(err error) error {
	var failure *sqlite.Error
	if !errors.As(err, &failure) {
		return nil
	}
	switch failure.Code() & 0xff { // the rest says more of the same
	case sqlite3.SQLITE_FULL:
		return ErrDiskFull
	case sqlite3.SQLITE_READONLY:
		return ErrReadOnly
	case sqlite3.SQLITE_PERM:
		return ErrDenied
	case sqlite3.SQLITE_IOERR:
		return ErrDevice
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return ErrCorrupt
	}
	return nil
}

package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"dmi/internal/vfs"

	"golang.org/x/sys/unix"
)

// counting is the machine's file system, and counts reads of segments.
type counting struct {
	vfs.OS
	reads *atomic.Int64
}

func (c counting) Open(name string, write bool) (vfs.File, error) {
	f, err := c.OS.Open(name, write)
	if err != nil || !strings.Contains(name, "/segments/") {
		return f, err
	}
	return countedFile{f, c.reads}, nil
}

type countedFile struct {
	vfs.File
	reads *atomic.Int64
}

func (f countedFile) ReadAt(p []byte, off int64) (int, error) {
	f.reads.Add(1)
	return f.File.ReadAt(p, off)
}

// chill has the machine forget what it keeps of a store's files in memory, and returns their bytes by what they are.
func chill(dir string) (sizes map[string]int64, err error) {
	sizes = map[string]int64{}
	return sizes, filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		kind, _, _ := strings.Cut(strings.TrimPrefix(name, dir+"/"), "/")
		kind, _, _ = strings.Cut(kind, ".")
		sizes[kind] += info.Size()
		if err := f.Sync(); err != nil { // what is not on the disk yet is not forgotten
			return err
		}
		return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	})
}

// rawRead reads a store's segments from front to back, a MiB at a time, up to so many bytes, and returns bytes a second.
func rawRead(dir string, most int64) (float64, error) {
	names, err := filepath.Glob(filepath.Join(dir, "segments", "*.safetensors"))
	if err != nil {
		return 0, err
	}
	b := make([]byte, 1<<20)
	begun, read := time.Now(), int64(0)
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			return 0, err
		}
		for n := 1; n > 0 && read < most; read += int64(n) {
			n, _ = f.Read(b)
		}
		f.Close()
	}
	return float64(read) / time.Since(begun).Seconds(), nil
}

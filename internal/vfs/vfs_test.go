package vfs

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"path"
	"slices"
	"testing"
	"unsafe"
)

// TestFileSystem holds the machine's file system and the one in memory to the same behaviour.
func TestFileSystem(t *testing.T) {
	for name, c := range map[string]struct {
		fs  FS
		dir string
	}{"os": {OS{}, t.TempDir()}, "mem": {NewMem(), "dir"}} {
		t.Run(name, func(t *testing.T) { conforms(t, c.fs, c.dir) })
	}
}

func conforms(t *testing.T, f FS, dir string) {
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	sub := path.Join(dir, "a", "b")
	must(f.MkdirAll(sub))
	name := path.Join(sub, "file")
	if _, err := f.Open(name, false); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("open what is not there: %v", err)
	}
	file, err := f.Create(name, true)
	must(err)
	if _, err := f.Create(name, false); !errors.Is(err, fs.ErrExist) {
		t.Errorf("create what is there: %v", err)
	}
	block := Aligned(2 * Align)
	for i := range block {
		block[i] = byte(i * 13)
	}
	_, err = file.WriteAt(block, Align)
	must(err)
	must(file.Sync())
	size, err := file.Size()
	must(err)
	got := make([]byte, 3*Align)
	_, err = file.ReadAt(got, 0)
	must(err)
	if size != 3*Align || !bytes.Equal(got[Align:], block) || !bytes.Equal(got[:Align], make([]byte, Align)) {
		t.Errorf("%d bytes, or they differ", size)
	}
	if n, err := file.ReadAt(got, 2*Align); n != Align || err != io.EOF {
		t.Errorf("read over the end: %d, %v", n, err)
	}
	must(file.Truncate(Align + 5))
	must(file.Close())
	must(f.Rename(name, name+"2"))
	must(f.SyncDir(sub))
	names, err := f.ReadDir(sub)
	must(err)
	if !slices.Equal(names, []string{"file2"}) {
		t.Errorf("names %v", names)
	}
	if size, err := f.Stat(name + "2"); err != nil || size != Align+5 {
		t.Errorf("stat: %d, %v", size, err)
	}
	if _, err := f.Stat(name); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("stat what is not there: %v", err)
	}
	if file, err = f.Open(name+"2", true); err != nil {
		t.Fatal(err)
	}
	_, err = file.WriteAt([]byte("x"), 1) // not direct: anywhere
	must(err)
	must(file.Close())
	must(f.Remove(name + "2"))
	if err := f.Remove(name + "2"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("remove what is not there: %v", err)
	}
	l, err := f.Lock(path.Join(dir, "lock"))
	must(err)
	if _, err := f.Lock(path.Join(dir, "lock")); !errors.Is(err, ErrLocked) {
		t.Errorf("lock twice: %v", err)
	}
	must(l.Close())
	l, err = f.Lock(path.Join(dir, "lock"))
	must(err)
	must(l.Close())
	if free, err := f.Free(dir); err != nil || free == 0 {
		t.Errorf("free: %d, %v", free, err)
	}
}

func TestPowerLossTakesWhatWasNotSynced(t *testing.T) {
	never, always := func() bool { return false }, func() bool { return true }
	m := NewMem()
	f, _ := m.Create("d/a", false)
	f.WriteAt([]byte("synced"), 0)
	f.Sync()
	if _, err := m.AfterPowerLoss(never).Stat("d/a"); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a name outlived a power loss that was not synced")
	}
	m.SyncDir("d")
	f.WriteAt([]byte("lost it"), 0)
	read := func(m *Mem, name string) string {
		f, err := m.Open(name, false)
		if err != nil {
			return err.Error()
		}
		b := make([]byte, 100)
		n, _ := f.ReadAt(b, 0)
		return string(b[:n])
	}
	if got := read(m.AfterPowerLoss(never), "d/a"); got != "synced" {
		t.Errorf("after a power loss: %q", got)
	}
	if got := read(m.AfterKill(), "d/a"); got != "lost it" {
		t.Errorf("after a kill: %q", got)
	}
	m.Rename("d/a", "d/b")
	for keep, name := range map[bool]string{false: "d/a", true: "d/b"} {
		choose := never
		if keep {
			choose = always
		}
		after := m.AfterPowerLoss(choose)
		if names, _ := after.ReadDir("d"); !slices.Equal(names, []string{path.Base(name)}) {
			t.Errorf("a rename left %v", names)
		}
	}
	m.Fault = func(op, _ string) error {
		if op == "write" {
			return ErrCrashed
		}
		return nil
	}
	if n, err := f.WriteAt([]byte("12345678"), 0); n != 4 || !errors.Is(err, ErrCrashed) {
		t.Errorf("a write that crashes: %d, %v", n, err)
	}
	if _, err := m.Open("d/b", false); !errors.Is(err, ErrCrashed) {
		t.Errorf("a call after the crash: %v", err)
	}
}

func TestBuffer(t *testing.T) {
	f, err := OS{}.Create(t.TempDir()+"/f", true)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const n = 3 * Align
	b, other := NewBuffer(n), NewBuffer(n)
	if address := uintptr(unsafe.Pointer(unsafe.SliceData(b.Bytes))); len(b.Bytes) != n || address%Align != 0 {
		t.Fatalf("%d bytes at %x", len(b.Bytes), address)
	}
	for i := range b.Bytes {
		b.Bytes[i], other.Bytes[i] = byte(i*7), 1
	}
	if _, err := f.WriteAt(b.Bytes, 0); err != nil {
		t.Fatal(err)
	}
	read := Aligned(n)
	if _, err := f.ReadAt(read, 0); err != nil {
		t.Fatal(err)
	}
	for i := range read {
		if read[i] != byte(i*7) {
			t.Fatalf("byte %d is %d", i, read[i])
		}
	}
	b.Free()
	b.Free()
	other.Free()
}

package vfs

import (
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

func TestSlowDisk(t *testing.T) {
	dir := "store"
	var speed atomic.Int64
	speed.Store(1 << 20)
	disk := Slow(NewMem(), filepath.Join(dir, "data"), func() float64 { return float64(speed.Load()) })
	if err := disk.MkdirAll(filepath.Join(dir, "data")); err != nil {
		t.Fatal(err)
	}
	write := func(name string, bytes int) time.Duration {
		f, err := disk.Create(filepath.Join(dir, name), false)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		begun := time.Now()
		if n, err := f.WriteAt(make([]byte, bytes), 0); n != bytes || err != nil {
			t.Fatal(n, err)
		}
		return time.Since(begun)
	}
	if took := write("data/a", 1<<18); took < 240*time.Millisecond {
		t.Errorf("256 KiB at 1 MiB a second took %v", took)
	}
	if took := write("elsewhere", 64<<20); took > 30*time.Second { // it would be 64 s
		t.Errorf("a file elsewhere took %v", took)
	}
	time.AfterFunc(100*time.Millisecond, func() { speed.Store(0) })
	if took := write("data/b", 64<<20); took < 90*time.Millisecond || took > 30*time.Second {
		t.Errorf("a disk that recovers after 0.1 s took %v for what had taken 64 s", took)
	}
}

package vfs

import (
	"strings"
	"sync"
	"time"
)

// slow is a file system on a disk that takes so many bytes a second.
type slow struct {
	FS
	folder string
	speed  func() float64

	head sync.Mutex // one write at a time: the rest wait for it, as behind a disk's one head
}

// Slow makes a file system's disk slow for tests and benchmarks: files in a folder take speed() bytes a second together, as it is asked a hundred times a
// second; 0 is as many as there come. Reads, syncs and files elsewhere are as fast as ever.
func Slow(fs FS, folder string, speed func() float64) FS {
	return &slow{FS: fs, folder: strings.TrimSuffix(folder, "/") + "/", speed: speed}
}

func (s *slow) of(name string, f File, err error) (File, error) {
	if err != nil || !strings.HasPrefix(name, s.folder) {
		return f, err
	}
	return slowFile{f, s}, nil
}

func (s *slow) Create(name string, direct bool) (File, error) {
	f, err := s.FS.Create(name, direct)
	return s.of(name, f, err)
}

func (s *slow) Open(name string, write bool) (File, error) {
	f, err := s.FS.Open(name, write)
	return s.of(name, f, err)
}

type slowFile struct {
	File
	disk *slow
}

const turn = 10 * time.Millisecond

func (f slowFile) WriteAt(p []byte, off int64) (int, error) {
	f.disk.head.Lock()
	defer f.disk.head.Unlock()
	for left := float64(len(p)); left > 0; {
		speed := f.disk.speed()
		if speed <= 0 {
			break
		}
		took := min(turn, time.Duration(left/speed*float64(time.Second)))
		begun := time.Now()
		time.Sleep(took)
		left -= max(1, speed*time.Since(begun).Seconds())
	}
	return f.File.WriteAt(p, off)
}

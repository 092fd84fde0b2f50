package store

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"dmi/internal/vfs"
)

// way makes readers give way to the writer. While somebody waits for something to be durable or for room in the buffer, or a sync is under way, everything that reads
// segments (queries, verify, compaction) gets at most wayBytes for each processor in each wayWindow, altogether, a read counting wayRead besides; four times that while
// rows come and nobody waits; else as much as it likes.
//
// It is rates that are bounded, not how many read at a time: what a reader does with the bytes it was given takes a processor as well, and is bounded with them. A
// reader waits at most wayWait for a read, so that none is kept out by a writer that never rests.
type way struct {
	waited atomic.Int32 // for how many the writer is waited for now
	came   atomic.Int64 // when the last rows did, Unix ns

	mu    sync.Mutex
	since time.Time // the window's beginning
	given int64     // bytes in it
}

const (
	wayWindow = 20 * time.Millisecond
	wayBytes  = 2 << 20
	wayRead   = 16 << 10
	wayWait   = 500 * time.Millisecond
	wayFresh  = time.Second // for so long rows count as coming after the last
)

// hold has readers give way until release is called.
func (w *way) hold() (release func()) {
	w.waited.Add(1)
	return func() { w.waited.Add(-1) }
}

// share is how many bytes readers may have in a window; 0: any number.
func (w *way) share(now time.Time) int64 {
	share := int64(runtime.GOMAXPROCS(0)) * wayBytes
	switch {
	case w.waited.Load() > 0:
		return share
	case now.UnixNano()-w.came.Load() < int64(wayFresh):
		return 4 * share
	}
	return 0
}

// pass returns when a reader may read so many bytes.
func (w *way) pass(bytes int64) {
	for begun := time.Now(); ; {
		now := time.Now()
		share := w.share(now)
		if share == 0 {
			return
		}
		w.mu.Lock()
		if now.Sub(w.since) >= wayWindow {
			w.since, w.given = now, 0
		}
		next := w.since.Add(wayWindow)
		if w.given == 0 || w.given+bytes+wayRead <= share || now.Sub(begun) >= wayWait {
			w.given += bytes + wayRead
			w.mu.Unlock()
			return
		}
		w.mu.Unlock()
		time.Sleep(time.Until(next))
	}
}

// yielding is a segment's file, whose readers give way.
type yielding struct {
	vfs.File
	way *way
}

func (y yielding) ReadAt(p []byte, off int64) (int, error) {
	y.way.pass(int64(len(p)))
	return y.File.ReadAt(p, off)
}

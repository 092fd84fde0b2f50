package store

import (
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestReadersGiveWay: readers together get no more than a window's bytes in each window while the writer is waited for, and four times that while rows come; all of them get on.
// Else they wait for nothing.
func TestReadersGiveWay(t *testing.T) {
	for what, c := range map[string]struct {
		begin func(*way) func()
		share int
	}{
		"waited for": {func(w *way) func() { return w.hold() }, 1},
		"rows come": {func(w *way) func() {
			w.came.Store(time.Now().Add(time.Second).UnixNano())
			return func() { time.Sleep(2 * time.Second) }
		}, 4},
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const readers, read = 8, 256 << 10
				var w way
				begun := time.Now()
				w.pass(1 << 40)
				if waited := time.Since(begun); waited != 0 {
					t.Errorf("while nothing happens a reader waited %v", waited)
				}
				end := c.begin(&w)
				got := make([]int, readers)
				var all sync.WaitGroup
				for i := range readers {
					all.Go(func() {
						for time.Since(begun) < time.Second {
							w.pass(read)
							got[i]++
						}
					})
				}
				all.Wait()
				total := 0
				for i, n := range got {
					if total += n; n == 0 {
						t.Errorf("reader %d was given nothing in a second", i)
					}
				}
				windows := int(time.Since(begun)/wayWindow) + 1
				if most := windows * (c.share * runtime.GOMAXPROCS(0) * wayBytes / (read + wayRead)); total > most || total < most/2 {
					t.Errorf("%d reads in %d windows, where %d fit", total, windows, most)
				}
				for _, bytes := range []int64{1 << 40, 0} { // what never fits is given at a window's beginning
					asked := time.Now()
					w.pass(bytes)
					if waited := time.Since(asked); waited > wayWindow {
						t.Errorf("a read of %d bytes waited %v", bytes, waited)
					}
				}
				end()
				asked := time.Now()
				for range 1000 {
					w.pass(read)
				}
				if waited := time.Since(asked); waited != 0 {
					t.Errorf("with nothing happening any more readers waited %v", waited)
				}
			})
		})
	}
}

// TestReadIsNotKeptOut: however many others read, a read waits no longer than the bound and a window.
func TestReadIsNotKeptOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w way
		defer w.hold()()
		var all sync.WaitGroup
		for range 200 {
			all.Go(func() {
				asked := time.Now()
				w.pass(int64(runtime.GOMAXPROCS(0)) * wayBytes)
				if waited := time.Since(asked); waited > wayWait+wayWindow {
					t.Errorf("a read waited %v", waited)
				}
			})
		}
		all.Wait()
	})
}

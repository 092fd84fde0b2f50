package control

import "sync"

// heapFloor is garbage that may gather before it is collected. Payload passes through fresh memory at gigabytes a second while little is kept:
// left alone, the collector would run hundreds of times a second, for two fifths of the engine's CPU time (bench/drain, GOGC=100 against
// 1000). This much is allocated and never touched: it counts as live, and takes no memory.
const heapFloor = 128 << 20

var floor = sync.OnceValue(func() []byte { return make([]byte, heapFloor) })

// HoldHeap has garbage collected that seldom, in this process, from now on. New does it.
func HoldHeap() { floor() }

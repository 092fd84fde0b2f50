package crc32c

// prefetch has the cache lines of n bytes from p on fetched, n > 0. It waits for none of them, and touches nothing.
//
//go:noescape
func prefetch(p *byte, n int)

// Package ringtape records what an engine saw of a session, and plays it again: a tape goes through a real memfd, real eventfds and the real
// control socket, so that every stage of the engine can be run without Python. docs/format/ringtape.md is the file's form.
//
// Producer is the other side of the shared memory, in Go: it does what libdmi does, or whatever lie a test wants told.
package ringtape

// Package control is the producers' door: the Unix socket of docs/format/control.md. It admits a producer, maps its ring, runs the drain and
// the pipeline of its session, keeps what it says of runs and requests, and ends the session when it says bye, hangs up, or the engine stops.
//
// Sessions share nothing but the store: one that lies, stalls or floods is closed, or waits, alone.
package control

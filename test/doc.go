// Package test holds DMI to its promises from outside: a real engine process and real producers, killed, stopped and starved at random, and books
// that must agree with what the producers counted themselves.
//
// `go test ./test` runs a seeded share; -full 1 runs the published counts, -full 0.1 a tenth (make soak). -seed repeats a run.
package test

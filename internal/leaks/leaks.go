// Package leaks has tests fail that leave goroutines behind. What only needs a moment to end, as connections do that were just closed, is given one: on a
// busy machine that is longer than goleak waits by itself.
package leaks

import (
	"fmt"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

const patience = 30 * time.Second

func left(options ...goleak.Option) (err error) {
	for deadline := time.Now().Add(patience); ; {
		if err = goleak.Find(options...); err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// Main runs a package's tests, and ends the process.
func Main(m *testing.M, options ...goleak.Option) {
	code := m.Run()
	if code == 0 {
		if err := left(options...); err != nil {
			fmt.Fprintln(os.Stderr, "the tests left goroutines behind:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// None fails a test that leaves a goroutine behind; for its end.
func None(t testing.TB) {
	t.Helper()
	if err := left(); err != nil {
		t.Error(err)
	}
}

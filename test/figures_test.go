//go:build linux

package test

import (
	"flag"
	"fmt"
	"testing"

	"dmi/bench/result"
)

var figuresDir = flag.String("figures", "", "directory to write what a soak came to")

// figures keeps what a test came to, once it has passed.
func figures(t *testing.T, name string, rows ...result.Row) {
	t.Helper()
	if *figuresDir == "" || t.Failed() {
		return
	}
	command := fmt.Sprintf("go test -count=1 -timeout 12h -v ./test -run '^%s$' -full %g -figures ../bench/results", t.Name(), *full)
	if err := result.Report(name, command, rows, *figuresDir); err != nil {
		t.Error(err)
	}
}

func count(metric string, n uint64) result.Row {
	return result.Row{Metric: metric, Value: float64(n), Unit: "times"}
}

func rowsOf(metric string, n uint64) result.Row {
	return result.Row{Metric: metric, Value: float64(n), Unit: "rows"}
}

//go:build linux

package test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"dmi/ring"
	"dmi/store"
	"dmi/tensor"
)

// ask asks an engine something by its local door, and reads for no longer than a moment: events do not end.
func ask(t *testing.T, e *engine, path string) string {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", e.HTTP)
	}}}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if path == "/v1/live/events" {
		time.AfterFunc(200*time.Millisecond, cancel)
	}
	text, _ := io.ReadAll(answer.Body)
	return string(text)
}

// number is a metric's value; 0 where there is no such line.
func number(t *testing.T, e *engine, line string) uint64 {
	t.Helper()
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(line) + ` (\S+)$`).FindStringSubmatch(ask(t, e, "/metrics"))
	if m == nil {
		return 0
	}
	f, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		t.Fatal(err)
	}
	return uint64(f)
}

func eventually(t *testing.T, what string, happened func() bool) {
	t.Helper()
	for begun := time.Now(); !happened(); time.Sleep(20 * time.Millisecond) {
		if time.Since(begun) > patience {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// An engine that is killed, and a producer that goes in the middle of a step: what that cost is in the metrics, the events, the log and the store, and is the same everywhere.
func TestWhatAKillCostIsTold(t *testing.T) {
	random := seeded(t)
	dir := storeDir(t)
	l := load{Seed: random.Uint64(), Lanes: 1, Sites: 6, Requests: 3, Prompt: 20, Length: 100}
	p, err := newProducer(newSession(random), l, ring.ModeComplete, booksRing, make([]uint64, tallyWords))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	e := start(t, dir, "store.flush_age_ms=60000", "store.sync_age_ms=60000") // what it took is in memory only
	if err := p.attach(e.Control, false); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		if err := p.play(); err != nil {
			t.Fatal(err)
		}
	}
	taken := p.tally[tallyProduced]
	eventually(t, "the engine takes everything", func() bool { return number(t, e, "dmi_rows_produced_total") == taken })
	eventually(t, "and settles it", func() bool { return number(t, e, `dmi_queue_used{queue="records"}`) == 0 })
	e.kill()
	p.client.Swap(nil).Close()

	e = start(t, dir)
	const lostLine = `dmi_rows_total{level="full",outcome="lost",reason="engine_exit"}`
	lost := number(t, e, "dmi_store_recovered_lost_rows")
	if lost == 0 || lost > p.tally[tallyCaptured] || number(t, e, lostLine) != lost {
		t.Errorf("recovered: %d rows lost, in the books %d, of %d captured", lost, number(t, e, lostLine), p.tally[tallyCaptured])
	}
	says := fmt.Sprintf("%d rows were on their way and are booked lost(engine_exit)", lost)
	eventually(t, "log and events say "+says, func() bool {
		return strings.Contains(e.log.String(), says) && strings.Contains(ask(t, e, "/v1/live/events"), `"engine_exit"`)
	})

	if err := p.attach(e.Control, true); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the producer is counted", func() bool { return number(t, e, "dmi_producers") == 1 })
	f := p.script.next()
	p.introduce(f)
	if opened, err := p.open(f); err != nil || !opened {
		t.Fatalf("open a step: %v %v", opened, err)
	}
	owed := uint64(f.rows) * uint64(len(f.actions))
	p.client.Load().Close()
	eventually(t, "the producer is missed", func() bool { return number(t, e, "dmi_producers") == 0 })
	if got := number(t, e, `dmi_rows_total{level="full",outcome="lost",reason="producer_exit"}`); got != owed {
		t.Errorf("%d rows are lost(producer_exit), and its open step owed %d", got, owed)
	}
	eventually(t, "the events say that the producer is gone", func() bool { return strings.Contains(ask(t, e, "/v1/live/events"), "gone without a bye") })
	e.stop()

	s, err := store.OpenReadOnly(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	verified(t, s)
	byReason := map[tensor.Reason]uint64{}
	for _, line := range s.Books().Lines {
		byReason[line.Reason] += line.Rows
	}
	if byReason[tensor.EngineExit] != lost || byReason[tensor.ProducerExit] != owed {
		t.Errorf("the store books %d rows lost to the engine's end and %d to the producer's, and was told %d and %d", byReason[tensor.EngineExit], byReason[tensor.ProducerExit], lost, owed)
	}
}

//go:build linux

package test

import (
	"fmt"
	"net"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"dmi/internal/ringtape"
	"dmi/ring"
)

// eventOf is the text of the latest event of a code, "" where there is none yet.
func eventOf(t *testing.T, e *engine, code string) string {
	t.Helper()
	all := regexp.MustCompile(`\{[^{}]*"code":"`+code+`"[^{}]*\}`).FindAllString(ask(t, e, "/v1/live/events"), -1)
	if len(all) == 0 {
		return ""
	}
	return all[len(all)-1]
}

// told waits for an event, and for what it says of what to do.
func told(t *testing.T, e *engine, code string, says ...string) {
	t.Helper()
	defer func() {
		if t.Failed() {
			t.Logf("events:\n%s", ask(t, e, "/v1/live/events"))
		}
	}()
	text := ""
	eventually(t, "event "+code, func() bool { text = eventOf(t, e, code); return text != "" })
	for _, s := range says {
		if !strings.Contains(text, s) {
			t.Errorf("event %s does not say %q: %s", code, s, text)
		}
	}
}

// What goes wrong outside the disk is told: a producer that floods, that stalls, that lies, that is refused, a subscriber that does not read, an engine that was stopped. Each has its
// metric, and an event that says what to do.
func TestTroublesAreTold(t *testing.T) {
	random := seeded(t)
	e := start(t, storeDir(t), "store.lag_after_s=0.5", "live.queue_frames=16")
	if got := number(t, e, "dmi_producers_refused_total") + number(t, e, "dmi_producers_expelled_total") + number(t, e, "dmi_engine_stopped_seconds_total"); got != 0 {
		t.Errorf("%d troubles before there was any", got)
	}
	var playing sync.WaitGroup
	var over atomic.Bool
	defer playing.Wait()
	defer over.Store(true)
	enter := func(create func(string, load, uint32, ringtape.Shape, []uint64) (*producer, error), shape ringtape.Shape) *producer {
		l := load{Seed: random.Uint64(), Lanes: 1, Sites: 20, Requests: 8, Prompt: 100, Length: 400}
		p, err := create(newSession(random), l, ring.ModeBestEffort, shape, make([]uint64, tallyWords))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.Close)
		if err := p.attach(e.Control, false); err != nil {
			t.Fatal(err)
		}
		return p
	}
	play := func(p *producer, pause time.Duration) {
		playing.Go(func() {
			for !over.Load() {
				if err := p.play(); err != nil {
					t.Error(err)
					return
				}
				time.Sleep(pause)
			}
		})
	}

	// Who does not read.
	deaf, err := net.Dial("unix", e.HTTP)
	if err != nil {
		t.Fatal(err)
	}
	defer deaf.Close()
	fmt.Fprintf(deaf, "GET /v1/live/tensors?site=** HTTP/1.1\r\nHost: localhost\r\n\r\n")
	eventually(t, "somebody subscribes", func() bool { return number(t, e, `dmi_live_subscribers{kind="chunks"}`) == 1 })

	// A flood, of more than the rings take.
	flooder := enter(newProducer, smallRing)
	play(flooder, 0)
	told(t, e, "overrun", flooder.session, "Capture less (dmi policy)")
	eventually(t, "a metric counts the rows that found no room", func() bool {
		return number(t, e, `dmi_rows_total{level="full",outcome="dropped",reason="ring_full"}`)+number(t, e, `dmi_rows_total{level="full",outcome="dropped",reason="records_full"}`) > 0
	})
	told(t, e, "subscriber", "read faster")
	if number(t, e, "dmi_live_dropped_rows_total") == 0 {
		t.Error("no metric counts what the subscriber was too slow for")
	}

	// One that does not copy.
	staller := enter(newStalledProducer, booksRing)
	play(staller, 10*time.Millisecond)
	told(t, e, "stalled", staller.session, "Is it stopped, or its device hung?")
	eventually(t, "the drain lags", func() bool {
		return regexp.MustCompile(`(?m)^dmi_drain_lag_seconds [^0\s]|^dmi_drain_lag_seconds 0\.[5-9]`).MatchString(ask(t, e, "/metrics"))
	})

	// One that is refused, and one that talks nonsense once it is not.
	stranger, err := net.Dial("unix", e.Control)
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	fmt.Fprint(stranger, "GET / HTTP/1.1\r\n\r\n")
	told(t, e, "refused", "a producer was refused: ")
	liar := enter(newProducer, smallRing)
	if err := liar.client.Load().SendRaw([]byte(`{"type":"dance"}`)); err != nil {
		t.Fatal(err)
	}
	told(t, e, "detach", liar.session, "dance")
	eventually(t, "both are counted", func() bool {
		return number(t, e, "dmi_producers_refused_total") == 1 && number(t, e, "dmi_producers_expelled_total") == 1
	})

	// The engine itself is stopped for a while.
	if err := e.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(4 * time.Second) // longer than what is told of
	if err := e.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	told(t, e, "stopped", "SIGSTOP", "find out who")
	if got := number(t, e, "dmi_engine_stopped_seconds_total"); got < 3 {
		t.Errorf("it did not run for %d s, it says", got)
	}
}

package trigger

import (
	"encoding/json"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"dmi/internal/leaks"
	"dmi/tensor"
)

func waitFor(t *testing.T, what func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !what(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited too long")
		}
	}
}

func TestWebhooksAreTriedAgain(t *testing.T) {
	defer leaks.None(t)
	var asked atomic.Int32
	bodies := make(chan map[string]any, 10)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) <= 2 {
			http.Error(w, "not now", http.StatusServiceUnavailable)
			return
		}
		var body map[string]any
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil || r.Method != "POST" || r.Header.Get("Content-Type") != "application/json" {
			t.Error(err, r.Method, r.Header)
		}
		bodies <- body
	}))
	defer server.Close()
	w := New(Options{Names: names{}})
	w.Use(load(t, "", "triggers: [{name: hot, hooks: resid_post, webhook: \""+server.URL+"/x\", when: {statistic: max, above: 2}}]"), 7)
	w.Look(3, []tensor.Chunk{chunkOf(1, 5, 9, []float64{1}, []float64{math.NaN()}, []float64{2.5})}, 0, nil)
	body := <-bodies
	for key, want := range map[string]any{"trigger": "hot", "condition": "statistic: max, above: 2", "value": 2.5, "session": "s00000003", "request": "r5", "site": "blocks.1.hook_resid_post",
		"position": 11.0, "step": 0.0, "revision": 7.0} {
		if body[key] != want {
			t.Errorf("%s: %v, want %v", key, body[key], want)
		}
	}
	waitFor(t, func() bool { return w.Deliveries() == Deliveries{Delivered: 1} })
	if asked.Load() != 3 {
		t.Errorf("%d tries", asked.Load())
	}
	w.Close()
}

func TestWebhooksAreBounded(t *testing.T) {
	defer leaks.None(t)
	release := make(chan struct{})
	stuck := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-release }))
	var refused atomic.Int32
	refusing := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		refused.Add(1)
		http.Redirect(w, r, stuck.URL, http.StatusFound)
	}))
	e := &told{}
	w := New(Options{Names: names{}, Event: e.tell})
	begun := time.Now()
	for range 200 {
		w.posts.send(stuck.URL, Firing{Value: Value(math.NaN())})
	}
	w.posts.send(refusing.URL, Firing{})
	if took := time.Since(begun); took > 20*time.Second { // it waits for no answer: that of the one that is stuck never comes
		t.Errorf("sending took %v", took)
	}
	waitFor(t, func() bool { d := w.Deliveries(); return d.Failed >= 1 && d.Dropped >= 200-waiting-1 }) // the one that redirects is not held up by the one that is stuck
	if refused.Load() != 1 {
		t.Errorf("a final answer was asked for %d times", refused.Load())
	}
	var events string // which are told of after they are counted
	waitFor(t, func() bool {
		events += strings.Join(e.take(), "\n")
		return strings.Contains(events, "302")
	})
	if !strings.Contains(events, "64 firings wait already") {
		t.Error(events)
	}
	close(release)
	w.Close()
	if d := w.Deliveries(); d.Delivered+d.Failed+d.Dropped != 201 {
		t.Errorf("%+v: 201 were sent", d)
	}
	stuck.Close()
	refusing.Close()
}

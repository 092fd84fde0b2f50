package serve

import (
	"bufio"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"dmi/live"
	"dmi/query"
	"dmi/tensor"
)

// Hundreds of open pages, a third of which read nothing, do not hold the publisher up: it hands over a token a millisecond, waits for none of
// them, and each page is told of every row, or that it was too slow for it. What it takes is logged here, and measured by bench/page.
func TestHundredsOfPages(t *testing.T) {
	const pages, silent, steps, sites = 300, 100, 1000, 37
	w := newWorld(t)
	w.hub.Close()
	w.hub = live.NewHub(sampleNames{w.Sample}, live.Options{})
	w.server.options.Live, w.server.options.StallTimeout = w.hub, time.Minute
	server := httptest.NewServer(w.server.Local())
	defer server.Close()
	ctx, stop := context.WithCancel(context.Background())
	var mu sync.Mutex
	told := make([]uint64, pages-silent)
	var readers sync.WaitGroup
	for i := range pages {
		request, err := http.NewRequestWithContext(ctx, "GET", server.URL+"/v1/live/map", nil)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := http.DefaultClient.Do(request)
		if err != nil || answer.StatusCode != http.StatusOK {
			t.Fatalf("page %d: %v %v", i, answer, err)
		}
		defer answer.Body.Close()
		if i < silent {
			continue
		}
		readers.Go(func() {
			for lines := bufio.NewScanner(answer.Body); lines.Scan(); {
				text, is := strings.CutPrefix(lines.Text(), "data: ")
				if !is {
					continue
				}
				var m mapAnswer
				if err := json.Unmarshal([]byte(text), &m); err != nil {
					t.Errorf("page %d: %v", i, err)
					return
				}
				mu.Lock()
				told[i-silent] += m.Dropped
				for _, s := range m.Sites {
					told[i-silent] += s.Rows
				}
				mu.Unlock()
			}
		})
	}
	t.Cleanup(readers.Wait)
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	defer stop()
	chunks := make([]tensor.Chunk, sites)
	data := make([]byte, 4*2560)
	took := make([]time.Duration, steps)
	begun := time.Now()
	for step := range steps {
		for i := range chunks {
			chunks[i] = tensor.Chunk{Key: w.requests[0].Key, Site: 1, First: uint32(step), Rows: 1, DType: tensor.F32, Shape: []int{2560}, Data: data}
		}
		at := time.Now()
		w.hub.Publish(w.Session.Number, chunks)
		took[step] = time.Since(at)
		time.Sleep(time.Until(begun.Add(time.Duration(step+1) * time.Millisecond)))
	}
	slices.Sort(took)
	t.Logf("%d pages, %d of which read nothing: handing a token's %d rows over took %v in the median, %v at most; 1,000 tokens in %v", pages, silent, sites, took[steps/2], took[steps-1], time.Since(begun))
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		mu.Lock()
		short := slices.IndexFunc(told, func(n uint64) bool { return n != steps*sites })
		mu.Unlock()
		if short < 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("page %d was told of %d rows, not of %d", short, told[short], steps*sites)
		}
	}
}

// A page that takes nothing for long loses the oldest maps, and is told of every row that was in them.
func TestSlowPageIsToldWhatItLost(t *testing.T) {
	hub := live.NewHub(sampleNames{}, live.Options{})
	defer hub.Close()
	r := &mapReader{news: make(chan struct{}, 1)}
	source := &mapSource{hub: hub, readers: map[*mapReader]struct{}{r: {}}}
	const maps = mapsKept + 5
	for i := range maps {
		source.handOut(mapAnswer{Tokens: uint64(i), Dropped: 1, Sites: []query.StatsRow{{Rows: 2}, {Rows: 3}}})
	}
	answers, err := source.next(t.Context(), r)
	if err != nil || len(answers) != mapsKept || answers[0].Tokens != 5 {
		t.Fatalf("%d maps from %d, %v; want the last %d", len(answers), answers[0].Tokens, err, mapsKept)
	}
	if answers[0].Dropped != 1+5*(1+2+3) {
		t.Errorf("told of %d lost rows, want 31", answers[0].Dropped)
	}
	if lost := hub.Metrics().DroppedRows; lost != 5*(2+3) {
		t.Errorf("%d rows counted as dropped, want 25: what was lost before is counted already", lost)
	}
}

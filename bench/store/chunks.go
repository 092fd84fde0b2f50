package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"time"

	"dmi/bench/result"
	"dmi/bench/traffic"
	"dmi/store"
)

const (
	manySites = 430 // of a large model, everything captured
	together  = 512 // requests
	thin      = 16  // bytes of a row: what is measured is what is kept about it
)

// chunks fills a store with so many chunks as small as they get, and asks for some of them.
func chunks(dir string, millions float64) ([]result.Row, error) {
	dir = filepath.Join(dir, "chunks")
	defer os.RemoveAll(dir)
	s, err := store.Open(dir, store.Options{})
	if err != nil {
		return nil, err
	}
	t, err := traffic.Begin(s, "s00000001", manySites, thin)
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	n, next, begun, told := int64(millions*1e6), uint64(0), time.Now(), time.Now()
	for made := int64(0); made < n; made += together * manySites {
		ids := make([]uint64, together)
		for i := range ids {
			ids[i] = next
			next++
		}
		if _, err := t.Step(ids, 0, 1); err != nil {
			return nil, errors.Join(err, s.Close())
		}
		if time.Since(told) > 5*time.Second {
			told = time.Now()
			fmt.Fprintf(os.Stderr, "%.0f of %.0f million chunks\n", float64(made)/1e6, millions)
		}
	}
	if err := s.Close(); err != nil {
		return nil, err
	}
	took := time.Since(begun).Seconds()
	sizes, err := chill(dir)
	if err != nil {
		return nil, err
	}
	opening := time.Now()
	if s, err = store.Open(dir, store.Options{}); err != nil {
		return nil, err
	}
	defer s.Close()
	opened := 1e3 * time.Since(opening).Seconds()
	made := float64(s.Stats().Chunks)
	about := float64(sizes["segments"]+sizes["manifest"]+sizes["catalogue"])/made - thin
	random := rand.New(rand.NewPCG(2, 2))
	var times []float64
	for range 300 {
		key := t.Key(random.Uint64N(next))
		asked := time.Now()
		refs, err := s.Chunks(key, random.Uint32N(manySites), 0, 1)
		if err != nil || len(refs) != 1 {
			return nil, fmt.Errorf("request %d: %d chunks, %w", key.Request, len(refs), err)
		}
		times = append(times, 1e3*time.Since(asked).Seconds())
	}
	slices.Sort(times)
	what := fmt.Sprintf("%.3g million chunks", made/1e6)
	return []result.Row{
		{Metric: what + ": written, booked, catalogued", Value: made / took / 1e3, Unit: "thousand/s"},
		{Metric: what + ": kept about each, in all files", Value: about, Unit: "bytes"},
		{Metric: what + ": of these in manifest and catalogue", Value: float64(sizes["manifest"]+sizes["catalogue"]) / made, Unit: "bytes"},
		{Metric: what + ": opening the store, cold", Value: opened, Unit: "ms"},
		result.Row{Metric: what + ": where a request's rows at a site are, cold, median", Value: times[len(times)/2], Unit: "ms"}.For("<= 5", times[len(times)/2] <= 5),
		{Metric: what + ": where a request's rows at a site are, cold, 99th of 100", Value: times[len(times)*99/100], Unit: "ms"},
	}, nil
}

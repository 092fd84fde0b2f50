package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"dmi/bench/result"
	"dmi/bench/traffic"
	"dmi/query"
	"dmi/store"
	"dmi/tensor"
)

const (
	hidden  = 2560 // Qwen3-4B's, in bf16
	width   = 2 * hidden
	layers  = 37
	batch   = 64 // requests at a time
	decoded = 64 // rows of each
)

// reads measures what it costs to read a store of so many MiB that requests were decoded into, 64 at a time; as it was written, and compacted.
func reads(dir string, mib int) ([]result.Row, error) {
	dir = filepath.Join(dir, "reads")
	defer os.RemoveAll(dir)
	requests, err := decode(dir, int64(mib)<<20)
	if err != nil {
		return nil, err
	}
	scattered, err := readStore(dir, requests, fmt.Sprintf("%d MiB as written", mib), 0)
	if err != nil {
		return nil, err
	}
	s, err := store.Open(dir, store.Options{})
	if err != nil {
		return nil, err
	}
	begun := time.Now()
	done, err := s.Compact(context.Background(), nil)
	if err = errors.Join(err, s.Close()); err != nil {
		return nil, err
	}
	took := time.Since(begun).Seconds()
	compacted, err := readStore(dir, requests, fmt.Sprintf("%d MiB compacted", mib), 3)
	rows := append(scattered, result.Row{Metric: fmt.Sprintf("compaction of %d MiB: written anew", mib), Value: float64(done.Bytes) / 1e6 / took, Unit: "MB/s"})
	return append(rows, compacted...), err
}

// decode fills a store, and returns its requests.
func decode(dir string, bytes int64) (requests []tensor.RequestKey, err error) {
	s, err := store.Open(dir, store.Options{})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	t, err := traffic.Begin(s, "s00000001", layers, width)
	if err != nil {
		return nil, err
	}
	if err := s.PutRun(tensor.Run{ID: "r00000001", Session: t.Session, Begun: time.Now()}); err != nil {
		return nil, err
	}
	for written, next := int64(0), uint64(0); written < bytes; {
		ids, known := make([]uint64, batch), make([]tensor.Request, batch)
		for i := range ids {
			ids[i] = next
			requests = append(requests, t.Key(next))
			known[i] = tensor.Request{Key: t.Key(next), ID: fmt.Sprintf("r00000001.%d", next), Run: "r00000001", Begun: time.Now(), Ended: time.Now()}
			next++
		}
		if err := s.PutRequests(known); err != nil {
			return nil, err
		}
		for at := range uint32(decoded) {
			n, err := t.Step(ids, at, 1)
			if err != nil {
				return nil, err
			}
			written += n
		}
	}
	return requests, nil
}

// readStore asks a store that lies on the disk alone for requests at sites, and for one site of all requests. atMost is the goal for reads; 0: max(3, bytes / achieved chunk).
func readStore(dir string, requests []tensor.RequestKey, what string, atMost float64) ([]result.Row, error) {
	if _, err := chill(dir); err != nil {
		return nil, err
	}
	var counter atomic.Int64
	s, err := store.Open(dir, store.Options{FS: counting{reads: &counter}})
	if err != nil {
		return nil, err
	}
	defer s.Close()
	m := s.Stats()
	bytes := int64(len(requests)) * layers * decoded * width
	chunk := float64(bytes) / float64(m.Chunks)
	random := rand.New(rand.NewPCG(1, 1))
	var counts, times []float64
	asked := 0.0 // chunks that those who were asked for have, mean
	for _, i := range random.Perm(len(requests))[:min(200, len(requests))] {
		begun := time.Now()
		counter.Store(0)
		chunks, err := readOne(s, requests[i], random.Uint32N(layers))
		if err != nil {
			return nil, err
		}
		asked += float64(chunks) / float64(min(200, len(requests)))
		counts, times = append(counts, float64(counter.Load())), append(times, 1e3*time.Since(begun).Seconds())
	}
	slices.Sort(counts)
	slices.Sort(times)
	most, mean := counts[len(counts)-1], 0.0
	for _, n := range counts {
		mean += n / float64(len(counts))
	}
	goal := fmt.Sprintf("<= %.0f", atMost)
	if atMost == 0 {
		atMost = max(3, asked)
		goal = "<= max(3, bytes / achieved chunk), " + strconv.FormatFloat(atMost, 'f', 2, 64)
	}
	if _, err := chill(dir); err != nil {
		return nil, err
	}
	var columns, raws, ratios []float64
	for range 3 {
		column, err := readColumn(s, int64(len(requests))*decoded*width)
		if err != nil {
			return nil, err
		}
		if _, err := chill(dir); err != nil {
			return nil, err
		}
		raw, err := rawRead(dir, int64(len(requests))*decoded*width)
		if err != nil {
			return nil, err
		}
		columns, raws, ratios = append(columns, column/1e6), append(raws, raw/1e6), append(ratios, column/raw)
		if _, err := chill(dir); err != nil {
			return nil, err
		}
	}
	return []result.Row{
		{Metric: what + ": bytes of a chunk", Value: chunk / 1e3, Unit: "kB"},
		result.Row{Metric: what + ": reads for a request at a site, mean", Value: mean, Unit: "reads"}.For(goal, mean <= atMost),
		{Metric: what + ": reads for a request at a site, most", Value: most, Unit: "reads"},
		{Metric: what + ": a request at a site, cold, median", Value: times[len(times)/2], Unit: "ms"},
		{Metric: what + ": a request at a site, cold, 99th of 100", Value: times[len(times)*99/100], Unit: "ms"},
		result.Row{Metric: what + ": a site of all requests, by a query, cold", Value: result.Median(columns), Unit: "MB/s"}.Against(result.Median(raws), result.Median(ratios)).
			For(">= 0.7 of raw sequential reads", result.Median(ratios) >= 0.7),
	}, nil
}

// readColumn asks for a site of all requests, as /rows does, and returns bytes a second.
func readColumn(s *store.Store, want int64) (float64, error) {
	begun, read := time.Now(), int64(0)
	e := query.New(s)
	q := query.RowsQuery{Scope: query.Scope{Run: "r00000001"}, Site: query.SiteName{Name: "blocks.7.hook_resid_post"}}
	for more := true; more; more = q.After != "" {
		page, err := e.Rows(context.Background(), q)
		if err != nil {
			return 0, err
		}
		n, err := page.Open(context.Background()).WriteTo(io.Discard)
		if err != nil {
			return 0, err
		}
		read, q.After = read+n, page.Next
	}
	if read != want {
		return 0, fmt.Errorf("%d bytes of a site were read, and %d were written", read, want)
	}
	return float64(read) / time.Since(begun).Seconds(), nil
}

// readOne reads all rows of a request at a site, and returns how many chunks they are in.
func readOne(s *store.Store, key tensor.RequestKey, site uint32) (chunks int, err error) {
	refs, err := s.Chunks(key, site, 0, decoded)
	if err != nil {
		return 0, err
	}
	rows := uint32(0)
	b := make([]byte, decoded*width)
	for _, ref := range refs {
		n := int(ref.Rows) * ref.RowBytes()
		if err := s.ReadRows(ref, 0, ref.Rows, b[:n]); err != nil {
			return 0, err
		}
		rows += ref.Rows
	}
	if rows != decoded {
		return 0, fmt.Errorf("request %d at site %d has %d rows, and %d were written", key.Request, site, rows, decoded)
	}
	return len(refs), nil
}

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"dmi/bench/result"
	"dmi/bench/traffic"
	"dmi/store"
	"dmi/tensor"
)

// writing is a store that is written to while something else happens.
type writing struct {
	t    *traffic.Traffic
	next uint64 // request
	at   uint32
}

// run writes for a while: a decode step of 64 requests, one after the other, no more than mbps (0: as fast as it goes), with a barrier every quarter of a second. It returns bytes a
// second, and how long steps and barriers took, in ms, sorted.
func (w *writing) run(mbps float64, during time.Duration) (rate float64, steps, barriers []float64, err error) {
	ctx, stop := context.WithCancel(context.Background())
	var asking sync.WaitGroup
	var failed error
	asking.Go(func() {
		for tick := time.NewTicker(250 * time.Millisecond); ; {
			select {
			case <-ctx.Done():
				tick.Stop()
				return
			case <-tick.C:
			}
			asked := time.Now()
			if failed = w.t.Store.Barrier(context.Background()); failed != nil {
				return
			}
			barriers = append(barriers, 1e3*time.Since(asked).Seconds())
		}
	})
	var written int64
	begun := time.Now()
	for time.Since(begun) < during && err == nil {
		ids := make([]uint64, batch)
		for i := range ids {
			ids[i] = w.next + uint64(i)
		}
		if w.at++; w.at == decoded {
			w.next, w.at = w.next+batch, 0
		}
		var n int64
		asked := time.Now()
		n, err = w.t.Step(ids, w.at, 1)
		steps = append(steps, 1e3*time.Since(asked).Seconds())
		written += n
		if mbps > 0 {
			time.Sleep(time.Until(begun.Add(time.Duration(float64(written) / mbps * 1e3))))
		}
	}
	rate = float64(written) / time.Since(begun).Seconds()
	stop()
	asking.Wait()
	slices.Sort(steps)
	slices.Sort(barriers)
	return rate, steps, barriers, errors.Join(err, failed)
}

// readers measures what eight readers of everything that is there, and two verifications, cost a writer, round by round.
func readers(dir string, mib, rounds int) ([]result.Row, error) {
	dir = filepath.Join(dir, "readers")
	defer os.RemoveAll(dir)
	requests, err := decode(dir, int64(mib)<<20)
	if err != nil {
		return nil, err
	}
	s, err := store.Open(dir, store.Options{})
	if err != nil {
		return nil, err
	}
	defer s.Close()
	t, err := traffic.Begin(s, "s00000002", layers, width)
	if err != nil {
		return nil, err
	}
	w := &writing{t: t}
	const rate, during = 150.0, 5 * time.Second
	var alone, beside [3][]float64 // median step, longest step, median barrier
	var read []float64
	note := func(into *[3][]float64) error {
		got, steps, barriers, err := w.run(rate, during)
		if err != nil || len(barriers) == 0 {
			return fmt.Errorf("%d barriers: %w", len(barriers), err)
		}
		fmt.Fprintf(os.Stderr, "%.0f MB/s: step median %.1f ms, longest %.0f ms; barrier median %.0f ms, longest %.0f ms\n", got/1e6, steps[len(steps)/2], steps[len(steps)-1],
			barriers[len(barriers)/2], barriers[len(barriers)-1])
		for i, v := range []float64{steps[len(steps)/2], steps[len(steps)*99/100], barriers[len(barriers)/2]} {
			into[i] = append(into[i], v)
		}
		return nil
	}
	for range rounds {
		if err := note(&alone); err != nil {
			return nil, err
		}
		bytes, end := greedy(s, requests)
		begun := time.Now()
		err := note(&beside)
		end()
		if err != nil {
			return nil, err
		}
		read = append(read, float64(bytes.Load())/time.Since(begun).Seconds()/1e6)
	}
	rows := []result.Row{{Metric: fmt.Sprintf("eight readers and two verifications beside a writer of %.0f MB/s: given to the readers", rate), Value: result.Median(read), Unit: "MB/s"}}
	for i, what := range []string{"a step of the writer, median", "a step of the writer, 99th of 100", "a barrier every 250 ms, median"} {
		var ratios []float64
		for r := range rounds {
			ratios = append(ratios, beside[i][r]/alone[i][r])
		}
		rows = append(rows, result.Row{Metric: "beside them: " + what, Value: result.Median(beside[i]), Unit: "ms"}.Against(result.Median(alone[i]), result.Median(ratios)))
	}
	return rows, nil
}

// retention measures what it costs a writer at full rate that the oldest segments go as new ones come, and that requests are deleted meanwhile.
func retention(dir string, rounds int) ([]result.Row, error) {
	const during = 5 * time.Second
	var plain, retained, deleted, took []float64
	for range rounds {
		for kind, into := range []*[]float64{&plain, &retained, &deleted} {
			rate, each, err := writeWhile(filepath.Join(dir, "retention"), kind, during)
			if err != nil {
				return nil, err
			}
			*into = append(*into, rate/1e6)
			took = append(took, each...)
			fmt.Fprintf(os.Stderr, "%s: %.0f MB/s\n", []string{"nothing goes", "retention", "deletion"}[kind], rate/1e6)
		}
	}
	ratio := func(of []float64) float64 {
		var ratios []float64
		for i := range of {
			ratios = append(ratios, of[i]/plain[i])
		}
		return result.Median(ratios)
	}
	base := result.Median(plain)
	return []result.Row{
		result.Row{Metric: "written at full rate while retention keeps 1 GiB", Value: result.Median(retained), Unit: "MB/s"}.Against(base, ratio(retained)),
		result.Row{Metric: "written at full rate while one request after the other is deleted", Value: result.Median(deleted), Unit: "MB/s"}.Against(base, ratio(deleted)),
		{Metric: "deleting a request meanwhile", Value: 1e3 * result.Median(took), Unit: "ms"},
	}, nil
}

// writeWhile writes at full rate for a while, into a new store: 0 as it is, 1 with retention, 2 while requests are deleted.
func writeWhile(dir string, kind int, during time.Duration) (rate float64, took []float64, err error) {
	defer os.RemoveAll(dir)
	o := store.Options{TidyEvery: 500 * time.Millisecond}
	if kind == 1 {
		o.RetainMiB = 1024
	}
	s, err := store.Open(dir, o)
	if err != nil {
		return 0, nil, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	t, err := traffic.Begin(s, "s00000001", layers, width)
	if err != nil {
		return 0, nil, err
	}
	over, deleting := make(chan struct{}), sync.WaitGroup{}
	var failed error
	if kind == 2 {
		deleting.Go(func() {
			for request := uint64(0); failed == nil; request++ {
				select {
				case <-over:
					return
				case <-time.After(200 * time.Millisecond):
				}
				begun := time.Now()
				var d store.Deletion
				if d, failed = s.Delete(context.Background(), []tensor.RequestKey{t.Key(request)}, nil); d.Rows > 0 {
					took = append(took, time.Since(begun).Seconds())
				}
			}
		})
	}
	w := &writing{t: t}
	rate, _, _, err = w.run(0, during)
	close(over)
	deleting.Wait()
	if kind == 1 && s.Stats().RetiredSegments == 0 {
		err = errors.Join(err, errors.New("retention: nothing went"))
	}
	if kind == 2 && len(took) == 0 {
		err = errors.Join(err, errors.New("deletion: nothing went"))
	}
	return rate, took, errors.Join(err, failed)
}

// Lists measures what it costs to list runs and requests, with what was captured of each: the first time, when their books are summed,
// and again, when only what has changed since is. The books are of as many lines as there are rows, which is the worst they can be.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"dmi/bench/result"
	"dmi/query"
	"dmi/ring"
	"dmi/store"
	"dmi/tensor"
)

func main() {
	dir := flag.String("dir", os.TempDir(), "where to make the stores")
	runs := flag.Int("runs", 10, "runs")
	requests := flag.Int("requests", 100, "requests of a run")
	few := flag.Int("few", 4, "rows of a request of one store")
	many := flag.Int("many", 400, "and of the other")
	rounds := flag.Int("rounds", 9, "times that each is asked for; medians are reported")
	out := flag.String("out", "", "directory to write the result to (default: standard output only)")
	flag.Parse()
	command := fmt.Sprintf("go run ./bench/lists -runs %d -requests %d -few %d -many %d -rounds %d -out bench/results", *runs, *requests, *few, *many, *rounds)
	rows, err := measure(*dir, *runs, *requests, *few, *many, *rounds)
	if err == nil {
		err = result.Report("lists", command, rows, *out)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "lists:", err)
		os.Exit(1)
	}
}

// question is something that is asked of an engine.
type question struct {
	name string
	ask  func(*query.Engine) (items int, err error)
}

func measure(dir string, runs, requests, few, many, rounds int) ([]result.Row, error) {
	questions := []question{
		{fmt.Sprintf("list %d runs of %d requests", runs, requests), func(e *query.Engine) (int, error) {
			page, err := e.Runs(context.Background(), query.RunsQuery{})
			return len(page.Items), err
		}},
		{"list the latest 50 requests", func(e *query.Engine) (int, error) {
			page, err := e.Requests(context.Background(), query.RequestsQuery{Latest: 50})
			return len(page.Items), err
		}},
	}
	load := result.Load()
	took := map[string]map[int][2]float64{} // by question and rows of a request: the first time, and again
	for _, rows := range []int{few, many} {
		s, err := fill(filepath.Join(dir, fmt.Sprintf("dmi-lists-%d-%d", os.Getpid(), rows)), runs, requests, rows)
		if s != nil {
			defer os.RemoveAll(s.Dir())
			defer s.Close()
		}
		if err != nil {
			return nil, fmt.Errorf("make a store: %w", err)
		}
		for _, q := range questions {
			var first, again []float64
			for range rounds {
				e := query.New(s)
				for _, into := range []*[]float64{&first, &again} {
					begun := time.Now()
					items, err := q.ask(e)
					*into = append(*into, float64(time.Since(begun).Microseconds())/1e3)
					if err != nil || items == 0 {
						return nil, fmt.Errorf("%s: %d items, %w", q.name, items, err)
					}
				}
			}
			if took[q.name] == nil {
				took[q.name] = map[int][2]float64{}
			}
			took[q.name][rows] = [2]float64{result.Median(first), result.Median(again)}
		}
	}
	table := []result.Row{load}
	for _, q := range questions {
		for _, rows := range []int{few, many} {
			t := took[q.name][rows]
			table = append(table, result.Row{Metric: fmt.Sprintf("%s, %d rows each, summed: the first time", q.name, rows), Value: t[0], Unit: "ms"},
				result.Row{Metric: fmt.Sprintf("%s, %d rows each, again", q.name, rows), Value: t[1], Unit: "ms"}.Against(t[0], t[1]/t[0]))
		}
		one, other := took[q.name][few][1], took[q.name][many][1]
		table = append(table, result.Row{Metric: fmt.Sprintf("%s, again, of %d rows each against %d", q.name, many, few), Value: other, Unit: "ms"}.Against(one, other/one).For("<= 1.5", other <= 1.5*one))
	}
	return table, nil
}

// fill makes a store whose requests each lost some rows here and there, so that its books cannot be told in few lines.
func fill(dir string, runs, requests, rows int) (*store.Store, error) {
	s, err := store.Open(dir, store.Options{})
	if err != nil {
		return nil, err
	}
	now := time.Now()
	session, err := s.BeginSession(tensor.Session{ID: "s0000001b", Begun: now})
	if err != nil {
		return s, err
	}
	if err := s.AddSites(session, []tensor.Site{{Name: "blocks.0.hook_resid_post"}}); err != nil {
		return s, err
	}
	for n := range runs * requests {
		run := fmt.Sprintf("r%08x", n/requests)
		if n%requests == 0 {
			if err := s.PutRun(tensor.Run{ID: run, Session: session, Begun: now}); err != nil {
				return s, err
			}
		}
		key := tensor.RequestKey{Session: session, Request: uint64(n)}
		request := tensor.Request{Key: key, ID: fmt.Sprintf("%s.%d", run, n%requests), Run: run, Begun: now, Ended: now}
		if err := errors.Join(s.PutRequests([]tensor.Request{request}), forward(s, key, uint64(n), uint32(rows)), s.FinishRequest(key)); err != nil {
			return s, err
		}
	}
	// Twice: what a sync commits is forgotten by the next, and only then read from the catalogue.
	return s, errors.Join(s.Barrier(context.Background()), s.Barrier(context.Background()))
}

func forward(s *store.Store, key tensor.RequestKey, step uint64, rows uint32) error {
	table := make([]byte, ring.TableSize+ring.SpanSize)
	header := ring.Table{Magic: ring.TableMagic, Bytes: uint32(len(table)), Step: step, Spans: 1}
	header.Encode(table)
	span := ring.Span{Request: key.Request, Count: rows}
	span.Encode(table[ring.TableSize:])
	record := make([]byte, ring.OpenRecordSize)
	open := ring.OpenRecord{Seq: step + 1, Step: step, TableBytes: uint64(len(table)), Sites: 1, Kind: ring.KindOpen, Rows: [3]uint32{rows}}
	open.Encode(record)
	if err := s.AppendStep(store.Step{Session: key.Session, First: step, Count: 1, Records: record, Tables: [][]byte{table}}); err != nil {
		return err
	}
	var books []tensor.Entry
	random := rand.New(rand.NewPCG(1, step))
	for first, n := uint32(0), uint32(0); first < rows; first += n {
		n = min(1+random.Uint32N(3), rows-first) // 1 to 3 captured, with one dropped after
		books = append(books, tensor.Entry{Key: key, Sites: []uint32{0}, First: first, Count: n, Stride: 1, Step: step, Outcome: tensor.Captured})
		if err := s.AppendChunk(tensor.Chunk{Key: key, First: first, Rows: n, Step: step, LastStep: step, DType: tensor.F32, Shape: []int{1}, Data: make([]byte, 4*n)}); err != nil {
			return err
		}
		if first += n; first < rows {
			books = append(books, tensor.Entry{Key: key, Sites: []uint32{0}, First: first, Count: 1, Stride: 1, Step: step, Outcome: tensor.Dropped, Reason: tensor.RingFull})
			n = 1
		}
	}
	return s.Book(books)
}

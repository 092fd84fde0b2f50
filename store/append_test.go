package store

import (
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"dmi/tensor"
)

// BenchmarkAppendOfManySites takes in steps of statistics, a row of 32 bytes for each request and site, as a pipeline's workers give them: each of as many as there are processors always the
// same sites. Nothing is written meanwhile.
func BenchmarkAppendOfManySites(b *testing.B) {
	const sites, requests = 726, 32
	s, err := Open(b.TempDir()+"/store", Options{BufferMiB: 4096, FlushAge: time.Hour, SyncAge: time.Hour})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	session, err := s.BeginSession(tensor.Session{ID: "s00000001", Producer: "p"})
	if err != nil {
		b.Fatal(err)
	}
	known := make([]tensor.Site, sites)
	for i := range known {
		known[i] = tensor.Site{ID: uint32(i), Name: fmt.Sprint("site", i)}
	}
	if err := s.AddSites(session, known); err != nil {
		b.Fatal(err)
	}
	workers := runtime.GOMAXPROCS(0)
	b.ResetTimer()
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			row := make([]byte, 4*tensor.Figures)
			chunks := make([]tensor.Chunk, requests)
			shape := tensor.StatsShape(0)
			for step := range b.N {
				for site := w; site < sites; site += workers {
					for r := range chunks {
						chunks[r] = tensor.Chunk{Key: tensor.RequestKey{Session: session, Request: uint64(r)}, Site: uint32(site), First: uint32(step), Rows: 1, Step: uint64(step),
							LastStep: uint64(step), DType: tensor.F32, Level: tensor.Stats, Shape: shape, Data: row}
					}
					if _, err := s.AppendChunks(chunks); err != nil {
						b.Error(err)
						return
					}
				}
			}
		})
	}
	all.Wait()
	b.StopTimer()
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/sites/requests, "ns/row")
}

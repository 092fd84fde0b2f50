package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"runtime"
	"sync"
	"time"

	"dmi/query"
	"dmi/store"
	"dmi/tensor"
)

// rows are a store's, all of them in memory: who reads them gets a copy, and touches no file. Everything else the store says itself.
type rows struct {
	*store.Store
	chunks map[chunk][]byte
}

type chunk struct {
	key     tensor.RequestKey
	site    uint32
	first   uint32
	attempt uint16
}

func chunkOf(ref store.ChunkRef) chunk { return chunk{ref.Key, ref.Site, ref.First, ref.Attempt} }

// load reads all rows of a store.
func load(dir string) (*rows, error) {
	s, err := store.OpenReadOnly(dir)
	if err != nil {
		return nil, err
	}
	all := &rows{s, map[chunk][]byte{}}
	requests, err := s.Requests(store.RequestFilter{Hidden: true})
	if err != nil {
		return nil, err
	}
	for _, r := range requests {
		sites, err := s.Sites(r.Key.Session)
		if err != nil {
			return nil, err
		}
		for _, site := range sites {
			found, err := s.Chunks(r.Key, site.ID, 0, math.MaxUint32)
			if err != nil {
				return nil, err
			}
			for _, ref := range found {
				data := make([]byte, int(ref.Rows)*ref.RowBytes())
				if err := s.ReadRows(ref, 0, ref.Rows, data); err != nil {
					return nil, err
				}
				all.chunks[chunkOf(ref)] = data
			}
		}
	}
	return all, nil
}

// ReadRows copies rows out of memory.
func (r *rows) ReadRows(ref store.ChunkRef, from, to uint32, dst []byte) error {
	data, known := r.chunks[chunkOf(ref)]
	row := ref.RowBytes()
	if !known || int(to)*row > len(data) {
		return fmt.Errorf("rows %d to %d of a chunk of request %d at site %d are not in memory", from, to, ref.Key.Request, ref.Site)
	}
	copy(dst, data[int(from)*row:int(to)*row])
	return nil
}

// pass is how fast all cores together sum the rows up, a chunk at a time, in GB/s: what memory gives.
func (r *rows) pass() float64 {
	work := make(chan []byte, len(r.chunks))
	total := 0
	for _, data := range r.chunks {
		work <- data
		total += len(data)
	}
	close(work)
	sums := make(chan uint64, runtime.NumCPU())
	var working sync.WaitGroup
	begun := time.Now()
	for range runtime.NumCPU() {
		working.Go(func() {
			var sum [4]uint64 // chains that do not wait for each other
			for data := range work {
				for ; len(data) >= 32; data = data[32:] {
					sum[0] += binary.LittleEndian.Uint64(data)
					sum[1] += binary.LittleEndian.Uint64(data[8:])
					sum[2] += binary.LittleEndian.Uint64(data[16:])
					sum[3] += binary.LittleEndian.Uint64(data[24:])
				}
			}
			sums <- sum[0] + sum[1] + sum[2] + sum[3]
		})
	}
	working.Wait()
	return float64(total) / time.Since(begun).Seconds() / 1e9
}

// speed is how fast a tool goes through size bytes of the rows, in GB/s.
func (r *rows) speed(tool func(context.Context, *query.Engine) error, size int64) (float64, error) {
	begun := time.Now()
	if err := tool(context.Background(), query.New(r)); err != nil {
		return 0, err
	}
	return float64(size) / time.Since(begun).Seconds() / 1e9, nil
}

package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"dmi/tensor"
)

func manySites(n int) []tensor.Site {
	sites := make([]tensor.Site, n)
	for i := range sites {
		sites[i] = tensor.Site{ID: uint32(i), Name: fmt.Sprint("site", i)}
	}
	return sites
}

// TestSitesSideBySide appends rows of many sites at once, little and large ones, to a buffer that they fill again and again, while others read, ask for what was appended to
// be durable, and finish requests: what a call has appended is there for who asks then, a barrier leaves none of what came before it in the buffer, and its bound holds.
func TestSitesSideBySide(t *testing.T) {
	const workers, sites, requests, steps = 8, 48, 6, 60
	dir := t.TempDir() + "/store"
	o := small()
	o.BufferMiB, o.SegmentMiB, o.SegmentTensors, o.FlushAge, o.SyncAge = 2, 16, 2000, time.Hour, 20*time.Millisecond
	s := mustOpen(t, dir, o)
	session, err := s.BeginSession(tensor.Session{ID: "s00000001", Producer: "p"})
	must(t, err)
	must(t, s.AddSites(session, manySites(sites)))
	key := func(r int) tensor.RequestKey { return tensor.RequestKey{Session: session, Request: uint64(r)} }
	width := func(site int) int { return []int{32, 32, 32, 600, smallPiece + 64}[site%5] }
	row := func(site, request int, position uint32) []byte {
		return bytes.Repeat(binary.LittleEndian.AppendUint64(nil, uint64(site)<<40|uint64(request)<<32|uint64(position)+1), width(site)/8)
	}
	var appended [sites]atomic.Uint32 // rows of each request, of which AppendChunks has returned
	check := func(s *Store, site, request int, rows uint32, kept bool) {
		refs, err := s.Chunks(key(request), uint32(site), 0, rows)
		if err != nil {
			t.Error(err)
			return
		}
		next := uint32(0)
		for _, ref := range refs {
			if kept && ref.data != nil && ref.First < rows {
				t.Errorf("site %d: rows from %d on are in the buffer after a barrier behind row %d", site, ref.First, rows)
			}
			data := make([]byte, int(ref.Rows)*width(site))
			if err := s.ReadRows(ref, 0, ref.Rows, data); err != nil {
				t.Error(err)
			}
			for i := range ref.Rows {
				if got := data[int(i)*width(site) : int(i+1)*width(site)]; ref.First+i != next || !bytes.Equal(got, row(site, request, next)) {
					t.Errorf("site %d, request %d: row %d comes where row %d is to, or is another", site, request, ref.First+i, next)
					return
				}
				next++
			}
		}
		if next < rows {
			t.Errorf("site %d, request %d: %d rows, of %d that were appended", site, request, next, rows)
		}
	}
	var writers, others sync.WaitGroup
	for w := range workers {
		writers.Go(func() {
			for step := range uint32(steps) {
				for site := w; site < sites; site += workers {
					var chunks []tensor.Chunk
					for r := range requests {
						chunks = append(chunks, tensor.Chunk{Key: key(r), Site: uint32(site), First: step, Rows: 1, Step: uint64(step), LastStep: uint64(step), DType: tensor.U8,
							Shape: []int{width(site)}, Data: row(site, r, step)})
					}
					if taken, err := s.AppendChunks(chunks); taken != requests || err != nil {
						t.Errorf("%d of %d chunks are taken: %v", taken, requests, err)
						return
					}
					appended[site].Add(1)
				}
			}
		})
	}
	var done atomic.Bool
	other := func(do func(turn int)) {
		others.Go(func() {
			for turn := 0; !done.Load() && !t.Failed(); turn++ {
				do(turn)
			}
		})
	}
	other(func(turn int) { check(s, turn*7%sites, turn%requests, appended[turn*7%sites].Load(), false) })
	other(func(turn int) {
		var before [sites]uint32
		for site := range before {
			before[site] = appended[site].Load()
		}
		if err := s.Barrier(t.Context()); err != nil {
			t.Error(err)
		}
		for site := turn % 5; site < sites; site += 5 {
			check(s, site, turn%requests, before[site], true)
		}
	})
	other(func(int) {
		if err := s.FinishRequest(key(0)); err != nil {
			t.Error(err)
		}
		if m := s.Stats(); m.BufferBytes > m.BufferBound {
			t.Errorf("the buffer of %d bytes holds %d", m.BufferBound, m.BufferBytes)
		}
		time.Sleep(time.Millisecond)
	})
	writers.Wait()
	done.Store(true)
	others.Wait()
	must(t, s.Barrier(t.Context()))
	if m := s.Stats(); m.BufferBytes != 0 || m.Streams != 0 {
		t.Errorf("the buffer holds %d bytes of %d streams, and all is written", m.BufferBytes, m.Streams)
	}
	must(t, s.Close())
	s = mustOpen(t, dir, o)
	defer s.Close()
	totals, err := s.SiteTotals(session)
	must(t, err)
	if len(totals) != sites {
		t.Errorf("totals of %d sites of %d", len(totals), sites)
	}
	for _, total := range totals {
		if total.Rows != steps*requests || total.Bytes != total.Rows*uint64(width(int(total.Site))) {
			t.Errorf("site %d: %d rows of %d bytes are counted, of %d rows", total.Site, total.Rows, total.Bytes, steps*requests)
		}
		for r := range requests {
			check(s, int(total.Site), r, steps, true)
		}
	}
}

// TestCloseWhileRowsCome: what a call has appended before another closes the store is kept, and nothing else.
func TestCloseWhileRowsCome(t *testing.T) {
	const sites = 8
	for round := range 20 {
		dir := t.TempDir() + "/store"
		s := mustOpen(t, dir, Options{HeaderKiB: 64, FlushAge: time.Hour})
		session, err := s.BeginSession(tensor.Session{ID: "s00000001", Producer: "p"})
		must(t, err)
		must(t, s.AddSites(session, manySites(sites)))
		key := tensor.RequestKey{Session: session, Request: 1}
		var taken [sites]uint32
		var appenders sync.WaitGroup
		for site := range taken {
			appenders.Go(func() {
				for ; ; taken[site]++ {
					if err := s.AppendChunk(tensor.Chunk{Key: key, Site: uint32(site), First: taken[site], Rows: 1, DType: tensor.U8, Shape: []int{8}, Data: make([]byte, 8)}); err != nil {
						if !errors.Is(err, ErrClosed) {
							t.Error(err)
						}
						return
					}
				}
			})
		}
		time.Sleep(time.Duration(round) * 100 * time.Microsecond)
		must(t, s.Close())
		appenders.Wait()
		s = mustOpen(t, dir, Options{HeaderKiB: 64})
		for site, rows := range taken {
			refs, err := s.Chunks(key, uint32(site), 0, math.MaxUint32)
			must(t, err)
			kept := uint32(0)
			for _, ref := range refs {
				kept += ref.Rows
			}
			if kept != rows {
				t.Errorf("site %d: %d rows are kept, of %d that were taken", site, kept, rows)
			}
		}
		must(t, s.Close())
	}
}

// TestOldestFirst: whatever shards they are in, streams become ready in the order in which they were begun, and no more of them than it takes.
func TestOldestFirst(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := newBuffer(1<<20, 1<<30)
		var weight int64
		for i := range rapid.IntRange(0, 60).Draw(t, "streams") {
			site := rapid.Uint32Range(0, 5).Draw(t, "site")
			c := tensor.Chunk{Key: tensor.RequestKey{Session: 1, Request: uint64(i)}, Site: site, Rows: 1, DType: tensor.U8, Shape: []int{8}, Data: make([]byte, 8)}
			b.add(b.shard(streamKeyOfSite{1, c.Site}), &inlet{}, &c, position{}, time.Unix(int64(i/3), 0), nil)
			weight = b.held.Load() / int64(i+1)
		}
		open := b.streams()
		order := func() {
			for i := 1; i < len(b.ready); i++ {
				if b.ready[i].born.Before(b.ready[i-1].born) {
					t.Fatalf("a stream begun at %v is ready behind one begun at %v", b.ready[i].born, b.ready[i-1].born)
				}
			}
		}
		wanted := rapid.IntRange(0, 60).Draw(t, "wanted")
		b.closeOldest(time.Time{}, int64(wanted)*weight)
		if order(); b.left() != min(wanted, open) {
			t.Fatalf("%d streams are ready, of %d, and %d were wanted", b.left(), open, wanted)
		}
		than := time.Unix(rapid.Int64Range(0, 21).Draw(t, "than"), 0)
		b.closeOldest(than, 0)
		if order(); b.left() != max(min(wanted, open), min(open, int(than.Unix())*3)) {
			t.Fatalf("%d streams are ready, of %d, and those begun before %d were wanted", b.left(), open, than.Unix())
		}
		b.closeOldest(time.Time{}, 1<<60)
		if order(); b.left() != open {
			t.Fatalf("%d streams of %d are ready", b.left(), open)
		}
	})
}

// BenchmarkAppendOfManySites takes in steps of statistics, a row of 32 bytes for each request and site, as a pipeline's workers give them: as many as there are processors,
// each always the same sites. Nothing is written meanwhile.
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
	if err := s.AddSites(session, manySites(sites)); err != nil {
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

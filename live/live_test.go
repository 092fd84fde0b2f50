package live

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"testing"
	"time"

	"dmi/internal/leaks"
	"dmi/tensor"
)

func TestMain(m *testing.M) { leaks.Main(m) }

// world is the names of two sessions with three sites each.
type world struct{}

func (world) SessionID(n uint32) (string, bool) { return fmt.Sprintf("s%08d", n), n <= 2 }
func (world) Sites(session uint32) ([]tensor.Site, error) {
	return []tensor.Site{{ID: 0, Name: "tokens", Layer: tensor.NoLayer}, {ID: 1, Name: "blocks.0.hook_resid_post"}, {ID: 2, Name: "blocks.0.attn.hook_pattern", RowAxis: 1, Keyed: true}}, nil
}
func (world) RequestID(k tensor.RequestKey) (string, bool) {
	return fmt.Sprintf("r%d.%d", k.Session, k.Request), true
}
func (w world) Introduced(k tensor.RequestKey, _ time.Time) (string, bool) { return w.RequestID(k) }

func floats(values ...float32) []byte {
	var data []byte
	for _, v := range values {
		data = binary.LittleEndian.AppendUint32(data, math.Float32bits(v))
	}
	return data
}

func chunk(session uint32, request uint64, site, first uint32, rows ...[]float32) tensor.Chunk {
	c := tensor.Chunk{Key: tensor.RequestKey{Session: session, Request: request}, Site: site, First: first, Rows: uint32(len(rows)), DType: tensor.F32, Shape: []int{len(rows[0])}}
	for _, r := range rows {
		c.Data = append(c.Data, floats(r...)...)
	}
	return c
}

func take(t *testing.T, s *Subscription) Batch {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	b, err := s.Next(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSubscribersGetWhatTheyAskedFor(t *testing.T) {
	h := NewHub(world{}, Options{})
	defer h.Close()
	resid := func(s tensor.Site) bool { return s.Name == "blocks.0.hook_resid_post" }
	filters := map[string]Filter{
		"everything": {},
		"site":       {Site: resid},
		"session":    {Session: "s00000002"},
		"request":    {Request: "r1.7"},
		"all three":  {Site: resid, Session: "s00000001", Request: "r1.7"},
		"nothing":    {Request: "unheard of"},
	}
	want := map[string][]string{
		"everything": {"r1.7/0", "r1.7/1", "r1.8/1", "r2.7/1"},
		"site":       {"r1.7/1", "r1.8/1", "r2.7/1"},
		"session":    {"r2.7/1"},
		"request":    {"r1.7/0", "r1.7/1"},
		"all three":  {"r1.7/1"},
		"nothing":    nil,
	}
	subscriptions := map[string]*Subscription{}
	for name, f := range filters {
		s, err := h.Subscribe(f)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		subscriptions[name] = s
	}
	row := []float32{1, 2}
	first := []tensor.Chunk{chunk(1, 7, 0, 0, row), chunk(1, 7, 1, 0, row), chunk(1, 8, 1, 0, row)}
	h.Publish(1, first)
	for _, c := range first {
		clear(c.Data) // its owner uses it anew
	}
	h.Publish(2, []tensor.Chunk{chunk(2, 7, 1, 0, row), chunk(2, 7, 99, 0, row)}) // 99: a site nobody has named
	for name, s := range subscriptions {
		var got []string
		if len(want[name]) > 0 {
			for _, f := range take(t, s).Frames {
				got = append(got, fmt.Sprintf("%s/%d", f.Request, f.Chunk.Site))
				if !bytes.Equal(f.Chunk.Data, floats(row...)) {
					t.Errorf("%s: data that was not published: %v", name, f.Chunk.Data)
				}
			}
		} else if len(s.queue.items) > 0 {
			t.Errorf("%s: got %d frames", name, len(s.queue.items))
		}
		if !slices.Equal(got, want[name]) {
			t.Errorf("%s: got %v, want %v", name, got, want[name])
		}
	}
}

// late is a world whose requests are told when the test says so.
type late struct {
	world
	told  chan struct{} // closed: from here on they are known
	asked chan struct{} // that somebody waits
	never bool          // they stay unknown
}

func (l *late) RequestID(k tensor.RequestKey) (string, bool) {
	select {
	case <-l.told:
		if !l.never {
			return l.world.RequestID(k)
		}
	default:
	}
	return "", false
}

func (l *late) Introduced(k tensor.RequestKey, came time.Time) (string, bool) {
	if came.IsZero() || time.Since(came) < 0 {
		panic("a frame that came at no time")
	}
	l.asked <- struct{}{}
	<-l.told
	return l.RequestID(k)
}

// Rows may overtake what is said of their request: publishing does not wait for it, who reads does.
func TestRowsThatOvertakeTheirRequestHaveItsName(t *testing.T) {
	for _, never := range []bool{false, true} {
		l := &late{told: make(chan struct{}), asked: make(chan struct{}, 16), never: never}
		h := NewHub(l, Options{})
		filters := []Filter{{}, {}, {Request: "r1.7"}, {Request: "r1.8"}}
		got := make([]chan []string, len(filters))
		for i, f := range filters {
			s, err := h.Subscribe(f)
			if err != nil {
				t.Fatal(err)
			}
			got[i] = make(chan []string, 1)
			go func() {
				var names []string
				for {
					batch, err := s.Next(context.Background())
					if err != nil {
						got[i] <- names
						return
					}
					for _, f := range batch.Frames {
						names = append(names, f.Request)
					}
				}
			}()
		}
		row := []float32{1, 2}
		h.Publish(1, []tensor.Chunk{chunk(1, 7, 0, 0, row), chunk(1, 8, 0, 0, row)}) // nobody has said who they are
		select {
		case <-l.asked:
		case <-time.After(30 * time.Second):
			t.Error("nobody waits for their names")
		}
		close(l.told)
		h.Publish(1, []tensor.Chunk{chunk(1, 7, 0, 1, row)})
		h.Close()
		want := [][]string{{"r1.7", "r1.8", "r1.7"}, {"r1.7", "r1.8", "r1.7"}, {"r1.7", "r1.7"}, {"r1.8"}}
		if never {
			want = [][]string{{"", "", ""}, {"", "", ""}, nil, nil}
		}
		for i := range filters {
			if names := <-got[i]; !slices.Equal(names, want[i]) {
				t.Errorf("never told %v, %+v: %q, want %q", never, filters[i], names, want[i])
			}
		}
	}
}

// Whoever is slow loses the oldest, is told exactly how much, and holds nobody up.
func TestSlowSubscriberLosesTheOldestAndIsTold(t *testing.T) {
	h := NewHub(world{}, Options{QueueFrames: 10})
	defer h.Close()
	slow, _ := h.Subscribe(Filter{})
	defer slow.Close()
	row := []float32{1, 2}
	const published = 1000
	for i := range uint32(published) {
		h.Publish(1, []tensor.Chunk{chunk(1, 1, 1, 3*i, row, row, row)})
	}
	b := take(t, slow)
	if len(b.Frames) != 10 || b.Dropped != 3*(published-10) {
		t.Fatalf("got %d frames and %d rows dropped, want 10 and %d", len(b.Frames), b.Dropped, 3*(published-10))
	}
	for i, f := range b.Frames {
		if f.Chunk.First != 3*uint32(published-10+i) {
			t.Fatalf("frame %d begins at row %d: not the latest ones, in order", i, f.Chunk.First)
		}
	}
	if m := h.Metrics(); m.DroppedRows != b.Dropped || m.Frames != published {
		t.Errorf("metrics %+v", m)
	}
	h.Publish(1, []tensor.Chunk{chunk(1, 1, 1, 0, row)})
	if b := take(t, slow); b.Dropped != 0 || len(b.Frames) != 1 {
		t.Errorf("the count is told again: %+v", b)
	}
}

func TestQueueIsBoundedInBytes(t *testing.T) {
	h := NewHub(world{}, Options{QueueBytes: 100})
	defer h.Close()
	s, _ := h.Subscribe(Filter{})
	defer s.Close()
	wide := make([]float32, 10) // 40 bytes
	for range 5 {
		h.Publish(1, []tensor.Chunk{chunk(1, 1, 1, 0, wide)})
	}
	if b := take(t, s); len(b.Frames) != 2 || b.Dropped != 3 {
		t.Errorf("got %d frames, %d dropped; 100 bytes hold 2 of 40", len(b.Frames), b.Dropped)
	}
	h.Publish(1, []tensor.Chunk{chunk(1, 1, 1, 0, wide, wide, wide)}) // larger than the bound: alone, not never
	if b := take(t, s); len(b.Frames) != 1 {
		t.Errorf("a chunk over the bound: %d frames", len(b.Frames))
	}
}

// The sum of what is delivered and what is dropped is what was published, whatever the timing.
func TestNothingIsLostUncounted(t *testing.T) {
	h := NewHub(world{}, Options{QueueFrames: 7})
	const publishers, each, readers = 3, 2000, 4
	var group sync.WaitGroup
	totals := make([]uint64, readers)
	for i := range readers {
		s, err := h.Subscribe(Filter{})
		if err != nil {
			t.Fatal(err)
		}
		group.Go(func() {
			defer s.Close()
			for {
				b, err := s.Next(t.Context())
				if errors.Is(err, ErrClosed) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				totals[i] += uint64(len(b.Frames)) + b.Dropped
				if i == 0 {
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	var publishing sync.WaitGroup
	for p := range publishers {
		publishing.Go(func() {
			for i := range uint32(each) {
				h.Publish(1, []tensor.Chunk{chunk(1, uint64(p), 1, i, []float32{1})})
			}
		})
	}
	publishing.Wait()
	h.Close()
	group.Wait()
	for i, n := range totals {
		if n != publishers*each {
			t.Errorf("reader %d: delivered and dropped sum to %d, %d were published", i, n, publishers*each)
		}
	}
}

func TestRowsOfKeyedSitesCountOnlyTheirOwnKeys(t *testing.T) {
	h := NewHub(world{}, Options{})
	defer h.Close()
	s, _ := h.Subscribe(Filter{})
	defer s.Close()
	// Two queries at positions 1 and 2, two heads, three keys: what lies beyond the query's position is fill, made loud here.
	c := tensor.Chunk{Key: tensor.RequestKey{Session: 1}, Site: 2, First: 1, Rows: 2, DType: tensor.F32, Shape: []int{2, 3}, Data: floats(
		.5, .5, 99, .25, .75, 99,
		.2, .3, .5, 1, 0, 0)}
	h.Publish(1, []tensor.Chunk{c})
	rows := take(t, s).Frames[0].Rows()
	if len(rows) != 2 || rows[0].Count != 4 || rows[0].Max != .75 || rows[1].Count != 6 || rows[1].Max != 1 {
		t.Errorf("rows %+v", rows)
	}
	c.DType, c.Shape, c.Site, c.Data = tensor.C64, []int{1}, 1, make([]byte, 16)
	h.Publish(1, []tensor.Chunk{c})
	if rows := take(t, s).Frames[0].Rows(); rows != nil {
		t.Errorf("complex numbers have statistics: %v", rows)
	}
}

func TestEventsAreKeptForThoseWhoComeLater(t *testing.T) {
	h := NewHub(world{}, Options{RecentEvents: 3})
	for i := range 5 {
		h.Event(Event{Level: "info", Code: "attach", Message: fmt.Sprint(i)})
	}
	stream, err := h.Events(0)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	h.Event(Event{Level: "info", Code: "detach", Message: "5"})
	events, dropped, err := stream.Next(t.Context())
	if err != nil || dropped != 0 {
		t.Fatal(dropped, err)
	}
	var got []string
	for _, e := range events {
		got = append(got, fmt.Sprintf("%d:%s", e.ID, e.Message))
		if e.Time.IsZero() {
			t.Error("an event without its time")
		}
	}
	if want := []string{"3:2", "4:3", "5:4", "6:5"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if recent := h.Recent(5); len(recent) != 1 || recent[0].ID != 6 {
		t.Errorf("after 5: %v", recent)
	}
	h.Close()
	if _, _, err := stream.Next(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
}

func TestSubscribersAreBounded(t *testing.T) {
	h := NewHub(world{}, Options{Subscribers: 2})
	defer h.Close()
	a, _ := h.Subscribe(Filter{})
	b, _ := h.Events(0)
	defer b.Close()
	if _, err := h.Subscribe(Filter{}); !errors.Is(err, ErrTooMany) {
		t.Fatalf("a third: %v", err)
	}
	a.Close()
	a.Close()
	c, err := h.Subscribe(Filter{})
	if err != nil {
		t.Fatalf("after one left: %v", err)
	}
	c.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Next(ctx); err == nil {
		t.Error("a closed subscription delivers")
	}
}

func TestPublishingToNobodyAllocatesNothing(t *testing.T) {
	h := NewHub(world{}, Options{})
	chunks := []tensor.Chunk{chunk(1, 1, 1, 0, []float32{1})}
	if n := testing.AllocsPerRun(100, func() { h.Publish(1, chunks) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkPublish(b *testing.B) {
	for _, subscribers := range []int{0, 1, 100} {
		b.Run(fmt.Sprint(subscribers), func(b *testing.B) {
			h := NewHub(world{}, Options{})
			for range subscribers {
				s, _ := h.Subscribe(Filter{})
				defer s.Close()
			}
			chunks := []tensor.Chunk{chunk(1, 1, 1, 0, make([]float32, 2560))}
			for b.Loop() {
				h.Publish(1, chunks)
			}
		})
	}
}

// BenchmarkLatency is from Publish to the subscriber's statistics in hand.
func BenchmarkLatency(b *testing.B) {
	h := NewHub(world{}, Options{})
	s, _ := h.Subscribe(Filter{})
	defer s.Close()
	c := chunk(1, 1, 1, 0, make([]float32, 2560))
	got := make(chan time.Time)
	go func() {
		for {
			batch, err := s.Next(context.Background())
			if err != nil {
				close(got)
				return
			}
			batch.Frames[0].Rows()
			got <- time.Now()
		}
	}()
	var took []time.Duration
	for b.Loop() {
		at := time.Now()
		h.Publish(1, []tensor.Chunk{c})
		took = append(took, (<-got).Sub(at))
	}
	h.Close()
	<-got
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1e3, "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds())/1e3, "p99-µs")
}

package pipeline_test

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"dmi/drain"
	"dmi/internal/leaks"
	"dmi/internal/ringtape"
	"dmi/pipeline"
	"dmi/ring"
	"dmi/tensor"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { leaks.Main(m) }

// sink keeps everything, row by row.
type sink struct {
	mu      sync.Mutex
	t       *traffic
	windows map[rowKey]int
	rows    map[rowKey]int // how often a row came
	booked  map[rowKey]fate
	loose   map[fate]uint64
	total   uint64
	wrong   []string
	raw     map[int]uint64 // records appended to the manifest, by lane
	slow    func()
	refuses func(tensor.Chunk) bool // nil: none
	refused map[rowKey]bool
}

func newSink(t *traffic) *sink {
	return &sink{t: t, rows: map[rowKey]int{}, booked: map[rowKey]fate{}, loose: map[fate]uint64{}, raw: map[int]uint64{}, windows: map[rowKey]int{}, refused: map[rowKey]bool{}}
}

func (s *sink) complain(format string, args ...any) {
	if len(s.wrong) < 10 {
		s.wrong = append(s.wrong, fmt.Sprintf(format, args...))
	}
}

// AppendChunks takes chunks up to the first that it refuses.
func (s *sink) AppendChunks(chunks []tensor.Chunk) (taken int, err error) {
	if s.slow != nil {
		s.slow()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range chunks {
		if err == nil && s.refuses != nil && s.refuses(c) {
			err = errors.New("refused")
		}
		if err == nil {
			s.take(c)
			taken++
			continue
		}
		for i := range c.Rows {
			s.refused[rowKey{c.Site, c.Key.Request, c.Attempt, c.First + i}] = true
		}
	}
	return taken, err
}

func (s *sink) take(c tensor.Chunk) {
	site := &s.t.sites[c.Site]
	elements := 1
	for _, d := range c.Shape {
		elements *= d
	}
	size := elements * c.DType.Size()
	if len(c.Data) != int(c.Rows)*size || cap(c.Data) != len(c.Data) || c.DType != site.dtype {
		s.complain("chunk of site %s: %d rows of %v %v in %d bytes (capacity %d)", site.name, c.Rows, c.Shape, c.DType, len(c.Data), cap(c.Data))
		return
	}
	for i := range c.Rows {
		k := rowKey{c.Site, c.Key.Request, c.Attempt, c.First + i}
		s.rows[k]++
		want := rowBytes(site, k, c.Shape, s.windows[k])
		if !bytes.Equal(c.Data[int(i)*size:int(i+1)*size], want) {
			s.complain("%v (%s, %v): got %x, want %x", k, site.name, c.Shape, c.Data[int(i)*size:int(i+1)*size], want)
		}
	}
}

func (s *sink) Book(entries []tensor.Entry) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range entries {
		f := fate{e.Outcome, e.Reason}
		s.total += uint64(e.Count) * uint64(len(e.Sites))
		if e.Key.Request == tensor.NoRequest {
			s.loose[f] += uint64(e.Count) * uint64(len(e.Sites))
			continue
		}
		for _, site := range e.Sites {
			for i := range e.Count {
				k := rowKey{site, e.Key.Request, e.Attempt, e.First + i*e.Stride}
				if old, twice := s.booked[k]; twice {
					s.complain("%v is booked twice: %v and %v", k, old, f)
				}
				s.booked[k] = f
				if f.outcome == tensor.Captured && s.rows[k] != 1 {
					s.complain("%v is booked captured and came %d times", k, s.rows[k])
				}
			}
		}
	}
	return nil
}

func (s *sink) Append(lane int, first uint64, records []byte, tables [][]byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if first != s.raw[lane] {
		s.complain("lane %d: manifest is given records from %d on after %d", lane, first, s.raw[lane])
	}
	s.raw[lane] = first + uint64(len(records)/ring.RecordSize)
	return nil
}

// echo is a Live and what stands before a Store: each is given the same chunks, Live first.
type echo struct {
	pipeline.Store
	mu    sync.Mutex
	shown map[string]int // that the store has not been given
	lied  bool           // by a producer that may say that bytes are there before they are: they may change from one reading to the next
	wrong string
}

func (o *echo) name(c *tensor.Chunk) string {
	sum := uint32(0)
	if !o.lied {
		sum = crc32.ChecksumIEEE(c.Data)
	}
	return fmt.Sprint(c.Key, c.Site, c.Attempt, c.First, c.Rows, c.Step, c.DType, c.Level, c.Shape, sum)
}

func (o *echo) Publish(_ uint32, chunks []tensor.Chunk) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := range chunks {
		o.shown[o.name(&chunks[i])]++
	}
}

func (o *echo) Heard() bool { return true }

func (o *echo) AppendChunks(chunks []tensor.Chunk) (int, error) {
	o.mu.Lock()
	for i := range chunks {
		name := o.name(&chunks[i])
		if o.shown[name] == 0 {
			o.wrong = "the store was given a chunk that subscribers were not: " + name
		} else if o.shown[name]--; o.shown[name] == 0 {
			delete(o.shown, name)
		}
	}
	o.mu.Unlock()
	return o.Store.AppendChunks(chunks)
}

// engine runs drain and pipeline over a producer's ring.
type engine struct {
	live     *echo
	ring     *ring.Ring
	bell     *ring.Bell
	drain    *drain.Drain
	pipeline *pipeline.Pipeline
	done     chan error
	t        interface{ Fatal(...any) }
}

// engineSink is what a drain and a pipeline give to.
type engineSink interface {
	pipeline.Store
	drain.Manifest
}

func startEngine(t interface{ Fatal(...any) }, p *ringtape.Producer, s engineSink, events func(level, code, message string), o drain.Options) *engine {
	return startRuledEngine(t, p, s, events, o, nil)
}

func startRuledEngine(t interface{ Fatal(...any) }, p *ringtape.Producer, s engineSink, events func(level, code, message string), o drain.Options, rules pipeline.Rules) *engine {
	r, err := ring.Map(p.FDs[0], 1<<40)
	if err != nil {
		t.Fatal(err)
	}
	dup := func(fd int) int {
		n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	bell, err := ring.NewBell(r, dup(p.FDs[1]), dup(p.FDs[2]))
	if err != nil {
		t.Fatal(err)
	}
	items := make(chan []*drain.Item, 4)
	o.Manifest, o.Sites, o.Event = s, func([]ring.Site) error { return nil }, events
	e := &engine{ring: r, bell: bell, done: make(chan error, 1), t: t}
	e.drain = drain.New(r, bell, items, o)
	e.live = &echo{Store: s, shown: map[string]int{}, lied: p.Lenient}
	e.pipeline = pipeline.New(pipeline.Options{Session: 1, Store: e.live, Live: e.live, Event: events, ShareBytes: 1 << rand.IntN(21), Rules: rules})
	go func() {
		failed := make(chan error, 1)
		go func() { failed <- e.drain.Run() }()
		e.pipeline.Run(items)
		e.done <- <-failed
	}()
	return e
}

func (e *engine) finish(grace time.Duration) error {
	e.drain.Finish(tensor.ProducerExit, grace)
	var err error
	select {
	case err = <-e.done:
	case <-time.After(2 * time.Minute):
		e.t.Fatal("the drain does not end")
	}
	e.bell.Close()
	e.ring.Close()
	if e.live.wrong != "" {
		e.t.Fatal(e.live.wrong)
	}
	for name := range e.live.shown {
		e.t.Fatal("subscribers were given a chunk that the store was not: " + name)
	}
	return err
}

func drawShape(t *rapid.T) (uint32, ringtape.Shape) {
	mode := uint32(rapid.IntRange(0, 1).Draw(t, "mode"))
	s := ringtape.Shape{Lanes: uint32(rapid.IntRange(1, 3).Draw(t, "lanes")), RecordCapacity: 1 << rapid.IntRange(3, 8).Draw(t, "records"),
		CommandCapacity: 1 << rapid.IntRange(0, 5).Draw(t, "commands"), SiteCapacity: 16,
		Payload: 4096 * uint64(rapid.IntRange(16, 40).Draw(t, "payload")), Table: 4096 * uint64(rapid.IntRange(1, 3).Draw(t, "table")),
		Staging: 4096 * uint64(rapid.IntRange(4, 64).Draw(t, "staging"))}
	if mode == ring.ModeComplete {
		s.Spill = 4096 * uint64(rapid.IntRange(0, 30).Draw(t, "spill"))
	}
	return mode, s
}

// Random traffic through ring, drain and pipeline: every row that was captured is, byte for byte, what its request, position, head and key make
// it, and the books hold each row once, with the fate that the producer gave it.
func TestRandomTrafficAgainstReference(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		mode, shape := drawShape(t)
		traffic, err := newTraffic(rapid.Uint64().Draw(t, "seed"), mode, shape)
		if err != nil {
			t.Fatal(err)
		}
		defer traffic.p.Close()
		s := newSink(traffic)
		var events, repeated []string
		if rapid.IntRange(0, 4).Draw(t, "slow") == 0 {
			s.slow = func() { time.Sleep(20 * time.Microsecond) }
		}
		if rapid.IntRange(0, 3).Draw(t, "refuses") == 0 {
			s.refuses = func(c tensor.Chunk) bool { return (uint64(c.First)+c.Key.Request+uint64(c.Site))%5 == 0 }
		}
		var mu sync.Mutex
		e := startEngine(t, traffic.p, s, func(level, code, message string) {
			mu.Lock()
			defer mu.Unlock()
			switch code {
			case "not_fired":
			case "repeated":
				repeated = append(repeated, strings.Split(message, `"`)[1])
			case "store":
				if s.refuses == nil {
					events = append(events, code+": "+message)
				}
			default:
				events = append(events, code+": "+message)
			}
		}, drain.Options{CoalesceBytes: 1 << rapid.IntRange(9, 16).Draw(t, "coalesce"),
			BusyPoll: time.Duration(rapid.IntRange(0, 2).Draw(t, "polls")) * time.Millisecond})
		traffic.p.StartPump()
		for range rapid.IntRange(1, 25).Draw(t, "steps") {
			lane := traffic.p.Lanes[traffic.IntN(len(traffic.p.Lanes))]
			if err := traffic.runStep(lane, s); err != nil {
				t.Fatal(err, events)
			}
		}
		marked := make(chan struct{})
		e.drain.Mark(func() { close(marked) })
		select {
		case <-marked:
		case <-time.After(time.Minute):
			t.Fatal("the mark does not come")
		}
		traffic.p.Finish()
		if err := e.finish(time.Minute); err != nil {
			t.Fatal(err)
		}
		for _, w := range s.wrong {
			t.Error(w)
		}
		mu.Lock()
		for _, event := range events {
			t.Error("unexpected event:", event)
		}
		if n := e.pipeline.Status().Repeated; (n > 0) != (len(repeated) > 0) {
			t.Errorf("%d rows came again, of which %d sites were reported", n, len(repeated))
		}
		slices.Sort(repeated)
		if once := slices.Compact(slices.Clone(repeated)); len(once) != len(repeated) {
			t.Errorf("sites that fired again are reported once each, not as %q", repeated)
		}
		mu.Unlock()
		compare(t, traffic, s)
		for i, lane := range traffic.p.Lanes {
			if s.raw[i] != lane.Head() {
				t.Errorf("lane %d: %d of %d records in the manifest", i, s.raw[i], lane.Head())
			}
			if room := lane.Room(); room != int(shape.RecordCapacity) {
				t.Errorf("lane %d: %d of %d record slots were given back", i, room, shape.RecordCapacity)
			}
		}
	})
}

func compare(t interface{ Errorf(string, ...any) }, traffic *traffic, s *sink) {
	complaints := 0
	for k := range s.refused {
		if want, known := traffic.want[k]; known && want.outcome == tensor.Captured {
			traffic.want[k] = fate{tensor.Lost, tensor.IO}
		}
	}
	for k, want := range traffic.want {
		if got := s.booked[k]; got != want {
			if complaints++; complaints < 10 {
				t.Errorf("%v (%s): booked %v/%v, want %v/%v", k, traffic.sites[k.site].name, got.outcome, got.reason, want.outcome, want.reason)
			}
		}
	}
	for k, got := range s.booked {
		if _, known := traffic.want[k]; !known {
			if complaints++; complaints < 10 {
				t.Errorf("%v is booked %v/%v, and was never produced", k, got.outcome, got.reason)
			}
		}
	}
	for k, n := range s.rows {
		if o := traffic.want[k].outcome; o != tensor.Captured && o != tensor.Rejected {
			t.Errorf("%v came %d times, and is %v", k, n, traffic.want[k])
		}
	}
	for f, want := range traffic.loose {
		if s.loose[f] != want {
			t.Errorf("%d rows of no request are %v/%v, want %d", s.loose[f], f.outcome, f.reason, want)
		}
	}
}

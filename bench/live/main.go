//go:build linux

// Live measures how long a decoded token's tensors take from their publication in shared memory to a subscriber that has read them
// from the engine's HTTP socket. Producer and subscriber are this process, the engine is `dmi serve` in another.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"time"

	"dmi/bench/result"
	"dmi/internal/ringtape"
	"dmi/ring"

	"golang.org/x/sys/unix"
)

const (
	hidden = 2560 // Qwen3-4B's
	width  = 2 * hidden
)

const warmUp = 50

func main() {
	engine := flag.String("engine", "bin/dmi", "the engine's program")
	steps := flag.Int("steps", 400, "decode steps of each measurement")
	pace := flag.Duration("pace", 10*time.Millisecond, "time between steps")
	out := flag.String("out", "", "directory to write the result to (default: standard output only)")
	before := flag.String("before", "", "another engine's program, to measure beside it")
	following := flag.String("follow", "", "an engine's HTTP socket: write when each tensor of -site was read, in Unix nanoseconds, and do nothing else")
	site := flag.String("site", siteName(0), "for -follow")
	every := flag.Bool("every", false, "for -follow: subscribe to every site, not to -site alone")
	asRelay := flag.String("relay", "", "be the relay that is measured beside the engine, direct or pumped; not for people")
	flag.Parse()
	var err error
	switch {
	case *asRelay != "":
		err = relay(*asRelay == "pumped")
	case *following != "":
		err = followTo(os.Stdout, *following, *site, *every)
	default:
		err = run(*engine, *before, *steps, *pace, *out)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "live:", err)
		os.Exit(1)
	}
}

// place is where the engine runs, and beside what.
type place struct {
	name  string
	own   bool // it has a core to itself
	busy  bool // other processes keep every core busy
	polls bool // control.busy_poll_s is set
}

// kind is what is published, and how a subscriber is given it.
type kind struct {
	name   string
	sites  int
	path   string
	pumped bool // by way of the payload ring, from which the engine has the pump copy it: what is large on the CPU, and all on a device. Else the engine reads it where the op put it
	goal   bool
	best   bool // in best-effort mode
}

var kinds = []kind{
	{name: "1 tensor of 5 KiB", sites: 1, path: "/v1/live/tensors", goal: true},
	{name: "1 tensor of 5 KiB, best-effort", sites: 1, path: "/v1/live/tensors", goal: true, best: true},
	{name: "statistics of 1 row of 5 KiB", sites: 1, path: "/v1/live/stats", goal: true},
	{name: "a group of 37 tensors of 5 KiB, the last of them", sites: 37, path: "/v1/live/tensors"},
	{name: "a group of 37 tensors of 5 KiB, the last of them to a subscriber of that one", sites: 37, path: "/v1/live/tensors?site=" + siteName(36)},
	{name: "1 tensor of 5 KiB by way of the payload ring", sites: 1, path: "/v1/live/tensors", pumped: true, best: true},
}

func run(engine, before string, steps int, pace time.Duration, out string) error {
	rows := []result.Row{result.Load()}
	for _, at := range []place{{name: "engine with a core to itself", own: true},
		{name: "engine that polls, with a core to itself", own: true, polls: true}, {name: "nothing pinned"}, {name: "every core busy with other work", busy: true}} {
		var floors [2][2]float64 // direct, pumped: p50, p99
		for i, name := range []string{"bare relay with the same wake-ups", "bare relay with the same wake-ups, by way of a pump"} {
			bare, err := at.measure(func(prefix []string) ([]float64, error) {
				self, err := os.Executable()
				if err != nil {
					return nil, err
				}
				return floor(append(prefix, self), i == 1, steps, pace)
			})
			if err != nil {
				return fmt.Errorf("%s, relay: %w", at.name, err)
			}
			p50, p99 := quantiles(bare)
			floors[i] = [2]float64{p50, p99}
			rows = append(rows, result.Row{Metric: name + ", p50, " + at.name, Value: p50, Unit: "us"}, result.Row{Metric: name + ", p99, " + at.name, Value: p99, Unit: "us"})
			fmt.Fprintf(os.Stderr, "%s, %s: p50 %.0f µs, p99 %.0f µs\n", at.name, name, p50, p99)
		}
		for _, k := range kinds {
			var before50 float64
			if before != "" {
				took, err := at.measure(func(prefix []string) ([]float64, error) { return measure(append(prefix, before), nil, k, steps, pace) })
				if err != nil {
					return fmt.Errorf("%s, %s, %s: %w", before, at.name, k.name, err)
				}
				var p99 float64
				before50, p99 = quantiles(took)
				fmt.Fprintf(os.Stderr, "%s, %s, by %s: p50 %.0f µs, p99 %.0f µs\n", at.name, k.name, before, before50, p99)
			}
			took, err := at.measure(func(prefix []string) ([]float64, error) {
				return measure(append(prefix, engine), at.settings(), k, steps, pace)
			})
			if err != nil {
				return fmt.Errorf("%s, %s: %w", at.name, k.name, err)
			}
			p50, p99 := quantiles(took)
			fmt.Fprintf(os.Stderr, "%s, %s: p50 %.0f µs, p99 %.0f µs\n", at.name, k.name, p50, p99)
			floor := floors[0]
			if k.pumped {
				floor = floors[1]
			}
			row50 := result.Row{Metric: "publication -> subscriber, p50, " + k.name + ", " + at.name, Value: p50, Unit: "us"}.Against(floor[0], p50/floor[0])
			row99 := result.Row{Metric: "publication -> subscriber, p99, " + k.name + ", " + at.name, Value: p99, Unit: "us"}.Against(floor[1], p99/floor[1])
			if k.goal && !at.busy {
				row50 = row50.For("<= 150", p50 <= 150)
			}
			if k.goal && at.own {
				row99 = row99.For("<= 1000", p99 <= 1000)
			}
			rows = append(rows, row50, row99)
			if before50 > 0 {
				rows = append(rows, result.Row{Metric: "against the engine of -before, p50, " + k.name + ", " + at.name, Value: p50, Unit: "us"}.Against(before50, p50/before50))
			}
		}
	}
	command := fmt.Sprintf("go run ./bench/live -steps %d -pace %v", steps, pace)
	if before != "" {
		command += " -before " + before
	}
	return result.Report("live_latency", command+" -out bench/results", rows, out)
}

func quantiles(took []float64) (p50, p99 float64) {
	slices.Sort(took)
	return took[len(took)/2], took[len(took)*99/100]
}

// measure runs something there: with prefix before the engine's command, where it has a core to itself that nothing else of ours is on.
func (at place) measure(what func(prefix []string) ([]float64, error)) ([]float64, error) {
	var prefix []string
	if last := runtime.NumCPU() - 1; at.own && last > 0 {
		prefix = []string{"taskset", "-c", strconv.Itoa(last)}
		var others, all unix.CPUSet
		if err := unix.SchedGetaffinity(0, &all); err != nil {
			return nil, err
		}
		others = all
		others.Clear(last)
		if err := setAffinity(&others); err != nil {
			return nil, err
		}
		defer setAffinity(&all)
	}
	if at.busy {
		for range runtime.NumCPU() {
			other := exec.Command("sh", "-c", "while :; do :; done")
			if err := other.Start(); err != nil {
				return nil, err
			}
			defer func() {
				other.Process.Kill()
				other.Wait()
			}()
		}
	}
	return what(prefix)
}

// settings of the engine.
func (at place) settings() []string {
	if at.polls {
		return []string{"--set", "control.busy_poll_s=0.1"}
	}
	return []string{"--set", "control.busy_poll_s=0"}
}

// measure gives the latency of each step in microseconds.
func measure(program, settings []string, k kind, steps int, pace time.Duration) (took []float64, err error) {
	dir, err := os.MkdirTemp("", "dmi")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	command := append(program, "serve", "--store", filepath.Join(dir, "s"), "--log-level", "warning")
	command = append(command, settings...)
	engine := exec.Command(command[0], command[1:]...)
	engine.Stderr = os.Stderr
	said, err := engine.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := engine.Start(); err != nil {
		return nil, err
	}
	defer func() {
		engine.Process.Signal(os.Interrupt)
		engine.Wait()
	}()
	var ready struct {
		Control  string
		HTTPUnix string `json:"http_unix"`
	}
	text, err := bufio.NewReader(said).ReadBytes('\n')
	if err != nil {
		return nil, fmt.Errorf("the engine did not start: %w", err)
	}
	if err := json.Unmarshal(text, &ready); err != nil {
		return nil, err
	}
	p, err := attach(ready.Control, k)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	arrived := make(chan time.Time, steps)
	body, err := subscribe(ready.HTTPUnix, k.path)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	failed := make(chan error, 1)
	go func() {
		failed <- follow(body, k.path, siteName(uint32(k.sites-1)), arrived)
	}()
	time.Sleep(200 * time.Millisecond)
	for step := range warmUp + steps {
		at, err := p.forward(uint64(step), k)
		if err != nil {
			return nil, err
		}
		select {
		case then := <-arrived:
			if step >= warmUp {
				took = append(took, float64(then.Sub(at).Nanoseconds())/1e3)
			}
		case err := <-failed:
			return nil, fmt.Errorf("the stream ended: %w", err)
		case <-time.After(10 * time.Second):
			return nil, fmt.Errorf("step %d did not arrive within 10 s", step)
		}
		time.Sleep(time.Until(at.Add(pace)))
	}
	return took, nil
}

// setAffinity moves every thread of this process.
func setAffinity(set *unix.CPUSet) error {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	for _, t := range threads {
		id, err := strconv.Atoi(t.Name())
		if err != nil {
			return err
		}
		if err := unix.SchedSetaffinity(id, set); err != nil && err != unix.ESRCH {
			return err
		}
	}
	return nil
}

func subscribe(socket, path string) (io.ReadCloser, error) {
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	answer, err := client.Get("http://localhost" + path)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("GET %s: %s", path, answer.Status)
	}
	return answer.Body, nil
}

// followTo writes a line for each tensor of a site that came, until the engine ends.
func followTo(out io.Writer, socket, site string, every bool) error {
	path := "/v1/live/tensors"
	if !every {
		path += "?site=" + url.QueryEscape(site)
	}
	body, err := subscribe(socket, path)
	if err != nil {
		return err
	}
	defer body.Close()
	arrived, ended := make(chan time.Time, 1), make(chan error, 1)
	go func() { ended <- follow(body, path, site, arrived) }()
	fmt.Fprintln(out, "ready")
	for {
		select {
		case at := <-arrived:
			fmt.Fprintln(out, at.UnixNano())
		case err := <-ended:
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return nil
			}
			return err
		}
	}
}

// follow tells when the tensor of a site in each step, or its statistics, have been read.
func follow(body io.Reader, path, name string, arrived chan<- time.Time) error {
	in := bufio.NewReaderSize(body, 1<<20)
	if path == "/v1/live/stats" {
		for {
			text, err := in.ReadBytes('\n')
			if err != nil {
				return err
			}
			if bytes.HasPrefix(text, []byte("data: ")) && bytes.Contains(text, []byte(name)) {
				arrived <- time.Now()
			}
		}
	}
	var prefix [8]byte
	var frame []byte
	for {
		if _, err := io.ReadFull(in, prefix[:]); err != nil {
			return err
		}
		head, body := binary.LittleEndian.Uint32(prefix[:]), binary.LittleEndian.Uint32(prefix[4:])
		if head == 0 { // a sign of life, or the end
			continue
		}
		n := int(head) + int(body)
		frame = slices.Grow(frame[:0], n)[:n]
		if _, err := io.ReadFull(in, frame); err != nil {
			return err
		}
		if bytes.Contains(frame[:head], []byte(name)) {
			arrived <- time.Now()
		}
	}
}

func siteName(i uint32) string { return fmt.Sprintf("blocks.%d.hook_resid_post", i) }

type producer struct {
	*ringtape.Producer
	client *ringtape.Client
	data   []byte
}

func attach(socket string, k kind) (*producer, error) {
	shape := ringtape.Shape{Mode: ring.ModeComplete, Spill: width << 13, Lanes: 1, // tensors fill it without a corner
		RecordCapacity: 4096, CommandCapacity: 1024, SiteCapacity: 64, Payload: 64 << 20, Table: 1 << 20, Staging: 64 << 20}
	mode := "complete"
	if k.best {
		shape.Mode, mode = ring.ModeBestEffort, "best-effort"
	}
	made, err := ringtape.NewProducer(shape)
	if err != nil {
		return nil, err
	}
	p := &producer{Producer: made, data: make([]byte, width)}
	for i := range p.data {
		p.data[i] = byte(i % 61)
	}
	for i := range uint32(k.sites) {
		p.AddSite(ring.Site{Layer: i, NDim: 2, Role: [ring.MaxDims]uint8{ring.RoleRow, ring.RoleInner}}, siteName(i))
	}
	p.StartPump()
	if p.client, err = ringtape.Dial(socket); err != nil {
		return nil, err
	}
	hello, err := json.Marshal(map[string]any{"type": "hello", "protocol": 1, "abi": ring.ABIVersion, "token": "", "session": "s0000be9c", "producer": p.Name(), "resume": false, "mode": mode,
		"text": "none", "process": map[string]any{}, "versions": map[string]any{}, "model": map[string]any{}, "aliases": map[string]any{}, "hooks": []string{"**"},
		"run": map[string]any{"id": "r0000be9c", "labels": map[string]any{}, "tags": []string{}, "begun_unix_ns": time.Now().UnixNano()}})
	if err != nil {
		return nil, err
	}
	if err := p.client.Hello(hello, p.FDs[:]...); err != nil {
		return nil, err
	}
	if _, err := p.client.Expect("welcome", 10*time.Second); err != nil {
		return nil, err
	}
	return p, p.client.Send(map[string]any{"type": "requests", "requests": []map[string]any{{"request": 1, "id": "r0000be9c.0", "run": "r0000be9c", "begun_unix_ns": time.Now().UnixNano()}}})
}

// forward publishes a step of one decoded token, whose tensors are one group, as the op would; it returns the moment before the group was published.
func (p *producer) forward(step uint64, k kind) (at time.Time, err error) {
	lane, deadline := p.Lanes[0], time.Now().Add(10*time.Second)
	table := ringtape.EncodeTable(step, []ring.Span{{Request: 1, Count: 1, Position: uint32(step), Phase: ring.PhaseDecode}}, 0, [ring.Spaces]uint32{1}, true)
	offset, err := lane.WriteTable(table, deadline)
	if err != nil {
		return at, err
	}
	raw := make([]byte, ring.RecordSize)
	open := ring.OpenRecord{Step: step, Table: offset, TableBytes: uint64(len(table)), OpenedUnixNS: uint64(time.Now().UnixNano()), Sites: uint32(k.sites), Kind: ring.KindOpen, Rows: [3]uint32{1}}
	open.Encode(raw)
	if err := lane.Publish(raw, deadline); err != nil {
		return at, err
	}
	place := uint8(ring.PlaceSpill)
	if k.pumped {
		place = ring.PlaceRing
	}
	group := make([]byte, k.sites*ring.RecordSize)
	for site := range uint32(k.sites) {
		payload, ok := p.WritePayload(place, p.data)
		if !ok {
			return at, fmt.Errorf("step %d: there is no room for its payload", step)
		}
		record := ring.Record{Step: step, Payload: payload, PayloadBytes: width, TensorBytes: width, Site: site, Rows: 1, Kind: ring.KindCapture, Outcome: ring.OutcomeCaptured,
			Size: [ring.MaxDims]uint32{1, hidden}, Stride: [ring.MaxDims]uint32{hidden, 1}, Role: [ring.MaxDims]uint8{ring.RoleRow, ring.RoleInner}, DType: ring.DTypeBF16, NDim: 2,
			Place: place, Flags: ring.RecordGathered}
		record.Encode(group[site*ring.RecordSize:])
	}
	at = time.Now()
	if err := lane.Publish(group, deadline); err != nil {
		return at, err
	}
	closing := ring.CloseRecord{Step: step, ClosedUnixNS: uint64(time.Now().UnixNano()), Records: uint64(k.sites), Kind: ring.KindClose}
	closing.Encode(raw)
	return at, lane.Publish(raw, deadline)
}

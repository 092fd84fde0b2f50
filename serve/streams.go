package serve

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"dmi/live"
	"dmi/query"
	"dmi/tensor"
)

// eventStream writes Server-Sent Events.
type eventStream struct {
	w *writer
}

func openEventStream(w *writer) (*eventStream, error) {
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no") // proxies
	w.WriteHeader(http.StatusOK)
	return &eventStream{w}, w.flush()
}

// send writes an event; id may be "".
func (e *eventStream) send(name, id string, data any) error {
	text, err := json.Marshal(data)
	if err != nil {
		return err
	}
	if id != "" {
		id = "id: " + id + "\n"
	}
	_, err = fmt.Fprintf(e.w, "event: %s\n%sdata: %s\n\n", name, id, text)
	return err
}

// follow calls next until the reader leaves or the server stops; on silence it calls beat.
func (s *Server) follow(c *call, next func(ctx context.Context) error, beat func() error) error {
	ctx, cancel := context.WithCancel(c.Context())
	defer cancel()
	defer context.AfterFunc(s.stop, cancel)()
	for {
		waiting, done := context.WithTimeout(ctx, s.options.Heartbeat)
		err := next(waiting)
		done()
		switch {
		case err == nil:
		case ctx.Err() != nil && c.Context().Err() == nil, errors.Is(err, live.ErrClosed):
			return nil // the engine stops: the stream ends in good order
		case errors.Is(err, context.DeadlineExceeded):
			if err := beat(); err != nil {
				return err
			}
		default:
			return err
		}
	}
}

func (e *eventStream) beat() error {
	if _, err := e.w.Write([]byte(": waiting\n\n")); err != nil {
		return err
	}
	return e.w.flush()
}

func (s *Server) notLive(c *call) error {
	if s.options.Live != nil {
		return nil
	}
	return &failure{http.StatusNotFound, "read_only", fmt.Sprintf("%s: nothing is captured here, this engine only reads the store", c.URL.Path),
		"attach a model with dmi.attach(store=...), or start `dmi serve`", nil}
}

// subscribe starts a subscription of what the arguments say and the scope allows.
func (s *Server) subscribe(c *call) (*live.Subscription, error) {
	if err := s.notLive(c); err != nil {
		return nil, err
	}
	matches, err := query.SiteMatcher(c.text("site"))
	if err != nil {
		return nil, err
	}
	wanted := matches
	if c.scope < ScopeText {
		wanted = func(site tensor.Site) bool { return !holdsPrompt(site) && matches(site) }
	}
	return s.options.Live.Subscribe(live.Filter{Site: wanted, Session: c.text("session"), Request: c.text("request")})
}

type droppedAnswer struct {
	Rows uint64 `json:"rows"`
}

func (s *Server) liveStats(w *writer, c *call) error {
	subscription, err := s.subscribe(c)
	if err != nil {
		return err
	}
	defer subscription.Close()
	stream, err := openEventStream(w)
	if err != nil {
		return err
	}
	var lines []query.StatsRow
	return s.follow(c, func(ctx context.Context) error {
		batch, err := subscription.Next(ctx)
		if err != nil {
			return err
		}
		if batch.Dropped > 0 {
			if err := stream.send("dropped", "", droppedAnswer{batch.Dropped}); err != nil {
				return err
			}
		}
		lines = lines[:0]
		for _, f := range batch.Frames {
			c.rows += uint64(f.Chunk.Rows)
			for i, row := range f.Rows() {
				least, greatest := row.Range()
				lines = append(lines, query.StatsRow{Request: f.Request, Site: f.Site.Name, Layer: f.Site.Layer, Position: int64(f.Chunk.First) + int64(i), Rows: 1,
					Mean: row.Mean(), RMS: row.RMS(), Min: least, Max: greatest, AbsMax: row.AbsMax(), L2: row.L2(), NonFinite: row.NonFinite, Count: row.Count,
					Level: f.Chunk.Level.String()})
			}
			if len(lines) >= 4096 { // so that one event stays small enough to be looked at
				if err := stream.send("stats", "", lines); err != nil {
					return err
				}
				lines = lines[:0]
			}
		}
		if len(lines) > 0 {
			if err := stream.send("stats", "", lines); err != nil {
				return err
			}
		}
		return w.flush()
	}, stream.beat)
}

type droppedEvents struct {
	Events uint64 `json:"events"`
}

func (s *Server) liveEvents(w *writer, c *call) error {
	after := uint64(c.number("after", 0, 1<<62))
	if last := c.Header.Get("Last-Event-ID"); last != "" { // what browsers send when they reconnect
		n, err := strconv.ParseUint(last, 10, 62)
		if err != nil {
			c.fail(badArgument("send back the id of an event", "Last-Event-ID %q is not a number", last))
		}
		after = n
	}
	if c.err != nil {
		return c.err
	}
	if err := s.notLive(c); err != nil {
		return err
	}
	events, err := s.options.Live.Events(after)
	if err != nil {
		return err
	}
	defer events.Close()
	stream, err := openEventStream(w)
	if err != nil {
		return err
	}
	return s.follow(c, func(ctx context.Context) error {
		list, dropped, err := events.Next(ctx)
		if err != nil {
			return err
		}
		if dropped > 0 {
			if err := stream.send("dropped", "", droppedEvents{dropped}); err != nil {
				return err
			}
		}
		for _, e := range list {
			if err := stream.send("event", strconv.FormatUint(e.ID, 10), e); err != nil {
				return err
			}
		}
		return w.flush()
	}, stream.beat)
}

// frameHeader goes before each tensor on /live/tensors. An empty one is a sign of life, or with the length streamEnd for a body the last there is: since the answer ends
// with the connection, a reader could not tell otherwise an engine that stops from one that is gone.
type frameHeader struct {
	Session string `json:"session"`
	Request string `json:"request"`
	Site    string `json:"site"`
	First   uint32 `json:"first"`
	Rows    uint32 `json:"rows"`
	DType   string `json:"dtype"`
	Shape   []int  `json:"shape"` // [rows, row shape...]
	Step    uint64 `json:"step"`
	Level   string `json:"level"`
	Attempt uint16 `json:"attempt"`
	Dropped uint64 `json:"dropped"` // rows lost before this frame, because this reader was slow
}

const streamEnd = 1<<32 - 1

func (s *Server) liveTensors(w *writer, c *call) error {
	subscription, err := s.subscribe(c)
	if err != nil {
		return err
	}
	defer subscription.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Transfer-Encoding", "identity") // a small frame is one write, where net/http cuts a chunk in two that wake the reader twice
	w.WriteHeader(http.StatusOK)
	if err := w.flush(); err != nil {
		return err
	}
	out := bufio.NewWriterSize(w, 64<<10) // a decoded token's frames are small and many
	err = s.follow(c, func(ctx context.Context) error {
		batch, err := subscription.Next(ctx)
		if err != nil {
			return err
		}
		for i, f := range batch.Frames {
			chunk := f.Chunk.Dequantised()
			header := frameHeader{f.Session, f.Request, f.Site.Name, chunk.First, chunk.Rows, chunk.DType.String(), append([]int{int(chunk.Rows)}, chunk.Shape...),
				chunk.Step, f.Chunk.Level.String(), chunk.Attempt, 0}
			if i == 0 {
				header.Dropped = batch.Dropped
			}
			if err := writeFrame(out, header, chunk.Data); err != nil {
				return err
			}
			c.rows += uint64(chunk.Rows)
		}
		if err := out.Flush(); err != nil {
			return err
		}
		return w.flush()
	}, func() error { return empty(w, 0) })
	if err != nil {
		return err
	}
	return empty(w, streamEnd)
}

// empty writes a frame without header and body.
func empty(w *writer, length uint32) error {
	var frame [8]byte
	binary.LittleEndian.PutUint32(frame[4:], length)
	if _, err := w.Write(frame[:]); err != nil {
		return err
	}
	return w.flush()
}

// writeFrame writes u32 header length, u32 body length (little-endian), header, body.
func writeFrame(w io.Writer, header frameHeader, body []byte) error {
	text, err := json.Marshal(header)
	if err != nil {
		return err
	}
	prefix := make([]byte, 8, 8+len(text))
	binary.LittleEndian.PutUint32(prefix, uint32(len(text)))
	binary.LittleEndian.PutUint32(prefix[4:], uint32(len(body)))
	if _, err := w.Write(append(prefix, text...)); err != nil {
		return err
	}
	for len(body) > 0 { // in pieces, so that a slow reader is told from a stalled one
		n := min(len(body), 1<<20)
		if _, err := w.Write(body[:n]); err != nil {
			return err
		}
		body = body[n:]
	}
	return nil
}

// progressEvery bounds how often /verify reports.
const progressEvery = 100 * time.Millisecond

package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

var errEnough = errors.New("enough")

func tailCommand(o *options) *cobra.Command {
	var site, session, request string
	var events, tensors, summed bool
	var count int
	c := &cobra.Command{
		Use:   "tail",
		Short: "Watch a running engine: statistics of rows as they come, or events, or tensors",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			r, err := o.reader(c)
			if err != nil {
				return err
			}
			defer r.close()
			v := url.Values{}
			set(v, "site", site)
			set(v, "session", session)
			set(v, "request", request)
			switch {
			case summed && tensors:
				err = usage(fmt.Errorf("tail: --map or --tensors, not both"))
			case events && (tensors || summed || len(v) > 0):
				return usage(fmt.Errorf("tail: --events stands alone"))
			case events:
				err = tailEvents(c, o, r, count, func(string) bool { return true })
			case summed:
				err = tailMaps(c, o, r, v, count)
			case tensors:
				err = tailTensors(c, o, r, v, count)
			default:
				err = tailStats(c, o, r, v, count)
			}
			if err == errEnough {
				return nil
			}
			return err
		},
	}
	f := c.Flags()
	f.StringVarP(&site, "site", "s", "", "sites: a name, an alias, its end, or a glob")
	f.StringVar(&session, "session", "", "of this session")
	f.StringVarP(&request, "request", "r", "", "of this request")
	f.BoolVar(&events, "events", false, "events: attach, detach, drops, disk, errors")
	f.BoolVar(&tensors, "tensors", false, "a line per tensor that passes, without its bytes")
	f.BoolVar(&summed, "map", false, "rows summed up by session and site, at most ten times a second: what the page draws while a model runs")
	f.IntVarP(&count, "count", "n", 0, "end after so many lines")
	return c
}

// tailEvents prints recent events whose codes are wanted, then those that come.
func tailEvents(c *cobra.Command, o *options, r *reader, count int, wanted func(code string) bool) error {
	out := c.OutOrStdout()
	return r.events(c.Context(), http.MethodGet, "/live/events", nil, func(name string, data []byte) error {
		var e struct {
			Time                          time.Time
			Level, Code, Session, Message string
		}
		if name != "dropped" {
			if err := json.Unmarshal(data, &e); err != nil {
				return err
			}
			if !wanted(e.Code) {
				return nil
			}
		}
		if o.json {
			fmt.Fprintf(out, "%s\n", data)
		} else if name == "dropped" {
			fmt.Fprintf(out, "-- dropped: %s\n", data)
		} else {
			fmt.Fprintf(out, "%s  %-7s  %-12s  %-9s  %s\n", e.Time.Local().Format("15:04:05.000"), e.Level, e.Code, dash(e.Session), e.Message)
		}
		if count--; count == 0 {
			return errEnough
		}
		return nil
	})
}

func tailStats(c *cobra.Command, o *options, r *reader, v url.Values, count int) error {
	out := c.OutOrStdout()
	if !o.json {
		fmt.Fprintf(out, "%-16s %-40s %8s %11s %11s %11s %11s %5s\n", "REQUEST", "SITE", "POSITION", "MEAN", "RMS", "ABSMAX", "L2", "NONF")
	}
	return r.events(c.Context(), http.MethodGet, "/live/stats", v, func(name string, data []byte) error {
		if name == "dropped" {
			if o.json {
				fmt.Fprintf(out, "{\"dropped\":%s}\n", data)
			} else {
				fmt.Fprintf(out, "-- dropped: %s\n", data)
			}
			return nil
		}
		var lines []json.RawMessage
		if err := json.Unmarshal(data, &lines); err != nil {
			return err
		}
		for _, raw := range lines {
			if o.json {
				fmt.Fprintf(out, "%s\n", raw)
			} else {
				var l statsLine
				if err := json.Unmarshal(raw, &l); err != nil {
					return err
				}
				cells := l.cells()
				fmt.Fprintf(out, "%-16s %-40s %8s %11s %11s %11s %11s %5d\n", cells[0], l.Site, cells[2], humanNumber(l.Mean), humanNumber(l.RMS), humanNumber(l.AbsMax), humanNumber(l.L2), l.NonFinite)
			}
			if count--; count == 0 {
				return errEnough
			}
		}
		return nil
	})
}

// tailMaps prints every site's rows since the map before, summed up; as JSON a map a line.
func tailMaps(c *cobra.Command, o *options, r *reader, v url.Values, count int) error {
	out := c.OutOrStdout()
	if !o.json {
		fmt.Fprintf(out, "%-9s %-40s %8s %11s %11s %11s %11s %5s\n", "SESSION", "SITE", "ROWS", "MEAN", "RMS", "ABSMAX", "L2", "NONF")
	}
	return r.events(c.Context(), http.MethodGet, "/live/map", v, func(name string, data []byte) error {
		if name != "map" {
			return nil
		}
		if o.json {
			fmt.Fprintf(out, "%s\n", data)
			if count--; count == 0 {
				return errEnough
			}
			return nil
		}
		var came struct {
			Session string
			Dropped uint64
			Sites   []statsLine
		}
		if err := json.Unmarshal(data, &came); err != nil {
			return err
		}
		if came.Dropped > 0 {
			fmt.Fprintf(out, "-- dropped: %s rows\n", humanCount(came.Dropped))
		}
		for _, l := range came.Sites {
			fmt.Fprintf(out, "%-9s %-40s %8d %11s %11s %11s %11s %5d\n", came.Session, l.Site, l.Rows, humanNumber(l.Mean), humanNumber(l.RMS), humanNumber(l.AbsMax), humanNumber(l.L2), l.NonFinite)
			if count--; count == 0 {
				return errEnough
			}
		}
		return nil
	})
}

// tailTensors prints the header of every frame.
func tailTensors(c *cobra.Command, o *options, r *reader, v url.Values, count int) error {
	answer, err := r.do(c.Context(), http.MethodGet, "/live/tensors", v)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	var prefix [8]byte
	for {
		if _, err := io.ReadFull(answer.Body, prefix[:]); err != nil {
			if c.Context().Err() != nil {
				return nil
			}
			return fmt.Errorf("read /live/tensors: the stream broke off, since the engine has gone or this reader was too slow for it; start again: %w", err)
		}
		n, body := binary.LittleEndian.Uint32(prefix[:]), binary.LittleEndian.Uint32(prefix[4:])
		if n == 0 {
			if body == 0 { // a sign of life
				continue
			}
			return nil // the engine stops
		}
		if n > maxEventBytes {
			return fmt.Errorf("read /live/tensors: a header of %d bytes", n)
		}
		header := make([]byte, n)
		_, err := io.ReadFull(answer.Body, header)
		if err == nil {
			_, err = io.CopyN(io.Discard, answer.Body, int64(body))
		}
		if err != nil {
			return fmt.Errorf("read /live/tensors: %w", err)
		}
		if o.json {
			fmt.Fprintf(c.OutOrStdout(), "%s\n", header)
		} else {
			var f struct {
				Request, Site, DType string
				First, Rows          uint32
				Shape                []int
				Dropped              uint64
			}
			if err := json.Unmarshal(header, &f); err != nil {
				return err
			}
			if f.Dropped > 0 {
				fmt.Fprintf(c.OutOrStdout(), "-- dropped: %d rows\n", f.Dropped)
			}
			fmt.Fprintf(c.OutOrStdout(), "%-16s %-40s %d:%d %s %v\n", f.Request, f.Site, f.First, f.First+f.Rows, f.DType, f.Shape)
		}
		if count--; count == 0 {
			return errEnough
		}
	}
}

func verifyCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "verify",
		Short: "Check every checksum of a store, and its books; exit code 1 if anything is wrong",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			r, err := o.reader(c)
			if err != nil {
				return err
			}
			defer r.close()
			var result json.RawMessage
			err = r.events(c.Context(), http.MethodPost, "/verify", nil, func(name string, data []byte) error {
				switch name {
				case "progress":
					var p struct {
						Done  uint64 `json:"bytes_done"`
						Total uint64 `json:"bytes_total"`
					}
					if err := json.Unmarshal(data, &p); err != nil {
						return err
					}
					if !o.json && isTerminal(c.ErrOrStderr()) {
						fmt.Fprintf(c.ErrOrStderr(), "\r%5.1f %%  %s of %s ", 100*float64(p.Done)/float64(max(1, p.Total)), humanBytes(p.Done), humanBytes(p.Total))
					}
				case "error":
					var failed answerError
					if err := json.Unmarshal(data, &failed.Body); err != nil {
						return err
					}
					return &failed
				case "result":
					result = append(result, data...)
				}
				return nil
			})
			if err != nil {
				return err
			}
			if result == nil {
				return fmt.Errorf("verify: the engine ended before it was done")
			}
			var report struct {
				OK               bool
				Segments         int
				Chunks, Bytes    uint64
				ManifestFiles    int `json:"manifest_files"`
				Produced, Booked uint64
				Truncated        bool
				Problems         []struct {
					File   string
					Offset int64
					What   string
				}
			}
			if err := json.Unmarshal(result, &report); err != nil {
				return err
			}
			if o.json {
				if err := printJSON(c, result); err != nil {
					return err
				}
			} else {
				if isTerminal(c.ErrOrStderr()) {
					fmt.Fprint(c.ErrOrStderr(), "\r\x1b[K")
				}
				out := c.OutOrStdout()
				fmt.Fprintf(out, "%d segments, %s chunks, %d manifest files, %s read\n", report.Segments, humanCount(report.Chunks), report.ManifestFiles, humanBytes(report.Bytes))
				fmt.Fprintf(out, "%s rows produced, %s on the books\n", humanCount(report.Produced), humanCount(report.Booked))
				for _, p := range report.Problems {
					fmt.Fprintf(out, "PROBLEM %s at %d: %s\n", p.File, p.Offset, p.What)
				}
				if report.Truncated {
					fmt.Fprintln(out, "and more problems than are listed")
				}
				if report.OK {
					fmt.Fprintln(out, "ok")
				}
			}
			if !report.OK {
				return &exitError{exitFailure, errQuiet}
			}
			return nil
		},
	}
}

func topCommand(o *options) *cobra.Command {
	var once bool
	var every time.Duration
	c := &cobra.Command{
		Use:   "top",
		Short: "Rates, occupancy and outcomes, refreshed",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			r, err := o.reader(c)
			if err != nil {
				return err
			}
			defer r.close()
			if every < 100*time.Millisecond {
				return usage(fmt.Errorf("top: --every %v: at least 100ms", every))
			}
			var before *status
			for {
				var raw json.RawMessage
				if err := r.get(c.Context(), "/status", nil, &raw); err != nil {
					return err
				}
				now := &status{at: time.Now()}
				if err := json.Unmarshal(raw, now); err != nil {
					return err
				}
				if o.json {
					if _, err := fmt.Fprintf(c.OutOrStdout(), "%s\n", raw); err != nil {
						return err
					}
				} else {
					text := now.screen(before)
					if !once && isTerminal(c.OutOrStdout()) {
						text = "\x1b[H\x1b[2J" + text
					}
					if _, err := io.WriteString(c.OutOrStdout(), text); err != nil {
						return err
					}
				}
				if once {
					return nil
				}
				before = now
				select {
				case <-c.Context().Done():
					return nil
				case <-time.After(every):
				}
			}
		},
	}
	c.Flags().BoolVar(&once, "once", false, "print once")
	c.Flags().DurationVar(&every, "every", time.Second, "time between refreshes")
	return c
}

// status is what top shows of /status.
type status struct {
	at     time.Time
	Engine struct {
		ID, Version string
		Uptime      float64 `json:"uptime_seconds"`
		ReadOnly    bool    `json:"read_only"`
	}
	Store struct {
		Path         string
		Segments     int
		SegmentBytes uint64  `json:"segment_bytes"`
		DurableLag   float64 `json:"durable_lag_seconds"`
		DiskFree     uint64  `json:"disk_free_bytes"`
		Failure      string
		Buffer       occupancy `json:"buffer_bytes"`
	}
	Produced uint64
	Books    struct {
		Rows     uint64
		Outcomes map[string]map[string]uint64
	}
	Rates struct {
		Rows    float64 `json:"rows_per_second"`
		Bytes   float64 `json:"bytes_per_second"`
		Seconds float64
	}
	Attached []struct {
		Session, Mode, Model string
		Occupancy            map[string]occupancy
		Steps                uint64
		CapturedRows         uint64 `json:"captured_rows"`
		CapturedBytes        uint64 `json:"captured_bytes"`
		Waits                uint64
		WaitNs               uint64 `json:"wait_ns"`
		LagNs                int64  `json:"lag_ns"`
	}
	Live *struct {
		Subscribers int
		DroppedRows uint64 `json:"dropped_rows"`
	}
}

type occupancy struct{ Used, Capacity uint64 }

func (o occupancy) String() string {
	return fmt.Sprintf("%3.0f %% of %s", 100*float64(o.Used)/float64(max(1, o.Capacity)), humanBytes(o.Capacity))
}

func (s *status) screen(before *status) string {
	var out strings.Builder
	mode := ""
	if s.Engine.ReadOnly {
		mode = "  (reading only)"
	}
	fmt.Fprintf(&out, "engine %s  %s  up %s%s\n", s.Engine.ID, s.Engine.Version, time.Duration(s.Engine.Uptime*float64(time.Second)).Round(time.Second), mode)
	fmt.Fprintf(&out, "store  %s  %d segments, %s, %s free\n", s.Store.Path, s.Store.Segments, humanBytes(s.Store.SegmentBytes), humanBytes(s.Store.DiskFree))
	fmt.Fprintf(&out, "buffer %s  durable lag %.2f s\n", s.Store.Buffer, s.Store.DurableLag)
	if s.Store.Failure != "" {
		fmt.Fprintf(&out, "STORE CANNOT BE WRITTEN: %s\n", s.Store.Failure)
	}
	rows, bytes := s.Rates.Rows, s.Rates.Bytes
	fmt.Fprintf(&out, "rates  %s rows/s  %s/s\n", humanCount(uint64(rows)), humanBytes(uint64(bytes)))
	fmt.Fprintf(&out, "rows   %s produced, %s booked\n\n", humanCount(s.Produced), humanCount(s.Books.Rows))
	t := newTable(&out, "outcome", "rows", "share", "rows/s")
	for _, outcome := range sortedKeys(s.Books.Outcomes) {
		for _, reason := range sortedKeys(s.Books.Outcomes[outcome]) {
			n := s.Books.Outcomes[outcome][reason]
			rate := "-"
			if before != nil && n >= before.Books.Outcomes[outcome][reason] {
				rate = humanCount(uint64(float64(n-before.Books.Outcomes[outcome][reason]) / s.at.Sub(before.at).Seconds()))
			}
			t.row(fmt.Sprintf("%s(%s)", outcome, reason), humanCount(n), fmt.Sprintf("%.4g %%", 100*float64(n)/float64(max(1, s.Books.Rows))), rate)
		}
	}
	_ = t.flush() // into memory
	if len(s.Attached) > 0 {
		fmt.Fprintln(&out)
		t := newTable(&out, "session", "mode", "model", "steps", "rows", "bytes", "waits", "waited", "lag", "queues")
		for _, a := range s.Attached {
			var queues []string
			for _, name := range sortedKeys(a.Occupancy) {
				if q := a.Occupancy[name]; q.Capacity > 0 {
					queues = append(queues, fmt.Sprintf("%s %.0f%%", strings.TrimSuffix(name, "_bytes"), 100*float64(q.Used)/float64(q.Capacity)))
				}
			}
			t.row(a.Session, a.Mode, dash(a.Model), humanCount(a.Steps), humanCount(a.CapturedRows), humanBytes(a.CapturedBytes), humanCount(a.Waits),
				time.Duration(a.WaitNs).Round(time.Millisecond).String(), time.Duration(a.LagNs).Round(time.Millisecond).String(), strings.Join(queues, " "))
		}
		_ = t.flush() // into memory
	}
	if s.Live != nil && s.Live.Subscribers > 0 {
		fmt.Fprintf(&out, "\nlive   %d subscribers, %s rows dropped for slow ones\n", s.Live.Subscribers, humanCount(s.Live.DroppedRows))
	}
	return out.String()
}

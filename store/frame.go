package store

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"time"

	"dmi/tensor"
)

// frameKind says what a manifest frame holds. docs/format/manifest.md.
type frameKind uint32

const (
	frameSession frameKind = 1 + iota // JSON of tensor.Session
	frameSessionEnd
	frameSites
	frameRun
	frameRequests
	frameStep
	frameBook    // entries of rows that a step produced
	frameCorrect // entries that replace what earlier ones said of the same rows
	frameAdopt   // entries of rows whose step's records a power loss took
	frameSync
	frameExpire  // entries of rows that are gone, or about to be
	frameReplace // segments that others take the place of, or none
	frameForget  // requests whose prompts are no longer kept
	frameKinds   // no kind: those before it are all
)

type sessionEnd struct {
	Session uint32    `json:"session"`
	Ended   time.Time `json:"ended"`
}

type sitesFrame struct {
	Session uint32        `json:"session"`
	Sites   []tensor.Site `json:"sites"`
}

type requestFrame struct {
	Session uint32 `json:"session"`
	Number  uint64 `json:"request"`
	tensor.Request
}

// syncPoint says that a segment is durable up to an offset, and every row booked captured before `low` is in a durable segment.
type syncPoint struct {
	segment uint64
	end     int64
	low     position
}

func (s syncPoint) encode() []byte {
	var b []byte
	for _, v := range [...]uint64{s.segment, uint64(s.end), s.low.file, uint64(s.low.offset)} {
		b = binary.AppendUvarint(b, v)
	}
	return b
}

func decodeSync(b []byte) (syncPoint, error) {
	r := reader{b: b}
	s := syncPoint{r.uint(math.MaxInt64), int64(r.uint(math.MaxInt64)), position{r.uint(math.MaxInt64), int64(r.uint(math.MaxInt64))}}
	return s, r.end()
}

func encodeJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // only raw JSON of a session can be at fault, and BeginSession has checked it
	}
	return b
}

func (s *Step) encode() []byte {
	size := 64 + len(s.Records)
	for _, t := range s.Tables {
		size += 5 + len(t)
	}
	b := make([]byte, 0, size)
	for _, v := range [...]uint64{uint64(s.Session), uint64(s.Lane), s.First, uint64(s.Count), uint64(len(s.Tables))} {
		b = binary.AppendUvarint(b, v)
	}
	for _, t := range s.Tables {
		b = append(binary.AppendUvarint(b, uint64(len(t))), t...)
	}
	return append(b, s.Records...)
}

func decodeStep(b []byte) (Step, error) {
	r := reader{b: b}
	s := Step{Session: uint32(r.uint(math.MaxUint32)), Lane: int(r.uint(math.MaxUint8)), First: r.uint(math.MaxUint64), Count: int(r.uint(math.MaxInt32))}
	n := r.uint(uint64(len(b)))
	for range n {
		s.Tables = append(s.Tables, r.bytes(int(r.uint(uint64(len(r.b))))))
		if r.err != nil {
			return s, r.err
		}
	}
	s.Records = r.bytes(len(r.b))
	if r.err == nil && len(s.Records) != s.Count*recordBytes {
		r.err = fmt.Errorf("%d bytes of records, for %d records", len(s.Records), s.Count)
	}
	return s, r.err
}

func appendSites(b []byte, sites []uint32) []byte {
	runs, next := [][2]uint32{}, uint32(0)
	for _, s := range sites {
		if n := len(runs); n > 0 && s == next {
			runs[n-1][1]++
		} else {
			runs = append(runs, [2]uint32{s, 1})
		}
		next = s + 1
	}
	b = binary.AppendUvarint(b, uint64(len(runs)))
	for _, r := range runs {
		b = binary.AppendUvarint(binary.AppendUvarint(b, uint64(r[0])), uint64(r[1]))
	}
	return b
}

func encodeEntries(entries []tensor.Entry) []byte {
	b := binary.AppendUvarint(nil, uint64(len(entries)))
	for i := range entries {
		e := &entries[i]
		b = binary.AppendUvarint(binary.AppendUvarint(b, uint64(e.Key.Session)), e.Key.Request)
		b = appendSites(b, e.Sites)
		for _, v := range [...]uint64{uint64(e.Attempt), uint64(e.First), uint64(e.Count), uint64(e.Stride), e.Step, uint64(e.Outcome), uint64(e.Reason),
			uint64(e.Level), e.Policy} {
			b = binary.AppendUvarint(b, v)
		}
	}
	return b
}

const maxSites = 65536

func decodeEntries(b []byte) ([]tensor.Entry, error) {
	r := reader{b: b}
	entries := make([]tensor.Entry, 0, min(r.uint(uint64(len(b))), 1<<16))
	for len(r.b) > 0 && r.err == nil {
		e := tensor.Entry{Key: tensor.RequestKey{Session: uint32(r.uint(math.MaxUint32)), Request: r.uint(math.MaxUint64)}}
		runs := r.uint(uint64(len(r.b)))
		for range runs {
			first, count := r.uint(maxSites), r.uint(maxSites)
			if len(e.Sites)+int(count) > maxSites || r.err != nil {
				return nil, errors.New("an entry with too many sites")
			}
			for i := range count {
				e.Sites = append(e.Sites, uint32(first+i))
			}
		}
		e.Attempt, e.First, e.Count = uint16(r.uint(math.MaxUint16)), uint32(r.uint(math.MaxUint32)), uint32(r.uint(math.MaxUint32))
		e.Stride, e.Step = uint32(r.uint(math.MaxUint32)), r.uint(math.MaxUint64)
		e.Outcome, e.Reason, e.Level = tensor.Outcome(r.uint(255)), tensor.Reason(r.uint(255)), tensor.Level(r.uint(255))
		e.Policy = r.uint(math.MaxUint64)
		if r.err == nil {
			r.err = checkEntry(&e)
		}
		entries = append(entries, e)
	}
	return entries, r.err
}

func checkEntry(e *tensor.Entry) error {
	switch {
	case !e.Outcome.Valid() || !e.Reason.Valid() || !e.Level.Valid():
		return fmt.Errorf("entry with outcome %d, reason %d, level %d", e.Outcome, e.Reason, e.Level)
	case e.Count == 0 || len(e.Sites) == 0:
		return errors.New("entry of no rows")
	case e.Stride == 0 || uint64(e.First)+uint64(e.Count-1)*uint64(e.Stride) > math.MaxUint32:
		return fmt.Errorf("entry of %d rows from %d by %d", e.Count, e.First, e.Stride)
	}
	for i := 1; i < len(e.Sites); i++ {
		if e.Sites[i] <= e.Sites[i-1] {
			return errors.New("entry whose sites are not ascending")
		}
	}
	return nil
}

// reader decodes a frame. The first malformed field sticks as err.
type reader struct {
	b   []byte
	err error
}

func (r *reader) uint(most uint64) uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 || v > most {
		if r.err == nil {
			r.err = errors.New("a number is cut short or out of range")
		}
		r.b = nil
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) bytes(n int) []byte {
	if n > len(r.b) {
		if r.err == nil {
			r.err = errors.New("cut short")
		}
		r.b = nil
		return nil
	}
	b := r.b[:n:n]
	r.b = r.b[n:]
	return b
}

func (r *reader) end() error {
	if r.err == nil && len(r.b) > 0 {
		r.err = fmt.Errorf("%d bytes too many", len(r.b))
	}
	return r.err
}

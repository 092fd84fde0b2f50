package ringtape

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"dmi/control"
	"dmi/internal/crc32c"
	"dmi/ring"
)

// The form of a tape (docs/format/ringtape.md):
//
//	file:  | "DMITAPE1" | u32 version | u32 header bytes | dmi_header | u32 CRC32C of all before | frames ...
//	frame: | u32 payload bytes | u8 kind | u8 lane | u16 0 | payload | u32 CRC32C of all before in the frame |
const (
	tapeMagic   = "DMITAPE1"
	tapeVersion = 1
	tapeHead    = 16 + ring.HeaderSize + 4
	frameHead   = 8
	maxFrame    = 1 << 30
)

// Kinds of frames.
const (
	frameHello   = 1 + iota // JSON, the token left out
	frameMessage            // JSON
	frameSites              // dmi_site entries
	frameRecord             // dmi_record | u32 bytes of the row table | row table | payload
	frameEnd                // nothing: the tape is whole
)

// Recorder keeps tapes of sessions in a folder. It is a control.Recorder.
type Recorder struct {
	dir   string
	limit int64
}

var _ control.Recorder = (*Recorder)(nil)

// NewRecorder makes the folder where it does not exist. limit bounds each tape in bytes; at the bound it ends, and Close says so. 0: 16 GiB.
func NewRecorder(dir string, limit int64) (*Recorder, error) {
	if limit == 0 {
		limit = 16 << 30
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("ringtape: folder for recordings: %w", err)
	}
	return &Recorder{dir, limit}, nil
}

// Begin starts a tape, in a file of its own: a session that comes back gets another.
func (r *Recorder) Begin(session string, header, hello []byte) (control.Tape, error) {
	name := filepath.Join(r.dir, fmt.Sprintf("%s.%d.tape", session, time.Now().UnixNano()))
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("ringtape: record: %w", err)
	}
	t := &writer{file: f, out: bufio.NewWriterSize(f, 1<<20), left: r.limit}
	head := append([]byte(tapeMagic), 0, 0, 0, 0, 0, 0, 0, 0)
	binary.LittleEndian.PutUint32(head[8:], tapeVersion)
	binary.LittleEndian.PutUint32(head[12:], uint32(len(header)))
	head = append(head, header...)
	head = binary.LittleEndian.AppendUint32(head, crc32c.Checksum(head))
	t.write(head)
	clean, err := without(hello, "token")
	if err == nil {
		t.frame(frameHello, 0, clean)
		err = t.failure
	}
	if err != nil {
		f.Close()
		os.Remove(name)
		return nil, fmt.Errorf("ringtape: record: %w", err)
	}
	return t, nil
}

// without blanks a field of a JSON object.
func without(body []byte, field string) ([]byte, error) {
	var o map[string]json.RawMessage
	if err := json.Unmarshal(body, &o); err != nil {
		return nil, err
	}
	o[field] = json.RawMessage(`""`)
	return json.Marshal(o)
}

// writer is a tape being made. A failure ends it, not the session.
type writer struct {
	mu      sync.Mutex
	file    *os.File
	out     *bufio.Writer
	left    int64
	failure error
}

func (w *writer) write(parts ...[]byte) {
	for _, b := range parts {
		if w.failure != nil {
			return
		}
		if w.left -= int64(len(b)); w.left < 0 {
			w.failure = errors.New("it has reached its bound")
			return
		}
		_, w.failure = w.out.Write(b)
	}
}

func (w *writer) frame(kind, lane byte, parts ...[]byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	if n > maxFrame && w.failure == nil {
		w.failure = fmt.Errorf("a frame of %d bytes: at most %d", n, maxFrame)
	}
	head := binary.LittleEndian.AppendUint32(nil, uint32(n))
	head = append(head, kind, lane, 0, 0)
	sum := crc32c.Checksum(head)
	for _, p := range parts {
		sum = crc32c.Update(sum, p)
	}
	w.write(head)
	w.write(parts...)
	w.write(binary.LittleEndian.AppendUint32(nil, sum))
}

func (w *writer) Message(body []byte) { w.frame(frameMessage, 0, body) }

func (w *writer) Sites(raw []byte) {
	if len(raw) > 0 {
		w.frame(frameSites, 0, raw)
	}
}

func (w *writer) Record(lane int, raw, table, payload []byte) {
	w.frame(frameRecord, byte(lane), raw, binary.LittleEndian.AppendUint32(nil, uint32(len(table))), table, payload)
}

func (w *writer) Close() error {
	w.frame(frameEnd, 0)
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.failure
	if e := w.out.Flush(); err == nil {
		err = e
	}
	if e := w.file.Close(); err == nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("ringtape: %s: %w", w.file.Name(), err)
	}
	return nil
}

// Reader reads a tape.
type Reader struct {
	Header ring.Header
	in     *bufio.Reader
	at     int64
}

// Frame is one thing that happened. Its slices are the caller's.
type Frame struct {
	Kind    byte
	Lane    int
	Body    []byte // of hello, message, sites
	Record  []byte
	Table   []byte
	Payload []byte
}

// NewReader checks the head of a tape.
func NewReader(in io.Reader) (*Reader, error) {
	r := &Reader{in: bufio.NewReaderSize(in, 1<<20)}
	var head [tapeHead]byte
	n, err := io.ReadFull(r.in, head[:])
	little := binary.LittleEndian
	switch {
	case n < 16 || string(head[:8]) != tapeMagic:
		return nil, errors.New("ringtape: not a tape: it does not start with " + tapeMagic)
	case little.Uint32(head[8:]) != tapeVersion:
		return nil, fmt.Errorf("ringtape: a tape of version %d; this program plays version %d", little.Uint32(head[8:]), tapeVersion)
	case err != nil || little.Uint32(head[12:]) != ring.HeaderSize || little.Uint32(head[tapeHead-4:]) != crc32c.Checksum(head[:tapeHead-4]):
		return nil, errors.New("ringtape: the tape's head is damaged")
	}
	r.Header.Decode(head[16:])
	if r.Header.Lanes < 1 || r.Header.Lanes > ring.MaxLanes {
		return nil, fmt.Errorf("ringtape: header.lanes is %d", r.Header.Lanes)
	}
	r.at = tapeHead
	return r, nil
}

// Next gives the next frame; io.EOF after the last of a whole tape. Memory grows with what is there, not with what a length claims.
func (r *Reader) Next() (*Frame, error) {
	var head [frameHead]byte
	if _, err := io.ReadFull(r.in, head[:]); err != nil {
		return nil, fmt.Errorf("ringtape: the tape ends at %d without its end: %w", r.at, io.ErrUnexpectedEOF)
	}
	n := binary.LittleEndian.Uint32(head[:])
	bad := func(why string) (*Frame, error) { return nil, fmt.Errorf("ringtape: frame at %d: %s", r.at, why) }
	if n > maxFrame {
		return bad(fmt.Sprintf("%d bytes: at most %d", n, maxFrame))
	}
	body, err := io.ReadAll(io.LimitReader(r.in, int64(n)+4))
	if err != nil || len(body) != int(n)+4 {
		return bad("it is cut short")
	}
	sum := crc32c.Update(crc32c.Checksum(head[:]), body[:n])
	if binary.LittleEndian.Uint32(body[n:]) != sum {
		return bad("its checksum is wrong")
	}
	body = body[:n:n]
	f := &Frame{Kind: head[4], Lane: int(head[5])}
	switch {
	case f.Lane >= int(r.Header.Lanes):
		return bad(fmt.Sprintf("lane %d of %d", f.Lane, r.Header.Lanes))
	case f.Kind == frameEnd:
		return nil, io.EOF
	case f.Kind == frameHello || f.Kind == frameMessage:
		f.Body = body
	case f.Kind == frameSites && n%ring.SiteSize == 0:
		f.Body = body
	case f.Kind == frameRecord && n >= ring.RecordSize+4:
		table := binary.LittleEndian.Uint32(body[ring.RecordSize:])
		if uint64(table) > uint64(n)-ring.RecordSize-4 {
			return bad("its row table leaves it")
		}
		f.Record, body = body[:ring.RecordSize], body[ring.RecordSize+4:]
		f.Table, f.Payload = body[:table], body[table:]
	default:
		return bad(fmt.Sprintf("kind %d with %d bytes", f.Kind, n))
	}
	r.at += frameHead + int64(n) + 4
	return f, nil
}

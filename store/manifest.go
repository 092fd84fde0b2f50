package store

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"dmi/internal/crc32c"
	"dmi/internal/vfs"
	"dmi/store/segment"
)

// The manifest is the store's log: everything but the tensors' bytes. A frame is in it before what it tells of is acted on, so that
// what a kill -9 leaves can be worked out exactly. docs/format/manifest.md:
//
//	file:  | "DMIMANIF" | u16 version | u16 0 | u32 0 | u64 file number | 32 bytes store id | u32 0 | u32 CRC32C of the 60 before | frames ...
//	frame: | u32 payload bytes | u32 kind | u32 number in the file | u32 CRC32C of the 12 before and the payload | payload |
const (
	manifestMagic   = "DMIMANIF"
	manifestVersion = 3
	manifestHeader  = 64
	frameHeader     = 16
	maxFrame        = 64 << 20
)

// position is a place in the manifest.
type position struct {
	file   uint64
	offset int64
}

func (p position) before(q position) bool {
	return p.file < q.file || (p.file == q.file && p.offset < q.offset)
}

func manifestName(dir string, number uint64) string {
	return path.Join(dir, fmt.Sprintf("%08d.log", number))
}

// manifest appends frames. Its user serialises.
type manifest struct {
	fs     vfs.FS
	dir    string
	store  string
	limit  int64
	number uint64
	file   vfs.File
	end    int64
	frames uint32
	torn   bool          // bytes after end are left of a write that failed
	size   atomic.Uint64 // of all files; read without Store.log, which a disk that hangs keeps
	buf    []byte
}

// begin starts file `number`.
func (m *manifest) begin(number uint64) error {
	name := manifestName(m.dir, number)
	f, err := m.fs.Create(name, false)
	if err != nil {
		return err
	}
	var b [manifestHeader]byte
	copy(b[:], manifestMagic)
	binary.LittleEndian.PutUint16(b[8:], manifestVersion)
	binary.LittleEndian.PutUint64(b[16:], number)
	copy(b[24:56], m.store)
	binary.LittleEndian.PutUint32(b[60:], crc32c.Checksum(b[:60]))
	_, err = f.WriteAt(b[:], 0)
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = m.fs.SyncDir(m.dir)
	}
	if err != nil {
		f.Close()
		m.fs.Remove(name)
		return err
	}
	if m.file != nil {
		m.file.Close()
	}
	m.file, m.number, m.end, m.frames, m.torn = f, number, manifestHeader, 0, false
	m.size.Add(manifestHeader)
	return nil
}

func (m *manifest) position() position { return position{m.number, m.end} }

// append writes a frame, all of it or, as far as readers can tell, nothing. It returns where the frame starts.
func (m *manifest) append(kind frameKind, payload []byte) (position, error) {
	if len(payload) > maxFrame {
		return position{}, fmt.Errorf("frame of %d bytes, where %d are the most", len(payload), maxFrame)
	}
	if m.end > m.limit {
		if err := m.file.Sync(); err != nil { // a file is durable before the next has a frame
			return position{}, err
		}
		if err := m.begin(m.number + 1); err != nil {
			return position{}, err
		}
	}
	if m.torn {
		if err := m.file.Truncate(m.end); err != nil {
			return position{}, err
		}
		m.torn = false
	}
	m.buf = slices.Grow(m.buf[:0], frameHeader+len(payload))[:frameHeader]
	putFrameHeader(m.buf, kind, m.frames, payload)
	m.buf = append(m.buf, payload...)
	at := m.position()
	if _, err := m.file.WriteAt(m.buf, m.end); err != nil {
		m.torn = m.file.Truncate(m.end) != nil
		return position{}, err
	}
	m.end += int64(len(m.buf))
	m.size.Add(uint64(len(m.buf)))
	m.frames++
	if cap(m.buf) > 1<<20 {
		m.buf = nil
	}
	return at, nil
}

// manifestFiles lists the numbers of the manifest's files, ascending.
func manifestFiles(fs vfs.FS, dir string) ([]uint64, error) {
	names, err := fs.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var numbers []uint64
	for _, n := range names {
		if digits, ok := strings.CutSuffix(n, ".log"); ok {
			if v, err := strconv.ParseUint(digits, 10, 63); err == nil {
				numbers = append(numbers, v)
			}
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}

// removeUnfinished removes files that were to take others' place when an engine ended.
func removeUnfinished(fs vfs.FS, dir string) error {
	names, err := fs.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, n := range names {
		if strings.HasSuffix(n, ".log.new") {
			if err := fs.Remove(path.Join(dir, n)); err != nil {
				return err
			}
		}
	}
	return nil
}

var errTorn = errors.New("torn")

// readManifest calls each for the frames of a file from an offset on (0: the start), and returns where whole frames end. errTorn: other bytes follow.
// The payload is each's only until it returns. Memory: the largest frame.
func readManifest(fs vfs.FS, dir, store string, number uint64, from int64, each func(position, frameKind, []byte) error) (int64, error) {
	f, err := fs.Open(manifestName(dir, number), false)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return 0, err
	}
	b := make([]byte, manifestHeader)
	if n, err := f.ReadAt(b, 0); n < len(b) && err != nil && err != io.EOF {
		return 0, err
	}
	if err := checkManifestHeader(b, store, number); err != nil {
		return 0, err
	}
	at, count := int64(manifestHeader), int64(-1) // the number of a first frame that is not the file's first is taken as it is
	if from > at {
		at = from
	} else {
		count = 0
	}
	in := bufio.NewReaderSize(io.NewSectionReader(f, at, max(0, size-at)), 1<<20)
	for {
		kind, payload, n, err := readFrame(in, count)
		if err == io.EOF {
			return at, nil
		}
		if err != nil {
			return at, err
		}
		if err := each(position{number, at}, kind, payload); err != nil {
			return at, err
		}
		at += frameHeader + int64(len(payload))
		count = int64(n) + 1
	}
}

func checkManifestHeader(b []byte, store string, number uint64) error {
	little := binary.LittleEndian
	switch {
	case len(b) < manifestHeader || string(b[:8]) != manifestMagic || little.Uint32(b[60:]) != crc32c.Checksum(b[:60]):
		return fmt.Errorf("manifest's header is damaged: %w", errTorn)
	case little.Uint16(b[8:]) > manifestVersion:
		return fmt.Errorf("manifest format %d, this one reads up to %d: %w", little.Uint16(b[8:]), manifestVersion, segment.ErrVersion)
	case little.Uint64(b[16:]) != number:
		return fmt.Errorf("manifest file %d calls itself %d: %w", number, little.Uint64(b[16:]), errTorn)
	case store != "" && strings.TrimRight(string(b[24:56]), "\x00") != store:
		return fmt.Errorf("manifest of another store: %w", errTorn)
	}
	return nil
}

// readFrame reads a frame. number < 0: whichever comes.
func readFrame(in io.Reader, number int64) (frameKind, []byte, uint32, error) {
	var h [frameHeader]byte
	if _, err := io.ReadFull(in, h[:]); err == io.EOF {
		return 0, nil, 0, io.EOF
	} else if err == io.ErrUnexpectedEOF {
		return 0, nil, 0, fmt.Errorf("a frame's header is cut short: %w", errTorn)
	} else if err != nil {
		return 0, nil, 0, err
	}
	little := binary.LittleEndian
	n := little.Uint32(h[:])
	if n > maxFrame {
		return 0, nil, 0, fmt.Errorf("a frame of %d bytes: %w", n, errTorn)
	}
	payload, err := io.ReadAll(io.LimitReader(in, int64(n))) // grows with what is there, not with what a damaged length claims
	if err != nil {
		return 0, nil, 0, err
	}
	if len(payload) < int(n) || crc32c.Update(crc32c.Checksum(h[:12]), payload) != little.Uint32(h[12:]) {
		return 0, nil, 0, fmt.Errorf("a frame is cut short or damaged: %w", errTorn)
	}
	if got := little.Uint32(h[8:]); number >= 0 && int64(got) != number {
		return 0, nil, 0, fmt.Errorf("frame %d where %d belongs: %w", got, number, errTorn)
	}
	return frameKind(little.Uint32(h[4:])), payload, little.Uint32(h[8:]), nil
}

// close ends the manifest.
func (m *manifest) close() error {
	if m.file == nil {
		return nil
	}
	return m.file.Close()
}

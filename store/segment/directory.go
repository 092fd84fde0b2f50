package segment

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"dmi/internal/vfs"
)

// Listed is a request's group in a directory: its chunks in order of site, attempt and position, and what the segment calls it.
type Listed struct {
	Group
	ID     string
	Chunks []Chunk
}

// Directory reads the directory of a sealed segment: two reads, where Scan goes over the whole file.
func Directory(f vfs.File) ([]Listed, error) {
	at, size, err := findDirectory(f)
	if err != nil {
		return nil, fmt.Errorf("segment: find the directory: %w", err)
	}
	b := make([]byte, size)
	if _, err := f.ReadAt(b, at); err != nil && err != io.EOF {
		return nil, fmt.Errorf("segment: read the directory at %d: %w", at, err)
	}
	var listed []Listed
	for {
		n := GroupLength(b)
		if n == 0 || n > int64(len(b)) {
			break
		}
		l, err := ParseListed(b[:n], at)
		if err != nil {
			return nil, err
		}
		listed = append(listed, l)
		b, at = b[n:], at+n
	}
	if len(bytes.Trim(b, "\x00")) > 0 || len(b) >= vfs.Align {
		return nil, errors.New("segment: the directory is damaged")
	}
	return listed, nil
}

// ParseListed reads a group that is at an offset of its file.
func ParseListed(b []byte, at int64) (Listed, error) {
	key, id, chunks, err := parseGroup(b)
	if err != nil {
		return Listed{}, err
	}
	l := Listed{Group{Key: key, Offset: at, Length: int64(len(b)), Chunks: len(chunks), List: string(b)}, id, chunks}
	for i := range chunks {
		l.Rows += uint64(chunks[i].Rows)
		l.Bytes += uint64(chunks[i].Length)
	}
	return l, nil
}

// Identify reads which segment a sealed file is, and where its batches begin, from its first batch.
func Identify(f vfs.File) (Identity, int64, error) {
	var b [vfs.Align]byte
	if _, err := f.ReadAt(b[:8], 0); err != nil {
		return Identity{}, 0, fmt.Errorf("segment: read the length of the header: %w", err)
	}
	data := int64(binary.LittleEndian.Uint64(b[:])) + 8
	if data < vfs.Align || data%vfs.Align != 0 || data > maxBlock {
		return Identity{}, 0, fmt.Errorf("segment: a header of %d bytes", data)
	}
	if _, err := f.ReadAt(b[:], data); err != nil {
		return Identity{}, 0, fmt.Errorf("segment: read the first batch at %d: %w", data, err)
	}
	t, err := parseTrailer(b[len(b)-trailerBytes:])
	if err != nil {
		return Identity{}, 0, err
	}
	if t.batch != 0 || t.start != data || t.block != data || blockBytes(t.block, int(t.items)) != len(b) {
		return Identity{}, 0, errors.New("segment: what should be the first batch is another")
	}
	first, err := parseBlock(b[:], t)
	if err != nil {
		return Identity{}, 0, err
	}
	if first.identity == nil {
		return Identity{}, 0, errors.New("segment: the first batch does not say whose it is")
	}
	id := *first.identity
	id.Nonce = t.nonce
	return id, data, nil
}

// findDirectory asks the safetensors header.
func findDirectory(f vfs.File) (offset, size int64, err error) {
	file, err := f.Size()
	if err != nil {
		return 0, 0, err
	}
	var length [8]byte
	if _, err := f.ReadAt(length[:], 0); err != nil {
		return 0, 0, err
	}
	n := binary.LittleEndian.Uint64(length[:])
	if n == 0 || n > uint64(file) || n > maxBlock {
		return 0, 0, fmt.Errorf("a header of %d bytes in a file of %d", n, file)
	}
	text := make([]byte, n)
	if _, err := f.ReadAt(text, 8); err != nil {
		return 0, 0, err
	}
	key := []byte(`"dmi.directory":`)
	i := bytes.LastIndex(text, key)
	if i < 0 {
		return 0, 0, errors.New("the header names none")
	}
	var entry struct {
		Offsets [2]int64 `json:"data_offsets"`
	}
	if err := json.NewDecoder(bytes.NewReader(text[i+len(key):])).Decode(&entry); err != nil {
		return 0, 0, err
	}
	from, to := entry.Offsets[0], entry.Offsets[1]
	if from < 0 || to < from || to > file-8-int64(n) {
		return 0, 0, fmt.Errorf("it reaches from %d to %d of a file of %d", from, to, file)
	}
	return 8 + int64(n) + from, to - from, nil
}

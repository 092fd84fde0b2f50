package segment

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"dmi/internal/crc32c"
	"dmi/internal/vfs"
	"dmi/tensor"
)

const (
	trailerBytes = 64
	maxDims      = 16
	maxBlock     = 64 << 20 // bytes of an index block
	blockMagic   = "DMIINDEX"
	groupMagic   = "DMIG"
	groupHeader  = 12
)

const (
	itemIdentity = 1 + iota
	itemRequest
	itemSite
	itemChunk
	itemPad
)

type pad struct{ offset, length int64 }

// items are what index blocks and directory groups hold.
type items struct {
	identity *Identity
	requests []requestItem
	sites    []siteItem
	chunks   []Chunk
	pads     []pad
}

type requestItem struct {
	key tensor.RequestKey
	id  string
}

type siteItem struct {
	key  siteKey
	name string
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func appendRequest(b []byte, key tensor.RequestKey, id string) []byte {
	b = binary.AppendUvarint(append(b, itemRequest), uint64(key.Session))
	return appendString(binary.AppendUvarint(b, key.Request), id)
}

func appendSite(b []byte, key siteKey, name string) []byte {
	b = binary.AppendUvarint(append(b, itemSite), uint64(key.session))
	return appendString(binary.AppendUvarint(b, uint64(key.site)), name)
}

// appendChunk encodes c, with its offset counted from base.
func appendChunk(b []byte, c *Chunk, base int64) []byte {
	b = append(b, itemChunk)
	for _, v := range [...]uint64{uint64(c.Key.Session), c.Key.Request, uint64(c.Site), uint64(c.Attempt), uint64(c.First), uint64(c.Rows), c.Step,
		c.LastStep - c.Step, uint64(c.DType), uint64(c.Level), c.Policy, uint64(c.Copy), uint64(len(c.Shape))} {
		b = binary.AppendUvarint(b, v)
	}
	for _, d := range c.Shape {
		b = binary.AppendUvarint(b, uint64(d))
	}
	b = binary.AppendUvarint(b, uint64(c.Offset-base))
	b = binary.AppendUvarint(b, uint64(c.Length))
	return binary.LittleEndian.AppendUint32(b, c.CRC)
}

// cursor decodes items. The first malformed field sticks as err.
type cursor struct {
	b   []byte
	err error
}

func (c *cursor) fail(what string) {
	if c.err == nil {
		c.err = errors.New(what)
	}
	c.b = nil
}

func (c *cursor) uint(max uint64) uint64 {
	v, n := binary.Uvarint(c.b)
	if n <= 0 || v > max {
		c.fail("a number is cut short or out of range")
		return 0
	}
	c.b = c.b[n:]
	return v
}

func (c *cursor) string() string {
	n := c.uint(uint64(len(c.b)))
	if n > uint64(len(c.b)) {
		c.fail("a string is cut short")
		return ""
	}
	s := string(c.b[:n])
	c.b = c.b[n:]
	return s
}

func (c *cursor) chunk(base int64) Chunk {
	k := Chunk{Key: tensor.RequestKey{Session: uint32(c.uint(math.MaxUint32)), Request: c.uint(math.MaxUint64)}, Site: uint32(c.uint(math.MaxUint32)),
		Attempt: uint16(c.uint(math.MaxUint16)), First: uint32(c.uint(math.MaxUint32)), Rows: uint32(c.uint(math.MaxUint32)), Step: c.uint(math.MaxUint64)}
	k.LastStep = k.Step + c.uint(math.MaxUint64-k.Step)
	k.DType, k.Level = tensor.DType(c.uint(math.MaxUint8)), tensor.Level(c.uint(math.MaxUint8))
	k.Policy, k.Copy = c.uint(math.MaxUint64), uint32(c.uint(math.MaxUint32))
	k.Shape = make([]int, c.uint(maxDims))
	for i := range k.Shape {
		k.Shape[i] = int(c.uint(math.MaxInt32))
	}
	k.Offset = base + int64(c.uint(uint64(math.MaxInt64-base)))
	k.Length = int64(c.uint(math.MaxInt64))
	if len(c.b) < 4 {
		c.fail("a chunk is cut short")
		return k
	}
	k.CRC = binary.LittleEndian.Uint32(c.b)
	c.b = c.b[4:]
	if err := k.Check(); err != nil {
		c.fail(err.Error())
	}
	return k
}

// decodeItems reads items whose offsets count from base.
func decodeItems(b []byte, base int64) (*items, error) {
	c := cursor{b: b}
	var t items
	for len(c.b) > 0 {
		kind := c.b[0]
		c.b = c.b[1:]
		switch kind {
		case itemIdentity:
			t.identity = &Identity{Store: c.string(), Number: c.uint(math.MaxInt64), Created: int64(c.uint(math.MaxInt64))}
		case itemRequest:
			key := tensor.RequestKey{Session: uint32(c.uint(math.MaxUint32)), Request: c.uint(math.MaxUint64)}
			t.requests = append(t.requests, requestItem{key, c.string()})
		case itemSite:
			key := siteKey{uint32(c.uint(math.MaxUint32)), uint32(c.uint(math.MaxUint32))}
			t.sites = append(t.sites, siteItem{key, c.string()})
		case itemChunk:
			t.chunks = append(t.chunks, c.chunk(base))
		case itemPad:
			p := pad{base + int64(c.uint(uint64(math.MaxInt64-base))), int64(c.uint(math.MaxInt32))}
			t.pads = append(t.pads, p)
		default:
			c.fail(fmt.Sprintf("an item of kind %d", kind))
		}
	}
	return &t, c.err
}

// trailer is the fixed end of an index block.
type trailer struct {
	items uint32 // bytes
	nonce uint64
	batch uint64
	start int64 // of the batch
	block int64 // of the index block
	crc   uint32
}

func (t trailer) put(b []byte) {
	little := binary.LittleEndian
	copy(b, blockMagic)
	little.PutUint16(b[8:], Version)
	little.PutUint32(b[12:], t.items)
	little.PutUint64(b[16:], t.nonce)
	little.PutUint64(b[24:], t.batch)
	little.PutUint64(b[32:], uint64(t.start))
	little.PutUint64(b[40:], uint64(t.block))
	little.PutUint32(b[56:], t.crc)
	little.PutUint32(b[60:], crc32c.Checksum(b[:60]))
}

var (
	errNoTrailer = errors.New("no index block ends here")
	// ErrVersion is that a file was written by a later version.
	ErrVersion = errors.New("written by a later version of DMI")
)

func parseTrailer(b []byte) (trailer, error) {
	little := binary.LittleEndian
	if len(b) != trailerBytes || string(b[:8]) != blockMagic || little.Uint32(b[60:]) != crc32c.Checksum(b[:60]) {
		return trailer{}, errNoTrailer
	}
	if v := little.Uint16(b[8:]); v != Version {
		return trailer{}, fmt.Errorf("segment format %d, this one reads up to %d: %w", v, Version, ErrVersion)
	}
	t := trailer{little.Uint32(b[12:]), little.Uint64(b[16:]), little.Uint64(b[24:]), int64(little.Uint64(b[32:])), int64(little.Uint64(b[40:])),
		little.Uint32(b[56:])}
	if t.start < 0 || t.start%vfs.Align != 0 || t.block < t.start || t.items > maxBlock {
		return trailer{}, errNoTrailer
	}
	return t, nil
}

// blockBytes is the size of an index block at an offset with this many bytes of items.
func blockBytes(offset int64, items int) int {
	end := offset + int64(items) + trailerBytes
	return int((end+vfs.Align-1)/vfs.Align*vfs.Align - offset)
}

// parseBlock decodes the index block b whose trailer is t.
func parseBlock(b []byte, t trailer) (*items, error) {
	if len(b) != blockBytes(t.block, int(t.items)) {
		return nil, fmt.Errorf("index block of %d bytes, where its items make %d", len(b), blockBytes(t.block, int(t.items)))
	}
	body := b[:len(b)-trailerBytes]
	if crc32c.Checksum(body) != t.crc {
		return nil, errors.New("index block's checksum is wrong")
	}
	decoded, err := decodeItems(body[:t.items], t.start)
	if err != nil {
		return nil, fmt.Errorf("index block: %w", err)
	}
	for i := range decoded.chunks {
		if c := &decoded.chunks[i]; c.Offset+c.Length > t.block {
			return nil, fmt.Errorf("index block: chunk at %d reaches past its batch", c.Offset)
		}
	}
	return decoded, nil
}

// appendGroup encodes a request's chunks, which are in order, for the directory.
func appendGroup(b []byte, id string, chunks []*Chunk) []byte {
	at := len(b)
	b = append(append(b, groupMagic...), make([]byte, groupHeader-4)...)
	b = appendRequest(b, chunks[0].Key, id)
	for _, c := range chunks {
		b = appendChunk(b, c, 0)
	}
	body := b[at+groupHeader:]
	binary.LittleEndian.PutUint32(b[at+4:], uint32(len(body)))
	binary.LittleEndian.PutUint32(b[at+8:], crc32c.Checksum(body))
	return b
}

// ParseGroup reads a request's chunks from its group in the directory.
func ParseGroup(b []byte) (tensor.RequestKey, []Chunk, error) {
	key, _, chunks, err := parseGroup(b)
	return key, chunks, err
}

// GroupLength is how long the directory group is that b begins with, by its own word; 0 where b begins with none.
func GroupLength(b []byte) int64 {
	if len(b) < groupHeader || string(b[:4]) != groupMagic {
		return 0
	}
	return groupHeader + int64(binary.LittleEndian.Uint32(b[4:]))
}

func parseGroup(b []byte) (key tensor.RequestKey, id string, chunks []Chunk, err error) {
	if len(b) < groupHeader || string(b[:4]) != groupMagic || uint64(binary.LittleEndian.Uint32(b[4:])) != uint64(len(b)-groupHeader) {
		return key, "", nil, errors.New("segment: no directory group here")
	}
	body := b[groupHeader:]
	if crc32c.Checksum(body) != binary.LittleEndian.Uint32(b[8:]) {
		return key, "", nil, errors.New("segment: directory group's checksum is wrong")
	}
	decoded, err := decodeItems(body, 0)
	if err != nil {
		return key, "", nil, fmt.Errorf("segment: directory group: %w", err)
	}
	if len(decoded.requests) != 1 {
		return key, "", nil, fmt.Errorf("segment: directory group of %d requests", len(decoded.requests))
	}
	key = decoded.requests[0].key
	for i := range decoded.chunks {
		if decoded.chunks[i].Key != key {
			return key, "", nil, errors.New("segment: directory group holds another request's chunk")
		}
	}
	return key, decoded.requests[0].id, decoded.chunks, nil
}

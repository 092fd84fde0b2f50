package segment

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"dmi/internal/crc32c"
	"dmi/internal/vfs"
	"dmi/tensor"
)

// Contents is what the index blocks of a segment say.
type Contents struct {
	Identity Identity
	Data     int64 // offset of the first batch
	End      int64 // of the last whole batch
	Chunks   []Chunk
	batches  uint64
	header   *header
	ends     []batchEnd
}

type batchEnd struct {
	end    int64
	chunks int // in this batch and before
}

// ErrEmpty is that a file has no whole batch: its creation was cut short.
var ErrEmpty = errors.New("segment: no whole batch")

// Scan follows the index blocks of a segment, sealed or not, to the last whole one. Damage before the end of the file is for Check to tell.
// Memory: the chunk list, and 1 MiB.
func Scan(f vfs.File) (*Contents, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	c := &Contents{header: newHeader()}
	window := make([]byte, min(1<<20, (size+vfs.Align-1)/vfs.Align*vfs.Align))
	var pos int64 // where the next batch starts; 0: unknown
	for at := int64(0); at < size; at += int64(len(window)) {
		n := int(min(int64(len(window)), size-at))
		if _, err := f.ReadAt(window[:n], at); err != nil && err != io.EOF {
			return nil, fmt.Errorf("segment: scan at %d: %w", at, err)
		}
		for page := vfs.Align; page <= n; page += vfs.Align {
			t, err := parseTrailer(window[page-trailerBytes : page])
			if errors.Is(err, ErrVersion) && c.batches == 0 {
				return nil, err
			}
			if err != nil || t.batch != c.batches || (c.batches > 0 && (t.nonce != c.Identity.Nonce || t.start != pos)) {
				continue
			}
			end := at + int64(page)
			if end-t.block != int64(blockBytes(t.block, int(t.items))) {
				continue
			}
			block := make([]byte, end-t.block)
			if _, err := f.ReadAt(block, t.block); err != nil {
				return nil, fmt.Errorf("segment: read the index block at %d: %w", t.block, err)
			}
			decoded, err := parseBlock(block, t)
			if err != nil {
				continue
			}
			if c.batches == 0 {
				if decoded.identity == nil || t.block != t.start {
					continue
				}
				c.Identity, c.Data = *decoded.identity, t.start
				c.Identity.Nonce = t.nonce
			}
			c.add(decoded, t, end)
			pos = end
		}
	}
	if c.batches == 0 {
		return nil, ErrEmpty
	}
	return c, nil
}

// add takes in a batch.
func (c *Contents) add(t *items, at trailer, end int64) {
	for _, r := range t.requests {
		c.header.request[r.key] = r.id
	}
	for _, s := range t.sites {
		c.header.site[s.key] = s.name
	}
	pads := t.pads
	for i := range t.chunks {
		k := &t.chunks[i]
		for len(pads) > 0 && pads[0].offset+pads[0].length <= k.Offset {
			c.header.addPad(pads[0], c.Data)
			pads = pads[1:]
		}
		c.header.addChunk(k, c.Data)
	}
	c.header.addIndex(at.batch, at.block-c.Data, end-at.block)
	c.Chunks = append(c.Chunks, t.chunks...)
	c.End = end
	c.batches++
	c.ends = append(c.ends, batchEnd{end, len(c.Chunks)})
}

// Request is the name that the segment knows a request by.
func (c *Contents) Request(key tensor.RequestKey) string { return c.header.request[key] }

// Intact is the end of the last batch such that every chunk between from and it has the right bytes. What a power loss left of
// batches that were never synced is found so. Memory: the largest chunk.
func (c *Contents) Intact(f vfs.File, from int64) (int64, error) {
	var buf []byte
	chunk := 0
	intact := c.Data
	for _, b := range c.ends {
		for ; chunk < b.chunks; chunk++ {
			k := &c.Chunks[chunk]
			if b.end <= from {
				continue
			}
			var err error
			if buf, err = Read(f, k, buf); err != nil {
				if errors.Is(err, ErrChecksum) || errors.Is(err, io.ErrUnexpectedEOF) {
					return intact, nil
				}
				return 0, err
			}
		}
		intact = b.end
	}
	return intact, nil
}

// Resume opens the unsealed segment that c describes, so that it can be sealed: whatever follows offset end, the end of one of
// its batches, is cut off.
func Resume(fs vfs.FS, name string, f vfs.File, end int64, limits Limits) (*Writer, *Contents, error) {
	if err := f.Truncate(end); err != nil {
		return nil, nil, fmt.Errorf("segment: cut %s at %d: %w", name, end, err)
	}
	c, err := Scan(f)
	if err != nil {
		return nil, nil, err
	}
	limits.Header = c.Data
	w := &Writer{fs: fs, path: name, file: f, id: c.Identity, limits: limits, header: c.header, at: end, start: end, batch: c.batches, all: c.Chunks}
	w.run()
	return w, c, nil
}

// ErrChecksum is that a chunk's bytes are not those that were written.
var ErrChecksum = errors.New("checksum is wrong")

// Read reads a chunk's bytes into buf, which is grown as needed, and checks them.
func Read(f vfs.File, c *Chunk, buf []byte) ([]byte, error) {
	size, err := f.Size()
	if err != nil {
		return buf, err
	}
	if c.Offset+c.Length > size { // before allocating what a damaged entry asks for
		return buf, fmt.Errorf("segment: read %d bytes at %d of a file of %d: %w", c.Length, c.Offset, size, io.ErrUnexpectedEOF)
	}
	if int64(cap(buf)) < c.Length {
		buf = make([]byte, c.Length)
	}
	buf = buf[:c.Length]
	if n, err := f.ReadAt(buf, c.Offset); n < len(buf) {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return buf, fmt.Errorf("segment: read %d bytes at %d: %w", c.Length, c.Offset, err)
	}
	if crc32c.Checksum(buf) != c.CRC {
		return buf, fmt.Errorf("segment: chunk of %d bytes at %d: %w", c.Length, c.Offset, ErrChecksum)
	}
	return buf, nil
}

// Groups is the directory that the segment has, or will have when it is sealed.
func (c *Contents) Groups() []Group {
	_, groups := buildDirectory(c.Chunks, c.header, c.End)
	return groups
}

// Listed is what that directory says.
func (c *Contents) Listed() []Listed {
	chunks := slices.Clone(c.Chunks)
	slices.SortFunc(chunks, func(a, b Chunk) int { return a.Compare(&b) })
	var listed []Listed
	for _, g := range c.Groups() {
		listed = append(listed, Listed{g, c.header.request[g.Key], chunks[:g.Chunks:g.Chunks]})
		chunks = chunks[g.Chunks:]
	}
	return listed
}

// Cut leaves only the batches that end at or before end.
func (c *Contents) Cut(end int64) {
	for i, b := range c.ends {
		if b.end > end {
			c.Chunks = c.Chunks[:0]
			c.ends, c.End = c.ends[:i], c.Data
			if i > 0 {
				c.Chunks, c.End = c.Chunks[:c.ends[i-1].chunks], c.ends[i-1].end
			}
			return
		}
	}
}

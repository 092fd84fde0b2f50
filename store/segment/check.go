package segment

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"dmi/internal/vfs"
)

// Check reads every byte of a segment and reports whatever is not as it was written: chunks, index blocks, padding, directory and header.
// read is told how many bytes were read. It returns the contents as far as they can be made out.
func Check(f vfs.File, sealed bool, read func(int64), report func(offset int64, what string)) (*Contents, error) {
	c, err := Scan(f)
	if errors.Is(err, ErrEmpty) {
		report(-1, "no index block can be read: the file is not a segment, or its start is damaged")
		return &Contents{}, nil
	}
	if err != nil {
		return nil, err
	}
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	checkBatches(f, c, read, report)
	if !sealed {
		if c.End < size {
			report(c.End, fmt.Sprintf("%d bytes after the last whole batch", size-c.End))
		}
		return c, nil
	}
	directory, groups := buildDirectory(c.Chunks, c.header, c.End)
	found := make([]byte, min(int64(len(directory)), max(0, size-c.End)))
	if _, err := f.ReadAt(found, c.End); err != nil && err != io.EOF {
		report(c.End, fmt.Sprintf("directory cannot be read: %v", err))
	}
	for _, g := range groups {
		from, to := g.Offset-c.End, g.Offset-c.End+g.Length
		if to > int64(len(found)) || !bytes.Equal(directory[from:to], found[from:to]) {
			report(g.Offset, "directory differs from what the index blocks say")
		}
	}
	if len(groups) > 0 {
		last := groups[len(groups)-1]
		tail := last.Offset + last.Length - c.End
		if int64(len(found)) < int64(len(directory)) || !bytes.Equal(directory[tail:], found[tail:]) {
			report(c.End+tail, "directory's padding is damaged or missing")
		}
	}
	if end := c.End + int64(len(directory)); end < size {
		report(end, fmt.Sprintf("%d bytes after the directory", size-end))
	}
	c.header.addBytes("dmi.directory", c.End-c.Data, int64(len(directory)))
	want, err := c.header.bytes(c.Identity, c.Data)
	if err != nil {
		report(0, err.Error())
		return c, nil
	}
	got := make([]byte, c.Data)
	if _, err := f.ReadAt(got, 0); err != nil && err != io.EOF {
		report(0, fmt.Sprintf("header cannot be read: %v", err))
	} else if !bytes.Equal(want, got) {
		at := int64(0)
		for want[at] == got[at] {
			at++
		}
		report(at, "safetensors header differs from what the index blocks say")
	}
	read(c.Data + int64(len(found)))
	return c, nil
}

// checkBatches reads chunks and what lies between them.
func checkBatches(f vfs.File, c *Contents, read func(int64), report func(int64, string)) {
	var buf []byte
	chunk := 0
	start := c.Data
	for _, b := range c.ends {
		at := start
		for ; chunk < b.chunks; chunk++ {
			k := &c.Chunks[chunk]
			if k.Offset < at {
				report(k.Offset, "chunks overlap")
			} else {
				checkZeros(f, at, k.Offset, report)
			}
			var err error
			if buf, err = Read(f, k, buf); err != nil {
				report(k.Offset, fmt.Sprintf("request %s, rows %d to %d: %v", c.header.name(k), k.First, uint64(k.First)+uint64(k.Rows), err))
			}
			at = k.Offset + k.Length
		}
		read(b.end - start)
		start = b.end
	}
}

// checkZeros reports padding that is not zero.
func checkZeros(f vfs.File, from, to int64, report func(int64, string)) {
	if to <= from {
		return
	}
	if to-from >= vfs.Align {
		report(from, fmt.Sprintf("%d bytes that no chunk owns", to-from))
		return
	}
	b := make([]byte, to-from)
	if _, err := f.ReadAt(b, from); err != nil && err != io.EOF {
		report(from, fmt.Sprintf("padding cannot be read: %v", err))
		return
	}
	for i, v := range b {
		if v != 0 {
			report(from+int64(i), "padding is not zero")
			return
		}
	}
}

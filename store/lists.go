package store

import (
	"bytes"
	"compress/flate"
	"io"
)

// Lists of a request's chunks that the catalogue has too. The lines of a request lie together there, while the segments that its rows are spread over are as many
// files: without them a cold read of a site whose rows are in four segments costs four reads before the first for rows.

const (
	// longestList is how long one may be once it is packed: the line and one page more are read for it, which is no more than a read of the segment. Longer ones are
	// of requests with many chunks in a segment, which cost far more reads than their lists.
	longestList = 4 << 10
	listRatio   = 5 / 2. // by which lists shrink at most, near enough: numbers that repeat, beside checksums and offsets that do not
)

// packer packs lists, one after the other.
type packer struct {
	to  bytes.Buffer
	zip *flate.Writer
}

// pack gives a list as it is kept, or nil where it is too long. The result is the caller's.
func (p *packer) pack(list string) []byte {
	if list == "" || len(list) > longestList*listRatio {
		return nil
	}
	p.to.Reset()
	if p.zip == nil {
		p.zip, _ = flate.NewWriter(&p.to, flate.BestSpeed) // the level is one that there is
	} else {
		p.zip.Reset(&p.to)
	}
	_, _ = io.WriteString(p.zip, list) // to memory: it cannot fail
	_ = p.zip.Close()
	if p.to.Len() > longestList {
		return nil
	}
	return bytes.Clone(p.to.Bytes())
}

// unpack gives back a list of so many bytes; "" where there is none, or another. What it holds is checked by who parses it.
func unpack(b []byte, length int64) string {
	if len(b) == 0 || length <= 0 || length > longestList*8 {
		return ""
	}
	list := make([]byte, length)
	r := flate.NewReader(bytes.NewReader(b))
	if _, err := io.ReadFull(r, list); err != nil {
		return ""
	}
	return string(list)
}

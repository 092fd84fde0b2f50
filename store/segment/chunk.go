package segment

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"

	"dmi/tensor"
)

// Version of the segment format that this package writes; it reads every version up to it.
const Version = 1

// Identity says which segment of which store a file is.
type Identity struct {
	Store   string
	Number  uint64
	Created int64 // ns since 1970
	Nonce   uint64
}

// Chunk says what a stored tensor is and where. Its bytes are Rows x Shape x DType, row-major.
type Chunk struct {
	Key      tensor.RequestKey
	Site     uint32
	Attempt  uint16
	First    uint32
	Rows     uint32
	Step     uint64
	LastStep uint64
	DType    tensor.DType
	Level    tensor.Level
	Policy   uint64
	Shape    []int
	Copy     uint32 // > 0 where a tensor of the same name was there before
	Offset   int64  // in the file
	Length   int64
	CRC      uint32
}

// Compare orders chunks by request, site, attempt and position.
func (c *Chunk) Compare(o *Chunk) int {
	for _, pair := range [...][2]uint64{{uint64(c.Key.Session), uint64(o.Key.Session)}, {c.Key.Request, o.Key.Request}, {uint64(c.Site), uint64(o.Site)},
		{uint64(c.Attempt), uint64(o.Attempt)}, {uint64(c.First), uint64(o.First)}, {uint64(c.Offset), uint64(o.Offset)}} {
		switch {
		case pair[0] < pair[1]:
			return -1
		case pair[0] > pair[1]:
			return 1
		}
	}
	return 0
}

// RowBytes is the size of one row.
func (c *Chunk) RowBytes() int64 {
	if c.Rows == 0 {
		return 0
	}
	return c.Length / int64(c.Rows)
}

// Check reports whether the fields of a chunk fit together.
func (c *Chunk) Check() error {
	if err := CheckRows(c.DType, c.Level, c.First, c.Rows, c.Shape, c.Length); err != nil {
		return err
	}
	if c.Offset < 0 || c.Offset > math.MaxInt64-c.Length {
		return fmt.Errorf("chunk of %d bytes at %d", c.Length, c.Offset)
	}
	return nil
}

// CheckRows reports whether rows of a shape and dtype at a level can be so many bytes.
func CheckRows(dtype tensor.DType, level tensor.Level, first, rows uint32, shape []int, length int64) error {
	if !dtype.Valid() || !level.Valid() {
		return fmt.Errorf("chunk of dtype %d and level %d", uint8(dtype), uint8(level))
	}
	if rows == 0 || uint64(first)+uint64(rows) > math.MaxUint32+1 {
		return fmt.Errorf("chunk of %d rows from %d", rows, first)
	}
	bytes := int64(rows) * int64(dtype.Size())
	for _, d := range shape {
		if d < 0 || (d > 0 && bytes > math.MaxInt64/int64(d)) {
			return fmt.Errorf("chunk of row shape %v", shape)
		}
		bytes *= int64(d)
	}
	if level.Quantised() {
		bytes = int64(rows) * int64(tensor.RowBytes(level, dtype, shape))
	}
	if bytes != length {
		return fmt.Errorf("chunk of %d bytes, where rows, shape and dtype make %d", length, bytes)
	}
	return nil
}

// dtypes that every safetensors reader knows. Others are stored as U8 with the last dimension in bytes, and their dtype in the
// header's metadata.
var safetensorsKnows = [...]bool{tensor.Bool: true, tensor.U8: true, tensor.I8: true, tensor.U16: true, tensor.I16: true, tensor.U32: true,
	tensor.I32: true, tensor.U64: true, tensor.I64: true, tensor.F16: true, tensor.BF16: true, tensor.F32: true, tensor.F64: true,
	tensor.F8E4M3: true, tensor.F8E5M2: true, tensor.C128: false}

// header is the JSON text of a safetensors header as it grows.
type header struct {
	lines   []byte // `,"name":{...}` each
	dtypes  []byte // `,"name":"C128"` each: what safetensors has no name for
	levels  []byte // `,"name":{...}` each: what quantised rows were
	taken   map[string]uint32
	request map[tensor.RequestKey]string
	site    map[siteKey]string
	tensors int
}

type siteKey struct{ session, site uint32 }

func newHeader() *header {
	return &header{taken: map[string]uint32{}, request: map[tensor.RequestKey]string{}, site: map[siteKey]string{}}
}

// name builds the name of c as far as it does not depend on what else is in the file.
func (h *header) name(c *Chunk) string {
	n := fmt.Sprintf("%s/%s/%07d:%07d", h.request[c.Key], h.site[siteKey{c.Key.Session, c.Site}], c.First, uint64(c.First)+uint64(c.Rows))
	if c.Attempt > 0 {
		n += "@" + strconv.Itoa(int(c.Attempt))
	}
	return n
}

// copyOf is how many tensors of c's name there are.
func (h *header) copyOf(c *Chunk) uint32 { return h.taken[h.name(c)] }

func (h *header) addChunk(c *Chunk, data int64) {
	name := h.name(c)
	h.taken[name]++
	if c.Copy > 0 {
		name += "#" + strconv.Itoa(int(c.Copy)+1)
	}
	dtype, shape := c.DType.String(), append([]int{int(c.Rows)}, c.Shape...)
	if c.Level.Quantised() {
		quoted, _ := json.Marshal(name)
		what, _ := json.Marshal(map[string]any{"level": c.Level.String(), "dtype": dtype, "shape": shape})
		h.levels = append(append(append(append(h.levels, ','), quoted...), ':'), what...)
		dtype, shape = tensor.U8.String(), []int{int(c.Rows), tensor.RowBytes(c.Level, c.DType, c.Shape)}
	} else if int(c.DType) >= len(safetensorsKnows) || !safetensorsKnows[c.DType] {
		quoted, _ := json.Marshal(name)
		h.dtypes = fmt.Appendf(h.dtypes, `,%s:"%s"`, quoted, dtype)
		dtype = tensor.U8.String()
		shape[len(shape)-1] *= c.DType.Size()
	}
	h.add(name, dtype, shape, c.Offset-data, c.Length)
}

func (h *header) addBytes(name string, offset, length int64) {
	h.add(name, tensor.U8.String(), []int{int(length)}, offset, length)
}

func (h *header) add(name, dtype string, shape []int, offset, length int64) {
	quoted, _ := json.Marshal(name)
	h.lines = append(append(h.lines, ','), quoted...)
	h.lines = append(append(append(h.lines, `:{"dtype":"`...), dtype...), `","shape":[`...)
	for i, d := range shape {
		if i > 0 {
			h.lines = append(h.lines, ',')
		}
		h.lines = strconv.AppendInt(h.lines, int64(d), 10)
	}
	h.lines = fmt.Appendf(h.lines, `],"data_offsets":[%d,%d]}`, offset, offset+length)
	h.tensors++
}

// room is an upper bound of the header's bytes once a chunk of this name has been added with what comes with it.
func (h *header) room(c *Chunk) int {
	line := 6*len(h.request[c.Key]) + 6*len(h.site[siteKey{c.Key.Session, c.Site}]) + 200 + 20*len(c.Shape) // 6: a byte escaped in JSON
	return len(h.lines) + 2*len(h.dtypes) + 2*len(h.levels) + 6*line + 2048
}

// bytes is the file up to its data: length, text and blanks.
func (h *header) bytes(id Identity, data int64) ([]byte, error) {
	meta := map[string]string{
		"dmi.format": "segment", "dmi.version": strconv.Itoa(Version), "dmi.store": id.Store, "dmi.segment": strconv.FormatUint(id.Number, 10),
		"dmi.created_unix_ns": strconv.FormatInt(id.Created, 10), "dmi.nonce": fmt.Sprintf("%016x", id.Nonce),
	}
	if len(h.dtypes) > 0 {
		meta["dmi.dtypes"] = "{" + string(h.dtypes[1:]) + "}"
	}
	if len(h.levels) > 0 {
		meta["dmi.levels"] = "{" + string(h.levels[1:]) + "}"
	}
	text, err := json.Marshal(map[string]any{"__metadata__": meta})
	if err != nil {
		return nil, err
	}
	text = append(append(text[:len(text)-1], h.lines...), '}')
	if int64(len(text)) > data-8 {
		return nil, fmt.Errorf("segment: header of %d bytes does not fit the %d kept for it", len(text), data-8)
	}
	b := slices.Grow([]byte{}, int(data))[:data]
	n := uint64(data - 8)
	for i := range 8 {
		b[i] = byte(n >> (8 * i))
	}
	copy(b[8:], text)
	for i := 8 + len(text); i < len(b); i++ {
		b[i] = ' '
	}
	return b, nil
}

func (h *header) addPad(p pad, data int64) {
	h.addBytes(fmt.Sprintf("dmi.pad/%d", p.offset), p.offset-data, p.length)
}

func (h *header) addIndex(batch uint64, offset, length int64) {
	h.addBytes(fmt.Sprintf("dmi.index/%d", batch), offset, length)
}

package pipeline_test

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"slices"
	"time"

	"dmi/internal/ringtape"
	"dmi/ring"
	"dmi/tensor"
)

// traffic is a producer of random steps that keeps, row by row, what the engine must make of them. What a captured element is worth is a
// function of what it stands for (element), so that the oracle knows nothing of strides, spans or spaces.
type traffic struct {
	*rand.Rand
	p        *ringtape.Producer
	sites    []trafficSite
	complete bool
	want     map[rowKey]fate // of every row that has been produced and attributed
	loose    map[fate]uint64 // row-outcomes of no request
	step     uint64
	next     uint64
	deadline time.Duration
	rules    *drawnRules                            // nil: everything is kept
	revision uint64                                 // of the step at hand
	drafts   map[*ringtape.ProducerLane][]ring.Span // of the lane's last step: which are rejected the next one says
	lie      func([]byte)                           // changes a record or row table before it is published; nil: honest
}

type rowKey struct {
	site     uint32
	request  uint64
	attempt  uint16
	position uint32
}

type fate struct {
	outcome tensor.Outcome
	reason  tensor.Reason
}

type trafficSite struct {
	ring.Site
	name  string
	dtype tensor.DType
	inner []int // sizes of INNER dimensions
}

type request struct {
	id      uint64
	attempt uint16
	length  uint32 // positions so far
}

// stepRows is what a step computes.
type stepRows struct {
	packed bool
	spans  []ring.Span
	width  [ring.Spaces]uint32
	keys   uint32
	batch  int
	rows   [ring.Spaces]uint32
}

func newTraffic(seed uint64, mode uint32, shape ringtape.Shape) (*traffic, error) {
	shape.Mode = mode
	p, err := ringtape.NewProducer(shape)
	if err != nil {
		return nil, err
	}
	t := &traffic{Rand: rand.New(rand.NewPCG(seed, 7)), p: p, complete: mode == ring.ModeComplete, want: map[rowKey]fate{}, drafts: map[*ringtape.ProducerLane][]ring.Span{}, loose: map[fate]uint64{}, next: 1,
		deadline: time.Minute}
	const R, I, K = ring.RoleRow, ring.RoleInner, ring.RoleKey
	t.add("resid", tensor.BF16, ring.SpaceTokens, 0, []uint8{R, R, I}, 1+t.IntN(40))
	t.add("q", tensor.F32, ring.SpaceTokens, 0, []uint8{R, R, I, I}, 1+t.IntN(3), 1+t.IntN(8))
	t.add("pattern", tensor.F16, ring.SpaceTokens, 0, []uint8{R, I, R, K}, 1+t.IntN(3))
	t.add("scores", tensor.F32, ring.SpaceTokens, 1, []uint8{R, I, R, K}, 1+t.IntN(2))
	t.add("logits", tensor.F32, ring.SpaceLogits, 0, []uint8{R, R, I}, 1+t.IntN(50))
	t.add("k_cache", tensor.F8E4M3, ring.SpaceCache, 0, []uint8{R, I, R, I}, 2, 1+t.IntN(9))
	t.add("tokens", tensor.I64, ring.SpaceTokens, 0, []uint8{R, R})
	t.add("empty", tensor.U8, ring.SpaceTokens, 0, []uint8{R, R, I}, 0)
	t.add("wide", tensor.F64, ring.SpaceTokens, 0, []uint8{R, R, I}, 200+t.IntN(800))
	t.add("expert", tensor.I8, ring.SpaceTokens, 0, []uint8{R, R, I}, 3)
	t.sites[len(t.sites)-1].Flags = ring.SiteOptional
	for i := range t.sites {
		s := t.sites[i].Site
		t.p.AddSite(s, t.sites[i].name)
	}
	return t, nil
}

func (t *traffic) add(name string, dtype tensor.DType, space uint8, fill uint8, roles []uint8, inner ...int) {
	s := trafficSite{name: name, dtype: dtype, inner: inner}
	s.ID, s.Layer, s.Space, s.Fill, s.NDim = uint32(len(t.sites)), ring.NoLayer, space, fill, uint8(len(roles))
	copy(s.Role[:], roles)
	t.sites = append(t.sites, s)
}

func (s *trafficSite) keyed() bool { return slices.Contains(s.Role[:s.NDim], ring.RoleKey) }

// element is the bytes of one element: of a row, at an index of its inner dimensions, and for keyed rows at a key's position.
func element(s *trafficSite, request uint64, attempt uint16, position uint32, inner int, key int) []byte {
	h := fnv.New64a()
	var b [40]byte
	for i, v := range []uint64{uint64(s.ID), request, uint64(attempt)<<32 | uint64(position), uint64(inner), uint64(key)} {
		binary.LittleEndian.PutUint64(b[8*i:], v)
	}
	h.Write(b[:])
	v := h.Sum64() * 0x9e3779b97f4a7c15
	binary.LittleEndian.PutUint64(b[:], v)
	binary.LittleEndian.PutUint64(b[8:], v>>7)
	return b[:s.dtype.Size()]
}

// plan makes up a step: a padded batch or packed requests, prompts or single tokens.
func (t *traffic) plan() stepRows {
	var r stepRows
	if t.IntN(2) == 0 {
		r.packed = true
		at, logit, slot := uint32(0), uint32(0), uint32(0)
		for range 1 + t.IntN(5) {
			q := &request{id: t.next, length: uint32(t.IntN(3)), attempt: uint16(t.IntN(2))}
			t.next++
			n := uint32(1 + t.IntN(6))
			s := ring.Span{Request: q.id, Attempt: q.attempt, First: at, Count: n, Position: q.length}
			if q.length > 0 && t.IntN(2) == 0 { // what comes before it is in the prefix cache
				r.spans = append(r.spans, ring.Span{Request: q.id, Attempt: q.attempt, Count: q.length, Flags: ring.SpanCached})
			}
			parts := []ring.Span{s}
			if t.IntN(3) == 0 && n > 1 { // a request whose rows are in two spans, of guesses perhaps the second
				a, b := s, s
				a.Count = 1 + uint32(t.IntN(int(n-1)))
				b.Count, b.First, b.Position = n-a.Count, s.First+a.Count, s.Position+a.Count
				b.Flags = uint8(t.IntN(2)) * ring.SpanDraft
				parts = []ring.Span{a, b}
			}
			l := parts[len(parts)-1]
			l.Space, l.First, l.Count, l.Position = ring.SpaceLogits, logit, 1, s.Position+n-1
			logit++
			r.spans = append(append(r.spans, parts...), l)
			for _, c := range parts {
				c.Space, c.First = ring.SpaceCache, slot+c.First-at
				r.spans = append(r.spans, c)
			}
			slot += n + uint32(t.IntN(2))
			at += n
			r.keys = max(r.keys, q.length+n)
		}
		r.batch = 1
	} else {
		n := 1 + t.IntN(4)
		width := uint32(1 + t.IntN(6))
		past := uint32(0)
		if t.IntN(2) == 0 {
			past = uint32(t.IntN(5))
		}
		r.batch, r.keys = n, past+width
		r.width = [3]uint32{width, width, past + width + uint32(t.IntN(3))}
		for b := range uint32(n) {
			count := 1 + uint32(t.IntN(int(width)))
			if past > 0 {
				count = width
			}
			pads := width - count
			keyFirst := pads
			if past > 0 {
				keyFirst = uint32(t.IntN(int(past)))
			}
			s := ring.Span{Request: t.next, Batch: b, First: pads, Count: count, Position: past + pads - keyFirst, KeyFirst: keyFirst}
			t.next++
			r.spans = append(r.spans, s)
			l := s
			if kept := uint32(t.IntN(int(count) + 1)); kept > 0 {
				l.Space, l.Count = ring.SpaceLogits, kept
				l.First, l.Position = s.First+count-kept, s.Position+count-kept
				r.spans = append(r.spans, l)
			}
			c := s
			c.Space, c.First = ring.SpaceCache, past+pads
			r.spans = append(r.spans, c)
		}
	}
	for _, s := range r.spans {
		if s.Flags&ring.SpanNoRows == 0 {
			r.rows[s.Space] += s.Count
		}
	}
	return r
}

// row is one row of a step's space in row-list order.
type row struct {
	span     ring.Span
	i        uint32
	position uint32
}

func (r *stepRows) list(space uint8) (rows []row) {
	for _, s := range r.spans {
		if s.Space == uint32(space) && s.Flags&ring.SpanNoRows == 0 {
			for i := range s.Count {
				rows = append(rows, row{s, i, s.Position + i})
			}
		}
	}
	return rows
}

// cached is the step's rows that no tensor has.
func (r *stepRows) cached() (rows []row) {
	for _, s := range r.spans {
		for i := range s.Count * uint32(s.Flags&ring.SpanCached) {
			rows = append(rows, row{s, i, s.Position + i})
		}
	}
	return rows
}

// judge says of the drafts of a lane's last step which were wrong: some of their ends.
func (t *traffic) judge(lane *ringtape.ProducerLane, r *stepRows) (rejected []row) {
	for _, s := range t.drafts[lane] {
		kept := uint32(t.IntN(int(s.Count) + 1))
		s.Position, s.Count, s.First, s.Flags = s.Position+kept, s.Count-kept, 0, ring.SpanRejected
		if s.Count == 0 {
			continue
		}
		r.spans = append(r.spans, s)
		for i := range s.Count {
			rejected = append(rejected, row{s, i, s.Position + i})
		}
	}
	t.drafts[lane] = nil
	return rejected
}

// tensorOf lays the source of a site out with random strides, and returns it with its sizes and strides in elements.
func (t *traffic) tensorOf(s *trafficSite, r *stepRows) (data []byte, size, stride []uint32, keyBase uint32) {
	rows := r.list(s.Space)
	rowDims := 0
	for _, role := range s.Role[:s.NDim] {
		if role == ring.RoleRow {
			rowDims++
		}
	}
	length := uint32(0)
	for _, x := range rows {
		length = max(length, x.span.First+x.i+1)
	}
	if !r.packed {
		length = r.width[s.Space]
	}
	length += uint32(t.IntN(2)) * uint32(boolInt(r.packed))
	if s.keyed() && t.IntN(3) == 0 { // a sliding window
		keyBase = uint32(t.IntN(int(r.keys)))
		for _, x := range rows { // but a row's own slot is in it
			keyBase = min(keyBase, x.span.KeyFirst+x.position)
		}
	}
	first := true
	inner := 0
	for _, role := range s.Role[:s.NDim] {
		switch role {
		case ring.RoleRow:
			if first && rowDims == 2 {
				size = append(size, uint32(r.batch))
			} else {
				size = append(size, length)
			}
			first = false
		case ring.RoleInner:
			size = append(size, uint32(s.inner[inner]))
			inner++
		case ring.RoleKey:
			size = append(size, r.keys-keyBase)
		}
	}
	order := t.Perm(len(size))
	stride = make([]uint32, len(size))
	total := uint32(1)
	for _, d := range order {
		stride[d] = total
		total *= size[d]
	}
	e := s.dtype.Size()
	data = make([]byte, int(total)*e)
	for i := range data {
		data[i] = byte(t.Uint32()) // pads and unused slots: nobody may ever see them
	}
	for _, x := range rows {
		t.fillRow(s, x, data, size, stride, keyBase, rowDims)
	}
	return data, size, stride, keyBase
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (t *traffic) fillRow(s *trafficSite, x row, data []byte, size, stride []uint32, keyBase uint32, rowDims int) {
	e := s.dtype.Size()
	index := make([]uint32, len(size))
	seen := 0
	for d, role := range s.Role[:s.NDim] {
		if role == ring.RoleRow {
			if seen++; rowDims == 2 && seen == 1 {
				index[d] = x.span.Batch
			} else {
				index[d] = x.span.First + x.i
			}
		}
	}
	var visit func(d int, inner int)
	visit = func(d int, inner int) {
		if d == len(size) {
			key := -1
			for k, role := range s.Role[:s.NDim] {
				if role == ring.RoleKey {
					key = int(index[k]+keyBase) - int(x.span.KeyFirst)
				}
			}
			if key > int(x.position) || key < -1 {
				return // a key that the row has not got
			}
			if s.keyed() && key < 0 {
				return
			}
			at := 0
			for k := range size {
				at += int(index[k]) * int(stride[k])
			}
			copy(data[at*e:], element(s, x.span.Request, x.span.Attempt, x.position, inner, key))
			return
		}
		switch s.Role[d] {
		case ring.RoleRow:
			visit(d+1, inner)
		case ring.RoleInner:
			for i := range size[d] {
				index[d] = i
				visit(d+1, inner*int(size[d])+int(i))
			}
		case ring.RoleKey:
			for i := range size[d] {
				index[d] = i
				visit(d+1, inner)
			}
		}
	}
	visit(0, 0)
}

// gatheredOf is the dense form of a site's rows: row list order, inner dimensions in order, keys where they stood.
func gatheredOf(s *trafficSite, r *stepRows, keyBase uint32) (data []byte, size []uint32, roles []uint8) {
	rows := r.list(s.Space)
	size, roles = []uint32{uint32(len(rows))}, []uint8{ring.RoleRow}
	inner := 0
	for _, role := range s.Role[:s.NDim] {
		switch role {
		case ring.RoleInner:
			size, roles = append(size, uint32(s.inner[inner])), append(roles, role)
			inner++
		case ring.RoleKey:
			size, roles = append(size, r.keys-keyBase), append(roles, role)
		}
	}
	for _, x := range rows {
		var visit func(d, inner, key int)
		visit = func(d, inner, key int) {
			if d == len(size) {
				if s.keyed() && (key < 0 || key > int(x.position)) {
					data = append(data, make([]byte, s.dtype.Size())...)
					return
				}
				data = append(data, element(s, x.span.Request, x.span.Attempt, x.position, inner, key)...)
				return
			}
			for i := range int(size[d]) {
				if roles[d] == ring.RoleKey {
					visit(d+1, inner, i+int(keyBase)-int(x.span.KeyFirst))
				} else {
					visit(d+1, inner*int(size[d])+i, key)
				}
			}
		}
		visit(1, 0, -1)
	}
	return data, size, roles
}

// expectation of a keyed or plain row, as a reader of the chunk finds it.
func rowBytes(s *trafficSite, k rowKey, shape []int, keyBaseSlots int) []byte {
	var out []byte
	n := 1
	for _, d := range s.inner {
		n *= d
	}
	if !s.keyed() {
		for i := range n {
			out = append(out, element(s, k.request, k.attempt, k.position, i, -1)...)
		}
		return out
	}
	keys := shape[len(shape)-1]
	fill := tensor.Fill(s.Fill).Element(s.dtype)
	for i := range n {
		for key := range keys {
			if key > int(k.position) || key < keyBaseSlots {
				out = append(out, fill...)
			} else {
				out = append(out, element(s, k.request, k.attempt, k.position, i, key)...)
			}
		}
	}
	return out
}

func (t *traffic) until() time.Time { return time.Now().Add(t.deadline) }

func (t *traffic) publish(lane *ringtape.ProducerLane, v interface{ Encode([]byte) }) error {
	var b [ring.RecordSize]byte
	v.Encode(b[:])
	if t.lie != nil {
		t.lie(b[:])
	}
	return lane.Publish(b[:], t.until())
}

func (k rowKey) String() string {
	return fmt.Sprintf("site %d, request %d.%d, position %d", k.site, k.request, k.attempt, k.position)
}

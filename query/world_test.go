package query

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"dmi/store"
	"dmi/tensor"

	"pgregory.net/rapid"
)

// A world is what was captured, row by row, and what became of every row: the slow and obvious form that answers are
// checked against. It becomes a Source by cutting its rows into chunks at random.
type world struct {
	session  tensor.Session
	run      tensor.Run
	requests []tensor.Request
	sites    []worldSite
	rows     map[rowKey]worldRow
	steps    map[uint64][]forward // by request: what each of its forwards computed
}

type worldSite struct {
	tensor.Site
	dtype tensor.DType
	shape []int // of a row; -1: keys
}

type rowKey struct {
	request  uint64
	site     uint32
	position uint32
	attempt  uint16
}

type worldRow struct {
	outcome tensor.Outcome
	reason  tensor.Reason
	level   tensor.Level
	step    uint64
	data    []byte // of a row that has any: position+1 keys where keyed
}

type forward struct {
	step         uint64
	first, count uint32
	attempt      uint16
}

var worldSites = []worldSite{
	{tensor.Site{ID: 0, Name: "blocks.0.hook_resid_post", Aliases: []string{"blocks.0.hook_out", "model.layers.0"}, Layer: 0}, tensor.BF16, []int{3}},
	{tensor.Site{ID: 1, Name: "blocks.0.attn.hook_q", Layer: 0}, tensor.F32, []int{3, 2}},
	{tensor.Site{ID: 2, Name: "blocks.0.attn.hook_pattern", Layer: 0, RowAxis: 1, Keyed: true}, tensor.F32, []int{3, -1}},
	{tensor.Site{ID: 3, Name: "blocks.1.attn.hook_attn_scores", Layer: 1, RowAxis: 1, Keyed: true, Fill: tensor.FillNegInf}, tensor.BF16, []int{2, -1}},
	{tensor.Site{ID: 4, Name: "unembed.hook_out", Aliases: []string{"logits"}, Layer: tensor.NoLayer, Space: tensor.Logits}, tensor.F16, []int{5}},
	{tensor.Site{ID: 5, Name: "tokens", Layer: tensor.NoLayer}, tensor.I64, []int{}},
	{tensor.Site{ID: 6, Name: "blocks.1.hook_moved", Layer: 1, RowAxis: 2}, tensor.U8, []int{2, 2, 3}},
}

// elements of the row at a position.
func (s worldSite) elements(position uint32) int {
	n := 1
	for _, d := range s.shape {
		if d < 0 {
			d = int(position) + 1
		}
		n *= d
	}
	return n
}

// drawWorld makes requests that were computed in several forwards, some positions more than once, and whose rows met any fate.
// With whole set, every row is captured or not owed.
func drawWorld(t *rapid.T, whole bool) *world {
	now := time.Unix(1700000000, 0)
	w := &world{
		session: tensor.Session{Number: 1, ID: "s00000001", Mode: "complete", Text: "ids", Model: json.RawMessage(`{"name":"toy"}`), Begun: now},
		run:     tensor.Run{ID: "r00000001", Session: 1, Labels: map[string]string{"topic": "tests"}, Tags: []string{"demo"}, Begun: now},
		sites:   worldSites,
		rows:    map[rowKey]worldRow{},
		steps:   map[uint64][]forward{},
	}
	fates := []worldRow{{outcome: tensor.Captured}, {outcome: tensor.Captured}, {outcome: tensor.Captured, reason: tensor.Repeated}, {outcome: tensor.NotComputed, reason: tensor.Engine},
		{outcome: tensor.Rejected, reason: tensor.Speculation}}
	if !whole {
		fates = append(fates, worldRow{outcome: tensor.Dropped, reason: tensor.RingFull}, worldRow{outcome: tensor.Lost, reason: tensor.NotFired},
			worldRow{outcome: tensor.Skipped, reason: tensor.Policy, level: tensor.Off}, worldRow{outcome: tensor.Captured, level: tensor.Sampled})
	}
	random := rapid.Uint64().Draw(t, "values")
	nextByte := func() byte {
		random = random*6364136223846793005 + 1442695040888963407
		return byte(random >> 56)
	}
	count := rapid.IntRange(1, 3).Draw(t, "requests")
	for number := range uint64(count) {
		id := fmt.Sprintf("r00000001.%d", number)
		request := tensor.Request{Key: tensor.RequestKey{Session: 1, Request: number}, ID: id, Run: w.run.ID, Begun: now.Add(time.Duration(number))}
		request.Hidden = rapid.IntRange(0, 4).Draw(t, "hidden") == 4
		length := rapid.IntRange(1, 9).Draw(t, "positions")
		for p := range length {
			request.Tokens = append(request.Tokens, int64(100+p))
		}
		step := uint64(10)
		for p, attempt := 0, uint16(0); p < length; step++ {
			n := rapid.IntRange(1, length-p).Draw(t, "rows of a forward")
			w.steps[number] = append(w.steps[number], forward{step, uint32(p), uint32(n), attempt})
			for _, s := range w.sites {
				mixed := rapid.IntRange(0, 2).Draw(t, "mixed") == 0
				for q := p; q < p+n; q++ {
					row := worldRow{outcome: tensor.Captured}
					if mixed {
						row = rapid.SampledFrom(fates).Draw(t, "fate")
					}
					row.step = step
					if row.outcome == tensor.Captured || row.outcome == tensor.Rejected { // a draft that was captured before it was rejected
						row.data = make([]byte, s.elements(uint32(q))*s.dtype.Size())
						for i := range row.data {
							row.data[i] = nextByte()
						}
					}
					w.rows[rowKey{number, s.ID, uint32(q), attempt}] = row
				}
			}
			p += n
			if p < length && rapid.IntRange(0, 5).Draw(t, "preempted") == 0 { // computed again, from the start
				p, attempt = 0, attempt+1
				if attempt > 2 {
					attempt = 2
					p = length
				}
			}
		}
		w.requests = append(w.requests, request)
	}
	if count > 1 && rapid.Bool().Draw(t, "beam") {
		at := uint32(rapid.IntRange(0, 5).Draw(t, "fork"))
		n := uint32(rapid.IntRange(1, 6).Draw(t, "after fork"))
		path := []tensor.PathPart{{Request: 0, First: 0, Count: at}, {Request: 1, First: at, Count: n}}
		w.requests = append(w.requests, tensor.Request{Key: tensor.RequestKey{Session: 1, Request: 90}, ID: "beam", Run: w.run.ID, Path: path, Begun: now.Add(time.Hour)})
	}
	return w
}

// lookup finds the rows of every attempt at a position, through the path; attempts ascend.
func (w *world) lookup(r tensor.Request, site uint32, position uint32) (rows []worldRow) {
	number := r.Key.Request
	if len(r.Path) > 0 {
		found := false
		for _, p := range r.Path {
			if position >= p.First && position < p.First+p.Count {
				number, found = p.Request, true
			}
		}
		if !found {
			return nil
		}
	}
	for attempt := range uint16(4) {
		if row, ok := w.rows[rowKey{number, site, position, attempt}]; ok {
			rows = append(rows, row)
		}
	}
	return rows
}

// entries are the books of a request, one line per run of rows with the same fate and step, all sites of the line interned.
func (w *world) entries(t *rapid.T, number uint64) []tensor.Entry {
	var all []tensor.Entry
	for key, row := range w.rows {
		if key.request != number {
			continue
		}
		all = append(all, tensor.Entry{Key: tensor.RequestKey{Session: 1, Request: number}, Sites: []uint32{key.site}, Attempt: key.attempt, First: key.position,
			Count: 1, Stride: 1, Step: row.step, Outcome: row.outcome, Reason: row.reason, Level: row.level, Policy: 1})
	}
	slices.SortFunc(all, func(a, b tensor.Entry) int {
		return slices.Compare([]uint32{a.Sites[0], uint32(a.Attempt), a.First}, []uint32{b.Sites[0], uint32(b.Attempt), b.First})
	})
	var merged []tensor.Entry
next:
	for _, e := range all {
		for i := range merged {
			m := &merged[i]
			if m.Sites[0] != e.Sites[0] || m.Attempt != e.Attempt || m.Outcome != e.Outcome || m.Reason != e.Reason || m.Level != e.Level {
				continue
			}
			if m.Count == 1 && rapid.Bool().Draw(t, "stride") {
				m.Stride = e.First - m.First
			}
			if e.First == m.First+m.Count*m.Stride {
				m.Count++
				continue next
			}
		}
		merged = append(merged, e)
	}
	return merged
}

// chunks cuts the captured rows of a request at random, consecutive positions of one attempt and level together.
func (w *world) chunks(t *rapid.T, number uint64) (all []tensor.Chunk) {
	for _, s := range w.sites {
		for attempt := range uint16(4) {
			var open *tensor.Chunk
			for p := range uint32(16) {
				row, ok := w.rows[rowKey{number, s.ID, p, attempt}]
				if !ok || row.data == nil {
					open = nil
					continue
				}
				if open == nil || open.Level != row.level || rapid.IntRange(0, 3).Draw(t, "cut") == 0 {
					all = append(all, tensor.Chunk{Key: tensor.RequestKey{Session: 1, Request: number}, Site: s.ID, Attempt: attempt, First: p, Step: row.step,
						DType: s.dtype, Level: row.level, Policy: 1, Shape: slices.Clone(s.shape)})
					open = &all[len(all)-1]
				}
				open.Rows++
				open.LastStep = row.step
			}
		}
	}
	for i := range all {
		c := &all[i]
		s := w.sites[c.Site]
		keys := c.First + c.Rows // the longest row's
		if s.Keyed {
			c.Shape[len(c.Shape)-1] = int(keys)
		}
		fill := s.Fill.Element(s.dtype)
		for p := c.First; p < c.First+c.Rows; p++ {
			data := w.rows[rowKey{number, s.ID, p, c.Attempt}].data
			if !s.Keyed {
				c.Data = append(c.Data, data...)
				continue
			}
			line := int(p+1) * s.dtype.Size()
			for len(data) > 0 {
				c.Data = append(c.Data, data[:line]...)
				data = data[line:]
				for range keys - p - 1 {
					c.Data = append(c.Data, fill...)
				}
			}
		}
	}
	return all
}

// inMemory is a Source over a world, cut once.
type inMemory struct {
	*world
	books map[uint64][]tensor.Entry
	all   []tensor.Chunk
}

func (w *world) memory(t *rapid.T) *inMemory {
	m := &inMemory{world: w, books: map[uint64][]tensor.Entry{}}
	for _, r := range w.requests {
		m.books[r.Key.Request] = w.entries(t, r.Key.Request)
		m.all = append(m.all, w.chunks(t, r.Key.Request)...)
	}
	return m
}

func (m *inMemory) Sessions() ([]tensor.Session, error) { return []tensor.Session{m.session}, nil }
func (m *inMemory) Runs() ([]tensor.Run, error)         { return []tensor.Run{m.run}, nil }

func (m *inMemory) Requests(f store.RequestFilter) (all []tensor.Request, err error) {
	for _, r := range m.requests {
		if r.ID == f.After {
			all = nil
		} else if f.Hidden || !r.Hidden {
			all = append(all, r)
		}
	}
	if f.Limit > 0 {
		all = all[:min(len(all), f.Limit)]
	}
	if f.Latest > 0 {
		all = all[max(0, len(all)-f.Latest):]
	}
	return all, nil
}

func (m *inMemory) RequestByID(id string) (tensor.Request, bool, error) {
	for _, r := range m.requests {
		if r.ID == id {
			return r, true, nil
		}
	}
	return tensor.Request{}, false, nil
}

func (m *inMemory) Sites(session uint32) (all []tensor.Site, err error) {
	for _, s := range m.sites {
		all = append(all, s.Site)
	}
	return all, nil
}

func (m *inMemory) Chunks(key tensor.RequestKey, site uint32, from, to uint32) (refs []store.ChunkRef, err error) {
	for _, c := range m.all {
		if c.Key == key && c.Site == site && c.First < to && c.First+c.Rows > from {
			refs = append(refs, store.ChunkRef{Key: key, Site: site, Attempt: c.Attempt, First: c.First, Rows: c.Rows, Step: c.Step, LastStep: c.LastStep,
				DType: c.DType, Level: c.Level, Policy: c.Policy, Shape: c.Shape})
		}
	}
	slices.SortStableFunc(refs, func(a, b store.ChunkRef) int { return int(a.First) - int(b.First) })
	return refs, nil
}

func (m *inMemory) ReadRows(ref store.ChunkRef, from, to uint32, dst []byte) error {
	for _, c := range m.all {
		if c.Key == ref.Key && c.Site == ref.Site && c.Attempt == ref.Attempt && c.First == ref.First {
			row := len(c.Data) / int(c.Rows)
			if len(dst) != row*int(to-from) {
				return fmt.Errorf("read %d rows of %d bytes into %d", to-from, row, len(dst))
			}
			copy(dst, c.Data[int(from)*row:int(to)*row])
			return nil
		}
	}
	return fmt.Errorf("no chunk %+v", ref)
}

func (m *inMemory) WillRead([]store.ChunkRef) {}

func (m *inMemory) Entries(key tensor.RequestKey) ([]tensor.Entry, error) {
	return m.books[key.Request], nil
}

func (m *inMemory) MarkRequest(tensor.RequestKey, string) uint64 { return 1 } // nothing changes
func (m *inMemory) MarkRun(string) uint64                        { return 1 }

func (m *inMemory) Forwards(_ context.Context, key tensor.RequestKey) (all []store.Forward, err error) {
	for _, f := range m.steps[key.Request] {
		all = append(all, store.Forward{Step: f.step, First: f.first, Count: f.count, Attempt: f.attempt})
	}
	return all, nil
}

func (m *inMemory) Books() (totals store.Totals) {
	for _, row := range m.rows {
		totals.Produced++
		totals.Lines = append(totals.Lines, store.Total{Session: 1, Outcome: row.outcome, Reason: row.reason, Level: row.level, Rows: 1})
	}
	return totals
}

package ring

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func goodHeader() Header {
	return Header{Magic: Magic, Version: ABIVersion, Mode: ModeComplete, TotalBytes: 2 << 20, Lanes: 2, RecordCapacity: 64, CommandCapacity: 16, SiteCapacity: 8,
		PayloadBytes: 1 << 16, TableBytes: 4096, StagingBytes: 1 << 16, SpillBytes: 8192, ControlOffset: 4096, SitesOffset: 12288, GatesOffset: 16384,
		RecordsOffset: 1134592, TablesOffset: 1150976, CommandsOffset: 1159168, StagingOffset: 1163264, SpillOffset: 1228800}
}

// Every field of a header that lies is refused with its name.
func TestHeadersThatLie(t *testing.T) {
	good := goodHeader()
	if err := good.check(2 << 20); err != nil {
		t.Fatal(err)
	}
	for field, lies := range map[string][]func(*Header){
		"magic":            {func(h *Header) { h.Magic++ }},
		"version":          {func(h *Header) { h.Version++ }},
		"mode":             {func(h *Header) { h.Mode = 2 }},
		"total_bytes":      {func(h *Header) { h.TotalBytes-- }},
		"device":           {func(h *Header) { h.Device = 9 }},
		"lanes":            {func(h *Header) { h.Lanes = 0 }, func(h *Header) { h.Lanes = 9 }},
		"record_capacity":  {func(h *Header) { h.RecordCapacity = 63 }, func(h *Header) { h.RecordCapacity = 0 }, func(h *Header) { h.RecordCapacity = 1 << 31 }},
		"command_capacity": {func(h *Header) { h.CommandCapacity = 0 }, func(h *Header) { h.CommandCapacity = 3 }},
		"site_capacity":    {func(h *Header) { h.SiteCapacity = MaxSites + 1 }},
		"payload_bytes":    {func(h *Header) { h.PayloadBytes = 4097 }, func(h *Header) { h.PayloadBytes = 0 }, func(h *Header) { h.PayloadBytes = 1 << 63 }},
		"table_bytes":      {func(h *Header) { h.TableBytes = 1 << 40 }, func(h *Header) { h.TableBytes = 0 }},
		"staging_bytes":    {func(h *Header) { h.StagingBytes = 1 }, func(h *Header) { h.StagingBytes = ^uint64(4095) }},
		"spill_bytes":      {func(h *Header) { h.SpillBytes = 100 }, func(h *Header) { h.SpillBytes = ^uint64(4095) }},
		"control_offset":   {func(h *Header) { h.ControlOffset = 0 }, func(h *Header) { h.ControlOffset = ^uint64(4095) }, func(h *Header) { h.ControlOffset = 4104 }},
		"sites_offset":     {func(h *Header) { h.SitesOffset = 8192 }},
		"records_offset":   {func(h *Header) { h.RecordsOffset = 1<<20 - 4096 }},
		"tables_offset":    {func(h *Header) { h.TablesOffset = 1 << 62 }},
		"commands_offset":  {func(h *Header) { h.CommandsOffset = h.TablesOffset }, func(h *Header) { h.CommandsOffset = 1 << 20 }},
		"staging_offset":   {func(h *Header) { h.StagingOffset = 1<<20 - 4096 }},
		"spill_offset":     {func(h *Header) { h.SpillOffset = 1 << 20 }, func(h *Header) { h.SpillOffset = h.StagingOffset + 4096 }},
	} {
		for i, lie := range lies {
			h := good
			lie(&h)
			err := h.check(2 << 20)
			if err == nil || !strings.Contains(err.Error(), "header."+field) {
				t.Errorf("%s, lie %d: %v", field, i, err)
			}
		}
	}
}

func addGolden(f *testing.F, names ...string) {
	for _, n := range names {
		b, err := os.ReadFile(filepath.Join(golden, n+".bin"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
}

// A header that is accepted has every region inside the memory.
func FuzzHeader(f *testing.F) {
	addGolden(f, "header")
	b := make([]byte, HeaderSize)
	h := goodHeader()
	h.Encode(b)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < HeaderSize {
			return
		}
		var h Header
		h.Decode(b)
		if h.check(h.TotalBytes) != nil || h.TotalBytes > 1<<30 {
			return
		}
		inside := func(at, n uint64) {
			if at > h.TotalBytes || at+n < at || at+n > h.TotalBytes {
				t.Fatalf("%+v: %d bytes at %d are outside", h, n, at)
			}
		}
		inside(h.ControlOffset, ControlSize)
		inside(h.RecordsOffset, uint64(h.Lanes)*uint64(h.RecordCapacity)*RecordSize)
		inside(h.TablesOffset, uint64(h.Lanes)*h.TableBytes)
		inside(h.CommandsOffset, uint64(h.CommandCapacity)*CommandSize)
		inside(h.StagingOffset, h.StagingBytes)
		inside(h.SpillOffset, h.SpillBytes)
	})
}

// A row table that is accepted names no row twice, and as many as OPEN says.
func FuzzRows(f *testing.F) {
	random := rand.New(rand.NewPCG(1, 1))
	for range 20 {
		n := 1 + random.IntN(4)
		b := make([]byte, TableSize+n*SpanSize)
		table := Table{Magic: TableMagic, Bytes: uint32(len(b)), Step: 1, Spans: uint32(n)}
		table.Encode(b)
		for i := range n {
			s := Span{Request: uint64(random.IntN(3)), Space: uint32(random.IntN(3)), First: uint32(random.IntN(5)), Count: uint32(random.IntN(5)), Position: uint32(random.IntN(9))}
			if random.IntN(4) == 0 {
				s.Flags = []uint8{SpanCached, SpanDraft, SpanRejected}[random.IntN(3)]
			}
			s.Encode(b[TableSize+i*SpanSize:])
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < TableSize {
			return
		}
		o := OpenRecord{Step: 1, TableBytes: uint64(len(b))}
		for i := TableSize; i+SpanSize <= len(b); i += SpanSize {
			var s Span
			s.Decode(b[i:])
			if s.Space < Spaces && s.Flags&SpanNoRows == 0 {
				o.Rows[s.Space] += s.Count
			}
		}
		rows, err := ParseRows(b, &o)
		if err != nil {
			return
		}
		type position struct {
			request  uint64
			attempt  uint16
			position uint32
		}
		if o.Rows[0] > 1<<16 {
			return
		}
		cached := map[position]bool{}
		for _, s := range rows.Cached {
			for i := range min(s.Count, 1<<16) {
				cached[position{s.Request, s.Attempt, s.Position + i}] = true
			}
		}
		tokens := map[position]bool{}
		for space := range Spaces {
			seen := map[position]bool{}
			for _, s := range rows.Spaces[space].Spans {
				for i := range s.Count {
					p := position{s.Request, s.Attempt, s.Position + i}
					if seen[p] || cached[p] {
						t.Fatalf("space %d has %+v twice, or as one that is cached", space, p)
					}
					seen[p] = true
					if space == SpaceTokens {
						tokens[p] = true
					} else if !tokens[p] {
						t.Fatalf("space %d has %+v, which is no token", space, p)
					}
				}
			}
			if len(seen) != int(o.Rows[space]) {
				t.Fatalf("space %d: %d rows of %d", space, len(seen), o.Rows[space])
			}
			if space == SpaceLogits {
				for _, s := range rows.Outside(SpaceLogits) {
					for i := range s.Count {
						p := position{s.Request, s.Attempt, s.Position + i}
						if seen[p] || !tokens[p] {
							t.Fatalf("%+v is said to be outside", p)
						}
						seen[p] = true
					}
				}
				if len(seen) != len(tokens) {
					t.Fatalf("%d of %d tokens are in or outside", len(seen), len(tokens))
				}
			}
		}
	})
}

// Ranges that are claimed and freed in any order: the tail never passes one in use, and reaches the end when all are free.
func TestTilesAgainstASet(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		word := uint64(0)
		tiles := newTiles("test", 1<<14, random.IntN(2) == 0, &word)
		type claim struct{ at, bytes uint64 }
		var used []claim
		var pending []claim // reserved by lanes, not yet published
		head := uint64(0)
		for range 300 {
			switch random.IntN(3) {
			case 0: // a lane reserves
				bytes := uint64(1 + random.IntN(900))
				if !tiles.wraps && head%tiles.capacity+aligned(bytes) > tiles.capacity {
					bytes = tiles.capacity - head%tiles.capacity
				}
				if head+aligned(bytes)-word <= tiles.capacity {
					pending = append(pending, claim{head, bytes})
					head += aligned(bytes)
				}
			case 1: // and publishes, in any order
				if len(pending) > 0 {
					i := random.IntN(len(pending))
					if err := tiles.Claim(pending[i].at, pending[i].bytes); err != nil {
						t.Fatal(err)
					}
					if tiles.Claim(pending[i].at, 1) == nil {
						t.Fatal("a range was claimed twice")
					}
					used = append(used, pending[i])
					pending = slices.Delete(pending, i, i+1)
				}
			case 2:
				if len(used) > 0 {
					i := random.IntN(len(used))
					tiles.Free(used[i].at, used[i].bytes)
					used = slices.Delete(used, i, i+1)
				}
			}
			lowest := head
			for _, c := range append(slices.Clone(used), pending...) {
				lowest = min(lowest, c.at)
			}
			if word > lowest {
				t.Fatalf("tail %d has passed %d, which is in use", word, lowest)
			}
		}
		for _, c := range pending {
			tiles.Claim(c.at, c.bytes)
			used = append(used, c)
		}
		for _, c := range used {
			tiles.Free(c.at, c.bytes)
		}
		if word != head {
			t.Fatalf("all is free, and the tail is %d of %d", word, head)
		}
		for _, bad := range []claim{{head + 1, 10}, {head + tiles.capacity, 1}, {head, tiles.capacity + 1}, {^uint64(63), 64}} {
			if err := tiles.Claim(bad.at, bad.bytes); err == nil || !strings.Contains(err.Error(), "record.payload") {
				t.Fatalf("%+v was claimed: %v", bad, err)
			}
		}
	}
}

// Leases of staging never overlap, and none is lost.
func TestStageAgainstAMap(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for range 100 {
		mem := make([]byte, 64*(8+random.IntN(64)))
		owner := make([]int, len(mem))
		stage := newStage(mem)
		var leases []*Lease
		number := 0
		for range 500 {
			if random.IntN(2) == 0 {
				n := uint64(1 + random.IntN(len(mem)>>random.IntN(4)))
				if l := stage.Take(n); l != nil {
					number++
					for i := range n {
						if owner[l.At+i] != 0 {
							t.Fatalf("byte %d is leased twice", l.At+i)
						}
						owner[l.At+i] = number
					}
					leases = append(leases, l)
				} else if len(leases) == 0 {
					t.Fatalf("%d of %d bytes cannot be had, and nothing is leased", n, len(mem))
				}
			} else if len(leases) > 0 {
				i := random.IntN(len(leases))
				l := leases[i]
				clear(owner[l.At : l.At+uint64(len(l.Bytes))])
				l.Give()
				leases = slices.Delete(leases, i, i+1)
			}
		}
	}
}

// Names that a site cannot have, and other lies of the site table.
func TestSitesThatLie(t *testing.T) {
	good := Site{ID: 3, Layer: NoLayer, NDim: 2, Role: [6]uint8{RoleRow, RoleInner}, NameBytes: 4, Name: [192]uint8{'a', '.', 'b', 'c'}}
	if err := good.check(3); err != nil {
		t.Fatal(err)
	}
	for field, lie := range map[string]func(*Site){
		"id": func(s *Site) { s.ID = 2 }, "name_bytes": func(s *Site) { s.NameBytes = 193 }, "name": func(s *Site) { s.Name[1] = 0xff },
		"space": func(s *Site) { s.Space = 3 }, "ndim": func(s *Site) { s.NDim = 7 }, "row_axis": func(s *Site) { s.RowAxis = 2 },
		"fill": func(s *Site) { s.Fill = 2 }, "flags": func(s *Site) { s.Flags = 4 }, "layer": func(s *Site) { s.Layer = 1 << 21 },
		"role": func(s *Site) { s.Role[0] = RoleInner }, "role[1]": func(s *Site) { s.Role[1] = 9 },
	} {
		s := good
		lie(&s)
		if err := s.check(3); err == nil || !strings.Contains(err.Error(), "site."+field) {
			t.Errorf("%s: %v", field, err)
		}
	}
	control := good
	control.Name[1] = '\n'
	if control.check(3) == nil {
		t.Error("a name with a line break was accepted")
	}
}

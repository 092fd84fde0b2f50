package query

import (
	"context"
	"fmt"

	"dmi/tensor"
)

// Stats are statistics that are planned and not yet computed.
type Stats struct {
	engine   *Engine
	query    StatsQuery
	requests []tensor.Request
}

// Stats plans statistics over the rows that are there, of the requests of a scope: of those of which only figures came, the figures are merged, and are of 24 bits. Rows that are not there are not an
// error: every line says how many rows it sums up, and Coverage what became of the others.
func (e *Engine) Stats(ctx context.Context, q StatsQuery) (*Stats, error) {
	requests, err := e.requestsOf(ctx, q.Scope)
	if err != nil {
		return nil, err
	}
	seen := map[uint32]bool{}
	for _, r := range requests {
		if !seen[r.Key.Session] {
			seen[r.Key.Session] = true
			if _, err := e.sitesOf(r.Key.Session, q.Site, q.Layer); err != nil {
				return nil, err
			}
		}
	}
	return &Stats{e, q, requests}, nil
}

// Each computes the lines and yields them: by request, site and position; per site, by site alone, all requests' rows
// merged. It reads rows once, in blocks within the engine's bound.
func (s *Stats) Each(ctx context.Context, yield func(StatsRow) error) error {
	type total struct {
		site       tensor.Site
		rows       uint64
		statistics tensor.Statistics
		level      tensor.Level
		mixed      bool
	}
	var totals []*total // per site, by first appearance
	bySite := map[string]*total{}
	for _, r := range s.requests {
		sites, err := s.engine.sitesOf(r.Key.Session, s.query.Site, s.query.Layer)
		if err != nil {
			return err
		}
		for _, site := range sites {
			selection, err := s.engine.choose(ctx, r, site, s.query.Tokens, Range{}, summable)
			if err != nil {
				return err
			}
			sum := &total{site: site}
			if s.query.Per == PerSite {
				if bySite[site.Name] == nil {
					bySite[site.Name] = sum
					totals = append(totals, sum)
				}
				sum = bySite[site.Name]
			}
			err = selection.eachRow(ctx, s.engine, func(position uint32, level tensor.Level, statistics tensor.Statistics) error {
				if s.query.Per == PerRow {
					return yield(leveled(statsRow(r.ID, site, int64(position), 1, statistics), level, false))
				}
				sum.mixed = sum.mixed || sum.rows > 0 && sum.level != level
				sum.level = level
				sum.rows++
				sum.statistics.Merge(statistics)
				return nil
			})
			if err != nil {
				return err
			}
			if s.query.Per == PerRequest && sum.rows > 0 {
				if err := yield(leveled(statsRow(r.ID, site, -1, sum.rows, sum.statistics), sum.level, sum.mixed)); err != nil {
					return err
				}
			}
		}
	}
	for _, sum := range totals {
		if sum.rows > 0 {
			if err := yield(leveled(statsRow("", sum.site, -1, sum.rows, sum.statistics), sum.level, sum.mixed)); err != nil {
				return err
			}
		}
	}
	return nil
}

// eachRow yields the statistics of every row selected. Of a keyed row, only keys up to its own position count: it
// has no others.
func (s *selection) eachRow(ctx context.Context, e *Engine, yield func(position uint32, level tensor.Level, statistics tensor.Statistics) error) error {
	var values []byte
	return s.eachStoredRow(ctx, e, func(position uint32, r run, row []byte) error {
		dtype, level := r.ref.DType, r.ref.Level
		if level == tensor.Stats {
			return yield(position, level, tensor.FiguresOf(row))
		}
		if !dtype.Real() {
			return badArgument("leave the site out", "statistics of site %s: elements of %s are not real numbers", s.site.Name, dtype)
		}
		if level.Quantised() {
			values = resize(values, product(r.ref.Shape)*tensor.F32.Size())
			level.Dequantise(values, row)
			row, dtype = values, tensor.F32
		}
		if !s.site.Keyed {
			return yield(position, level, tensor.RowStats(dtype, row))
		}
		var statistics tensor.Statistics
		line := r.ref.Shape[len(r.ref.Shape)-1] * dtype.Size()
		keys := min(line, (int(position)+1)*dtype.Size())
		for at := 0; at < len(row); at += line {
			statistics.Add(dtype, row[at:at+keys])
		}
		return yield(position, level, statistics)
	})
}

// eachStoredRow reads the rows selected, a block at a time, and yields each as it is stored. The row is valid during the call.
func (s *selection) eachStoredRow(ctx context.Context, e *Engine, yield func(position uint32, r run, row []byte) error) error {
	return s.eachStored(ctx, e, e.MemoryBytes/4, yield)
}

// eachStored is eachStoredRow with blocks of so many bytes, one row at least.
func (s *selection) eachStored(ctx context.Context, e *Engine, blockBytes int, yield func(position uint32, r run, row []byte) error) error {
	return s.eachBlock(ctx, e, blockBytes, func(first uint32, n int, r run, rows []byte) error {
		bytes := rowBytes(r.ref)
		for i := range n {
			if err := yield(first+uint32(i), r, rows[i*bytes:(i+1)*bytes]); err != nil {
				return err
			}
		}
		return nil
	})
}

// eachBlock reads the rows selected, and yields those that were read together: n of them from position first on, one after the other.
func (s *selection) eachBlock(ctx context.Context, e *Engine, blockBytes int, yield func(first uint32, n int, r run, rows []byte) error) error {
	var block []byte
	for _, r := range s.runs {
		bytes := rowBytes(r.ref)
		rows := r.Count
		if bytes > 0 {
			rows = uint32(min(int(r.Count), max(1, blockBytes/bytes)))
		}
		for done := uint32(0); done < r.Count; done += rows {
			if err := ctx.Err(); err != nil {
				return err
			}
			n := min(rows, r.Count-done)
			block = resize(block, int(n)*bytes)
			from := r.First - r.ref.First + done
			if err := s.read(e, r, from, from+n, block); err != nil {
				return err
			}
			if s.watch != nil {
				s.watch(len(block))
			}
			if err := yield(r.First+done, int(n), r, block); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *selection) read(e *Engine, r run, from, to uint32, dst []byte) error {
	if err := e.source.ReadRows(r.ref, from, to, dst); err != nil {
		return fmt.Errorf("query: read request %s at site %s, rows %d..%d of the chunk at position %d: %w", s.request.ID, s.site.Name, from, to, r.ref.First, err)
	}
	return nil
}

// SumRow is the line of a site whose rows somebody else summed up.
func SumRow(site tensor.Site, rows uint64, sums tensor.Statistics) StatsRow {
	return statsRow("", site, -1, rows, sums)
}

// leveled says what level rows had.
func leveled(line StatsRow, level tensor.Level, mixed bool) StatsRow {
	if line.Level = level.String(); mixed {
		line.Level = "mixed"
	}
	return line
}

func statsRow(request string, site tensor.Site, position int64, rows uint64, s tensor.Statistics) StatsRow {
	least, greatest := s.Range()
	return StatsRow{Request: request, Site: site.Name, Layer: site.Layer, Position: position, Rows: rows, Mean: s.Mean(), RMS: s.RMS(),
		Min: least, Max: greatest, AbsMax: s.AbsMax(), L2: s.L2(), NonFinite: s.NonFinite, Count: s.Count, Level: tensor.Full.String()}
}

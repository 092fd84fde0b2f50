package store

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"

	"dmi/store/segment"
	"dmi/tensor"
)

// outcomes and so on by name, as the catalogue keeps them for people.
var (
	outcomeOf = byName(func(i uint8) (string, bool) { o := tensor.Outcome(i); return o.String(), o.Valid() })
	reasonOf  = byName(func(i uint8) (string, bool) { r := tensor.Reason(i); return r.String(), r.Valid() })
	levelOf   = byName(func(i uint8) (string, bool) { l := tensor.Level(i); return l.String(), l.Valid() })
)

func byName(name func(uint8) (string, bool)) map[string]uint8 {
	m := map[string]uint8{}
	for i := range 255 {
		if n, ok := name(uint8(i)); ok {
			m[n] = uint8(i)
		}
	}
	return m
}

func (c *catalogue) statement(query string) (*sql.Stmt, error) {
	if known, is := c.statements.Load(query); is {
		return known.(*sql.Stmt), nil
	}
	made, err := c.read.Prepare(query)
	if err != nil {
		return nil, err
	}
	kept, other := c.statements.LoadOrStore(query, made)
	if other { // another goroutine was first
		err = made.Close() //nolint:sqlclosecheck // only where it is not the one that is kept
	}
	return kept.(*sql.Stmt), err
}

// each runs a query and calls row for each of its rows. Its text is one of a few: the statement is kept.
func (c *catalogue) each(row func(scan func(...any) error) error, query string, args ...any) error {
	statement, err := c.statement(query) //nolint:sqlclosecheck // it is kept until the catalogue closes
	if err != nil {
		return err
	}
	rows, err := statement.Query(args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := row(rows.Scan); err != nil {
			return err
		}
	}
	return rows.Err()
}

func (c *catalogue) checkpoint() (checkpoint, error) {
	var p checkpoint
	next := "next_segment"
	if c.version < 2 {
		next = "0"
	}
	err := c.read.QueryRow(`SELECT manifest, manifest_offset, low, low_offset, segment, segment_offset, closed, `+next+` FROM checkpoint`).Scan(&p.applied.file,
		&p.applied.offset, &p.low.file, &p.low.offset, &p.segment, &p.end, &p.closed, &p.next)
	if errors.Is(err, sql.ErrNoRows) {
		return checkpoint{}, nil
	}
	return p, err
}

func (c *catalogue) sessions() (sessions []tensor.Session, produced map[uint32]uint64, err error) {
	produced = map[uint32]uint64{}
	err = c.each(func(scan func(...any) error) error {
		var s tensor.Session
		var model, versions, process, hooks string
		var begun, ended int64
		var rows int64
		if err := scan(&s.Number, &s.ID, &s.Producer, &s.Mode, &s.Text, &model, &versions, &process, &hooks, &begun, &ended, &rows); err != nil {
			return err
		}
		s.Model, s.Versions, s.Process = raw(model), raw(versions), raw(process)
		s.Begun, s.Ended = timeOf(begun), timeOf(ended)
		produced[s.Number] = uint64(rows)
		sessions = append(sessions, s)
		return json.Unmarshal([]byte(hooks), &sessions[len(sessions)-1].Hooks)
	}, `SELECT number, id, producer, mode, text, model, versions, process, hooks, begun_unix_ns, ended_unix_ns, produced FROM sessions ORDER BY number`)
	return sessions, produced, err
}

func raw(s string) json.RawMessage {
	if s == "" {
		return nil
	}
	return json.RawMessage(s)
}

func (c *catalogue) sites() (map[uint32][]tensor.Site, error) {
	sites := map[uint32][]tensor.Site{}
	err := c.each(func(scan func(...any) error) error {
		var session uint32
		var s tensor.Site
		var aliases string
		if err := scan(&session, &s.ID, &s.Name, &aliases, &s.Layer, &s.Space, &s.RowAxis, &s.Keyed, &s.Fill, &s.Optional); err != nil {
			return err
		}
		if err := json.Unmarshal([]byte(aliases), &s.Aliases); err != nil {
			return err
		}
		sites[session] = append(sites[session], s)
		return nil
	}, `SELECT * FROM sites ORDER BY session, id`)
	return sites, err
}

func (c *catalogue) siteTotals() (map[uint32]map[uint32]*siteTotal, error) {
	totals := map[uint32]map[uint32]*siteTotal{}
	err := c.each(func(scan func(...any) error) error {
		var session uint32
		var dtype, shape string
		var rows, bytes int64
		t := &siteTotal{}
		if err := scan(&session, &t.Site, &dtype, &shape, &rows, &bytes); err != nil {
			return err
		}
		t.Rows, t.Bytes = uint64(rows), uint64(bytes)
		t.DType, _ = tensor.ParseDType(dtype)
		if totals[session] == nil {
			totals[session] = map[uint32]*siteTotal{}
		}
		totals[session][t.Site] = t
		return json.Unmarshal([]byte(shape), &t.Shape)
	}, `SELECT session, site, dtype, row_shape, rows, bytes FROM site_totals`)
	return totals, err
}

func (c *catalogue) lanes() (map[laneKey]uint64, error) {
	lanes := map[laneKey]uint64{}
	err := c.each(func(scan func(...any) error) error {
		var k laneKey
		var records int64
		err := scan(&k.session, &k.lane, &records)
		lanes[k] = uint64(records)
		return err
	}, `SELECT session, lane, records FROM lanes`)
	return lanes, err
}

const runColumns = `seq, id, session, labels, tags, begun_unix_ns, ended_unix_ns`

func scanRun(scan func(...any) error) (*runState, error) {
	r := &runState{}
	var labels, tags string
	var begun, ended int64
	if err := scan(&r.seq, &r.ID, &r.Session, &labels, &tags, &begun, &ended); err != nil {
		return nil, err
	}
	r.Begun, r.Ended = timeOf(begun), timeOf(ended)
	return r, errors.Join(json.Unmarshal([]byte(labels), &r.Labels), json.Unmarshal([]byte(tags), &r.Tags))
}

func (c *catalogue) runs(where string, args ...any) (runs []*runState, err error) {
	err = c.each(func(scan func(...any) error) error {
		r, err := scanRun(scan)
		runs = append(runs, r)
		return err
	}, `SELECT `+runColumns+` FROM runs `+where, args...)
	return runs, err
}

func (c *catalogue) requests(full bool, where string, args ...any) (requests []*requestState, err error) {
	tokens := `'', ''`
	if full {
		tokens = `tokens, text`
	}
	err = c.each(func(scan func(...any) error) error {
		r := &requestState{}
		var number, begun, ended int64
		var labels, tags, tokens, path string
		if err := scan(&r.seq, &r.Key.Session, &number, &r.ID, &r.Run, &labels, &tags, &tokens, &r.Text, &r.Hidden, &path, &begun, &ended, &r.Reason); err != nil {
			return err
		}
		r.Key.Request = uint64(number)
		r.Begun, r.Ended = timeOf(begun), timeOf(ended)
		if tokens != "" {
			if r.Tokens, r.Pieces, err = readTokens(tokens); err != nil {
				return err
			}
		}
		requests = append(requests, r)
		return errors.Join(json.Unmarshal([]byte(labels), &r.Labels), json.Unmarshal([]byte(tags), &r.Tags), json.Unmarshal([]byte(path), &r.Path))
	}, `SELECT seq, session, request, id, run, labels, tags, `+tokens+`, hidden, path, begun_unix_ns, ended_unix_ns, reason FROM requests `+where, args...)
	return requests, err
}

// segmentNumbers are those that the catalogue knows sealed, and what they come to.
func (c *catalogue) segments() (map[uint64]sealedSegment, error) {
	segments := map[uint64]sealedSegment{}
	err := c.each(func(scan func(...any) error) error {
		var s sealedSegment
		var rows, bytes int64
		err := scan(&s.number, &s.bytes, &s.data, &s.chunks, &rows, &bytes, &s.created)
		s.rows, s.chunkBytes = uint64(rows), uint64(bytes)
		segments[s.number] = s
		return err
	}, `SELECT number, bytes, data, chunks, rows, chunk_bytes, created_unix_ns FROM segments`)
	return segments, err
}

// groups are where sealed segments list a request's chunks, and the lists themselves where the catalogue has them.
func (c *catalogue) groups(key tensor.RequestKey) (map[uint64]segment.Group, error) {
	groups := map[uint64]segment.Group{}
	err := c.each(func(scan func(...any) error) error {
		var number uint64
		var list []byte
		g := segment.Group{Key: key}
		err := scan(&number, &g.Chunks, &g.Rows, &g.Bytes, &g.Offset, &g.Length, &list)
		g.List = unpack(list, g.Length)
		groups[number] = g
		return err
	}, `SELECT segment, chunks, rows, bytes, list_offset, list_bytes, `+c.list()+` FROM segment_requests WHERE session=? AND request=?`, key.Session, int64(key.Request))
	return groups, err
}

// list is the column of that name, which older formats have not.
func (c *catalogue) list() string {
	if c.version < 3 {
		return "NULL"
	}
	return "list"
}

// groupsOf are where a segment lists chunks. It goes over all lines: for segments that do not say it themselves.
func (c *catalogue) groupsOf(number uint64) (groups []segment.Group, err error) {
	err = c.each(func(scan func(...any) error) error {
		var g segment.Group
		var request int64
		var list []byte
		err := scan(&g.Key.Session, &request, &g.Chunks, &g.Rows, &g.Bytes, &g.Offset, &g.Length, &list)
		g.Key.Request, g.List = uint64(request), unpack(list, g.Length)
		groups = append(groups, g)
		return err
	}, `SELECT session, request, chunks, rows, bytes, list_offset, list_bytes, `+c.list()+` FROM segment_requests WHERE segment=?`, int64(number))
	return groups, err
}

// scattered counts the requests that may lie scattered, and of which something is in a segment from a number on.
func (c *catalogue) scattered(from uint64) (n uint64, err error) {
	err = c.read.QueryRow(`SELECT COUNT(*) FROM (SELECT 1 FROM segment_requests GROUP BY session, request HAVING `+scattered+`)`, int64(from)).Scan(&n)
	return n, err
}

// scatteredAfter lists them, from the one after a request on, which may be nil.
func (c *catalogue) scatteredAfter(last *tensor.RequestKey, from uint64, most int) (keys []tensor.RequestKey, err error) {
	after, args := "", []any{}
	if last != nil {
		after, args = "WHERE (session, request) > (?, ?)", []any{last.Session, int64(last.Request)}
	}
	err = c.each(func(scan func(...any) error) error {
		var key tensor.RequestKey
		var request int64
		err := scan(&key.Session, &request)
		key.Request = uint64(request)
		keys = append(keys, key)
		return err
	}, `SELECT session, request FROM segment_requests `+after+` GROUP BY session, request HAVING `+scattered+` ORDER BY session, request LIMIT ?`, append(args, int64(from), most)...)
	return keys, err
}

// scattered: requests in one segment with two chunks cost no more than three reads, whatever those are of.
const scattered = `(COUNT(*) > 1 OR SUM(chunks) > 2) AND MAX(segment) >= ?`

func (c *catalogue) sets() (sets []*siteSet, err error) {
	err = c.each(func(scan func(...any) error) error {
		s := &siteSet{}
		var sites string
		if err := scan(&s.id, &s.session, &sites); err != nil {
			return err
		}
		sets = append(sets, s)
		return json.Unmarshal([]byte(sites), &s.sites)
	}, `SELECT id, session, sites FROM site_sets`)
	return sets, err
}

// lines are the books of a request, or of a session's rows without one.
func (c *catalogue) lines(key tensor.RequestKey, set func(int64) *siteSet) (lines []*line, err error) {
	err = c.each(func(scan func(...any) error) error {
		l := &line{Entry: tensor.Entry{Key: key}}
		var id, step, policy int64
		var outcome, reason, level string
		if err := scan(&l.id, &l.Attempt, &id, &l.First, &l.Count, &l.Stride, &step, &outcome, &reason, &level, &policy, &l.Expired); err != nil {
			return err
		}
		l.Step, l.Policy = uint64(step), uint64(policy)
		l.Outcome, l.Reason, l.Level = tensor.Outcome(outcomeOf[outcome]), tensor.Reason(reasonOf[reason]), tensor.Level(levelOf[level])
		if l.set = set(id); l.set == nil {
			return fmt.Errorf("books line %d names site set %d, which is not there", l.id, id)
		}
		l.Sites = l.set.sites
		lines = append(lines, l)
		return nil
	}, `SELECT id, attempt, site_set, first, count, stride, step, outcome, reason, level, policy, expired_unix_ns FROM books WHERE session=? AND request=? ORDER BY id`,
		key.Session, int64(key.Request))
	return lines, err
}

func (c *catalogue) totals() (map[Total]uint64, error) {
	totals := map[Total]uint64{}
	err := c.each(func(scan func(...any) error) error {
		var t Total
		var outcome, reason, level string
		var rows int64
		err := scan(&t.Session, &outcome, &reason, &level, &rows)
		t.Outcome, t.Reason, t.Level = tensor.Outcome(outcomeOf[outcome]), tensor.Reason(reasonOf[reason]), tensor.Level(levelOf[level])
		totals[t] = uint64(rows)
		return err
	}, `SELECT session, outcome, reason, level, rows FROM totals`)
	return totals, err
}

// expired are rows that were captured and are gone, by session.
func (c *catalogue) expired() (map[uint32]uint64, error) {
	expired := map[uint32]uint64{}
	if c.version < 2 {
		return expired, nil
	}
	err := c.each(func(scan func(...any) error) error {
		var session uint32
		var rows int64
		err := scan(&session, &rows)
		expired[session] = uint64(rows)
		return err
	}, `SELECT session, rows FROM expired`)
	return expired, err
}

// top is the largest value of a column, 0 where there is none.
func (c *catalogue) top(column, table string) (int64, error) {
	var v sql.NullInt64
	err := c.read.QueryRow("SELECT MAX(" + column + ") FROM " + table).Scan(&v)
	return v.Int64, err
}

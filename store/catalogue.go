package store

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"sync"
	"time"

	_ "modernc.org/sqlite" // the driver

	"dmi/store/segment"
	"dmi/tensor"
)

const catalogueVersion = 3

// schema is documented in docs/format/catalogue.md. Times are ns since 1970, 0 where there is none; lists and maps are JSON.
const schema = `
CREATE TABLE sessions (number INTEGER PRIMARY KEY, id TEXT NOT NULL, producer TEXT, mode TEXT, text TEXT, model TEXT, versions TEXT, process TEXT,
	hooks TEXT, begun_unix_ns INTEGER, ended_unix_ns INTEGER, produced INTEGER NOT NULL DEFAULT 0);
CREATE TABLE sites (session INTEGER, id INTEGER, name TEXT, aliases TEXT, layer INTEGER, space INTEGER, row_axis INTEGER, keyed INTEGER, fill INTEGER,
	optional INTEGER, PRIMARY KEY (session, id)) WITHOUT ROWID;
CREATE TABLE site_totals (session INTEGER, site INTEGER, dtype TEXT, row_shape TEXT, rows INTEGER, bytes INTEGER, PRIMARY KEY (session, site)) WITHOUT ROWID;
CREATE TABLE lanes (session INTEGER, lane INTEGER, records INTEGER, PRIMARY KEY (session, lane)) WITHOUT ROWID;
CREATE TABLE runs (seq INTEGER PRIMARY KEY, id TEXT UNIQUE, session INTEGER, labels TEXT, tags TEXT, begun_unix_ns INTEGER, ended_unix_ns INTEGER);
CREATE TABLE requests (seq INTEGER PRIMARY KEY, session INTEGER, request INTEGER, id TEXT, run TEXT, labels TEXT, tags TEXT, tokens TEXT, text TEXT,
	hidden INTEGER, path TEXT, begun_unix_ns INTEGER, ended_unix_ns INTEGER, reason TEXT, UNIQUE (session, request));
CREATE INDEX requests_id ON requests (id);
CREATE INDEX requests_run ON requests (run);
CREATE TABLE segments (number INTEGER PRIMARY KEY, bytes INTEGER, data INTEGER, chunks INTEGER, rows INTEGER, chunk_bytes INTEGER, created_unix_ns INTEGER);
CREATE TABLE segment_requests (session INTEGER, request INTEGER, segment INTEGER, chunks INTEGER, rows INTEGER, bytes INTEGER, list_offset INTEGER,
	list_bytes INTEGER, PRIMARY KEY (session, request, segment)) WITHOUT ROWID;
CREATE TABLE site_sets (id INTEGER PRIMARY KEY, session INTEGER, sites TEXT);
CREATE TABLE books (id INTEGER PRIMARY KEY, session INTEGER, request INTEGER, attempt INTEGER, site_set INTEGER, first INTEGER, count INTEGER,
	stride INTEGER, step INTEGER, outcome TEXT, reason TEXT, level TEXT, policy INTEGER, expired_unix_ns INTEGER NOT NULL DEFAULT 0);
CREATE INDEX books_request ON books (session, request);
CREATE TABLE totals (session INTEGER, outcome TEXT, reason TEXT, level TEXT, rows INTEGER, PRIMARY KEY (session, outcome, reason, level)) WITHOUT ROWID;
CREATE TABLE checkpoint (one INTEGER PRIMARY KEY CHECK (one = 1), manifest INTEGER, manifest_offset INTEGER, low INTEGER, low_offset INTEGER,
	segment INTEGER, segment_offset INTEGER, closed INTEGER NOT NULL DEFAULT 0);
`

// since2 is what format 2 has and format 1 had not.
const since2 = `
CREATE TABLE expired (session INTEGER PRIMARY KEY, rows INTEGER);
ALTER TABLE checkpoint ADD COLUMN next_segment INTEGER NOT NULL DEFAULT 0;
`

// since3 is what format 3 has and format 2 had not.
const since3 = `
ALTER TABLE segment_requests ADD COLUMN list BLOB;
`

// catalogue is what can be asked without reading segments. All of it can be had from them and the manifest again.
type catalogue struct {
	write   *sql.DB // one connection
	read    *sql.DB
	version int // of the file; one that is only read may be older

	statements sync.Map // *sql.Stmt of read, by its text: SQLite takes longer to parse most than to answer them
}

// checkpoint is how far the catalogue has come: the manifest before `applied` is in it; from `low` on there may be rows that were
// booked and not yet in a durable segment, or produced and not yet booked; segments up to `segment`, `end` hold nothing that it does not know of.
type checkpoint struct {
	applied position
	low     position
	segment uint64
	end     int64
	next    uint64 // number that no segment ever had; those of segments that are gone do not come again
	closed  int64  // where the manifest's last file ends, if the store was closed in order; else 0
}

func dsn(file string, pragmas ...string) string {
	v := url.Values{"_txlock": {"immediate"}}
	for _, p := range append(pragmas, "busy_timeout(10000)") {
		v.Add("_pragma", p)
	}
	return "file:" + (&url.URL{Path: file}).EscapedPath() + "?" + v.Encode()
}

// openCatalogue opens or makes the SQLite file.
func openCatalogue(file string) (*catalogue, error) {
	if f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o600); err != nil { // SQLite would make it readable to all
		return nil, err
	} else {
		f.Close()
	}
	// The manifest is what is made durable; the catalogue only has to stay whole, and does without a sync a commit.
	write, err := sql.Open("sqlite", dsn(file, "journal_mode(WAL)", "synchronous(NORMAL)", "secure_delete(ON)")) // what is deleted is overwritten
	if err != nil {
		return nil, err
	}
	write.SetMaxOpenConns(1)
	c := &catalogue{write: write}
	if err := c.prepare(); err != nil {
		c.close()
		return nil, err
	}
	if c.read, err = sql.Open("sqlite", dsn(file, "query_only(1)")); err != nil {
		c.close()
		return nil, err
	}
	c.read.SetMaxOpenConns(4)
	return c, nil
}

// memoryCatalogue is for readers of a store whose own catalogue cannot be used.
func memoryCatalogue() (*catalogue, error) {
	db, err := sql.Open("sqlite", ":memory:")
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	db.SetConnMaxIdleTime(0)
	c := &catalogue{write: db, read: db}
	if err := c.prepare(); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// readCatalogue opens the SQLite file for reading. alone: no engine has it open, so that no -wal need be looked at.
func readCatalogue(file string, alone bool) (*catalogue, error) {
	mode := "?mode=ro&_pragma=query_only(1)&_pragma=busy_timeout(10000)"
	if info, err := os.Stat(file + "-wal"); alone && (err != nil || info.Size() == 0) {
		mode += "&immutable=1"
	}
	db, err := sql.Open("sqlite", "file:"+(&url.URL{Path: file}).EscapedPath()+mode)
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(4)
	var version int
	if err := db.QueryRow("PRAGMA user_version").Scan(&version); err != nil {
		db.Close()
		return nil, err
	}
	if version == 0 {
		db.Close()
		return nil, errors.New("it is empty")
	}
	if version > catalogueVersion {
		db.Close()
		return nil, fmt.Errorf("catalogue format %d: %w", version, segment.ErrVersion)
	}
	return &catalogue{read: db, version: version}, nil
}

func (c *catalogue) prepare() error {
	var version int
	if err := c.write.QueryRow("PRAGMA user_version").Scan(&version); err != nil {
		return err
	}
	c.version = catalogueVersion
	script := ""
	switch version {
	case 0:
		script = schema + since2 + since3
	case 1:
		script = since2 + since3
	case 2:
		script = since3
	case catalogueVersion:
		return nil
	default:
		return fmt.Errorf("catalogue format %d, this one reads up to %d: %w", version, catalogueVersion, segment.ErrVersion)
	}
	tx, err := c.write.Begin()
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if _, err := tx.Exec(script + fmt.Sprintf("PRAGMA user_version = %d", catalogueVersion)); err != nil {
		return err
	}
	return tx.Commit()
}

func (c *catalogue) close() error {
	var errs []error
	if c.write != nil && c.write != c.read {
		if c.read != nil { // leave one file behind, not three
			errs = append(errs, c.read.Close())
		}
		_, _ = c.write.Exec("PRAGMA wal_checkpoint(TRUNCATE)") // the next to open does it else
		return errors.Join(append(errs, c.write.Close())...)
	}
	return c.read.Close()
}

// scrub has the file hold nothing but what the catalogue does.
func (c *catalogue) scrub() error {
	var busy, log, done int
	if err := c.write.QueryRow("PRAGMA wal_checkpoint(TRUNCATE)").Scan(&busy, &log, &done); err != nil {
		return err
	}
	if busy != 0 {
		return errors.New("a reader keeps the catalogue's journal from being emptied; close readers of the store and delete again")
	}
	return nil
}

func unixNS(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func timeOf(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns).UTC()
}

func toJSON(v any) string {
	b, _ := json.Marshal(v)
	return string(b)
}

// change is what a commit writes, copied so that nothing is locked meanwhile.
type change struct {
	sessions   []tensor.Session
	sites      map[uint32][]tensor.Site
	siteTotals map[uint32][]SiteTotal
	lanes      map[laneKey]uint64
	runs       []*runState
	requests   []*requestState
	segments   []sealedSegment
	gone       []goneSegment
	sets       []*siteSet
	lines      []line
	removed    map[int64]bool
	totals     []Total
	produced   map[uint32]uint64
	expired    map[uint32]uint64
	checkpoint checkpoint

	dirty   dirty // what the above were copied for
	lineSet map[*line]tensor.RequestKey
}

// commit writes a change whole or not at all.
func (c *catalogue) commit(ch *change) error {
	tx, err := c.write.Begin()
	if err != nil {
		return err
	}
	defer tx.Rollback()
	w, lists := statements{tx: tx}, packer{}
	for _, s := range ch.sessions {
		w.exec(`INSERT INTO sessions (number, id, producer, mode, text, model, versions, process, hooks, begun_unix_ns, ended_unix_ns) VALUES (?,?,?,?,?,?,?,?,?,?,?)
			ON CONFLICT (number) DO UPDATE SET producer=excluded.producer, mode=excluded.mode, text=excluded.text, model=excluded.model, versions=excluded.versions,
			process=excluded.process, hooks=excluded.hooks, begun_unix_ns=excluded.begun_unix_ns, ended_unix_ns=excluded.ended_unix_ns`,
			s.Number, s.ID, s.Producer, s.Mode, s.Text, string(s.Model), string(s.Versions), string(s.Process), toJSON(s.Hooks), unixNS(s.Begun), unixNS(s.Ended))
	}
	for session, sites := range ch.sites {
		for _, s := range sites {
			w.exec(`INSERT OR REPLACE INTO sites VALUES (?,?,?,?,?,?,?,?,?,?)`, session, s.ID, s.Name, toJSON(s.Aliases), s.Layer, s.Space, s.RowAxis, s.Keyed, s.Fill, s.Optional)
		}
	}
	for session, totals := range ch.siteTotals {
		for _, t := range totals {
			w.exec(`INSERT OR REPLACE INTO site_totals VALUES (?,?,?,?,?,?)`, session, t.Site, t.DType.String(), toJSON(t.Shape), int64(t.Rows), int64(t.Bytes))
		}
	}
	for k, records := range ch.lanes {
		w.exec(`INSERT OR REPLACE INTO lanes VALUES (?,?,?)`, k.session, k.lane, int64(records))
	}
	for _, r := range ch.runs {
		w.exec(`INSERT OR REPLACE INTO runs VALUES (?,?,?,?,?,?,?)`, r.seq, r.ID, r.Session, toJSON(r.Labels), toJSON(r.Tags), unixNS(r.Begun), unixNS(r.Ended))
	}
	for _, r := range ch.requests {
		w.exec(`INSERT OR REPLACE INTO requests VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)`, r.seq, r.Key.Session, int64(r.Key.Request), r.ID, r.Run, toJSON(r.Labels), toJSON(r.Tags),
			tokensJSON(r.Request), r.Text, r.Hidden, toJSON(r.Path), unixNS(r.Begun), unixNS(r.Ended), r.Reason)
	}
	for _, s := range ch.segments {
		w.exec(`INSERT OR REPLACE INTO segments VALUES (?,?,?,?,?,?,?)`, int64(s.number), s.bytes, s.data, s.chunks, int64(s.rows), int64(s.chunkBytes), s.created)
		for _, g := range s.groups {
			w.exec(`INSERT OR REPLACE INTO segment_requests VALUES (?,?,?,?,?,?,?,?,?)`, g.Key.Session, int64(g.Key.Request), int64(s.number), g.Chunks, int64(g.Rows),
				int64(g.Bytes), g.Offset, g.Length, lists.pack(g.List))
		}
	}
	for _, g := range ch.gone {
		w.exec(`DELETE FROM segments WHERE number=?`, int64(g.number))
		if g.keys == nil {
			w.exec(`DELETE FROM segment_requests WHERE segment=?`, int64(g.number))
		}
		for _, key := range g.keys {
			w.exec(`DELETE FROM segment_requests WHERE session=? AND request=? AND segment=?`, key.Session, int64(key.Request), int64(g.number))
		}
	}
	for _, s := range ch.sets {
		w.exec(`INSERT OR REPLACE INTO site_sets VALUES (?,?,?)`, s.id, s.session, toJSON(s.sites))
	}
	for id := range ch.removed {
		w.exec(`DELETE FROM books WHERE id=?`, id)
	}
	for i := range ch.lines {
		l := &ch.lines[i]
		w.exec(`INSERT INTO books (id, session, request, attempt, site_set, first, count, stride, step, outcome, reason, level, policy, expired_unix_ns) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)
			ON CONFLICT (id) DO UPDATE SET first=excluded.first, count=excluded.count, stride=excluded.stride`,
			l.id, l.Key.Session, int64(l.Key.Request), l.Attempt, l.set.id, l.First, l.Count, l.Stride, int64(l.Step), l.Outcome.String(), l.Reason.String(), l.Level.String(),
			int64(l.Policy), l.Expired)
	}
	for _, t := range ch.totals {
		w.exec(`INSERT OR REPLACE INTO totals VALUES (?,?,?,?,?)`, t.Session, t.Outcome.String(), t.Reason.String(), t.Level.String(), int64(t.Rows))
	}
	for session, rows := range ch.produced {
		w.exec(`UPDATE sessions SET produced=? WHERE number=?`, int64(rows), session)
	}
	for session, rows := range ch.expired {
		w.exec(`INSERT OR REPLACE INTO expired VALUES (?,?)`, session, int64(rows))
	}
	p := ch.checkpoint
	w.exec(`INSERT OR REPLACE INTO checkpoint VALUES (1,?,?,?,?,?,?,?,?)`, int64(p.applied.file), p.applied.offset, int64(p.low.file), p.low.offset, int64(p.segment), p.end, p.closed,
		int64(p.next))
	if w.err != nil {
		return w.err
	}
	return tx.Commit()
}

// statements runs statements of a transaction, each prepared once. The first error sticks.
type statements struct {
	tx       *sql.Tx
	prepared map[string]*sql.Stmt
	err      error
}

func (s *statements) exec(query string, args ...any) {
	if s.err != nil {
		return
	}
	stmt := s.prepared[query]
	if stmt == nil {
		if stmt, s.err = s.tx.Prepare(query); s.err != nil {
			return
		}
		if s.prepared == nil {
			s.prepared = map[string]*sql.Stmt{}
		}
		s.prepared[query] = stmt
	}
	_, s.err = stmt.Exec(args...)
}

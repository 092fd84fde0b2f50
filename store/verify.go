package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"

	"dmi/store/segment"
	"dmi/tensor"
)

const mostProblems = 1000 // listed; more are only said to exist

// verifier is one run of Verify.
type verifier struct {
	*Store
	ctx      context.Context
	report   Report
	progress func(Progress)
	done     Progress
	upTo     position // of the manifest: what was whole when it began
	books    Totals
	inFlight map[uint32]uint64 // rows, by session
	unbooked bool              // the books of this moment are not to balance: an engine is at work that we are not
	open     map[uint64]int64  // unsealed segments, and where their last whole batch ended
	known    map[uint64]sealedSegment
	stored   uint64 // rows in chunks
}

// Verify reads the whole store, and reports whatever is not as it was written: every byte of every segment, every frame of the manifest, the catalogue against both, and the
// books against what was produced. A store that is being written can be verified; what is written meanwhile is left out. progress may be nil. The error
// is only for what kept it from reading on.
func (s *Store) Verify(ctx context.Context, progress func(Progress)) (Report, error) {
	if progress == nil {
		progress = func(Progress) {}
	}
	v := &verifier{Store: s, ctx: ctx, progress: progress}
	v.snapshot()
	v.report.Problems = slices.Clone(s.noticed)
	for _, step := range []func() error{v.measure, v.manifests, v.segments, v.catalogue} {
		if err := step(); err != nil {
			return v.report, explain("verify "+s.dir, err)
		}
	}
	return v.report, nil
}

// snapshot notes what the store says of itself at one moment.
func (v *verifier) snapshot() {
	s := v.Store
	s.log.Lock()
	defer s.log.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	v.upTo, v.books = *s.logEnd.Load(), s.books.sum()
	v.inFlight = map[uint32]uint64{}
	for k, f := range s.flight.steps {
		v.inFlight[k.session] += uint64(max(0, f.rows))
	}
	v.unbooked = s.unsettled
	v.open, v.known = map[uint64]int64{}, map[uint64]sealedSegment{}
	for _, o := range s.open {
		v.open[o.number] = o.end
	}
	for n, g := range s.sealed {
		v.known[n] = g
	}
}

func (v *verifier) problem(file string, offset int64, format string, args ...any) {
	if len(v.report.Problems) == mostProblems {
		v.report.Truncated = true
		return
	}
	v.report.Problems = append(v.report.Problems, Problem{file, offset, fmt.Sprintf(format, args...)})
}

func (v *verifier) read(file string, n int64) {
	v.done.File = file
	v.done.Done += uint64(n)
	v.report.Bytes += uint64(n)
	v.progress(v.done)
}

// measure finds how much there is to read.
func (v *verifier) measure() error {
	for _, dir := range []string{"segments", "manifest"} {
		names, err := v.fs.ReadDir(path.Join(v.dir, dir))
		if err != nil {
			return err
		}
		for _, n := range names {
			if size, err := v.fs.Stat(path.Join(v.dir, dir, n)); err == nil {
				v.done.Total += uint64(size)
			}
		}
	}
	return nil
}

// manifests reads every frame, and holds the books against them.
func (v *verifier) manifests() error {
	dir := path.Join(v.dir, "manifest")
	files, err := manifestFiles(v.fs, dir)
	if err != nil {
		return err
	}
	produced, booked := map[uint32]uint64{}, map[uint32]uint64{}
	for i, n := range files {
		if n > v.upTo.file {
			break
		}
		if i > 0 && n != files[i-1]+1 {
			v.problem(manifestName("manifest", n), -1, "files %d to %d before it are missing", files[i-1]+1, n-1)
		}
		if err := v.manifest(dir, n, produced, booked); err != nil {
			return err
		}
		v.report.ManifestFiles++
	}
	var sums = map[uint32]uint64{}
	for _, line := range v.books.Lines {
		sums[line.Session] += line.Rows
		v.report.Booked += line.Rows
	}
	v.report.Produced = v.books.Produced
	if v.unbooked {
		return nil
	}
	for session, rows := range v.books.Sessions {
		if produced[session]+v.adoptedHere[session] != rows {
			v.problem("manifest", -1, "session %d: its steps and entries come to %d rows, the books say %d were produced", session, produced[session], rows)
		}
		if n := sums[session]; n+v.inFlight[session] != rows {
			v.problem("catalogue.sqlite", -1, "session %d: %d rows were produced, %d are on the books and %d in flight", session, rows, n, v.inFlight[session])
		}
	}
	for session, rows := range sums {
		if n := booked[session]; n+v.settledHere[session] != rows {
			v.problem("manifest", -1, "session %d: its entries come to %d rows, the books to %d", session, n+v.settledHere[session], rows)
		}
	}
	return nil
}

// manifest reads a file's frames.
func (v *verifier) manifest(dir string, n uint64, produced, booked map[uint32]uint64) error {
	name := manifestName("manifest", n)
	var last int64
	bad := func(at position, err error) { v.problem(name, at.offset, "%v", err) }
	end, err := readManifest(v.fs, dir, v.id, n, 0, func(at position, kind frameKind, payload []byte) error {
		if err := v.ctx.Err(); err != nil {
			return err
		}
		if !at.before(v.upTo) {
			return errEnough
		}
		last = at.offset
		switch kind {
		case frameStep:
			step, err := decodeStep(payload)
			if err != nil {
				bad(at, err)
				return nil
			}
			opened, err := openings(&step)
			if err != nil {
				bad(at, err)
				return nil
			}
			v.mu.Lock()
			for _, o := range opened {
				produced[step.Session] += o.rows*uint64(len(v.required(step.Session, o.sites))) + o.loose
			}
			v.mu.Unlock()
		case frameBook, frameAdopt:
			entries, err := decodeEntries(payload)
			if err != nil {
				bad(at, err)
				return nil
			}
			v.mu.Lock()
			for i := range entries {
				e := &entries[i]
				booked[e.Key.Session] += rowsOf(e)
				if kind == frameAdopt {
					produced[e.Key.Session] += rowsOf(e)
				} else {
					produced[e.Key.Session] += v.freeRows(e)
				}
			}
			v.mu.Unlock()
		case frameCorrect:
			if _, err := decodeEntries(payload); err != nil {
				bad(at, err)
			}
		case frameExpire:
			if _, err := decodeExpired(payload); err != nil {
				bad(at, err)
			}
		case frameReplace:
			if _, err := decodeReplacement(payload); err != nil {
				bad(at, err)
			}
		case frameSession, frameSessionEnd, frameSites, frameRun, frameRequests, frameForget, frameSync:
		default:
			bad(at, fmt.Errorf("a frame of kind %d", kind))
		}
		return nil
	})
	v.read(name, max(end, last))
	switch {
	case errors.Is(err, errEnough):
	case errors.Is(err, errTorn) && (position{n, end}).before(v.upTo):
		v.problem(name, end, "%v", err)
	case errors.Is(err, errTorn): // what an engine at work is adding, or one that was killed could not finish
		if !v.live() && v.clean {
			v.problem(name, end, "%v", err)
		}
	case err == nil && (position{n, end}).before(v.upTo) && n == v.upTo.file:
		v.problem(name, end, "the file ends here, and should reach to %d", v.upTo.offset)
	}
	if errors.Is(err, errEnough) || errors.Is(err, errTorn) {
		return nil
	}
	return err
}

var errEnough = errors.New("as far as was asked")

// live reports whether this is the store of an engine.
func (s *Store) live() bool { return !s.readOnly }

// segments reads every segment.
func (v *verifier) segments() error {
	open, sealed, err := v.segmentFiles()
	if err != nil {
		return err
	}
	for n := range v.known {
		if _, found := slices.BinarySearch(sealed, n); !found && v.stillThere(n) {
			v.problem(v.segmentName(n, true), -1, "the segment is missing; its rows are on the books and not there")
		}
	}
	for _, n := range sealed {
		if _, was := v.open[n]; was { // sealed since
			v.open[n] = -1
		}
		if err := v.segment(n, true); err != nil {
			return err
		}
	}
	for _, n := range open {
		if _, was := v.open[n]; !was {
			continue // begun since, or by an engine that was killed before it had anything in it
		}
		if err := v.segment(n, false); err != nil {
			return err
		}
	}
	var captured uint64
	for _, line := range v.books.Lines {
		if line.Outcome == tensor.Captured {
			captured += line.Rows
		}
	}
	for _, rows := range v.books.Expired {
		captured -= min(captured, rows)
	}
	if !v.live() && !v.unbooked && v.stored < captured {
		v.problem("segments", -1, "%d rows are booked captured, and the segments hold %d", captured, v.stored)
	}
	return nil
}

// stillThere reports whether a segment is one now: others may have taken its place since.
func (v *verifier) stillThere(n uint64) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	_, is := v.sealed[n]
	return is
}

func (v *verifier) segmentName(n uint64, sealed bool) string {
	return path.Join("segments", path.Base(v.segmentPath(n, sealed)))
}

func (v *verifier) segment(n uint64, sealed bool) error {
	if err := v.ctx.Err(); err != nil {
		return err
	}
	name, file := v.segmentName(n, sealed), v.segmentPath(n, sealed)
	if sealed {
		file = v.sealedPath(n)
	}
	f, err := v.fs.Open(file, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // renamed or removed since it was listed
	}
	if err != nil {
		return err
	}
	defer f.Close()
	var contents *segment.Contents
	contents, err = segment.Check(yielding{f, &v.way}, sealed, func(bytes int64) { v.read(name, bytes) }, func(offset int64, what string) {
		if !sealed && offset >= v.open[n] {
			return // being written, or what an engine that was killed could not finish
		}
		v.problem(name, offset, "%s", what)
	})
	if err != nil {
		if errors.Is(err, segment.ErrVersion) {
			v.problem(name, -1, "%v", err)
			return nil
		}
		return err
	}
	v.report.Segments++
	v.report.Chunks += uint64(len(contents.Chunks))
	for i := range contents.Chunks {
		v.stored += uint64(contents.Chunks[i].Rows)
	}
	if contents.Data == 0 {
		return nil // unreadable, and reported
	}
	if id := contents.Identity; id.Store != v.id || id.Number != n {
		v.problem(name, -1, "it is segment %d of store %s", id.Number, id.Store)
	}
	if sealed {
		return v.listed(name, n, contents)
	}
	return nil
}

// listed holds the catalogue's lines of a segment against what is in it.
func (v *verifier) listed(name string, n uint64, contents *segment.Contents) error {
	known, found := v.known[n]
	if !found {
		if !v.live() {
			v.problem(name, -1, "the catalogue does not know it")
		}
		return nil
	}
	if known.chunks != len(contents.Chunks) {
		v.problem("catalogue.sqlite", -1, "segment %d has %d chunks, the catalogue says %d", n, len(contents.Chunks), known.chunks)
	}
	v.mu.Lock()
	pending := slices.ContainsFunc(v.pending, func(g sealedSegment) bool { return g.number == n })
	v.mu.Unlock()
	if pending {
		return nil
	}
	for _, g := range contents.Groups() {
		committed, err := v.cat.groups(g.Key)
		if err != nil {
			v.problem("catalogue.sqlite", -1, "segment %d: %v", n, err)
			return nil
		}
		has := committed[n]
		if has.List == "" { // it is not in every line
			g.List = ""
		}
		if has != g && v.stillThere(n) {
			v.problem("catalogue.sqlite", -1, "segment %d, request %d of session %d: the catalogue's line differs from the segment", n, g.Key.Request, g.Key.Session)
		}
	}
	return nil
}

// catalogue has SQLite check its file, and its sums.
func (v *verifier) catalogue() error {
	err := v.cat.each(func(scan func(...any) error) error {
		var what string
		if err := scan(&what); err != nil {
			return err
		}
		if what != "ok" {
			v.problem("catalogue.sqlite", -1, "%s", what)
		}
		return nil
	}, "PRAGMA quick_check")
	if err != nil {
		v.problem("catalogue.sqlite", -1, "%v", err)
		return nil
	}
	var broken int
	err = v.cat.read.QueryRow(`SELECT COUNT(*) FROM (SELECT session, outcome, reason, level, SUM(rows) AS rows FROM
		(SELECT b.session, outcome, reason, level, b.count * json_array_length(s.sites) AS rows FROM books b JOIN site_sets s ON s.id = b.site_set)
		GROUP BY session, outcome, reason, level) sums FULL JOIN totals t USING (session, outcome, reason, level)
		WHERE COALESCE(sums.rows, 0) <> COALESCE(t.rows, 0)`).Scan(&broken)
	if err != nil {
		v.problem("catalogue.sqlite", -1, "%v", err)
	} else if broken > 0 {
		v.problem("catalogue.sqlite", -1, "%d of its totals are not the sum of its books", broken)
	}
	return nil
}

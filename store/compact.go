package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"dmi/internal/vfs"
	"dmi/store/segment"
	"dmi/tensor"
)

// Compaction rewrites segments so that what belongs together lies together: each request in as few segments as hold it, each of its sites in chunks of up to
// 16 MiB. A read of one request and site costs a read for the list in each such segment, and one for each chunk: three at most for up to two chunks, where
// the request fits a segment. It happens while nothing else does, or when Compact is asked for; books, answers and references that readers hold stay as they are.

// Compaction says what came of compacting.
type Compaction struct {
	Segments int    `json:"segments"` // rewritten
	Made     int    `json:"made"`     // in their place
	Chunks   uint64 `json:"chunks"`   // in those that were rewritten
	Merged   uint64 `json:"merged"`   // in those that were made
	Bytes    uint64 `json:"bytes"`    // of the new chunks
}

// CompactionProgress is how far Compact has come. A pass looks at every request once; there is another while the last one found something to do.
type CompactionProgress struct {
	Pass          int    `json:"pass"`
	Requests      uint64 `json:"requests"`
	RequestsTotal uint64 `json:"requests_total"`
	Compaction
}

const (
	enoughReads    = 3       // of a request and site: fewer are not striven for
	jobSegments    = 64      // that are rewritten at once,
	jobBytesFactor = 4       // of so many full ones' bytes,
	jobChunks      = 1 << 18 // and so many chunks: some 50 MB of lists
	seenAtOnce     = 1000    // requests that are asked of the catalogue
)

// errBusy ends a compaction for something that is more urgent.
var errBusy = errors.New("there is other work")

// Compact seals what is written and rewrites what is scattered, whatever else the store does. progress may be nil.
func (s *Store) Compact(ctx context.Context, progress func(CompactionProgress)) (Compaction, error) {
	if s.readOnly {
		return Compaction{}, errors.New("store: compact: opened for reading only")
	}
	if progress == nil {
		progress = func(CompactionProgress) {}
	}
	c := &compaction{Store: s, progress: progress, pace: func(int64) error { return ctx.Err() }}
	if err := s.barrier(ctx, &barrier{done: make(chan error, 1), seal: true}); err != nil {
		return Compaction{}, explainOnce("compact "+s.dir, err)
	}
	for more := true; more; {
		var err error
		if more, err = c.pass(ctx); err != nil {
			return c.done.Compaction, explainOnce("compact "+s.dir, err)
		}
	}
	return c.done.Compaction, nil
}

// compaction is one run.
type compaction struct {
	*Store
	progress func(CompactionProgress)
	pace     func(bytes int64) error // is told of bytes written; an error ends the run
	done     CompactionProgress
	from     uint64             // segments before are as good as they get
	weight   int                // before the pass under way
	upTo     uint64             // which segments the pass under way knows
	last     *tensor.RequestKey // that the pass under way has looked at; nil: it has not begun
}

// pass looks at every request once, of those that have rows in segments since the last pass that was completed. more: another may find something to do.
func (c *compaction) pass(ctx context.Context) (more bool, err error) {
	if c.last == nil {
		c.weight, c.upTo = c.weigh()
		c.done.Pass++
		c.done.Requests = 0
	}
	if c.done.RequestsTotal, err = c.cat.scattered(c.from); err != nil {
		return false, explain("count requests", err)
	}
	for {
		keys, err := c.cat.scatteredAfter(c.last, c.from, seenAtOnce)
		if err != nil {
			return false, explain("list requests", err)
		}
		for i := range keys {
			err := errUrgent
			for errors.Is(err, errUrgent) { // again, now that it is done
				err = c.request(keys[i])
			}
			if err != nil {
				return false, err
			}
			c.last = &keys[i]
			c.done.Requests++
			c.progress(c.done)
		}
		if len(keys) < seenAtOnce {
			break
		}
	}
	c.last, c.from = nil, c.upTo
	weight, next := c.weigh()
	if weight >= c.weight { // what was written anew, if anything, is as good as it gets: passes end, because the weight cannot fall for ever
		c.from = next
		return false, nil
	}
	return true, c.Barrier(ctx) // the catalogue is to know of it
}

// weigh counts what reads cost: segments, and chunks in them. next is the number of the next segment.
func (c *compaction) weigh() (weight int, next uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, g := range c.sealed {
		weight += 1 + g.chunks
	}
	return weight, c.nextSegment
}

// errUrgent is that a deletion waits for its turn.
var errUrgent = fmt.Errorf("a deletion waits: %w", errBusy)

// request compacts the segments that hold a request, if reading it gets cheaper by that.
func (c *compaction) request(key tensor.RequestKey) error {
	c.rewriting.Lock()
	defer c.rewriting.Unlock()
	if err := c.paced(0); err != nil {
		return err
	}
	if err := c.settleFiles(); err != nil {
		return err
	}
	if c.growing(key) {
		return nil
	}
	groups, err := c.groups(key)
	if err != nil {
		return err
	}
	for numbers := c.sound(slices.Sorted(maps.Keys(groups))); len(numbers) > 0; {
		n := c.together(numbers)
		worth, err := c.worth(groups, numbers[:n])
		if err == nil && worth {
			err = c.rewriteJob(numbers[:n])
		}
		if err == nil {
			numbers = numbers[n:]
			continue
		}
		if err := c.spare(numbers[:n], err); err != nil {
			return err
		}
		numbers = c.sound(numbers) // the others once more, without what is damaged
	}
	return nil
}

// sound leaves those of some segments of which no damage is known. It changes the slice.
func (c *compaction) sound(numbers []uint64) []uint64 {
	return slices.DeleteFunc(numbers, func(n uint64) bool { return c.spared[n] })
}

// growing reports whether more of a request may come.
func (s *Store) growing(key tensor.RequestKey) bool {
	r, err := s.requestState(key)
	if err != nil || r != nil && !r.Ended.IsZero() {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.sessions[key.Session]
	return t != nil && t.Ended.IsZero() && t.busy
}

// damagedSegment is the error that one segment of several is damaged.
type damagedSegment struct {
	number uint64
	error
}

func (d damagedSegment) Unwrap() error { return d.error }

// inSegment says of an error whose fault it is.
func inSegment(number uint64, err error) error {
	if errors.Is(err, ErrCorrupt) {
		return damagedSegment{number, err}
	}
	return err
}

// spare has a damaged segment, from now on, stay as it is: that which err names, else all that were read. Any other error than damage comes back.
func (c *compaction) spare(numbers []uint64, err error) error {
	if !errors.Is(err, ErrCorrupt) {
		return err
	}
	if one, ok := errors.AsType[damagedSegment](err); ok {
		numbers = []uint64{one.number}
	}
	for _, n := range numbers {
		c.spared[n] = true
	}
	c.opt.Log("error", "damaged", fmt.Sprintf("%v; compaction leaves segments %v as they are", err, numbers))
	return nil
}

// together is how many of a request's segments, from the first on, may be rewritten at once: within what a job may have; and, where rows go by
// their age, of one time, because all are then kept as long as the youngest.
func (c *compaction) together(numbers []uint64) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	var bytes, oldest, youngest int64
	chunks := 0
	for i, n := range numbers {
		g, there := c.sealed[n]
		if !there {
			return max(1, i)
		}
		if i == 0 {
			oldest, youngest = g.created, g.created
		}
		bytes, chunks = bytes+g.bytes, chunks+g.chunks
		oldest, youngest = min(oldest, g.created), max(youngest, g.created)
		most := jobBytesFactor * int64(c.opt.SegmentMiB) << 20
		if i > 0 && (i == jobSegments || bytes > most || chunks > jobChunks || c.opt.RetainAge > 0 && youngest-oldest > int64(c.opt.SegmentAge)) {
			return i
		}
	}
	return len(numbers)
}

// worth reports whether some site of a request costs more reads than are enough, and fewer once these segments are rewritten.
func (c *compaction) worth(groups map[uint64]segment.Group, numbers []uint64) (bool, error) {
	var all []located
	var bytes int64
	for _, n := range numbers {
		c.mu.Lock()
		_, there := c.sealed[n]
		c.mu.Unlock()
		if !there {
			return false, nil
		}
		chunks, err := c.chunksOf(n, groups[n])
		if err != nil {
			return false, inSegment(n, err)
		}
		for _, k := range chunks {
			all = append(all, located{n, k})
			bytes += k.Length
		}
	}
	sortLocated(all)
	runs := c.inRuns(all)
	lists := 1 // of a request that does not fit a segment there are more, one of them perhaps shared with the next
	if parts := max(bytes/(int64(c.opt.SegmentMiB)<<20), int64((len(runs)*9/8+8)/c.opt.SegmentTensors)); parts > 0 {
		lists = int(parts) + 2
	}
	before, after := map[uint32]int{}, map[uint32]int{}
	for _, run := range runs {
		before[run[0].Site] += len(run)
		after[run[0].Site]++
	}
	for site, n := range before {
		if n += len(numbers); n > enoughReads && lists+after[site] < n {
			return true, nil
		}
	}
	return false, nil
}

func sortLocated(chunks []located) {
	slices.SortFunc(chunks, func(a, b located) int {
		x, y := a.Chunk, b.Chunk
		return cmp.Or(x.Key.Compare(y.Key), cmp.Compare(x.Site, y.Site), cmp.Compare(x.Attempt, y.Attempt), cmp.Compare(x.Level, y.Level), cmp.Compare(x.First, y.First),
			cmp.Compare(a.segment, b.segment), cmp.Compare(x.Offset, y.Offset))
	})
}

// rewriteJob writes segments anew, a request after the other.
func (c *compaction) rewriteJob(numbers []uint64) error {
	var old []goneSegment
	var all []located
	ids := map[tensor.RequestKey]string{}
	var created, bytes int64
	for _, n := range numbers {
		c.mu.Lock()
		g := c.sealed[n]
		c.mu.Unlock()
		created, bytes = max(created, g.created), bytes+g.bytes
		listed, err := c.listed(n)
		if err != nil {
			return inSegment(n, err)
		}
		old = append(old, goneSegment{n, keysOf(listed)})
		for i := range listed {
			l := &listed[i]
			ids[l.Key] = l.ID
			for j := range l.Chunks {
				all = append(all, located{n, &l.Chunks[j]})
			}
		}
	}
	chunks := uint64(len(all))
	if left, err := c.leftToGo(ids, all); err != nil || left {
		return err
	}
	if free, err := c.fs.Free(c.dir); err == nil && free < uint64(bytes)+spareBytes {
		return fmt.Errorf("%d MiB are free, and %d are needed for a while to write %d segments anew: %w", free>>20, (uint64(bytes)+spareBytes)>>20, len(numbers), ErrDiskFull)
	}
	sortLocated(all)
	var merged, written uint64
	made, err := c.rewrite(old, created, func(r *rewriter) error {
		m := &merger{s: c.Store, files: map[uint64]vfs.File{}}
		defer m.close()
		for len(all) > 0 {
			n, size := 0, int64(0)
			for ; n < len(all) && all[n].Key == all[0].Key; n++ {
				size += all[n].Length
			}
			runs := c.inRuns(all[:n])
			if err := r.whole(size, len(runs)); err != nil {
				return err
			}
			for _, run := range runs {
				k, data, err := m.merge(run)
				if err == nil {
					err = r.add(k, ids[k.Key], data, false)
				}
				if err == nil {
					err = c.paced(int64(len(data)))
				}
				if err != nil {
					return err
				}
				merged++
				written += uint64(len(data))
			}
			all = all[n:]
		}
		return nil
	})
	if err != nil {
		return err
	}
	c.done.Segments += len(old)
	c.done.Made += len(made)
	c.done.Chunks += chunks
	c.done.Merged += merged
	c.done.Bytes += written
	c.mu.Lock()
	c.metrics.CompactedSegments += uint64(len(old))
	c.metrics.CompactedBytes += written
	c.mu.Unlock()
	c.opt.Log("info", "compaction", fmt.Sprintf("%d segments with %d chunks are now %d with %d", len(old), chunks, len(made), merged))
	return nil
}

const spareBytes = 256 << 20 // that compaction leaves of a disk

// leftToGo reports whether rows are among chunks that the books say are gone: a retention or deletion that was cut off finds them where they are.
func (c *compaction) leftToGo(ids map[tensor.RequestKey]string, all []located) (bool, error) {
	gone := map[tensor.RequestKey][]tensor.Entry{}
	for key := range ids {
		entries, err := c.Entries(key)
		if err != nil {
			return false, err
		}
		for _, e := range entries {
			if e.Expired != 0 {
				gone[key] = append(gone[key], e)
			}
		}
	}
	for _, l := range all {
		for _, e := range gone[l.Key] {
			if _, found := slices.BinarySearch(e.Sites, l.Site); !found || e.Attempt != l.Attempt {
				continue
			}
			if rows := (&tensor.Entry{First: l.First, Count: l.Rows, Stride: 1}); touches(rows, &e) {
				return true, nil
			}
		}
	}
	return false, nil
}

// paced is told of bytes that were written, and ends what is under way where something else is more urgent.
func (c *compaction) paced(bytes int64) error {
	switch {
	case c.urgent.Load() > 0:
		return errUrgent
	case c.stopping():
		return errBusy
	}
	return c.pace(bytes)
}

// whole begins a segment where a request does not fit the one that is being written, and would fit one of its own.
func (r *rewriter) whole(bytes int64, chunks int) error {
	if r.writer == nil || r.writer.Empty() {
		return nil
	}
	most, tensors := int64(r.s.opt.SegmentMiB)<<20, r.s.opt.SegmentTensors
	fits := r.writer.End()-r.writer.Data()+bytes <= most && r.count+chunks+chunks/8 <= tensors
	if fits || bytes > most || chunks > tensors {
		return nil
	}
	return r.seal()
}

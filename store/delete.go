package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"dmi/store/segment"
	"dmi/tensor"
)

// Deletion says what came of deleting requests.
type Deletion struct {
	Requests int    `json:"requests"`
	Active   int    `json:"active"` // of these, not ended: what comes of them later is captured
	Rows     uint64 `json:"rows"`   // removed now
	Bytes    uint64 `json:"bytes"`
	Segments int    `json:"segments"` // rewritten, or removed
	Prompts  int    `json:"prompts"`  // kept token ids or text of so many requests were removed
}

// DeletionProgress is how far Delete has come.
type DeletionProgress struct {
	Segments      int    `json:"segments"`
	SegmentsTotal int    `json:"segments_total"`
	Rows          uint64 `json:"rows"`
	ManifestFiles int    `json:"manifest_files"` // read for prompts
	ManifestTotal int    `json:"manifest_total"`
}

// unbookedWait bounds how long Delete waits for rows of a request at work to get onto the books.
const unbookedWait = 10 * time.Second

// deletion is one run of Delete.
type deletion struct {
	*Store
	ctx      context.Context
	keys     map[tensor.RequestKey]bool
	result   Deletion
	done     DeletionProgress
	progress func(DeletionProgress)
	left     []error // what could not be done, file by file
}

// Delete removes what is kept of requests: their rows, wherever they are, and their token ids and text, from segments, catalogue and manifest. The segments that hold them are
// written anew without, so that no hole is left that could pass for data. What remains is the books: each row as it was, and since when it is gone; and the request's id, labels and tags.
// It works while the store is being written. A crash leaves a part deleted: give the same requests again. Where files are damaged, everything goes that can be made out and nothing else; rows
// of others whose bytes are wrong stay so. A file that has to be left as it is stands in the error, with what to do about it. progress may be nil.
func (s *Store) Delete(ctx context.Context, keys []tensor.RequestKey, progress func(DeletionProgress)) (Deletion, error) {
	if s.readOnly {
		return Deletion{}, errors.New("store: delete: opened for reading only")
	}
	if progress == nil {
		progress = func(DeletionProgress) {}
	}
	d := &deletion{Store: s, ctx: ctx, keys: map[tensor.RequestKey]bool{}, progress: progress}
	for _, k := range keys {
		d.keys[k] = true
	}
	s.urgent.Add(1) // compaction makes way
	s.rewriting.Lock()
	s.urgent.Add(-1)
	defer s.rewriting.Unlock()
	doing := fmt.Sprintf("delete %d requests", len(d.keys))
	for _, step := range []func() error{s.settleFiles, d.count, d.seal, d.segments, d.forget, d.redact} {
		if err := step(); err != nil {
			return d.result, explainOnce(doing, err)
		}
	}
	s.mu.Lock()
	s.metrics.DeletedRows += d.result.Rows
	s.metrics.DeletedBytes += d.result.Bytes
	s.mu.Unlock()
	text := fmt.Sprintf("%d requests are deleted: %d rows, %d bytes, from %d segments", d.result.Requests, d.result.Rows, d.result.Bytes, d.result.Segments)
	if len(d.left) > 0 {
		err := fmt.Errorf("store: %s; but %d files are left as they are, with what they hold of them: %w", text, len(d.left), errors.Join(d.left...))
		s.opt.Log("error", "damaged", err.Error())
		return d.result, err
	}
	s.opt.Log("info", "deletion", text)
	return d.result, nil
}

func (d *deletion) count() error {
	for key := range d.keys {
		r, err := d.requestState(key)
		if err != nil {
			return err
		}
		if r == nil {
			continue
		}
		d.result.Requests++
		if r.Ended.IsZero() && !d.sessionEnded(key.Session) {
			d.result.Active++
		}
	}
	return nil
}

// requestState is what is known of a request, nil: nothing.
func (s *Store) requestState(key tensor.RequestKey) (*requestState, error) {
	s.mu.Lock()
	if r := s.requests[key]; r != nil {
		clone := *r
		s.mu.Unlock()
		return &clone, nil
	}
	s.mu.Unlock()
	found, err := s.cat.requests(true, "WHERE session=? AND request=?", key.Session, int64(key.Request))
	if err != nil || len(found) == 0 {
		return nil, err
	}
	return found[0], nil
}

func (s *Store) sessionEnded(session uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.sessions[session]
	return t == nil || !t.Ended.IsZero()
}

// seal has every row of the requests that was appended so far in a sealed segment.
func (d *deletion) seal() error {
	return d.barrier(d.ctx, &barrier{done: make(chan error, 1), seal: true})
}

// segments rewrites those that hold the requests.
func (d *deletion) segments() error {
	holders, err := d.holders()
	if err != nil {
		return err
	}
	d.done.SegmentsTotal = len(holders)
	for _, n := range holders {
		if err := d.ctx.Err(); err != nil {
			return err
		}
		d.progress(d.done)
		err := d.segment(n)
		if leavable(err) {
			d.left = append(d.left, fmt.Errorf("%s: %w", d.segmentPath(n, true), err))
		} else if err != nil {
			return err
		}
		d.done.Segments++
		d.done.Rows = d.result.Rows
	}
	d.progress(d.done)
	return nil
}

// holders are the sealed segments with rows of the requests.
func (d *deletion) holders() ([]uint64, error) {
	in := map[uint64]bool{}
	for key := range d.keys {
		groups, err := d.groups(key)
		if err != nil {
			return nil, err
		}
		for n := range groups {
			in[n] = true
		}
	}
	numbers := make([]uint64, 0, len(in))
	for n := range in {
		numbers = append(numbers, n)
	}
	slices.Sort(numbers)
	return numbers, nil
}

func (d *deletion) segment(n uint64) error {
	d.mu.Lock()
	g, there := d.sealed[n]
	d.mu.Unlock()
	if !there {
		return nil
	}
	listed, damage := d.listed(n)
	if damage != nil && !leavable(damage) {
		return damage
	}
	var out, stay []segment.Listed
	for _, l := range listed {
		if d.keys[l.Key] {
			out = append(out, l)
		} else {
			stay = append(stay, l)
		}
	}
	if err := d.expireSoon(out); err != nil {
		return err
	}
	if damage != nil { // it cannot be written anew; those that can be made out are on the books as gone, so that nobody is given them
		return damage
	}
	old := []goneSegment{{n, keysOf(listed)}}
	if _, err := d.rewrite(old, g.created, func(r *rewriter) error { return r.copyGroups(n, stay, d.pace) }); err != nil {
		return err
	}
	for _, l := range out {
		d.result.Rows += l.Rows
		d.result.Bytes += l.Bytes
	}
	d.result.Segments++
	return nil
}

func (d *deletion) pace(int64) error { return d.ctx.Err() }

// expireSoon books rows as gone, waiting for their fate to be booked where they are still at work.
func (d *deletion) expireSoon(out []segment.Listed) error {
	for begun := time.Now(); ; {
		err := d.expire(out, time.Now())
		if !errors.Is(err, errUnbooked) || time.Since(begun) > unbookedWait {
			return err
		}
		select {
		case <-d.ctx.Done():
			return d.ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

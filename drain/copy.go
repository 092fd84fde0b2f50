package drain

import (
	"fmt"
	"time"

	"dmi/ring"
	"dmi/tensor"
)

// copyJob is copy commands that end with number last: of some whole payloads behind each other, or of a piece of one.
type copyJob struct {
	last    uint64
	entries []*entry
	lease   *ring.Lease
	piece   bool
}

func aligned(n uint64) uint64 {
	return (n + ring.PayloadAlign - 1) / ring.PayloadAlign * ring.PayloadAlign
}

// foreignDone reports whether the pump has done with what an engine before us asked for.
func (d *Drain) foreignDone() bool { return d.done >= d.foreign }

// request posts commands for payload that was read, as far as staging and command ring have room. Payloads that lie behind each other go
// in one command, so that there are large copies when there is much and small ones at once when there is little.
func (d *Drain) request() bool {
	if len(d.want) == 0 || !d.foreignDone() {
		return false
	}
	moved := false
	together := min(d.options.CoalesceBytes, d.ring.Stage.Capacity()/2)
	for len(d.want) > 0 {
		e := d.want[0]
		if aligned(e.bytes) > d.ring.Stage.Capacity() || e.bytes > d.options.TensorBytes {
			if d.requestPiece(e) {
				moved = true
				continue
			}
			break
		}
		n, end := 1, e.at+aligned(e.bytes)
		for n < len(d.want) && d.want[n].at == end && end+d.want[n].bytes-e.at <= together {
			end += aligned(d.want[n].bytes)
			n++
		}
		last := d.want[n-1]
		total := last.at + last.bytes - e.at
		// One payload may need several commands, but never more than there are slots.
		size := max(d.options.CoalesceBytes, aligned(total/uint64(d.ring.Header().CommandCapacity)+1))
		if uint64(d.ring.CommandRoom()) < (total+size-1)/size {
			break
		}
		lease := d.ring.Stage.Take(total)
		if lease == nil {
			break
		}
		job := copyJob{entries: d.want[:n:n], lease: lease, last: d.post(e.at, total, lease.At, size)}
		lease.Retain(n - 1)
		for _, x := range job.entries {
			x.item.lease, x.item.drain = lease, d
			from := x.at - e.at
			x.item.Data = lease.Bytes[from : from+x.bytes : from+x.bytes]
		}
		d.copying = append(d.copying, job)
		d.want = d.want[n:]
		moved = true
	}
	if moved {
		d.ring.Publish()
		if d.ring.PumpWaiting() {
			d.bell.RingPump()
		}
	}
	return moved
}

// post asks for a range in commands of at most size bytes, and returns the last one's number.
func (d *Drain) post(at, bytes, staging, size uint64) uint64 {
	last := uint64(0)
	for done := uint64(0); done < bytes; {
		n := min(bytes-done, size)
		d.copied.Add(n)
		last = d.ring.Post(at+done, n, staging+done)
		done += n
	}
	return last
}

// requestPiece asks for more of a payload that is too large for staging, which is put together in memory of its own, one at a time.
func (d *Drain) requestPiece(e *entry) bool {
	if e.bytes > d.options.TensorBytes {
		d.want = d.want[1:]
		e.item.Kind, e.item.Record.Outcome, e.item.Record.Reason = Settled, ring.OutcomeDropped, ring.ReasonBudget
		e.ready = true
		d.free(e)
		d.event("warning", "budget", fmt.Sprintf("a tensor of %d bytes at site %q is larger than the %d that the engine puts together in memory: it is dropped(budget); give the ring more staging, or run fewer rows a step",
			e.bytes, e.item.Step.Sites[e.item.Record.Site].Text(), d.options.TensorBytes))
		return true
	}
	if d.big != nil && d.big != e || d.ring.CommandRoom() == 0 {
		return false
	}
	asked := uint64(len(e.owned))
	for _, job := range d.copying {
		if job.piece {
			asked += uint64(len(job.lease.Bytes))
		}
	}
	if asked == e.bytes {
		return false // all of it is under way
	}
	n := min(e.bytes-asked, d.options.CoalesceBytes, max(d.ring.Stage.Capacity()/4, 4096))
	lease := d.ring.Stage.Take(n)
	if lease == nil {
		return false
	}
	if d.big == nil {
		d.big, e.owned = e, d.memory(e.bytes)
	}
	d.copied.Add(n)
	d.copying = append(d.copying, copyJob{entries: []*entry{e}, lease: lease, piece: true, last: d.ring.Post(e.at+asked, n, lease.At)})
	return true
}

// memory is room for a payload outside staging: that of the last such one, if nobody reads it any more. Large memory that is new is filled with zeros, page by page.
func (d *Drain) memory(bytes uint64) []byte {
	if last := d.spare.Swap(nil); last != nil && uint64(cap(*last)) >= bytes {
		return (*last)[:0]
	}
	return make([]byte, 0, bytes)
}

// completions takes note of what the pump has done, and frees its payload.
func (d *Drain) completions() bool {
	done, err := d.ring.Completed()
	if err != nil {
		d.fail(err)
		return true
	}
	d.done = done
	n := 0
	for n < len(d.copying) && d.copying[n].last < done {
		job := &d.copying[n]
		n++
		for _, e := range job.entries {
			if job.piece {
				e.owned = append(e.owned, job.lease.Bytes...)
				job.lease.Give()
				if uint64(len(e.owned)) < e.bytes {
					continue
				}
				e.item.Data, d.big, d.want = e.owned, nil, d.want[1:]
				e.item.owned, e.item.drain = e.owned, d
			}
			e.ready = true
			d.free(e)
		}
	}
	if n == 0 {
		return false
	}
	clear(d.copying[:n])
	if d.copying = d.copying[n:]; len(d.copying) == 0 {
		d.copying = nil
	}
	d.mu.Lock()
	if d.finishing != nil {
		d.finishing.moved = time.Now()
	}
	d.mu.Unlock()
	return true
}

// abandon gives up payload that has not come, and what is still to be read of: the pump is gone. The bytes in staging cannot be told
// from rubbish.
func (d *Drain) abandon(reason tensor.Reason) {
	d.gone = reason
	for _, l := range d.lanes {
		for _, e := range l.queue {
			if e.ready {
				continue
			}
			e.ready = true
			e.lose(reason)
			d.free(e)
			e.item.lease = nil // staging ends with the ring
		}
	}
	d.want, d.copying, d.big = nil, nil, nil
	for _, o := range d.offers {
		d.letGo(o)
	}
}

// lose makes an entry one whose payload does not come.
func (e *entry) lose(reason tensor.Reason) {
	e.item.Kind, e.item.Data = Settled, nil
	e.item.Record.Outcome, e.item.Record.Reason = ring.OutcomeLost, uint8(reason)
}

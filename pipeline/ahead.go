package pipeline

import (
	"runtime"
	"slices"

	"dmi/drain"
	"dmi/ring"
	"dmi/tensor"
)

// ahead gives live subscribers the rows of a batch from item i on, as far as they are of one step, before the store is given any: the last of a token's
// tensors would else wait until the store has all the others. It returns where it ended; p.shown has the items that they were given.
//
// Only what is sure to be kept, and as it came, can go ahead of its books, and only the first of what a site has in a batch. All else is delivered when it
// is settled.
func (p *Pipeline) ahead(batch []*drain.Item, i int) int {
	lane, step := batch[i].Lane, batch[i].Step
	p.shown = slices.Grow(p.shown[:0], len(batch))[:len(batch)]
	clear(p.shown)
	heard, b := p.options.Live.Heard(), p.books[lane]
	any, next := false, uint32(0)
	for ; i < len(batch); i++ {
		item := batch[i]
		if item.Owner != nil || item.Lane != lane || item.Step != step || item.Kind != drain.Captured && item.Kind != drain.Settled {
			break
		}
		site := item.Record.Site
		if !heard || item.Kind != drain.Captured || site < next || !p.asItCame(b, &item.Record) {
			next = max(next, site+1)
			continue
		}
		next = site + 1
		chunks, err := p.showing.cut(step, &item.Record, item.Data, item.Record.RowFirst, item.Record.Rows)
		if err != nil || len(chunks) == 0 {
			continue // whoever settles it says so
		}
		p.publish(chunks)
		p.shown[i], any = true, true
	}
	if any {
		runtime.Gosched() // as in deliver
	}
	return i
}

// asItCame reports whether all rows of a record are kept at the level that they have, unless the store refuses them.
func (p *Pipeline) asItCame(b *book, r *ring.Record) bool {
	if len(b.accounts[r.Site]) != 0 || int(r.Site) < len(b.offers) && len(b.offers[r.Site]) != 0 {
		return false
	}
	if p.rules == nil {
		return true
	}
	p.showing.verdicts = p.rules.verdicts(p.showing.verdicts[:0], b, r, r.RowFirst, r.RowFirst+r.Rows)
	return !slices.ContainsFunc(p.showing.verdicts, func(v verdict) bool {
		level := levelOf(r, v.level)
		return v.unwanted || v.level == tensor.Off || level != tensor.Level(r.Level) || level == tensor.Stats && v.level == tensor.Stats && int(v.top) < topOf(r)
	})
}

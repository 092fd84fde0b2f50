package pipeline

import (
	"runtime"

	"dmi/tensor"
)

// deliver hands chunks to live subscribers, who wait for nothing, and then to the store. last: no others follow at once, so those who were woken may run before
// the store and the books have their turn, which would otherwise keep them waiting where there is one processor, and for another to wake where there are more.
// shown: subscribers have them. It returns how many rows the store took, the first.
func (p *Pipeline) deliver(chunks []tensor.Chunk, last, shown bool) (rows uint32, err error) {
	if len(chunks) == 0 {
		return 0, nil
	}
	if p.options.Live != nil && !shown {
		p.publish(chunks)
		if last {
			runtime.Gosched()
		}
	}
	taken, err := p.options.Store.AppendChunks(chunks)
	bytes := 0
	for i := range chunks[:taken] {
		bytes += len(chunks[i].Data)
		rows += chunks[i].Rows
	}
	p.chunks.Add(uint64(taken)) // once: workers would wait for each other's caches at every row
	p.bytes.Add(uint64(bytes))
	return rows, err
}

func (p *Pipeline) publish(chunks []tensor.Chunk) {
	p.publishing.Lock()
	p.options.Live.Publish(p.options.Session, chunks)
	p.publishing.Unlock()
}

package pipeline

import (
	"testing"

	"dmi/policy"
	"dmi/tensor"
)

// always is a trigger that every row meets.
type always struct{}

func (always) Look(_ uint32, chunks []tensor.Chunk, document uint64, met func(request uint64, trigger int, document uint64)) {
	for i := range chunks {
		met(chunks[i].Key.Request, 0, document)
	}
}

// Of quantised rows the producer had the originals, and held those against the conditions: what the codes come to beside a threshold keeps nothing.
func TestQuantisedRowsKeepNothing(t *testing.T) {
	for level, want := range map[tensor.Level]bool{tensor.Full: true, tensor.Stats: true, tensor.FP8: false, tensor.Int8: false} {
		p := New(Options{Triggers: always{}})
		b := new(book)
		b.late.begin(1, []policy.Keep{{By: 1}}, 7)
		p.look(b, []tensor.Chunk{{Key: tensor.RequestKey{Request: 3}, Level: level}})
		if got := p.kept(b, 0, 3); got != want {
			t.Errorf("rows at %v: kept is %v, not %v", level, got, want)
		}
	}
}

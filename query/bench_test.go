package query

import (
	"context"
	"fmt"
	"io"
	"testing"

	"dmi/tensor"
)

// attention is a request of so many tokens, its pattern rows in chunks of 64.
func attention(heads, tokens int) *inMemory {
	site := worldSite{tensor.Site{Name: "blocks.0.attn.hook_pattern", RowAxis: 1, Keyed: true}, tensor.BF16, []int{heads, -1}}
	w := &world{session: tensor.Session{Number: 1, ID: "s"}, run: tensor.Run{ID: "r", Session: 1}, sites: []worldSite{site},
		requests: []tensor.Request{{Key: tensor.RequestKey{Session: 1}, ID: "r.0", Run: "r"}}}
	m := &inMemory{world: w, books: map[uint64][]tensor.Entry{0: {{Sites: []uint32{0}, Count: uint32(tokens), Stride: 1, Outcome: tensor.Captured}}}}
	for first := 0; first < tokens; first += 64 {
		keys := first + 64
		m.all = append(m.all, tensor.Chunk{Key: w.requests[0].Key, First: uint32(first), Rows: 64, DType: tensor.BF16, Shape: []int{heads, keys},
			Data: make([]byte, 64*heads*keys*2)})
	}
	return m
}

func BenchmarkAttention(b *testing.B) {
	m := attention(16, 1024)
	for _, memory := range []int{1 << 20, 8 << 20, 64 << 20} {
		b.Run(fmt.Sprintf("memory=%dMiB", memory>>20), func(b *testing.B) {
			e := New(m)
			e.MemoryBytes = memory
			t, err := e.Tensor(context.Background(), TensorQuery{Request: "r.0", Site: SiteName{Name: "pattern"}})
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(t.Size())
			for b.Loop() {
				if _, err := t.Open(context.Background()).WriteTo(io.Discard); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

package crc32c

import (
	"fmt"
	"hash/crc32"
	"testing"

	"pgregory.net/rapid"
)

// TestAgainstTheStandardLibrary: the same whatever the length, where the data lies and how it is cut.
func TestAgainstTheStandardLibrary(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		length := rapid.IntRange(0, 4*(step+ahead)).Draw(t, "length")
		offset := rapid.IntRange(0, 64).Draw(t, "offset")
		data := make([]byte, offset+length)
		state := rapid.Uint64().Draw(t, "seed")
		for i := range data {
			state = state*6364136223846793005 + 1442695040888963407
			data[i] = byte(state >> 56)
		}
		data = data[offset:]
		want := crc32.Checksum(data, crc32.MakeTable(crc32.Castagnoli))
		Expect(data)
		if got := Checksum(data); got != want {
			t.Fatalf("%#x, want %#x", got, want)
		}
		cut := rapid.IntRange(0, length).Draw(t, "cut")
		if got := Update(Checksum(data[:cut]), data[cut:]); got != want {
			t.Fatalf("cut at %d: %#x, want %#x", cut, got, want)
		}
	})
	if got := Checksum([]byte("123456789")); got != 0xe3069283 { // the check value of CRC-32C in the catalogue of parametrised CRC algorithms
		t.Errorf("%#x", got)
	}
}

// BenchmarkOutOfCache reads a GiB, row by row, as slices of a step's payload come.
func BenchmarkOutOfCache(b *testing.B) {
	data := make([]byte, 1<<30)
	for i := range data {
		data[i] = byte(i * 7)
	}
	table := crc32.MakeTable(crc32.Castagnoli)
	for _, row := range []int{1024, 5120, 1 << 20} {
		for _, kind := range []struct {
			name string
			sum  func(row, next []byte) uint32
		}{
			{"hash/crc32", func(row, _ []byte) uint32 { return crc32.Checksum(row, table) }},
			{"prefetched", func(row, next []byte) uint32 { Expect(next); return Checksum(row) }},
		} {
			b.Run(fmt.Sprintf("%d/%s", row, kind.name), func(b *testing.B) {
				b.SetBytes(int64(len(data)))
				for b.Loop() {
					sum := uint32(0)
					for at := 0; at+2*row <= len(data); at += row {
						sum += kind.sum(data[at:at+row], data[at+row:at+2*row])
					}
				}
			})
		}
	}
}

package store

import (
	"testing"

	"dmi/tensor"
)

// TestOtherBytes: rows that were not captured weigh what the latest captured row of their site does, by outcome; of a site without one, nothing.
func TestOtherBytes(t *testing.T) {
	seeded(t)
	s := mustOpen(t, t.TempDir(), small())
	session, err := s.BeginSession(tensor.Session{ID: "s0000000a", Producer: "p", Mode: "best-effort"})
	must(t, err)
	must(t, s.AddSites(session, []tensor.Site{site(0, "wide", false, 0), site(1, "narrow", false, 0), site(2, "unseen", false, 0)}))
	key := tensor.RequestKey{Session: session, Request: 1}
	for id, width := range []int{100, 7} {
		must(t, s.AppendChunk(tensor.Chunk{Key: key, Site: uint32(id), Rows: 1, DType: tensor.BF16, Shape: []int{width}, Data: make([]byte, 2*width)}))
	}
	all := []uint32{0, 1, 2}
	must(t, s.Book([]tensor.Entry{
		{Key: key, Sites: all[:2], Count: 1, Stride: 1, Outcome: tensor.Captured},
		{Key: key, Sites: all[2:], Count: 1, Stride: 1, Outcome: tensor.Dropped, Reason: tensor.RingFull},
		{Key: key, Sites: all, First: 1, Count: 5, Stride: 1, Step: 1, Outcome: tensor.Dropped, Reason: tensor.RingFull},
		{Key: key, Sites: all[1:], First: 6, Count: 3, Stride: 2, Step: 2, Outcome: tensor.Skipped, Reason: tensor.Policy},
	}))
	want := [tensor.Outcomes]uint64{tensor.Dropped: 5 * 2 * (100 + 7), tensor.Skipped: 3 * 2 * 7}
	if got := s.Stats().OtherBytes; got != want {
		t.Errorf("bytes by outcome %v, want %v", got, want)
	}
	must(t, s.Close())
}

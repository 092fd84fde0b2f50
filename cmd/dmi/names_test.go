//go:build linux

package main

import (
	"testing"
	"time"

	"dmi/tensor"
)

// Rows come through the ring and names through the socket, and nobody holds the one back for the other.
func TestARequestMayBeToldAfterItsRowsCame(t *testing.T) {
	r := newRecorder()
	key := tensor.RequestKey{Session: 3, Request: 5}
	told := make(chan string)
	go func() {
		id, _ := (&introducing{recorder: r, vain: map[uint32]bool{}}).RequestID(key)
		told <- id
	}()
	go func() {
		id, _ := r.Introduced(key, time.Now())
		told <- id
	}()
	select {
	case id := <-told:
		t.Fatalf("it is called %q before anybody said so", id)
	case <-time.After(20 * time.Millisecond):
	}
	r.learn([]tensor.Request{{Key: key, ID: "r0000cafe.5"}})
	for range 2 {
		if id := <-told; id != "r0000cafe.5" {
			t.Errorf("it is called %q", id)
		}
	}
	// Of who is waited for in vain, rows that came long ago do not wait again.
	if id, known := r.Introduced(tensor.RequestKey{Session: 3, Request: 6}, time.Now().Add(-introduction)); known {
		t.Error(id)
	}
	vain := &introducing{recorder: r, vain: map[uint32]bool{3: true}}
	if id, known := vain.RequestID(tensor.RequestKey{Session: 3, Request: 6}); known {
		t.Error(id)
	}
}

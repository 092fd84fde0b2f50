package control

import (
	"encoding/binary"
	"encoding/json"
	"io"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestOutboxKeepsWhatStands: whatever finds no room, because a producer does not read, the newest of what stands reaches it once it does.
func TestOutboxKeepsWhatStands(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		file := os.NewFile(uintptr(fd), "")
		if ends[i], err = net.FileConn(file); err != nil {
			t.Fatal(err)
		}
		file.Close()
		defer ends[i].Close()
	}
	o := newOutbox(ends[0].(*net.UnixConn))
	filler := eventMessage{Type: "event", Message: string(make([]byte, 64<<10))}
	for o.send(filler) { // until socket and queue are full
	}
	for name := range uint64(3) {
		if !o.replace(groupsMessage{"groups", name, nil}) {
			t.Fatalf("groups %d were not taken", name)
		}
	}
	for {
		var size [4]byte
		if _, err := io.ReadFull(ends[1], size[:]); err != nil {
			t.Fatal(err)
		}
		body := make([]byte, binary.LittleEndian.Uint32(size[:]))
		if _, err := io.ReadFull(ends[1], body); err != nil {
			t.Fatal(err)
		}
		var came struct {
			Type string `json:"type"`
			Name uint64 `json:"groups"`
		}
		if err := json.Unmarshal(body, &came); err != nil {
			t.Fatal(err)
		}
		if came.Type == "groups" && came.Name == 2 {
			break
		}
	}
	ends[1].Close()
	o.close()
}

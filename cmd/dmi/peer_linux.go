package main

import (
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

func peerName(c *net.UnixConn) peerAddr {
	raw, err := c.SyscallConn()
	if err != nil {
		return "unix"
	}
	name := peerAddr("unix")
	_ = raw.Control(func(fd uintptr) {
		if who, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			name = peerAddr(fmt.Sprintf("unix uid=%d gid=%d pid=%d", who.Uid, who.Gid, who.Pid))
		}
	})
	return name
}

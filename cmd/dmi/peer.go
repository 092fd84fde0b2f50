package main

import "net"

// namingPeers is a listener on a Unix socket whose connections say who is at their other end, as RemoteAddr.
type namingPeers struct{ net.Listener }

func (l namingPeers) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if unix, is := c.(*net.UnixConn); err == nil && is {
		return namedConn{unix, peerName(unix)}, nil
	}
	return c, err
}

type namedConn struct {
	*net.UnixConn
	peer peerAddr
}

func (c namedConn) RemoteAddr() net.Addr { return c.peer }

// peerAddr is what the kernel said of a peer when it connected. Of one in another namespace it says what it can: pid 0, or uid 65534.
type peerAddr string

func (peerAddr) Network() string  { return "unix" }
func (a peerAddr) String() string { return string(a) }

//go:build !linux

package main

import "net"

func peerName(*net.UnixConn) peerAddr { return "unix" }

package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"strconv"
	"syscall"
	"time"
)

// maxSocketPath is what the kernel takes (sockaddr_un), without the final NUL.
const maxSocketPath = 107

// checkSocketPath refuses a path that the kernel would cut, before anything is opened.
func checkSocketPath(path, key string) error {
	if len(path) > maxSocketPath {
		return &exitError{exitAddress, fmt.Errorf("serve: the socket path %s has %d bytes, Unix sockets allow %d: use a shorter store path, or set %s to a short path (under /tmp or $XDG_RUNTIME_DIR)",
			path, len(path), maxSocketPath, key)}
	}
	return nil
}

// listenUnix listens on a socket that only this user may open. One left behind by an engine that died is replaced.
func listenUnix(path, key string) (net.Listener, error) {
	if err := checkSocketPath(path, key); err != nil {
		return nil, err
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode()&fs.ModeSocket == 0 {
			return nil, &exitError{exitAddress, fmt.Errorf("serve: listen on %s: there is something that is not a socket; remove it, or set %s", path, key)}
		}
		if connection, err := net.DialTimeout("unix", path, time.Second); err == nil {
			connection.Close()
			return nil, &exitError{exitAddress, fmt.Errorf("serve: listen on %s: another engine listens there; stop it, or set %s", path, key)}
		}
		if err := os.Remove(path); err != nil {
			return nil, &exitError{exitAddress, fmt.Errorf("serve: replace the socket that a dead engine left: %w", err)}
		}
	}
	// The mode must be right from the first moment on. The mask is the process's, so this is only done while it starts.
	mask := syscall.Umask(0o177)
	l, err := net.Listen("unix", path)
	syscall.Umask(mask)
	if err != nil {
		return nil, &exitError{exitAddress, fmt.Errorf("serve: listen on %s: %w", path, err)}
	}
	return l, nil
}

// admitGroup lets a group open a socket, whose folder it must be able to reach.
func admitGroup(path, group string) error {
	if group == "" {
		return nil
	}
	number, err := strconv.Atoi(group)
	if err != nil {
		found, failed := user.LookupGroup(group)
		if failed != nil {
			return usage(fmt.Errorf("serve: control.group: %w; make it (groupadd %s), or say its number", failed, group))
		}
		number, _ = strconv.Atoi(found.Gid)
	}
	if err := os.Chown(path, -1, number); err != nil {
		return usage(fmt.Errorf("serve: control.group: give %s to group %s: %w; the engine's user must be a member of it", path, group, err))
	}
	if err := os.Chmod(path, 0o660); err != nil {
		return &exitError{exitAddress, fmt.Errorf("serve: control.group: %w", err)}
	}
	return nil
}

func listenTCP(address, key string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if errors.Is(err, syscall.EADDRINUSE) {
		err = fmt.Errorf("serve: listen on %s: the port is in use; stop who uses it (ss -ltnp shows), or set %s to another port, or to port 0 for a free one", address, key)
	} else if err != nil {
		err = fmt.Errorf("serve: listen on %s (%s): %w", address, key, err)
	}
	if err != nil {
		return nil, &exitError{exitAddress, err}
	}
	return l, nil
}

// withTLS encrypts a listener.
func withTLS(l net.Listener, certificate, key string) (net.Listener, error) {
	pair, err := tls.LoadX509KeyPair(certificate, key)
	if err != nil {
		return nil, usage(fmt.Errorf("serve: TLS certificate %s with key %s: %w", certificate, key, err))
	}
	return tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}}), nil
}

package vfs

import (
	"os"

	"golang.org/x/sys/unix"
)

const directFlag = unix.O_DIRECT

func dataSync(f *os.File) error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); err != unix.EINTR {
			return os.NewSyscallError("fdatasync", err)
		}
	}
}

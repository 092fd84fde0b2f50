package vfs

import (
	"os"

	"golang.org/x/sys/unix"
)

const directFlag = unix.O_DIRECT

func (f osFile) WillRead(off, n int64) {
	_ = unix.Fadvise(int(f.Fd()), off, n, unix.FADV_WILLNEED) // a hint
}

func dataSync(f *os.File) error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); err != unix.EINTR {
			return os.NewSyscallError("fdatasync", err)
		}
	}
}

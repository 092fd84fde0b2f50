package vfs

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

const hugePage = 2 << 20

// mapBuffer begins at a huge page, and asks for such pages.
func mapBuffer(n int) (bytes []byte, unmap func(), err error) {
	size := uintptr(n + hugePage)
	m, err := unix.MmapPtr(-1, 0, nil, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, nil, err
	}
	bytes = unsafe.Slice((*byte)(unsafe.Add(m, -uintptr(m)&(hugePage-1))), n)
	_ = unix.Madvise(bytes, unix.MADV_HUGEPAGE) // a hint
	return bytes, func() { _ = unix.MunmapPtr(m, size) }, nil
}

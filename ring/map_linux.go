package ring

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Map maps the memfd of a producer. The descriptor remains the caller's, who may close it. limit bounds the ring's size in bytes.
func Map(fd int, limit uint64) (*Ring, error) {
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil {
		return nil, fmt.Errorf("ring: map: the first descriptor is not a memfd that can be sealed: %w", err)
	}
	if need := unix.F_SEAL_SHRINK | unix.F_SEAL_GROW; seals&need != need {
		return nil, fmt.Errorf("ring: map: the memfd has seals %#x; seal it with F_SEAL_SHRINK and F_SEAL_GROW before sending it", seals)
	}
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return nil, fmt.Errorf("ring: map: size of the memfd: %w", err)
	}
	size := uint64(stat.Size)
	if stat.Size < HeaderSize {
		return nil, fmt.Errorf("ring: map: the memfd has %d bytes, less than a header's %d", stat.Size, HeaderSize)
	}
	if size > limit {
		return nil, fmt.Errorf("ring: map: the memfd has %d bytes, more than the %d that this engine admits; attach with less, or raise its limit", size, limit)
	}
	var b [HeaderSize]byte
	if n, err := unix.Pread(fd, b[:], 0); n != len(b) {
		return nil, fmt.Errorf("ring: map: read the header: %d of %d bytes: %v", n, len(b), err) //nolint:errorlint // a short read has none
	}
	var h Header
	h.Decode(b[:])
	if err := h.check(size); err != nil {
		return nil, err
	}
	mem, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("ring: map %d bytes: %w", size, err)
	}
	r, err := over(mem, h)
	if err != nil {
		unix.Munmap(mem)
		return nil, err
	}
	return r, nil
}

// Close unmaps the ring. Nobody may hold a slice of it any more.
func (r *Ring) Close() error {
	if r.mem == nil {
		return nil
	}
	err := unix.Munmap(r.mem)
	r.mem = nil
	return err
}

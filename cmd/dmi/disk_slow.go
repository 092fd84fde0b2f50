//go:build slowdisk

package main

import (
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"dmi/internal/vfs"
)

// diskOf is, in a build for tests and benchmarks of overload, a disk that writes segments as slowly as the file `disk_bytes_per_s` beside the store's folder says at the time.
func diskOf(dir string) vfs.FS {
	name := filepath.Clean(dir) + ".disk_bytes_per_s"
	var speed float64
	var read time.Time
	return vfs.Slow(vfs.OS{}, path.Join(dir, "segments"), func() float64 { // one at a time: under the disk's lock
		if now := time.Now(); now.Sub(read) > 20*time.Millisecond {
			text, _ := os.ReadFile(name)
			speed, _ = strconv.ParseFloat(strings.TrimSpace(string(text)), 64)
			read = now
		}
		return speed
	})
}

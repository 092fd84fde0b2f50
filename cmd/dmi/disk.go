//go:build !slowdisk

package main

import "dmi/internal/vfs"

// diskOf is the file system that a store is on.
func diskOf(string) vfs.FS { return vfs.OS{} }

//go:build !linux

package vfs

import "os"

const directFlag = 0

func dataSync(f *os.File) error { return f.Sync() }

//go:build !linux

package vfs

import "os"

const directFlag = 0

func (osFile) WillRead(int64, int64) {}

func dataSync(f *os.File) error { return f.Sync() }

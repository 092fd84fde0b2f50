//go:build !amd64

package crc32c

func prefetch(*byte, int) {}

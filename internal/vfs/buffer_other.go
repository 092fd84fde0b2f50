//go:build !linux

package vfs

import "errors"

func mapBuffer(int) ([]byte, func(), error) { return nil, nil, errors.ErrUnsupported }

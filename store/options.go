package store

import (
	"fmt"
	"time"

	"dmi/internal/vfs"
)

func (o Options) withDefaults() (Options, error) {
	for _, f := range [...]struct {
		name     string
		value    *int
		standard int
		most     int
	}{
		{"buffer_mib", &o.BufferMiB, 256, 1 << 20}, {"chunk_kib", &o.ChunkKiB, 1024, 1 << 20}, {"segment_mib", &o.SegmentMiB, 256, 1 << 20},
		{"segment_tensors", &o.SegmentTensors, 32768, 1 << 20}, {"header_kib", &o.HeaderKiB, 4096, 64 << 10}, // safetensors readers take 100 MB
		{"sync_mib", &o.SyncMiB, 128, 1 << 20}, {"manifest_mib", &o.ManifestMiB, 64, 1 << 20},
		{"compact_mib_s", &o.CompactMiBs, 128, 1 << 20},
	} {
		if *f.value == 0 {
			*f.value = f.standard
		}
		if *f.value < 1 || *f.value > f.most {
			return o, fmt.Errorf("store: option %s is %d; give 1 to %d, or 0 for %d", f.name, *f.value, f.most, f.standard)
		}
	}
	for _, f := range [...]struct {
		name     string
		value    *time.Duration
		standard time.Duration
	}{
		{"flush_age", &o.FlushAge, time.Second}, {"segment_age", &o.SegmentAge, time.Hour}, {"sync_age", &o.SyncAge, time.Second},
		{"group_commit", &o.GroupCommit, 100 * time.Millisecond}, {"full_disk_wait", &o.FullDiskWait, 30 * time.Second},
		{"tidy_every", &o.TidyEvery, 10 * time.Second}, {"stall_after", &o.StallAfter, 10 * time.Second}, {"lag_after", &o.LagAfter, 10 * time.Second},
	} {
		if *f.value == 0 {
			*f.value = f.standard
		}
		if *f.value < 0 {
			return o, fmt.Errorf("store: option %s is %v; give a positive duration, or 0 for %v", f.name, *f.value, f.standard)
		}
	}
	if o.HeaderKiB < 16 || o.HeaderKiB%4 != 0 {
		return o, fmt.Errorf("store: option header_kib is %d; give a multiple of 4, at least 16", o.HeaderKiB)
	}
	if o.RetainMiB < 0 || o.RetainAge < 0 {
		return o, fmt.Errorf("store: options retain_mib and retain_age are %d and %v; give positive ones, or 0 to keep everything", o.RetainMiB, o.RetainAge)
	}
	if o.CompactAfter < 0 {
		return o, fmt.Errorf("store: option compact_after is %v; give a positive duration, or 0 for never", o.CompactAfter)
	}
	if o.FS == nil {
		o.FS = vfs.OS{}
	}
	if o.Log == nil {
		o.Log = func(string, string, string) {}
	}
	return o, nil
}

func (o *Options) direct() bool { return o.Direct == nil || *o.Direct }

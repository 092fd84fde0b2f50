package store

import (
	"time"

	"dmi/internal/vfs"
	"dmi/store/segment"
	"dmi/tensor"
)

// Version is the format of a store's directory as a whole (dmi.json). Files carry versions of their own as well.
const Version = 1

// Formats are the versions of what a store consists of.
func Formats() map[string]int {
	return map[string]int{"store": Version, "segment": segment.Version, "manifest": manifestVersion, "catalogue": catalogueVersion}
}

// Options tune a store that is opened for writing. A zero field means its default.
type Options struct {
	// BufferMiB bounds the memory of rows that wait to be merged and written (256), however many call AppendChunks: at the bound the oldest are written first, and
	// it blocks until there is room, before it copies. Only a single chunk that is larger than the bound goes beyond, alone. A quarter as much again is kept to be used
	// anew, and 32 MiB is on its way to the disk.
	BufferMiB int
	// ChunkKiB is the size at which a (request, site)'s rows are written without waiting for more (1024). Stored chunks are at
	// most twice that, unless one row is larger.
	ChunkKiB int
	// FlushAge is how long a row may wait for neighbours (1 s).
	FlushAge time.Duration
	// SegmentMiB, SegmentTensors and SegmentAge are when a segment is sealed (256, 32768, 1 h), HeaderKiB the space kept for its
	// safetensors header (4096), which seals it when full.
	SegmentMiB     int
	SegmentTensors int
	SegmentAge     time.Duration
	HeaderKiB      int
	// SyncMiB and SyncAge are after how many bytes, and how long, data are made durable without anyone asking (128, 1 s). Barriers
	// that come within GroupCommit of the last share one sync (100 ms).
	SyncMiB     int
	SyncAge     time.Duration
	GroupCommit time.Duration
	// ManifestMiB is when a manifest file is followed by the next (64).
	ManifestMiB int
	// FullDiskWait bounds how long AppendChunks and AppendStep of a session in complete mode wait for a disk that refuses writes (30 s).
	FullDiskWait time.Duration
	// RetainMiB bounds the bytes of segments, and RetainAge the age of rows: the oldest sealed segments go, whole, so that rows are kept for at least RetainAge and at
	// most SegmentAge and TidyEvery longer. What goes is booked as expired (0: nothing goes).
	RetainMiB int
	RetainAge time.Duration
	// TidyEvery is how often that is looked after (10 s).
	TidyEvery time.Duration
	// CompactAfter is for how long nothing may have come before segments are rewritten in which requests lie scattered (0: never), CompactMiBs how many MiB are
	// written a second meanwhile, at most (128).
	CompactAfter time.Duration
	CompactMiBs  int
	// StallAfter is how long a write or a sync may take until the store counts as one that cannot be written (10 s), LagAfter how long a row may wait to be
	// durable until the operator is told (10 s).
	StallAfter, LagAfter time.Duration
	// Direct false: write through the page cache. nil: O_DIRECT where the file system has it.
	Direct *bool
	// FS is the file system; nil: the machine's. The catalogue is always on the machine's.
	FS vfs.FS
	// Catalogue is the path of the SQLite file; "": catalogue.sqlite in the store.
	Catalogue string
	// Log is told what an operator should know, one call an event; nil: nobody.
	Log func(level, code, message string)

	rebuild func(Progress) // Repair's: the catalogue is made anew, and how far that has come
}

// Step is a batch of records of one lane as the ring held them, and the row tables of the OPEN records among them. It need not be a
// whole step, or only one.
type Step struct {
	Session uint32
	Lane    int
	First   uint64   // index of the first record in the lane, counted since the ring was created
	Count   int      // records
	Records []byte   // Count x 128 bytes; copied by the call
	Tables  [][]byte // row table of each OPEN record in Records whose table_bytes is not 0, in their order; copied by the call
}

// ChunkRef is where some consecutive rows of a request at a site are. It stays readable however the store moves on, until
// retention removes the rows.
type ChunkRef struct {
	Key      tensor.RequestKey
	Site     uint32
	Attempt  uint16
	First    uint32 // position of the first row
	Rows     uint32
	Step     uint64 // of the chunk's first row
	LastStep uint64 // of its last
	DType    tensor.DType
	Level    tensor.Level
	Policy   uint64
	Shape    []int // of one row; not to be modified

	skip    uint32 // rows of the stored chunk before First
	data    []byte // the rows themselves while they are in the buffer
	segment uint64
	entry   *segment.Chunk
}

// RequestFilter selects requests; a zero field selects all. Limit and Latest bound what it costs, too.
type RequestFilter struct {
	Session uint32
	Run     string
	Hidden  bool // true: hidden ones too

	After  string // id of the request after which to begin; the latest of that id
	Limit  int    // no more than this many of the first
	Latest int    // no more than this many of the last
}

// SiteTotal is what has been captured of a site over its session; since the catalogue was last made anew, what was there then and came later.
type SiteTotal struct {
	Site  uint32
	DType tensor.DType // DTypeNone while nothing was captured; of the latest rows
	Shape []int        // of the latest row; the last dimension of a keyed site varies
	Rows  uint64
	Bytes uint64
}

// Total counts rows that met one fate.
type Total struct {
	Session uint32
	Outcome tensor.Outcome
	Reason  tensor.Reason
	Level   tensor.Level
	Rows    uint64
}

// Totals are the books summed up. Produced is counted apart, from the step manifest: it exceeds the sum of Lines by the rows whose
// fate is still being decided, and equals it when nothing is in flight.
type Totals struct {
	Produced uint64
	Sessions map[uint32]uint64 // produced, by session
	Lines    []Total           // by session, outcome, reason, level
	Expired  map[uint32]uint64 // of those captured, no longer there; by session
}

// Metrics is the store's condition.
type Metrics struct {
	Segments        int    // sealed
	SegmentBytes    uint64 // all segments, the open one included
	ManifestBytes   uint64
	Chunks          uint64 // stored
	Streams         int    // (request, site) pairs in the buffer
	BufferBytes     uint64
	BufferBound     uint64
	WrittenBytes    uint64        // chunk bytes since open
	WriteBusy       time.Duration // time in which they were written: how fast the disk is, where it is not the page cache that takes them
	Syncs           uint64        // since open
	DurableLag      time.Duration // age of the oldest row that is not yet durable
	Stalled         time.Duration // how long the oldest change to a file that is under way has not been answered
	LastSync        time.Duration // how long it took
	DiskFree        uint64
	Failure         string // why writing does not succeed at present; ""
	Failures        uint64 // times that it began not to, since open
	RecoveredLost   uint64 // rows that the last open had to book lost(engine_exit)
	CatalogueBehind uint64 // books and requests not yet committed
	// By outcome, since open: what the rows that were not captured would have had in full, by the length of their site's latest row. Sites of which nothing was captured count nothing.
	OtherBytes        [tensor.Outcomes]uint64
	ExpiredRows       uint64 // captured, and gone by retention or deletion; over the store's life
	RetiredSegments   uint64 // removed by retention since open
	RetiredBytes      uint64
	CompactedSegments uint64 // rewritten since open, so that what belongs together lies together
	CompactedBytes    uint64
	DeletedRows       uint64 // since open
	DeletedBytes      uint64
}

// Progress is how far Verify or Repair has come.
type Progress struct {
	File  string
	Done  uint64 // bytes read, all files
	Total uint64
}

// Problem is one thing that was found wrong.
type Problem struct {
	File   string `json:"file"`
	Offset int64  `json:"offset"` // -1: the file as a whole
	What   string `json:"what"`
}

// Report is what Verify, or Repair, found.
type Report struct {
	Segments      int       `json:"segments"`
	Chunks        uint64    `json:"chunks"`
	Bytes         uint64    `json:"bytes"` // read and checked
	ManifestFiles int       `json:"manifest_files"`
	Produced      uint64    `json:"produced"`
	Booked        uint64    `json:"booked"`
	Problems      []Problem `json:"problems"`
	Truncated     bool      `json:"truncated"` // more problems than are listed
}

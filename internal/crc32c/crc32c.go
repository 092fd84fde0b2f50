// Package crc32c computes CRC-32C (Castagnoli), the checksum of all that DMI writes, over memory that is in no cache: payload that a copy engine has just
// put there, or a segment that was read. hash/crc32 reads three places a kilobyte apart at a time, which a processor's own prefetching does not follow.
package crc32c

import "hash/crc32"

const (
	step  = 3 * 1344 // bytes that hash/crc32 takes at once
	ahead = 1344     // bytes between what is computed and what is fetched meanwhile
	short = 512
)

var table = crc32.MakeTable(crc32.Castagnoli)

// Checksum is the CRC-32C of data.
func Checksum(data []byte) uint32 { return Update(0, data) }

// Update is the CRC-32C of what crc is that of, with data behind it.
func Update(crc uint32, data []byte) uint32 {
	for len(data) >= ahead+step {
		prefetch(&data[ahead], step)
		crc = crc32.Update(crc, table, data[:step])
		data = data[step:]
	}
	return crc32.Update(crc, table, data)
}

// Expect says that data's checksum is asked for next: its beginning is fetched while something else is computed. Not of what is short: rows of figures lie one behind another, which a
// processor follows by itself.
func Expect(data []byte) {
	if len(data) >= short {
		prefetch(&data[0], min(len(data), ahead+step))
	}
}

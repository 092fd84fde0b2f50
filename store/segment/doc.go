// Package segment is the file format of stored tensors, and nothing else. docs/format/segment.md is its specification.
//
// A segment is written from front to back, and becomes a safetensors file when it is sealed:
//
//	 0            8                     data (multiple of 4096)
//	+------------+---------------------+------------------------------------------------------------------+
//	| u64 length | JSON, then blanks   | batch 0 | batch 1 | ...                            | directory   |
//	+------------+---------------------+------------------------------------------------------------------+
//	 `-- zeros until the file is sealed --'
//
//	batch:  | chunk | chunk | pad | chunk | ...   index block |   ends at a multiple of 4096, written once, never again
//
//	index block (a U8 tensor `dmi.index/N`):
//	+----------------------------+-----------+----------------------------------------------------------+
//	| items: requests, sites,    | zeros to  | trailer, 64 bytes                                         |
//	| chunks, pads of this batch | alignment |                                                          |
//	+----------------------------+-----------+----------------------------------------------------------+
//	trailer, little-endian:
//	 0 "DMIINDEX"   8 u16 version  10 u16 0  12 u32 items' bytes  16 u64 nonce  24 u64 batch number
//	32 u64 batch's offset in the file   40 u64 block's offset   48 u64 0   56 u32 CRC32C of the items and zeros   60 u32 CRC32C of bytes 0..59
//
// Batch 0 is an index block alone: it says which store and segment this is. From index blocks the header can be rebuilt, byte for
// byte. The nonce, chosen when the file is made, keeps bytes of a tensor from passing for an index block.
//
// Item: u8 kind, then uvarints, and strings as a uvarint length and bytes.
//
//	1 identity  store (string), segment, created (ns since 1970)
//	2 request   session, request, id (string)           before the request's first chunk in this file
//	3 site      session, site, name (string)            likewise
//	4 chunk     session, request, site, attempt, first, rows, step, last step - step, dtype, level, policy, copy, dimensions, each
//	            dimension of a row, offset from the batch's start, bytes, u32 CRC32C (little-endian)
//	5 pad       offset from the batch's start, bytes      zeros, named so that the file has no holes
//
// directory (a U8 tensor `dmi.directory`, padded with zeros to 4096): a group for each request, in the order of (session, request),
// so that one read finds all of a request's chunks:
//
//	| "DMIG" | u32 body's bytes | u32 CRC32C of the body | body: its request item, and its chunk items in order of (site, attempt, first) |
//
// where chunk offsets count from the start of the file.
//
// A tensor's name is REQUEST/SITE/FIRST:END, for people. A later attempt at a position adds "@ATTEMPT", a name already taken "#N".
package segment

// Package ring is the engine's side of the shared memory that abi/ring.h defines. It maps a producer's memfd, reads records and row
// tables, posts copy commands, and gives back what has been consumed.
//
// The producer may lie, and may change any byte at any time. So nothing is used in place: it is copied, checked, then used, and every
// error names the field. Payload bytes are the exception: they are read where they lie, because any value of theirs is a value. The
// mapping cannot shrink under us: Map refuses memory that is not sealed.
//
// Words that both sides touch are read and written with sync/atomic, which is sequentially consistent and so at least as strong as the
// acquire and release that ring.h asks for.
package ring

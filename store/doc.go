// Package store keeps what was captured: rows in segments that are safetensors files, everything else in a step manifest, and a catalogue that
// is derived from both. docs/format says what lies in the directory and what a crash leaves of it.
//
// A row's way: its step into the manifest (it is produced), its bytes into the buffer, where they are merged with their neighbours, its
// fate onto the books, its chunk into a segment; then a sync makes them durable in that order, so that each vouches only for what is safe.
// Readers merge buffer, open segment and sealed ones, and never see part of a chunk.
package store

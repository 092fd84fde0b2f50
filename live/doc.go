// Package live hands what passes through the engine to those who watch: chunks of tensors, statistics of their rows, events.
//
// Publishing never waits. With nobody watching it costs one atomic load. Each subscriber has a bounded queue; at the bound the
// oldest goes first, and the number of rows (or events) lost is given to the subscriber with what it gets next. Statistics are
// computed by the first subscriber that looks at a chunk, on its own goroutine, and shared by all.
//
//	pipeline ── Publish(session, chunks) ──▶ Hub ──▶ queue of a Subscription ──▶ Next: Batch{Frames, Dropped}
//	control  ── Event(Event) ─────────────▶     ──▶ queue of an EventStream ──▶ Next
package live

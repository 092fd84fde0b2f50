// Room in the rings: how much there is, how it is waited for in complete mode, and where what found none at once goes.
#pragma once

#include "atomics.h"
#include "scratch.h"

namespace dmi::device {

constexpr uint64_t kFragment = 64 << 10;  // complete mode does not break a tensor into smaller pieces while more room may come
constexpr uint64_t kStillNs = 2'000'000;  // without a byte of the ring freed: longer than the largest copy that frees some takes

// Reads the engine's word, on shortage only; one that goes back, or claims what was never written, is not believed. `seen` hands the
// word on with its order, so that whoever writes where the engine has read does so after it: release here, acquire wherever it is loaded.
DMI_HD inline uint64_t refresh(uint64_t& seen, uint64_t& theirs, uint64_t& head) {
  const uint64_t tail = load_acquire_sys(theirs);  // pairs with the engine's release
  uint64_t known = load_acquire_gpu(seen);
  while (tail > known && tail <= load_relaxed_gpu(head)) {
    if (swap_acq_rel_gpu(seen, known, tail)) return tail;
  }
  return known;
}

// Bytes free between two words that were not read at one moment. A head that was moved since belongs to a newer tail than ours: then none
// are known to be free, and whoever asks reads again.
DMI_HD inline uint64_t room_left(uint64_t capacity, uint64_t head, uint64_t tail) {
  const uint64_t used = head - tail;
  return used <= capacity ? capacity - used : 0;
}

DMI_HD inline uint64_t free_records(State& s, const Fixed& f) {
  const uint64_t aside = load_relaxed_gpu(s.aside), head = load_relaxed_gpu(s.record_head);
  const uint64_t used = head - load_acquire_gpu(s.record_tail_seen) + aside;
  return used < f.record_capacity ? f.record_capacity - used : 0;
}

DMI_HD inline bool records_free(State& s, const Fixed& f, uint64_t wanted) {
  if (free_records(s, f) >= wanted) return true;
  refresh(s.record_tail_seen, *f.record_tail, s.record_head);
  return free_records(s, f) >= wanted;
}

// Of a group that is little: its payload goes to the spill region, which the engine reads in place. A copy command, and the threads that
// are woken for it, take longer than a token's tensors take over PCIe: stores of a kernel reach 19 to 38 GB/s there, so all of it is 7 to
// 14 us of the model's time at most, and 37 tensors of 5 KiB are 5 to 10.
constexpr uint64_t kLittle = 256 << 10;
// Whatever corner it leaves, a group that is little then fits an empty region.
DMI_HD inline uint64_t little_of(uint64_t spill_bytes) { return spill_bytes / 2 < kLittle ? spill_bytes / 2 : kLittle; }
// A few tensors at a group's end may be large, as logits are, and the others little: those need not wait for them.
constexpr uint32_t kFewLarge = 4;
DMI_HD inline bool large(const Fixed& f, uint64_t bytes) { return bytes > f.little / 4; }

DMI_HD inline Seen look(State& s, Region of) {
  const uint64_t head = load_relaxed_gpu(of == kPayloadRegion ? s.payload_head : s.spill_head);
  return {head, load_acquire_gpu(of == kPayloadRegion ? s.payload_tail_seen : s.spill_tail_seen)};
}

// Room there for `total` bytes, in one piece and all at once; false where none is known of. The corner that they leave at the region's end
// is part of what is reserved, and has to be told of. By one thread.
DMI_HD inline bool reserve_little(State& s, const Fixed& f, const Seen& seen, uint64_t total, uint64_t& at, uint32_t& left) {
  uint64_t tail = seen.tail;
  bool fresh = false;
  for (uint64_t head = seen.head;;) {
    const uint64_t to_end = f.spill_bytes - place_in(f.spill_bytes, head), corner = to_end < total ? to_end : 0;
    if (room_left(f.spill_bytes, head, tail) < corner + total) {
      if (fresh) return false;
      tail = refresh(s.spill_tail_seen, *f.spill_tail, s.spill_head);
      head = load_relaxed_gpu(s.spill_head);
      fresh = true;
      continue;
    }
    fresh = false;
    if (!swap_relaxed_gpu(s.spill_head, head, head + corner + total)) continue;
    at = head + corner;
    left = uint32_t(corner);
    return true;
  }
}

// Complete mode: room() again and again until it is there or the bound is reached. Once a step has given up it waits no more.
template <typename Room>
DMI_HD bool wait(State& s, Room room) {
  if (load_relaxed_gpu(s.gave_up) != 0) return room();
  const uint64_t start = clock_ns();
  uint64_t now = start;
  bool found = false;
  for (uint32_t pause = 500;; pause = pause < 16'000 ? pause * 2 : pause) {
    found = room();
    now = clock_ns();
    if (found || now - start >= s.fixed.wait_bound_ns) break;
    pause_ns(pause);
  }
  count(s.wait_ns, now - start);
  count(s.counters.waits, 1);
  count(s.counters.wait_ns, now - start);
  if (!found) store_relaxed_gpu<uint32_t>(s.gave_up, 1);
  return found;
}

// Complete mode: until so many bytes of the payload ring are free, for as long as some are freed now and then. Copies out of the ring may
// have to wait for what this launch holds up: so whoever sees none for a while goes on without.
DMI_HD inline void wait_while_drained(State& s, uint64_t bytes) {
  const Fixed& f = s.fixed;
  uint64_t start = 0, moved = 0, last = 0, now = 0;
  for (uint32_t pause = 500;; pause = pause < 4'000 ? pause * 2 : pause) {
    const uint64_t tail = refresh(s.payload_tail_seen, *f.payload_tail, s.payload_head);
    if (room_left(f.payload_bytes, load_relaxed_gpu(s.payload_head), tail) >= bytes) break;
    now = clock_ns();
    if (start == 0) start = moved = now;
    if (tail != last) moved = now;
    last = tail;
    if (now - moved >= kStillNs || now - start >= f.wait_bound_ns || load_relaxed_gpu(s.gave_up) != 0) break;
    pause_ns(pause);
  }
  if (start == 0) return;
  now = clock_ns();
  count(s.wait_ns, now - start);
  count(s.counters.waits, 1);
  count(s.counters.wait_ns, now - start);
}

// The next rows' room in x.target, x.taken, x.place; false where none is to be had now.
DMI_HD inline bool find_room(State& s, Scratch& x, uint64_t row_bytes, uint32_t rows, bool own) {
  const Fixed& f = x.fixed;
  if (!own && !records_free(s, f, 1)) return false;
  // What cannot fit goes in quarters of the ring, so that copying in and draining overlap.
  uint64_t most = rows;
  if (rows > f.payload_bytes / 2 / row_bytes) most = f.payload_bytes / 4 / row_bytes;
  if (most == 0) most = 1;
  uint64_t least = kFragment / row_bytes;
  least = least < 1 ? 1 : least > most ? most : least;
  uint64_t tail = refresh(s.payload_tail_seen, *f.payload_tail, s.payload_head);
  for (uint64_t head = load_relaxed_gpu(s.payload_head);;) {
    const uint64_t fit = room_left(f.payload_bytes, head, tail) / row_bytes;
    const uint64_t n = fit < most ? fit : most;
    if (n < least) break;
    if (!swap_relaxed_gpu(s.payload_head, head, head + aligned(n * row_bytes))) continue;
    x.target = {f.payload, f.payload_bytes, head};
    x.taken = uint32_t(n);
    x.place = DMI_PLACE_RING;
    return true;
  }
  if (f.spill_bytes < row_bytes) return false;
  tail = refresh(s.spill_tail_seen, *f.spill_tail, s.spill_head);
  for (uint64_t head = load_relaxed_gpu(s.spill_head);;) {
    const uint64_t room = room_left(f.spill_bytes, head, tail), to_end = f.spill_bytes - place_in(f.spill_bytes, head);
    const bool corner = to_end < row_bytes;  // no range crosses the end
    const uint64_t fit = (to_end < room ? to_end : room) / row_bytes;
    const uint64_t n = corner ? 0 : fit < most ? fit : most;
    if (corner ? room < to_end : n == 0) return false;
    if (!swap_relaxed_gpu(s.spill_head, head, head + (corner ? to_end : aligned(n * row_bytes)))) continue;
    x.target = {f.spill, f.spill_bytes, head};
    x.taken = uint32_t(n);  // 0: the corner, given back at once
    x.place = DMI_PLACE_SPILL;
    return true;
  }
}

}  // namespace dmi::device

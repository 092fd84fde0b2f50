// How bytes are moved on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dmi/dmi.h"
#include "layout.h"

namespace dmi {

// memcpy, past the caches where there is much of it: a ring is written far ahead of where it is read again, so lines that a store would
// first fetch are fetched for nothing, and push the model's own data out. Twice as fast from 16 KiB on (bench/hook_cost.py).
// Much of it is shared among the threads that share_copies names.
void copy_bytes(std::byte* to, const std::byte* from, uint64_t bytes);
void share_copies(dmi_share share);

// Copies bytes [begin, begin + bytes) of the gathered stream to `to`. All but whole rows cost a look-up.
void copy_gathered(const Gather& gather, uint64_t begin, uint64_t bytes, std::byte* to);

// Calls part(pointer, first byte, bytes) for the one or two pieces of a range of a byte ring.
template <typename Part>
void in_ring(std::byte* ring, uint64_t capacity, uint64_t offset, uint64_t bytes, Part part) {
  const uint64_t at = offset % capacity;
  const uint64_t before = bytes < capacity - at ? bytes : capacity - at;
  if (before != 0) part(ring + at, uint64_t{0}, before);
  if (bytes != before) part(ring, before, bytes - before);
}

}  // namespace dmi

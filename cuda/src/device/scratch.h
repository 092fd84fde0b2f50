// What a block of a capture keeps in its shared memory.
#pragma once

#include "atomics.h"
#include "parts.h"
#include "rows.h"
#include "state.h"

namespace dmi::device {

// Where the rings stand, read ahead of a reservation, which would wait for one word after the other. Whoever moved a head since is noticed
// by the swap; of a tail that moved since, less room is known.
struct Seen {
  uint64_t head, tail;
};
enum Region : uint32_t { kPayloadRegion, kSpillRegion, kRegions };

struct Scratch {
  Fixed fixed;
  Tensor tensor[kGroupTensors];
  Plan plan[kGroupTensors];
  uint64_t at[kGroupTensors];          // offset of the tensor's bytes in the ring that they go to
  uint64_t start[kGroupTensors];       // and where that is in it
  uint32_t granted[kGroupTensors];     // rows that found room
  uint32_t unit[kGroupTensors + 1];    // units of copying before the tensor's
  uint32_t record[kGroupTensors + 1];  // records before the tensor's
  uint8_t own[kGroupTensors];          // records set aside for its site
  uint64_t total, slot;
  uint32_t plain;    // every site still has the record it needs, and none comes twice; of watched steps: nothing is kept or offered
  uint32_t changed;  // of watched steps
  bool first, last;  // whether this block reserves the group's room, and whether it makes it visible
  Grant grant;
  Seen seen[kRegions];
  // of complete mode's way
  bool found;
  uint8_t place;
  uint32_t taken;
  Target target;
  Rendezvous meet;
};

DMI_HD inline void count(uint64_t& counter, uint64_t n) { add_relaxed_gpu<uint64_t>(counter, n); }

}  // namespace dmi::device

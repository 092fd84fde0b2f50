// What the capturing device keeps of a ring, and what a launch is told. Plain structs: the same bytes on both sides of a launch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "abi/ring.h"
#include "watch.h"

namespace dmi::device {

// Records a site may always publish in a step, and those a step leaves free for gated ones; as in lane.h.
constexpr uint32_t kRecordsPerSite = 2;
constexpr uint64_t kHeadroom = 16;

constexpr uint32_t kGroupTensors = 128;  // of a launch
constexpr uint32_t kInnerDims = DMI_MAX_DIMS - 1;
constexpr uint32_t kListsEach = DMI_LEVELS * DMI_SPACES;  // of a selection, by level and space

// Rows `start`, `start + 1`, ... of a space's row list: source rows (batch, first), (batch, first + 1), ...
struct Run {
  uint32_t batch, first, count, start;
};

// The keys that the rows of a run have: cache slots from key_first on; of its first row, those of positions up to `position`.
struct Own {
  uint32_t key_first, position;
};

// Rows of a list from `start` on, up to where the next one's begin: those of one of the step's requests.
struct Holder {
  uint32_t start, request;
};

// What a step wants of a site.
struct Gate {
  uint8_t level;       // dmi_level of all rows, where selection is 0
  uint8_t left;        // records set aside for it
  uint16_t selection;  // which of the lists say what level each row has; from 1 on
  uint8_t top;         // greatest elements of rows at STATS
  uint8_t spare[3];
};
static_assert(sizeof(Gate) == 8);

// The rows of one space in a step, or those of them that a selection has at one level.
struct Space {
  uint32_t rows, runs, width;
  uint32_t runs_at;              // in Fixed::runs
  uint32_t batch, first;         // of the first run
  uint32_t holders, holders_at;  // of watched steps: in Fixed::holders
  uint64_t batches, end, flat_end;
};

// A step, as its OPEN launch is told. By value, but for what `slot` holds.
struct Opening {
  uint64_t step, unix_ns, policy, table, table_bytes;
  uint32_t sites, keys;
  uint32_t levelled;  // some rows are neither FULL nor OFF, or those of one site are not all of one level
  uint32_t watched;   // conditions of rows may come to change what some of them are captured at
  uint32_t requests;  // of a watched step
  uint32_t run_count, own_count, list_count, holder_count, weight_count;
  uint64_t aside;  // records for all sites
  Space space[DMI_SPACES];
  const Run* runs;                                    // host memory; null: those of the step before serve again
  const Own* owns;                                    // likewise, one for each run; of levelled steps with keys
  const Space* lists;                                 // likewise, DMI_LEVELS * DMI_SPACES for each selection
  const Gate* gates;                                  // likewise, by site
  const Holder* holders;                              // likewise, of watched steps
  const dmi_keep* keeps;                              // likewise, by site
  const Condition* watches;                           // likewise, DMI_MAX_WATCHES
  const float* weights;                               // likewise, of all probes
  uint64_t gap_first, gap_last, gap_steps, gap_rows;  // dropped by the host before it
  uint64_t slot_end;                                  // what is before it in the slots may be written anew once this launch is done
  uint32_t read;                                      // there is something in the slots that is to be read
};

struct Closing {
  uint64_t unix_ns, op_calls, op_ns, waits, wait_ns, outside;  // of the host, since the last one
  uint32_t aborted;
};

// Words of page-locked host memory that the device writes for its own process. System scope; what orders them is said where they are
// written.
struct Notice {
  uint64_t closes;        // steps whose close ran, gated and lost ones included
  uint64_t slot_end;      // slots below it have been read
  uint64_t gave_up;       // steps in which complete mode gave rows up
  uint64_t payload_head;  // as of the last close, and spill_head
  uint64_t spill_head;
  uint64_t bursts;  // of copies that the pump's stream has made
};

// A tensor of a group. Fixed when the op is called, which in a graph is long before the step.
struct alignas(16) Tensor {
  const std::byte* data;
  uint64_t batch_stride, row_stride;  // bytes
  uint32_t site;
  uint32_t batch, last;  // sizes of the two ROW dimensions; batch is 1 where there is one
  uint8_t dtype, element, space;
  uint8_t rows;    // ROW dimensions; 0: nothing that the site could have
  uint8_t inners;  // other dimensions, outermost first
  uint8_t key;     // which of them counts keys; kInnerDims: none
  uint8_t vector;  // bytes that can be moved at once, by what does not depend on the step
  uint8_t shift;   // element is 1 << shift
  uint32_t size[kInnerDims];
  uint32_t row_bytes;           // where a row is one contiguous piece whatever the step; else 0
  uint64_t stride[kInnerDims];  // bytes
};

// Rows of a tensor, in a watched step, that one record tells of.
struct Lot {
  enum What : uint8_t { kGiven, kKept, kOffered, kSkipped, kMismatch, kOutside };

  uint64_t at;           // of its payload, behind the group's first byte
  uint32_t tensor;       // of the group
  uint32_t unit;         // units of work before it
  uint32_t first, rows;  // in the row list
  uint32_t row;          // where they begin in the list of the rows of their gate's level
  uint32_t row_bytes;    // of its payload
  uint8_t what, level;   // level of its payload
  uint8_t gate;          // level that its gate gives
  uint8_t spare[5];
};
static_assert(sizeof(Lot) == 40);

// Room for a group.
struct Grant {
  uint64_t base;     // payload offset of the group, or where it would be if none of it was in the spill region
  uint64_t spilled;  // spill offset of its first tensors, which lie there behind each other
  uint32_t near;     // so many
  uint32_t whole;    // tensors that were granted room whole
  uint32_t rows;     // of the next one
  uint32_t first;    // the block that reserved
};

// Where the blocks of one launch meet. Zero between launches, but for what only counts once `ready` says that it does.
struct Meeting {
  uint32_t arrived, done;  // blocks: `arrived` wraps to 0 by itself, the last block clears the others
  uint64_t ready;          // 0: nothing is reserved yet; else the grant in a word, or that it is here
  Grant grant;
  uint32_t more;     // whether tensors may have more records than were set aside for their sites
  uint32_t corner;   // bytes before grant.spilled that were skipped: the end of the region, which no range crosses
  uint64_t slot;     // the group's first record
  uint32_t records;  // of the group; as `slot`, for the last block: whoever writes them arrives at `done` after it
  // Of watched steps.
  uint32_t claimed, watched;  // units of rows that were taken up; that were held against the conditions
  uint32_t lots, lots_at;     // in Fixed::lots; none where the group goes the levelled way
  uint64_t taken;             // bytes that the lots have, behind `base`
};
static_assert(sizeof(Meeting) == 96);

struct State;

struct alignas(16) Group {
  State* state;
  Meeting* meeting;
  uint32_t count;
  uint32_t unit_shift;  // a block copies 1 << unit_shift bytes at a time
  Tensor tensor[kGroupTensors];
};
static_assert(sizeof(Group) <= 32764, "kernel parameters");

// What does not change while a capture runs: a block reads it once, together. Written by open and close, which the streams order
// against everything else of the ring.
struct alignas(16) Fixed {
  std::byte* payload;
  uint64_t payload_bytes;
  std::byte* spill;
  uint64_t spill_bytes;
  uint64_t little;  // bytes up to which a group's payload goes to the spill region first
  dmi_record* records;
  uint64_t record_capacity;
  uint64_t* record_tail;
  uint64_t* payload_tail;
  uint64_t* spill_tail;
  Run* runs;
  Own* owns;
  Space* lists;
  Gate* gates;    // by site
  uint8_t* left;  // by site: records still set aside for it. The last block of a capture writes it
  Holder* holders;
  dmi_keep* keeps;  // by site
  Condition* watches;
  float* weights;
  uint64_t* met;  // by request of a watched step: watches that its rows have met. Captures add to it, by atomics of device scope
  Lot* lots;      // of a watched step, as many as the ring has records
  uint64_t wait_bound_ns;
  // the step
  uint64_t step;
  uint32_t sites, keys;
  uint32_t complete;
  uint32_t open;  // 0: hooks do nothing
  uint32_t gated;
  uint32_t lost;  // not even a gated OPEN had room
  uint32_t levelled, watched;
  Space space[DMI_SPACES];
};

// One ring, in device memory; it outlives the ring, because graphs that were captured keep pointing at it.
struct State {
  Fixed fixed;
  // Changed by captures, several at once where a step has branches: atomics of device scope.
  alignas(128) uint64_t payload_head;
  uint64_t payload_tail_seen, spill_head, spill_tail_seen;
  uint64_t record_head, record_tail_seen;
  uint64_t aside;              // records set aside for the step
  uint64_t captures, wait_ns;  // of the step
  uint64_t met;                // watches that some row of the step has met
  uint32_t lots;               // of the step
  dmi_counters counters;
  uint32_t gave_up;  // the step waits no more
  // Of open and close alone.
  Notice* notice;
  dmi_counters* counters_out;
  uint64_t gap_first, gap_last, gap_steps, gap_rows;
  uint64_t closes, gave_ups;
};

}  // namespace dmi::device

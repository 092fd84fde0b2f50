// Records: their slots, what stands in them, what makes them visible.
#pragma once

#include <cstddef>
#include <cstring>

#include "atomics.h"
#include "scratch.h"

namespace dmi::device {

// All of a record but seq, by one thread.
DMI_HD inline void write_record(dmi_record& to, const dmi_record& from) {
  to.step = from.step;
#ifdef __CUDA_ARCH__
  auto* wide = reinterpret_cast<uint4*>(&to) + 1;
#pragma unroll
  for (uint32_t i = 0; i < sizeof(dmi_record) / 16 - 1; ++i) {
    uint4 part;
    memcpy(&part, reinterpret_cast<const uint4*>(&from) + 1 + i, sizeof part);
    wide[i] = part;
  }
#else
  std::memcpy(reinterpret_cast<std::byte*>(&to) + 16, reinterpret_cast<const std::byte*>(&from) + 16, sizeof from - 16);
#endif
}

DMI_HD inline dmi_record& slot_of(const Fixed& f, uint64_t index) { return f.records[index & (f.record_capacity - 1)]; }

// Takes the next slots; the room is known to be there.
DMI_HD inline uint64_t take_slots(State& s, uint64_t count) { return add_relaxed_gpu(s.record_head, count); }

DMI_HD inline void publish_slot(const Fixed& f, uint64_t index) {
  // Pairs with the acquires of seq, the engine's and the pump's: the record, and the payload that this block knows to be written, come
  // before it.
  store_release_sys(slot_of(f, index).seq, index + 1);
}

// A record of one thread's making.
template <typename Record>
DMI_HD void publish_one(State& s, const Fixed& f, const Record& record) {
  static_assert(sizeof(Record) == sizeof(dmi_record));
  const uint64_t index = take_slots(s, 1);
  write_record(slot_of(f, index), reinterpret_cast<const dmi_record&>(record));
  publish_slot(f, index);
  count(s.counters.records, 1);
}

DMI_HD inline dmi_record form_of(const Fixed& f, const Tensor& t, const Plan& p, uint32_t first, uint32_t rows) {
  dmi_record r{};
  r.step = f.step;
  r.site = t.site;
  r.row_first = first;
  r.rows = rows;
  r.kind = DMI_KIND_CAPTURE;
  r.outcome = DMI_OUTCOME_CAPTURED;
  r.level = DMI_LEVEL_FULL;
  r.dtype = t.dtype;
  r.flags = DMI_RECORD_GATHERED;
  r.key_base = p.key_base;
  r.ndim = uint8_t(t.inners + 1);
  r.size[0] = rows;
  r.role[0] = DMI_ROLE_ROW;
  uint32_t stride = 1;
#ifdef __CUDA_ARCH__
#pragma unroll  // so that the record stays in registers
#endif
  for (uint32_t back = 0; back < kInnerDims; ++back) {
    const uint32_t d = kInnerDims - 1 - back;
    if (d >= t.inners) continue;
    r.size[d + 1] = p.size[d];
    r.stride[d + 1] = stride;
    r.role[d + 1] = d == t.key ? DMI_ROLE_KEY : DMI_ROLE_INNER;
    stride *= p.size[d];
  }
  r.stride[0] = stride;
  return r;
}

DMI_HD inline void place_at(dmi_record& r, uint8_t place, uint64_t offset, uint64_t bytes) {
  r.place = place;
  r.payload = offset;
  r.payload_bytes = r.tensor_bytes = bytes;
}

DMI_HD inline dmi_record other_record(const Fixed& f, const Tensor& t, dmi_outcome outcome, dmi_reason reason, uint32_t first,
                                      uint32_t rows) {
  dmi_record r{};
  r.step = f.step;
  r.site = t.site;
  r.row_first = first;
  r.rows = rows;
  r.kind = DMI_KIND_CAPTURE;
  r.outcome = uint8_t(outcome);
  r.reason = uint8_t(reason);
  r.level = outcome == DMI_OUTCOME_SKIPPED ? DMI_LEVEL_OFF : DMI_LEVEL_FULL;
  return r;
}
// A record for rows of a tensor that are not captured, in the next of its slots, if one is left.
DMI_HD inline void say_other(State& s, const Fixed& f, const Tensor& t, const Plan& p, dmi_outcome outcome, dmi_reason reason,
                             uint32_t first, uint32_t rows, uint64_t& slot, uint64_t end) {
  count(s.counters.other_rows[reason], rows);
  if (slot >= end) return;
  dmi_record r = other_record(f, t, outcome, reason, first, rows);
  r.selection = p.selection;
  write_record(slot_of(f, slot++), r);
}

// Likewise for rows that are.
DMI_HD inline void say_captured(State& s, const Fixed& f, dmi_record r, uint8_t place, uint64_t at, uint64_t bytes, uint64_t& slot,
                                uint64_t end) {
  if (slot >= end) return;
  place_at(r, place, at, bytes);
  write_record(slot_of(f, slot++), r);
  count(s.counters.captured_rows, r.rows);
  count(s.counters.captured_bytes, bytes);
  if (place == DMI_PLACE_SPILL) count(s.counters.spilled_bytes, bytes);
}

// The end of the spill region, of which a group's payload has nothing: a part of a row that nothing continues. The engine frees it, and
// takes the row from what follows.
DMI_HD inline void say_corner(const Fixed& f, const Tensor& t, const Plan& p, uint64_t end, uint32_t bytes, uint64_t slot) {
  dmi_record r = form_of(f, t, p, 0, 0);
  r.selection = p.selection;
  r.size[0] = 1;
  place_at(r, DMI_PLACE_SPILL, end - bytes, bytes);
  r.tensor_bytes = bytes + DMI_PAYLOAD_ALIGN;
  write_record(slot_of(f, slot), r);
}

DMI_HD inline dmi_record form_of(const Fixed& f, const Tensor& t, const Plan& p, const Part& part, uint32_t first, uint32_t rows) {
  dmi_record r = form_of(f, t, p, first, rows);
  r.level = part.level;
  r.selection = p.selection;
  return r;
}

}  // namespace dmi::device

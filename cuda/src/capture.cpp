// Captures: for every tensor of a group, find room for the wanted rows, copy them there, say so in a record.
//
// What is little tries the spill region, then the payload ring. Best-effort never waits: rows that find no room are booked as
// dropped(ring_full). Complete mode tries both for all else too, then waits for the engine; at its bound it books the rest as
// dropped(timeout).
#include <algorithm>
#include <cstring>

#include "copy.h"
#include "encode.h"
#include "levels.h"
#include "ring.h"
#include "shared.h"

namespace dmi {
namespace {

// Complete mode does not break a tensor into pieces smaller than this while more room may come.
constexpr uint64_t kFragment = 64 << 10;
// Tensors up to this size go to the spill region first, which the engine reads in place: a copy command, and two threads woken for it, take
// longer than such a copy, and are all of the time that a decoded token takes to a subscriber (bench/live).
constexpr uint64_t kLittle = 256 << 10;

}  // namespace

class Capture {
 public:
  Capture(Ring& ring, Lane& lane, Layout& layout) : ring_(ring), lane_(lane), step_(lane.step), layout_(layout) {}

  void offer(const dmi_tensor& tensor);

 private:
  // Where bytes of the tensor go next.
  struct Room {
    dmi_place place;
    uint64_t offset;
    uint64_t rows;  // whole ones; 0 for a part of a row
    uint64_t bytes;
  };

  void watch(const dmi_tensor& tensor);
  void give_rows(const dmi_tensor& tensor, const RowLists& lists, uint32_t level);
  bool kept(const Own& own) const;
  uint64_t keep(uint64_t from, uint64_t to);
  void offer_payload(uint64_t from, uint64_t to);
  void give(uint64_t from, uint64_t to);
  uint64_t store(uint64_t from, uint64_t to);
  bool store_whole();
  bool little(uint64_t bytes) const;
  bool take(Room& room, dmi_place place, uint64_t unit, uint64_t most, uint64_t least);
  bool find(Room& room, uint64_t rows, uint64_t part);
  bool find_part(Room& room, dmi_place place, uint64_t part);
  bool record_free();
  void copy(const Room& room, uint64_t begin);
  template <typename Part>
  void fill(const Room& room, Part part);
  dmi_record& record(const dmi_record& form, dmi_outcome outcome, dmi_reason reason, uint64_t first, uint64_t rows);
  void captured(dmi_record& record, dmi_place place, uint64_t offset, uint64_t bytes);
  void settle(dmi_outcome outcome, dmi_reason reason, uint64_t first, uint64_t rows);

  Ring& ring_;
  Lane& lane_;
  Lane::Step& step_;
  Layout& layout_;
  uint32_t site_ = 0;
  // Of the rows at hand: their level, where they begin in the row list, and the bytes of one in the payload.
  uint8_t level_ = DMI_LEVEL_FULL;
  uint64_t first_ = 0, row_bytes_ = 0;
  uint32_t later_ = 0;  // records that rows of later levels need
  uint8_t flags_ = 0;   // of records: DMI_RECORD_KEPT
  bool records_short_ = false;
};

void Capture::offer(const dmi_tensor& tensor) {
  if (tensor.site >= step_.sites) return ring_.count_outside(1);
  site_ = tensor.site;
  const dmi_site& site = ring_.sites_[site_];
  first_ = later_ = 0;
  if (step_.keeps[site_].watch != 0) watch(tensor);
  if (const uint32_t n = step_.selection[site_]; n == 0) {
    give_rows(tensor, step_.rows, step_.level[site_]);
  } else {
    const Selection& selection = step_.selections[n - 1];
    later_ = selection.records(site.space);
    for (uint32_t level = 0; level < DMI_LEVELS; ++level) {
      const RowLists& lists = selection.at(level);
      if (lists[site.space].rows == 0) continue;
      later_ -= Selection::records_of(level);
      give_rows(tensor, lists, level);
      first_ += lists[site.space].rows;
    }
  }
  // What the site did not need is free for others.
  lane_.set_aside(lane_.aside() - step_.left[site_]);
  step_.left[site_] = 0;
}

// Holds every row of the site against its conditions, before any of them is given.
void Capture::watch(const dmi_tensor& tensor) {
  const bool complex = tensor.dtype == DMI_DTYPE_C64 || tensor.dtype == DMI_DTYPE_C128;
  plan_layout(layout_, tensor, ring_.sites_[site_], step_.rows, step_.keys);
  if (layout_.fits && !complex) watch_gathered(layout_, step_.watches, step_.keeps[site_].watch, step_.met);
}

bool Capture::kept(const Own& own) const {
  const uint64_t bits = step_.keeps[site_].keep;
  if (bits == 0 || step_.met.empty()) return false;
  const auto found = step_.met.find(own.request);
  return found != step_.met.end() && (found->second & bits) != 0;
}

// Rows of one level, as their gate gives them; in full, where a condition was met.
void Capture::give_rows(const dmi_tensor& tensor, const RowLists& lists, uint32_t level) {
  const dmi_site& site = ring_.sites_[site_];
  const dmi_keep& keeps = step_.keeps[site_];
  level_ = level_for(uint8_t(level), tensor.dtype);
  const bool extra = level_ != DMI_LEVEL_FULL && ((keeps.keep != 0 && !step_.met.empty()) || keeps.offer != 0);
  if (level_ == DMI_LEVEL_OFF && !extra) return settle(DMI_OUTCOME_SKIPPED, DMI_REASON_POLICY, 0, lists[site.space].rows);
  plan_layout(layout_, tensor, site, lists, step_.keys);
  if (!layout_.fits) return settle(DMI_OUTCOME_DROPPED, DMI_REASON_MISMATCH, 0, layout_.rows);
  const uint64_t rows = layout_.rows;
  if (!extra) return give(0, rows);
  uint64_t row = 0, given = 0;  // rows up to `given` are; those up to `row` are not kept
  for (const Own& own : *layout_.owns) {
    const uint64_t end = row + own.count;
    if (kept(own)) {
      // What this divides needs a record for each part, and so may what follows.
      if (lane_.free_records(4) < 4) break;
      if (given < row) {
        offer_payload(given, row);
        give(given, row);
      }
      given = keep(row, end);
    }
    row = end;
  }
  if (given == rows && rows != 0) return;
  offer_payload(given, rows);
  give(given, rows);
}

// Returns up to which row there was room.
uint64_t Capture::keep(uint64_t from, uint64_t to) {
  const uint8_t level = level_;
  level_ = DMI_LEVEL_FULL;
  flags_ = DMI_RECORD_KEPT;
  const uint64_t done = store(from, to);
  level_ = level;
  flags_ = 0;
  return done;
}

// Rows in full, for the engine to take or leave. An offer does not wait, and takes no record that others may need.
void Capture::offer_payload(uint64_t from, uint64_t to) {
  const uint64_t rows = to - from, bytes = rows * layout_.gather.row_bytes;
  if (step_.keeps[site_].offer == 0 || bytes == 0 || lane_.free_records(4) < 4) return;
  const Range range = ring_.payload_space_.take(bytes, 1, 1);
  if (range.units == 0) return;
  in_ring(ring_.payload_, ring_.payload_space_.capacity(), range.offset, bytes, [&](std::byte* at, uint64_t first, uint64_t n) {
    copy_gathered(layout_.gather, from * layout_.gather.row_bytes + first, n, at);
  });
  flags_ = DMI_RECORD_OFFER;
  dmi_record& r = record(layout_.form, DMI_OUTCOME_CAPTURED, DMI_REASON_NONE, from, rows);
  flags_ = 0;
  r.size[0] = uint32_t(rows);
  r.tensor_bytes = r.payload_bytes = bytes;
  r.place = DMI_PLACE_RING;
  r.payload = range.offset;
  r.level = DMI_LEVEL_FULL;
  add(lane_.counters().offered_bytes, bytes);
}

// Rows at their level; those that find no room are booked.
void Capture::give(uint64_t from, uint64_t to) {
  if (level_ == DMI_LEVEL_OFF) return settle(DMI_OUTCOME_SKIPPED, DMI_REASON_POLICY, from, to - from);
  const uint64_t done = store(from, to);
  if (done < to) {
    const dmi_reason reason = ring_.complete() ? DMI_REASON_TIMEOUT : records_short_ ? DMI_REASON_RECORDS_FULL : DMI_REASON_RING_FULL;
    settle(DMI_OUTCOME_DROPPED, reason, done, to - done);
  }
}

// Copies rows, and returns up to which one.
uint64_t Capture::store(uint64_t from, uint64_t to) {
  const uint32_t element = dtype_bytes(layout_.form.dtype);
  row_bytes_ = level_row_bytes(level_, layout_.gather.row_bytes / element, element, step_.top[site_]);
  const bool as_it_lies = level_ == DMI_LEVEL_FULL && flags_ == 0 && step_.selection[site_] == 0;
  if (as_it_lies && layout_.whole_bytes != 0 && store_whole()) return to;
  const uint64_t row_bytes = row_bytes_;
  uint64_t done = from, part = 0;  // rows; bytes of the next one
  do {
    Room room{};
    auto try_once = [&] {
      records_short_ = !record_free();
      return !records_short_ && find(room, to - done, part);
    };
    if (!try_once() && !(ring_.complete() && ring_.wait(lane_, try_once))) break;
    copy(room, done * row_bytes + part);
    const bool parts = room.rows == 0 && to != from;
    const bool ends = part + room.bytes == row_bytes;  // the row that this is a part of
    dmi_record& r = record(layout_.form, DMI_OUTCOME_CAPTURED, DMI_REASON_NONE, done, parts ? ends : room.rows);
    r.size[0] = uint32_t(parts ? 1 : room.rows);
    r.part_offset = part;
    r.tensor_bytes = parts ? row_bytes : room.bytes;
    captured(r, room.place, room.offset, room.bytes);
    done += parts ? ends : room.rows;
    part = parts && !ends ? part + room.bytes : 0;
  } while (done < to);
  return done;
}

// One copy of the source as it lies, where there is room for all of it at once.
bool Capture::store_whole() {
  if (!record_free()) return false;
  const uint64_t bytes = layout_.whole_bytes;
  Room room{};
  if (little(bytes)) {
    if (bytes > ring_.spill_space_.to_end()) return false;  // row by row, so that the region is filled to its end
    take(room, DMI_PLACE_SPILL, bytes, 1, 1);
  }
  if (room.rows == 0 && !take(room, DMI_PLACE_RING, bytes, 1, 1)) return false;
  fill(room, [&](std::byte* to, uint64_t first, uint64_t n) { copy_bytes(to, layout_.gather.base + first, n); });
  dmi_record& r = record(layout_.whole, DMI_OUTCOME_CAPTURED, DMI_REASON_NONE, 0, layout_.rows);
  r.tensor_bytes = bytes;
  captured(r, room.place, room.offset, bytes);
  return true;
}

// Whether a record can be published and the site still have one to say that the rest was dropped.
bool Capture::record_free() { return step_.left[site_] > later_ + 1 || lane_.free_records(1) >= 1; }

bool Capture::little(uint64_t bytes) const { return bytes <= std::min(kLittle, ring_.spill_space_.capacity()); }

bool Capture::take(Room& room, dmi_place place, uint64_t unit, uint64_t most, uint64_t least) {
  const Range range = (place == DMI_PLACE_RING ? ring_.payload_space_ : ring_.spill_space_).take(unit, most, least);
  if (range.units == 0) return false;
  room = {place, range.offset, range.units, range.units * unit};
  return true;
}

bool Capture::find(Room& room, uint64_t rows, uint64_t part) {
  const Reservation &payload = ring_.payload_space_, &spill = ring_.spill_space_;
  const uint64_t row_bytes = row_bytes_;
  if (rows == 0 || row_bytes == 0) {  // nothing to copy; the record says that the site fired
    room = {DMI_PLACE_RING, payload.head(), rows, 0};
    return true;
  }
  const bool cornered = spill.capacity() != 0 && row_bytes > spill.to_end();
  const bool first = little(layout_.rows * row_bytes);  // the spill region comes first, every row of it that fits
  if (part == 0) {
    if (first && !cornered && take(room, DMI_PLACE_SPILL, row_bytes, rows, 1)) return true;
    if (first && cornered && find_part(room, DMI_PLACE_SPILL, part)) return true;
    if (!ring_.complete()) return take(room, DMI_PLACE_RING, row_bytes, rows, 1);
    // What cannot fit goes in quarters of the ring, so that copying in and draining overlap.
    const bool large = rows > payload.capacity() / 2 / row_bytes;
    const uint64_t most = large ? std::max<uint64_t>(payload.capacity() / 4 / row_bytes, 1) : rows;
    const uint64_t least = std::min(most, std::max<uint64_t>(kFragment / row_bytes, 1));
    if (take(room, DMI_PLACE_RING, row_bytes, most, least) || take(room, DMI_PLACE_SPILL, row_bytes, most, least)) return true;
  }
  // Rows in parts: those that no reservation can hold, and those that meet the end of the spill ring, which no range crosses.
  const bool large = part != 0 || row_bytes > payload.capacity();
  if (!large && !cornered) return false;
  if (first && find_part(room, DMI_PLACE_SPILL, part)) return true;
  return (large && find_part(room, DMI_PLACE_RING, part)) || find_part(room, DMI_PLACE_SPILL, part);
}

// Room for a part of a row, from byte `part` of it on.
bool Capture::find_part(Room& room, dmi_place place, uint64_t part) {
  const uint64_t chunks = aligned(row_bytes_ - part) / DMI_PAYLOAD_ALIGN;
  const uint64_t least = std::min<uint64_t>(chunks, kFragment / DMI_PAYLOAD_ALIGN);
  if (place == DMI_PLACE_RING) {
    const uint64_t most = std::min(chunks, ring_.payload_space_.capacity() / 4 / DMI_PAYLOAD_ALIGN);
    if (!take(room, place, DMI_PAYLOAD_ALIGN, most, std::min(least, most))) return false;
  } else if (!take(room, place, DMI_PAYLOAD_ALIGN, chunks, std::min(least, ring_.spill_space_.to_end() / DMI_PAYLOAD_ALIGN))) {
    return false;
  }
  room.rows = 0;
  room.bytes = std::min(room.bytes, row_bytes_ - part);
  return true;
}

void Capture::copy(const Room& room, uint64_t begin) {
  fill(room, [&](std::byte* to, uint64_t first, uint64_t bytes) {
    if (encoded(level_)) return encode_gathered(layout_, level_, step_.top[site_], begin + first, bytes, to);
    copy_gathered(layout_.gather, begin + first, bytes, to);
  });
}

// Calls part(pointer, first byte, bytes) for the one or two pieces of a room.
template <typename Part>
void Capture::fill(const Room& room, Part part) {
  const bool ring = room.place == DMI_PLACE_RING;
  in_ring(ring ? ring_.payload_ : ring_.mapping_.spill(), ring ? ring_.payload_space_.capacity() : ring_.spill_space_.capacity(),
          room.offset, room.bytes, part);
}

dmi_record& Capture::record(const dmi_record& form, dmi_outcome outcome, dmi_reason reason, uint64_t first, uint64_t rows) {
  // The last of the site's own are for what is still to be said, whatever happens to the rest.
  const bool own = step_.left[site_] > (outcome == DMI_OUTCOME_CAPTURED ? later_ + 1 : later_);
  if (own) --step_.left[site_];
  dmi_record& r = lane_.next(own);
  std::memcpy(&r.step, &form.step, sizeof r - sizeof r.seq);  // seq is publish()'s
  r.step = step_.number;
  r.site = site_;
  r.row_first = uint32_t(first_ + first);
  r.flags |= flags_;
  r.selection = step_.selection[site_];
  r.rows = uint32_t(rows);
  r.kind = DMI_KIND_CAPTURE;
  r.outcome = outcome;
  r.reason = reason;
  ++step_.captures;
  add(lane_.counters().records, 1);
  return r;
}

void Capture::captured(dmi_record& r, dmi_place place, uint64_t offset, uint64_t bytes) {
  r.place = place;
  r.payload = offset;
  r.payload_bytes = bytes;
  r.level = level_;
  add(lane_.counters().captured_rows, r.rows);
  add(lane_.counters().captured_bytes, bytes);
  if ((r.flags & DMI_RECORD_KEPT) != 0) add(lane_.counters().kept_rows, r.rows);
  if (place == DMI_PLACE_SPILL) add(lane_.counters().spilled_bytes, bytes);
}

void Capture::settle(dmi_outcome outcome, dmi_reason reason, uint64_t first, uint64_t rows) {
  add(lane_.counters().other_rows[reason], rows);
  // A site that fires again and again may have used up its records: then only the counter knows.
  if (step_.left[site_] <= later_ && lane_.free_records(1) == 0) return;
  dmi_record& r = record({}, outcome, reason, first, rows);
  r.level = outcome == DMI_OUTCOME_SKIPPED ? DMI_LEVEL_OFF : DMI_LEVEL_FULL;
}

void Ring::capture(Lane& lane, const dmi_tensor* tensors, uint32_t count, void* stream) {
  if (lane.step.gated) return;  // its OPEN has booked every row
  const uint64_t start = monotonic_ns();
  if (device_ != nullptr) {
    device_->capture(tensors, count, sites_.data(), lane.step.sites, false, stream);
    ++host_work_.op_calls;
    host_work_.op_ns += monotonic_ns() - start;
    return;
  }
  thread_local Layout layout;
  Capture capture(*this, lane, layout);
  for (uint32_t i = 0; i < count; ++i) capture.offer(tensors[i]);
  lane.publish();
  wake_engine();
  const uint64_t ns = monotonic_ns() - start;
  lane.step.op_ns += ns;
  add(lane.counters().op_calls, 1);
  add(lane.counters().op_ns, ns);
}

}  // namespace dmi

// Ring² from the device's side: what the launches that open a step, capture a group and close the step do. A block's threads run each
// function together; `Block` gives thread(), threads(), index(), count(), sync(), also of some warps, load(): a copy, sum(): exclusive
// prefix sums of up to kGroupTensors numbers, the total in the place behind them or returned, and of a thread's warp lane(), lanes(),
// warp(), warps() and across(): what merging a value of all its lanes gives. No block waits for one that may not have started.
//
// What is done is decided when it runs, by what the step's open launch wrote: a graph that was recorded long ago follows a change of gates
// at its next replay. Steps whose rows are all FULL or OFF, site by site, go the short way; the others (kLevelled) that of parts.h; those
// with conditions that of keep.h.
//
// A group costs one reservation of payload, by compare-and-swap, and one publication, by the block that finishes last. What
// finds no room is dropped (best-effort). In complete mode the reservation waits for as long as the ring is being emptied. What found no
// room all the same the last block copies alone: to the payload ring, else to the spill region in host memory, which needs nobody
// but the engine to be emptied, else it waits, to a bound.
#pragma once

#include <cstddef>
#include <cstring>

#include "atomics.h"
#include "parts.h"
#include "rows.h"
#include "state.h"

namespace dmi::device {

constexpr uint64_t kFragment = 64 << 10;  // complete mode does not break a tensor into smaller pieces while more room may come
constexpr uint64_t kStillNs = 2'000'000;  // without a byte of the ring freed: longer than the largest copy that frees some takes
constexpr uint32_t kMostRecords = 6;      // of a tensor: one a level, one for rows that found no room, one for those that are off
// Free records that let concurrent groups have more of them than were set aside.
DMI_HD constexpr uint64_t several(bool levelled) { return 4 * kGroupTensors * (levelled ? kMostRecords : kRecordsPerSite); }

// What a block of a capture keeps while it runs.
struct Scratch {
  Fixed fixed;
  Tensor tensor[kGroupTensors];
  Plan plan[kGroupTensors];
  uint64_t at[kGroupTensors];          // offset of the tensor's bytes in the payload ring
  uint64_t start[kGroupTensors];       // and where that is in it
  uint32_t granted[kGroupTensors];     // rows that found room
  uint32_t unit[kGroupTensors + 1];    // units of copying before the tensor's
  uint32_t record[kGroupTensors + 1];  // records before the tensor's
  uint8_t own[kGroupTensors];          // records set aside for its site
  uint64_t total, slot;
  uint32_t plain;    // every site still has the record it needs, and none comes twice; of watched steps: nothing is kept or offered
  uint32_t changed;  // of watched steps
  bool last;
  // of complete mode's way
  bool found;
  uint8_t place;
  uint32_t taken;
  Target target;
  Rendezvous meet;
};

DMI_HD inline void count(uint64_t& counter, uint64_t n) { add_relaxed_gpu<uint64_t>(counter, n); }

// ------------------------------------------------------------------ room
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

DMI_HD inline uint64_t free_records(State& s) {
  const uint64_t used = load_relaxed_gpu(s.record_head) - load_acquire_gpu(s.record_tail_seen) + load_relaxed_gpu(s.aside);
  return used < s.fixed.record_capacity ? s.fixed.record_capacity - used : 0;
}

DMI_HD inline bool records_free(State& s, uint64_t wanted) {
  if (free_records(s) >= wanted) return true;
  refresh(s.record_tail_seen, *s.fixed.record_tail, s.record_head);
  return free_records(s) >= wanted;
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

// ------------------------------------------------------------------ records
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
DMI_HD void publish_one(State& s, const Record& record) {
  static_assert(sizeof(Record) == sizeof(dmi_record));
  const uint64_t index = take_slots(s, 1);
  write_record(slot_of(s.fixed, index), reinterpret_cast<const dmi_record&>(record));
  publish_slot(s.fixed, index);
  count(s.counters.records, 1);
}

// ------------------------------------------------------------------ open
DMI_HD inline void add_gap(State& s, uint64_t first, uint64_t last, uint64_t steps, uint64_t rows) {
  if (steps == 0) return;
  if (s.gap_steps == 0) s.gap_first = first;
  s.gap_last = last;
  s.gap_steps += steps;
  s.gap_rows += rows;
}

DMI_HD inline void publish_gap(State& s) {
  dmi_gap gap{};
  gap.step = s.gap_first;
  gap.last_step = s.gap_last;
  gap.steps = s.gap_steps;
  gap.rows = s.gap_rows;
  gap.kind = DMI_KIND_GAP;
  publish_one(s, gap);
  s.counters.steps += s.gap_steps;
  s.counters.other_rows[DMI_REASON_RECORDS_FULL] += s.gap_rows;
  s.gap_steps = s.gap_rows = 0;
}

DMI_HD inline void publish_open(State& s, const Opening& o, uint64_t rows) {
  if (s.gap_steps != 0) publish_gap(s);
  dmi_open open{};
  open.step = o.step;
  open.opened_unix_ns = o.unix_ns;
  open.policy = o.policy;
  open.sites = o.sites;
  open.kind = DMI_KIND_OPEN;
  open.gated = uint8_t(s.fixed.gated);
  open.table = o.table;
  open.table_bytes = o.table_bytes;
  for (uint32_t space = 0; space < DMI_SPACES; ++space) open.rows[space] = o.space[space].rows;
  publish_one(s, open);
  s.counters.steps += 1;
  if (s.fixed.gated != 0) s.counters.other_rows[DMI_REASON_RECORDS_FULL] += rows;
  s.aside = s.fixed.gated != 0 ? 1 : o.aside + 1;
}

// One block. `rows`: owed by all sites together; `gap_rows`: as dmi_gap counts them.
template <typename Block>
DMI_HD void open_step(Block& block, State& s, const Opening& o, uint64_t rows, uint64_t gap_rows) {
  Fixed& f = s.fixed;
  if (block.thread() == 0) {
    f.step = o.step;
    f.sites = o.sites;
    f.keys = o.keys;
    f.levelled = o.levelled;
    f.watched = o.watched;
    s.gave_up = 0;
    s.captures = s.wait_ns = s.aside = s.met = 0;
    s.lots = 0;
    add_gap(s, o.gap_first, o.gap_last, o.gap_steps, o.gap_rows);
    // OPEN, CLOSE, a GAP, what the sites may need, and what gated steps after this one need.
    const uint64_t needed = o.aside + 3 + kHeadroom;
    const bool room = records_free(s, needed) || (f.complete != 0 && wait(s, [&] { return records_free(s, needed); }));
    f.gated = room ? 0 : 1;
    f.lost = room || records_free(s, 3) ? 0 : 1;  // a GAP perhaps, OPEN, CLOSE
    if (f.lost != 0) {
      add_gap(s, o.step, o.step, 1, gap_rows);
    } else {
      publish_open(s, o, rows);
    }
    for (uint32_t space = 0; space < DMI_SPACES; ++space) f.space[space] = o.space[space];
    f.open = 1;
  }
  // Beside what thread 0 does: the loads from host memory, where there are any.
  auto take = [&](auto* to, const auto* from, uint32_t count) {
    if (from == nullptr) return;
    for (uint32_t i = block.thread(); i < count; i += block.threads()) to[i] = from[i];
  };
  take(f.runs, o.runs, o.run_count);
  take(f.owns, o.owns, o.own_count);
  take(f.lists, o.lists, o.list_count);
  take(f.holders, o.holders, o.holder_count);
  take(f.keeps, o.keeps, o.sites);
  take(f.watches, o.watches, DMI_MAX_WATCHES);
  take(f.weights, o.weights, o.weight_count);
  if (o.watched != 0) {
    for (uint32_t i = block.thread(); i < o.requests; i += block.threads()) f.met[i] = 0;
  }
  for (uint32_t site = block.thread(); site < o.sites; site += block.threads()) {
    if (o.gates != nullptr) f.gates[site] = o.gates[site];
    f.left[site] = f.gates[site].left;
  }
  if (o.read == 0) return;
  block.sync();
  // Pairs with the host's acquire: what was in the slots was read.
  if (block.thread() == 0) store_release_sys(s.notice->slot_end, o.slot_end);
}

// Outside a step, at the end: what could not be said before. One thread.
DMI_HD inline void tell_gap(State& s, uint64_t first, uint64_t last, uint64_t steps, uint64_t rows) {
  add_gap(s, first, last, steps, rows);
  if (s.gap_steps != 0 && records_free(s, 1)) publish_gap(s);
}

// ------------------------------------------------------------------ close
// One block.
template <typename Block>
DMI_HD void close_step(Block& block, State& s, const Closing& c) {
  if (s.fixed.open == 0) return;
  const bool said = s.fixed.lost == 0;
  block.sync();
  if (block.thread() == 0) {
    s.fixed.open = 0;
    s.aside = 0;  // sites that did not fire have no say any more
    s.counters.op_calls += c.op_calls;
    s.counters.op_ns += c.op_ns;
    s.counters.waits += c.waits;
    s.counters.wait_ns += c.wait_ns;
    s.counters.outside += c.outside;
    if (said) s.counters.records += 1;
  }
  block.sync();
  if (said) {
    // Counters first: they are exact once the CLOSE is seen.
    auto* from = reinterpret_cast<uint64_t*>(&s.counters);
    auto* to = reinterpret_cast<uint64_t*>(s.counters_out);
    for (uint32_t word = block.thread(); word < sizeof(dmi_counters) / 8; word += block.threads()) store_relaxed_sys(to[word], from[word]);
  }
  block.sync();
  if (block.thread() != 0) return;
  if (s.gave_up != 0) store_relaxed_sys(s.notice->gave_up, ++s.gave_ups);
  store_relaxed_sys(s.notice->payload_head, s.payload_head);
  if (said) {
    dmi_close close{};
    close.step = s.fixed.step;
    close.closed_unix_ns = c.unix_ns;
    close.records = s.captures;
    close.wait_ns = s.wait_ns + c.wait_ns;
    close.op_ns = c.op_ns;
    close.kind = DMI_KIND_CLOSE;
    close.aborted = uint8_t(c.aborted);
    const uint64_t index = take_slots(s, 1);
    write_record(slot_of(s.fixed, index), reinterpret_cast<const dmi_record&>(close));
    publish_slot(s.fixed, index);
  }
  // Pairs with the host's acquire: whoever sees that the step is over sees its records, and so does whom it tells.
  store_release_sys(s.notice->closes, ++s.closes);
}

// ------------------------------------------------------------------ capture
// Bytes of the ring that all of a tensor takes.
template <bool kLevelled>
DMI_HD uint64_t room_of(const Plan& p) {
  if (p.fate != Fate::kCapture) return 0;
  return kLevelled ? p.room : aligned(stream_bytes(p));
}

// Records that a tensor gets now: one for what was captured, or for why it was not, one for rows that found no room for good.
template <bool kLevelled>
DMI_HD uint32_t records_of(const Fixed& f, const Tensor& t, const Plan& p, uint32_t granted) {
  if (p.fate == Fate::kOutside) return 0;
  if (kLevelled && p.selection != 0) {
    uint32_t records = p.off != 0 ? 1 : 0;
    if (p.fate != Fate::kCapture) return records + (p.rows != 0 ? 1 : 0);
    each_part(f, t, p, [&](const Part& part) {
      if (granted_of(part, granted) != 0) ++records;
      return true;
    });
    return records + (granted != p.rows && f.complete == 0 ? 1 : 0);
  }
  if (p.fate != Fate::kCapture || granted == p.rows) return 1;
  return (granted != 0 ? 1 : 0) + (f.complete != 0 ? 0 : 1);
}

// Whether records were set aside for a tensor, which another one of its group does not need.
DMI_HD inline bool has_records(const Scratch& x, uint32_t i) {
  if (x.own[i] == 0) return false;
  for (uint32_t j = 0; j < i; ++j) {
    if (x.tensor[j].site == x.tensor[i].site) return false;
  }
  return true;
}

// One reservation for the group: all of it, or, where room is short, whole tensors and then whole rows. Its records' slots too, where
// all is as it mostly is; otherwise say() takes them. By one thread of one block.
template <bool kLevelled>
DMI_HD void reserve(State& s, const Group& g, const Scratch& x, Meeting& m) {
  const Fixed& f = x.fixed;
  uint64_t head = load_relaxed_gpu(s.payload_head);
  uint64_t tail = load_acquire_gpu(s.payload_tail_seen);
  uint32_t whole = g.count, rows = 0;
  uint64_t total = x.total;
  uint32_t most = g.count;
  m.more = 1;
  if (x.plain == 0 && !records_free(s, several(kLevelled))) {
    // Bytes that no record tells of would never be free again: from the first tensor on that may find none, there is no room.
    m.more = 0;
    for (most = 0; most < g.count && has_records(x, most);) ++most;
    if (most < g.count) total = x.at[most];
  }
  for (bool fresh = false, waited = f.complete == 0;;) {
    const uint64_t room = room_left(f.payload_bytes, head, tail);
    if (room < total && !fresh) {
      tail = refresh(s.payload_tail_seen, *f.payload_tail, s.payload_head);
      head = load_relaxed_gpu(s.payload_head);
      fresh = true;
      continue;
    }
    if (room < total && !waited) {
      wait_while_drained(s, total < f.payload_bytes / 2 ? total : f.payload_bytes / 2);
      waited = true;
      fresh = false;
      continue;
    }
    uint64_t taken = total;
    whole = most;
    rows = 0;
    if (room < total) {
      for (whole = 0; x.at[whole] + room_of<kLevelled>(x.plan[whole]) <= room;) ++whole;
      if constexpr (kLevelled) {
        rows = fit_rows(f, x.tensor[whole], x.plan[whole], room - x.at[whole], taken);
        taken += x.at[whole];
      } else {
        rows = uint32_t((room - x.at[whole]) / x.plan[whole].row_bytes);
        taken = x.at[whole] + aligned(uint64_t{rows} * x.plan[whole].row_bytes);
      }
    }
    if (swap_relaxed_gpu(s.payload_head, head, head + taken)) break;
    fresh = false;
  }
  if (x.plain != 0 && whole == g.count) m.slot = take_slots(s, g.count);
  m.base = head;
  m.whole = whole;
  m.rows = rows;
}

// What the others need to know is there.
template <typename Block>
DMI_HD void reserved(Block& block, Meeting& m) {
  m.first = block.index();
  if (block.count() != 1) store_release_gpu<uint32_t>(m.ready, 1);  // pairs with their acquire
}

// After the others know the reservation: what each tensor has of it. By all threads; x.at and x.unit hold what the whole would need.
template <bool kLevelled, typename Block>
DMI_HD void share_out(Block& block, const Group& g, Scratch& x, const Meeting& m) {
  const uint64_t base = m.base;
  const uint32_t whole = m.whole, rows = m.rows;
  for (uint32_t i = block.thread(); i < g.count; i += block.threads()) {
    x.at[i] += base;
    x.start[i] = x.at[i] % x.fixed.payload_bytes;
    x.granted[i] = x.plan[i].fate != Fate::kCapture || i > whole ? 0 : i < whole ? x.plan[i].rows : rows;
  }
  if (whole == g.count) return;
  block.sync();
  for (uint32_t i = block.thread(); i < g.count; i += block.threads())
    x.unit[i] = kLevelled ? levelled_units(x.fixed, x.tensor[i], x.plan[i], x.granted[i], g.unit_shift)
                          : units_of(uint64_t{x.granted[i]} * x.plan[i].row_bytes, g.unit_shift);
  block.sync();
  block.sum(x.unit, g.count);
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

// The slots of groups that are not as they mostly are. By all threads; gives x.record, and m.slot.
template <bool kLevelled, typename Block>
DMI_HD void find_slots(Block& block, State& s, const Group& g, Scratch& x, Meeting& m) {
  for (uint32_t i = block.thread(); i < g.count; i += block.threads()) {
    if (!has_records(x, i)) x.own[i] = 0;  // fired twice in a group: the first has what was set aside
    const uint32_t wanted = records_of<kLevelled>(x.fixed, x.tensor[i], x.plan[i], x.granted[i]);
    // A site that fires again and again may have used up its records: then only the counters know.
    x.record[i] = x.own[i] >= wanted || m.more != 0 ? wanted : x.own[i];
  }
  block.sync();
  block.sum(x.record, g.count);
  if (block.thread() == 0) m.slot = take_slots(s, x.record[g.count]);
  block.sync();
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
DMI_HD inline void say_captured(State& s, const Fixed& f, dmi_record r, uint64_t at, uint64_t bytes, uint64_t& slot, uint64_t end) {
  if (slot >= end) return;
  place_at(r, DMI_PLACE_RING, at, bytes);
  write_record(slot_of(f, slot++), r);
  count(s.counters.captured_rows, r.rows);
  count(s.counters.captured_bytes, bytes);
}

DMI_HD inline dmi_record form_of(const Fixed& f, const Tensor& t, const Plan& p, const Part& part, uint32_t first, uint32_t rows) {
  dmi_record r = form_of(f, t, p, first, rows);
  r.level = part.level;
  r.selection = p.selection;
  return r;
}

template <bool kLevelled>
DMI_HD void say_tensor(State& s, const Fixed& f, const Tensor& t, const Plan& p, uint32_t granted, uint64_t at, uint64_t slot,
                       uint64_t end) {
  if (p.fate == Fate::kOutside) return count(s.counters.outside, 1);
  if (p.fate == Fate::kOff) return say_other(s, f, t, p, DMI_OUTCOME_SKIPPED, DMI_REASON_POLICY, 0, p.rows, slot, end);
  if (p.fate == Fate::kMismatch) {
    if (p.rows != 0 || p.selection == 0) say_other(s, f, t, p, DMI_OUTCOME_DROPPED, DMI_REASON_MISMATCH, 0, p.rows, slot, end);
  } else {
    if (kLevelled && p.rows != 0) {
      each_part(f, t, p, [&](const Part& part) {
        const uint32_t rows = granted_of(part, granted);
        if (rows != 0)
          say_captured(s, f, form_of(f, t, p, part, part.first, rows), at + part.at, uint64_t{rows} * part.row_bytes, slot, end);
        return true;
      });
    } else if (granted != 0 || (p.rows == 0 && p.selection == 0)) {
      say_captured(s, f, form_of(f, t, p, 0, granted), at, uint64_t{granted} * p.row_bytes, slot, end);
    }
    if (p.rows != granted && f.complete == 0)
      say_other(s, f, t, p, DMI_OUTCOME_DROPPED, DMI_REASON_RING_FULL, granted, p.rows - granted, slot, end);
  }
  if (kLevelled && p.off != 0) say_other(s, f, t, p, DMI_OUTCOME_SKIPPED, DMI_REASON_POLICY, p.rows, p.off, slot, end);
}

// The records of what is captured at once, and of what will not be, but for what makes them visible. By one block, all its threads: where
// all found room the one that reserved, while the others are at work; else the last one.
template <bool kLevelled, typename Block>
DMI_HD DMI_APART void say(Block& block, State& s, const Group& g, Scratch& x, Meeting& m) {
  const Fixed& f = x.fixed;
  const bool plain = x.plain != 0 && m.whole == g.count;
  if (!plain) find_slots<kLevelled>(block, s, g, x, m);
  if (block.thread() == 0) {
    m.records = plain ? g.count : x.record[g.count];
    count(s.captures, m.records);
    count(s.counters.records, m.records);
  }
  for (uint32_t i = block.thread(); i < g.count; i += block.threads()) {
    const Tensor& t = x.tensor[i];
    const Plan& p = x.plan[i];
    const uint32_t given = plain ? 1 : x.record[i + 1] - x.record[i];
    const uint64_t slot = m.slot + (plain ? i : x.record[i]);
    say_tensor<kLevelled>(s, f, t, p, x.granted[i], x.at[i], slot, slot + given);
    // What the site did not need is free for others, unless the rest of it is still to come.
    const bool later = f.complete != 0 && p.fate == Fate::kCapture && x.granted[i] < p.rows;
    const uint32_t kept = later && x.own[i] > given ? x.own[i] - given : 0;
    count(s.aside, 0 - uint64_t{x.own[i] - kept});
    x.own[i] = uint8_t(kept);
  }
}

// Makes them visible. The last block, all its threads.
template <typename Block>
DMI_HD void publish(Block& block, const Group& g, const Scratch& x, const Meeting& m) {
  const Fixed& f = x.fixed;
  for (uint32_t r = block.thread(); r < m.records; r += block.threads()) publish_slot(f, m.slot + r);
  for (uint32_t i = block.thread(); i < g.count; i += block.threads()) {
    if (x.tensor[i].site < f.sites) f.left[x.tensor[i].site] = 0;  // others of this launch have read it
  }
}

// ------------------------------------------------------------------ complete mode's way, for what found no room at once
// The next rows' room in x.target, x.taken, x.place; false where none is to be had now.
DMI_HD inline bool find_room(State& s, Scratch& x, uint64_t row_bytes, uint32_t rows, bool own) {
  const Fixed& f = x.fixed;
  if (!own && !records_free(s, 1)) return false;
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
    const uint64_t room = room_left(f.spill_bytes, head, tail), to_end = f.spill_bytes - head % f.spill_bytes;
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

// Rows [x.granted, rows) of tensor i, by this block alone.
template <bool kLevelled, typename Block>
DMI_HD void stream(Block& block, State& s, Scratch& x, uint32_t i) {
  const Tensor& t = x.tensor[i];
  const Plan& p = x.plan[i];
  for (uint32_t done = x.granted[i]; done < p.rows;) {
    Part part{&x.fixed.space[t.space], 0, p.rows, DMI_LEVEL_FULL, p.row_bytes, 0};
    if constexpr (kLevelled) {
      each_part(x.fixed, t, p, [&](const Part& each) {
        part = each;
        return done >= each.first + each.rows;
      });
    }
    const uint32_t left = part.first + part.rows - done, first = done - part.first;  // of the part
    block.sync();
    if (block.thread() == 0) {
      const uint64_t rest = uint64_t{left} * part.row_bytes, quarter = x.fixed.payload_bytes / 4;
      wait_while_drained(s, rest < quarter ? rest : quarter);
      const bool own = x.own[i] >= kRecordsPerSite;  // one stays, to say that the rest was dropped
      auto room = [&] { return find_room(s, x, part.row_bytes, left, own); };
      x.found = room() || wait(s, room);
    }
    block.sync();
    if (!x.found) break;
    const uint64_t bytes = uint64_t{x.taken} * part.row_bytes;
    if (kLevelled && encoded(part.level)) {
      compute_rows(block, x.meet, x.fixed, t, p, part, first, first + x.taken, x.target);
    } else {
      const Rows rows = rows_of(t, p.outers, p.flat_stride, p.row_bytes, *part.list);
      for (uint64_t at = 0; at < bytes; at += kLargestUnit) {
        const uint64_t end = at + kLargestUnit < bytes ? at + kLargestUnit : bytes;
        copy_stream(x.fixed, t, p, rows, first, at, end, x.target, block.thread(), block.threads());
      }
    }
    block.sync();
    if (block.thread() == 0) {
      dmi_record r = form_of(x.fixed, t, p, part, done, x.taken);
      place_at(r, x.place, x.target.offset, bytes);
      if (x.taken == 0) {  // a part of a row that nothing continues: the engine frees it and waits for the row itself
        r.size[0] = 1;
        r.payload_bytes = x.target.capacity - x.target.offset % x.target.capacity;
        r.tensor_bytes = part.row_bytes;
      }
      if (x.own[i] >= kRecordsPerSite) {
        --x.own[i];
        count(s.aside, ~uint64_t{0});
      }
      publish_one(s, r);
      count(s.captures, 1);
      count(s.counters.captured_rows, x.taken);
      count(s.counters.captured_bytes, bytes);
      if (x.place == DMI_PLACE_SPILL) count(s.counters.spilled_bytes, bytes);
      x.granted[i] = done + x.taken;
    }
    done += x.taken;
  }
  block.sync();
  if (block.thread() == 0) {
    if (x.granted[i] < p.rows) {
      const uint32_t rest = p.rows - x.granted[i];
      count(s.counters.other_rows[DMI_REASON_TIMEOUT], rest);
      if (x.own[i] != 0 || records_free(s, 1)) {
        dmi_record r = other_record(x.fixed, t, DMI_OUTCOME_DROPPED, DMI_REASON_TIMEOUT, x.granted[i], rest);
        r.selection = p.selection;
        publish_one(s, r);
        count(s.captures, 1);
      }
    }
    count(s.aside, 0 - uint64_t{x.own[i]});
  }
}

// By the last block.
template <bool kLevelled>
DMI_HD void leave(Meeting& m) {
  m.arrived = m.ready = m.done = 0;  // for the next launch, which a stream orders after this one
  if constexpr (kLevelled) m.claimed = m.watched = 0;
}

// Thread 0 of a block that does not reserve. Whoever does is running, and waits for none of us.
DMI_HD inline void wait_until_ready(Meeting& m) {
  for (uint32_t pause = 20; load_acquire_gpu(m.ready) == 0; pause = pause < 500 ? pause * 2 : pause) pause_ns(pause);
}

// Which of the tensors from `first` on has a unit of the group.
DMI_HD inline uint32_t whose(const Scratch& x, uint32_t first, uint32_t count, uint32_t unit) {
  uint32_t low = first;
  for (uint32_t high = count; high - low > 1;) {
    const uint32_t middle = (low + high) / 2;
    if (x.unit[middle] <= unit) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Units come in turn, beginning behind the block that reserved, which has the fewest, as it has the records to write.
template <typename Block>
DMI_HD uint32_t first_unit(const Block& block, const Meeting& m) {
  return block.index() - m.first - 1 + (block.index() <= m.first ? block.count() : 0);
}

// This block's units of tensors whose rows are all reduced. Apart, so that it has the registers for it.
template <typename Block>
DMI_HD DMI_APART void reduce_units(Block& block, Scratch& x, uint32_t count, uint32_t first) {
  const uint32_t units = x.unit[count], step = block.count();
  for (uint32_t unit = first, i = 0; unit < units; unit += step) {
    i = whose(x, i, count, unit);
    const Plan& p = x.plan[i];
    if (p.reduced != nullptr) reduce_unit(block, x.meet, x.fixed, x.tensor[i], p, x.granted[i], unit - x.unit[i], x.start[i]);
  }
}

// By all blocks of the launch.
template <bool kLevelled, typename Block>
DMI_HD void capture_group(Block& block, State& s, const Group& g, Scratch& x) {
  const Fixed& f = x.fixed;
  if (block.thread() == 0) x.plain = 1;
  block.sync();
  for (uint32_t i = block.thread(); i < g.count; i += block.threads()) {
    const Tensor& t = x.tensor[i];
    x.own[i] = t.site < f.sites ? f.left[t.site] : 0;
    if constexpr (kLevelled) {
      x.plan[i] = plan_levelled(f, t, g.unit_shift, x.unit[i]);
    } else {
      x.plan[i] = plan_of(f, t);
      x.unit[i] = units_of(x.plan[i].fate == Fate::kCapture ? stream_bytes(x.plan[i]) : 0, g.unit_shift);
    }
    x.at[i] = room_of<kLevelled>(x.plan[i]);
    // Groups list their sites in order, as a rule: then none is there twice.
    if (x.own[i] == 0 || (i != 0 && x.tensor[i - 1].site >= t.site)) store_relaxed_gpu<uint32_t>(x.plain, 0);
    if (kLevelled && x.plan[i].selection != 0) store_relaxed_gpu<uint32_t>(x.plain, 0);
  }
  block.sync();
  const uint64_t total = block.sum(x.at, g.count);
  if (block.thread() == 0) x.total = total;
  block.sum(x.unit, g.count);
  Meeting& m = *g.meeting;
  if (block.thread() == 0) {
    if (block.count() == 1 || add_relaxed_gpu<uint32_t>(m.arrived, 1) == 0) {
      reserve<kLevelled>(s, g, x, m);
      reserved(block, m);
    } else {
      wait_until_ready(m);
    }
  }
  block.sync();
  share_out<kLevelled>(block, g, x, m);
  block.sync();
  const bool all = m.whole == g.count;
  if (all && m.first == block.index()) say<kLevelled>(block, s, g, x, m);
  const uint32_t units = x.unit[g.count], first = first_unit(block, m);
  if constexpr (kLevelled) reduce_units(block, x, g.count, first);
  for (uint32_t unit = first, i = 0; unit < units; unit += block.count()) {
    i = whose(x, i, g.count, unit);
    const Tensor& t = x.tensor[i];
    const Plan& p = x.plan[i];
    const Target to{f.payload, f.payload_bytes, x.start[i]};
    const uint32_t n = unit - x.unit[i];
    if constexpr (kLevelled) {
      if (p.reduced == nullptr) move_unit(block, x.meet, f, t, p, x.granted[i], n, g.unit_shift, to);
    } else {
      const uint64_t begin = uint64_t{n} << g.unit_shift, end = uint64_t{n + 1} << g.unit_shift, of = uint64_t{x.granted[i]} * p.row_bytes;
      copy_stream(f, t, p, all_rows(f, t, p), 0, begin, end < of ? end : of, to, block.thread(), block.threads());
    }
  }
  block.sync();
  if (block.count() != 1) {
    // Release: what this block copied, and the records that it wrote. Acquire, for the last: what all others did.
    if (block.thread() == 0) x.last = add_acq_rel_gpu<uint32_t>(m.done, 1) + 1 == block.count();
    block.sync();
    if (!x.last) return;
  }
  if (!all) say<kLevelled>(block, s, g, x, m);
  block.sync();
  publish(block, g, x, m);
  if (f.complete != 0 && !all) {
    block.sync();
    for (uint32_t i = 0; i < g.count; ++i) {
      if (x.plan[i].fate == Fate::kCapture && x.granted[i] < x.plan[i].rows) stream<kLevelled>(block, s, x, i);
    }
  }
  block.sync();
  if (block.thread() == 0) leave<kLevelled>(m);
}

}  // namespace dmi::device

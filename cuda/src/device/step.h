// What the launches that open and close a step do.
#pragma once

#include "records.h"
#include "room.h"

namespace dmi::device {

// ------------------------------------------------------------------ open
DMI_HD inline void add_gap(State& s, uint64_t first, uint64_t last, uint64_t steps, uint64_t rows) {
  if (steps == 0) return;
  if (s.gap_steps == 0) s.gap_first = first;
  s.gap_last = last;
  s.gap_steps += steps;
  s.gap_rows += rows;
}

DMI_HD inline void publish_gap(State& s, const Fixed& f) {
  dmi_gap gap{};
  gap.step = s.gap_first;
  gap.last_step = s.gap_last;
  gap.steps = s.gap_steps;
  gap.rows = s.gap_rows;
  gap.kind = DMI_KIND_GAP;
  publish_one(s, f, gap);
  count(s.counters.steps, gap.steps);
  count(s.counters.other_rows[DMI_REASON_RECORDS_FULL], gap.rows);
  s.gap_steps = s.gap_rows = 0;
}

DMI_HD inline void publish_open(State& s, const Fixed& f, const Opening& o, bool gated) {
  dmi_open open{};
  open.step = o.step;
  open.opened_unix_ns = o.unix_ns;
  open.policy = o.policy;
  open.sites = o.sites;
  open.kind = DMI_KIND_OPEN;
  open.gated = uint8_t(gated);
  open.table = o.table;
  open.table_bytes = o.table_bytes;
  for (uint32_t space = 0; space < DMI_SPACES; ++space) open.rows[space] = o.space[space].rows;
  publish_one(s, f, open);
  count(s.counters.steps, 1);
}

// One block. `rows`: owed by all sites together; `gap_rows`: as dmi_gap counts them.
template <typename Block>
DMI_HD void open_step(Block& block, State& s, const Opening& o, uint64_t rows, uint64_t gap_rows) {
  Fixed& f = s.fixed;
  if (block.thread() == 0) {
    const Fixed ring = f;  // what of it is asked for is read at once, not word after word
    const uint64_t gaps = s.gap_steps + o.gap_steps;
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
    auto free = [&] { return records_free(s, ring, needed); };
    const bool room = free() || (ring.complete != 0 && wait(s, free));
    const bool lost = !room && !records_free(s, ring, 3);  // a GAP perhaps, OPEN, CLOSE
    f.gated = room ? 0 : 1;
    f.lost = lost ? 1 : 0;
    if (lost) {
      add_gap(s, o.step, o.step, 1, gap_rows);
    } else {
      if (gaps != 0) publish_gap(s, ring);
      publish_open(s, ring, o, !room);
      if (!room) count(s.counters.other_rows[DMI_REASON_RECORDS_FULL], rows);
      s.aside = room ? o.aside + 1 : 1;
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
  if (s.gap_steps != 0 && records_free(s, s.fixed, 1)) publish_gap(s, s.fixed);
}

// ------------------------------------------------------------------ close
// What a close adds to a counter.
DMI_HD inline uint64_t more_of(const Closing& c, const State& s, const uint64_t* counter, bool said) {
  if (counter == &s.counters.op_calls) return c.op_calls;
  if (counter == &s.counters.op_ns) return c.op_ns;
  if (counter == &s.counters.waits) return c.waits;
  if (counter == &s.counters.wait_ns) return c.wait_ns;
  if (counter == &s.counters.outside) return c.outside;
  return counter == &s.counters.records && said ? 1 : 0;
}

// One block.
template <typename Block>
DMI_HD void close_step(Block& block, State& s, const Closing& c) {
  if (s.fixed.open == 0) return;
  const bool said = s.fixed.lost == 0;
  block.sync();
  // Counters first: they are exact once the CLOSE is seen.
  auto* counters = reinterpret_cast<uint64_t*>(&s.counters);
  auto* to = reinterpret_cast<uint64_t*>(s.counters_out);
  for (uint32_t word = block.thread(); word < sizeof(dmi_counters) / 8; word += block.threads()) {
    const uint64_t more = more_of(c, s, counters + word, said);
    const uint64_t value = more != 0 ? add_relaxed_gpu(counters[word], more) + more : load_relaxed_gpu(counters[word]);
    if (said) store_relaxed_sys(to[word], value);
  }
  uint64_t index = 0;
  if (block.thread() == 0) {
    s.fixed.open = 0;
    s.aside = 0;  // sites that did not fire have no say any more
    Notice& notice = *s.notice;
    if (said) {
      dmi_close close{};
      close.step = s.fixed.step;
      close.closed_unix_ns = c.unix_ns;
      close.records = s.captures;
      close.wait_ns = s.wait_ns + c.wait_ns;
      close.op_ns = c.op_ns;
      close.kind = DMI_KIND_CLOSE;
      close.aborted = uint8_t(c.aborted);
      index = take_slots(s, 1);
      write_record(slot_of(s.fixed, index), reinterpret_cast<const dmi_record&>(close));
    }
    const uint64_t payload = s.payload_head, spill = s.spill_head;
    if (s.gave_up != 0) store_relaxed_sys(notice.gave_up, ++s.gave_ups);
    store_relaxed_sys(notice.payload_head, payload);
    store_relaxed_sys(notice.spill_head, spill);
  }
  block.sync();
  if (block.thread() != 0) return;
  if (said) publish_slot(s.fixed, index);
  // Pairs with the host's acquire: whoever sees that the step is over sees its records, and so does whom it tells.
  store_release_sys(s.notice->closes, ++s.closes);
}

}  // namespace dmi::device

// Opening and closing steps: what is said of a step as a whole, and the room that it needs to be said in.
#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

#include "error.h"
#include "ring.h"
#include "shared.h"

namespace dmi {
namespace {

std::string milliseconds(uint64_t ns) { return std::to_string(ns / 1'000'000) + " ms"; }

void fill_close(dmi_record& slot, const Lane::Step& step, bool aborted) {
  dmi_close close{};
  close.step = step.number;
  close.closed_unix_ns = unix_ns();
  close.records = step.captures;
  close.wait_ns = step.wait_ns;
  close.op_ns = step.op_ns;
  close.kind = DMI_KIND_CLOSE;
  close.aborted = aborted;
  // All but seq, which publish() writes.
  std::memcpy(&slot.step, &close.step, sizeof close - sizeof close.seq);
}

}  // namespace

void write_table(std::byte* to, const Opening& opening, const std::vector<dmi_run>& runs) {
  dmi_table table{};
  table.magic = DMI_TABLE_MAGIC;
  table.bytes = uint32_t(table_bytes(opening, runs));
  table.step = opening.step;
  table.spans = opening.count;
  table.flags = opening.flags;
  table.keys = opening.keys;
  std::copy_n(opening.width, DMI_SPACES, table.width);
  std::memcpy(to, &table, sizeof table);
  to += sizeof table;
  if (opening.count != 0) std::memcpy(to, opening.spans, opening.count * sizeof(dmi_span));
  if (!runs.empty()) std::memcpy(to + opening.count * sizeof(dmi_span), runs.data(), runs.size() * sizeof(dmi_run));
}

Lane* Ring::free_lane(uint32_t preferred) {
  const uint32_t count = uint32_t(lanes_.size());
  for (uint32_t i = 0; i < count; ++i) {
    Lane& lane = *lanes_[(preferred + i) % count];
    if (lane.acquire()) return &lane;
  }
  return nullptr;
}

void Ring::add_gap(uint64_t step, uint64_t rows) {
  std::lock_guard lock(gap_mutex_);
  gap_.add(step, rows);
  has_gap_.store(true, std::memory_order_relaxed);
}

// There is room for one record, none of it set aside.
void Ring::publish_gap(Lane& lane) {
  std::lock_guard lock(gap_mutex_);
  has_gap_.store(false, std::memory_order_relaxed);
  if (gap_.steps == 0) return;
  dmi_gap gap{};
  gap.step = gap_.first;
  gap.last_step = gap_.last;
  gap.steps = gap_.steps;
  gap.rows = gap_.rows;
  gap.kind = DMI_KIND_GAP;
  dmi_record& slot = lane.next(false);
  std::memcpy(&slot.step, &gap.step, sizeof gap - sizeof gap.seq);
  add(lane.counters().steps, gap_.steps);
  add(lane.counters().records, 1);
  add(lane.counters().other_rows[DMI_REASON_RECORDS_FULL], gap_.rows);
  gap_ = {};
}

void Ring::latch_gates(Lane& lane) {
  Lane::Step& step = lane.step;
  uint64_t& version = mapping_.control().policy.value;
  const size_t known = step.level.size();
  step.level.resize(step.sites, DMI_LEVEL_FULL);
  step.selection.resize(step.sites, 0);
  step.top.resize(step.sites, 0);
  step.keeps.resize(step.sites);
  thread_local std::vector<dmi_gate> gates;
  // A bounded number of tries: an engine that died while writing must not stop the model. The last latch stays.
  for (int attempt = 0; attempt < 64; ++attempt) {
    const uint64_t before = load_acquire(version);  // pairs with the engine's release after the gates (even)
    if (before == step.policy && known >= step.sites) return;
    if (before % 2 != 0) continue;
    gates.resize(step.sites);
    for (uint32_t site = 0; site < step.sites; ++site) gates[site] = load_words(mapping_.gates()[site]);
    step.clauses.resize(DMI_MAX_CLAUSES);
    uint32_t clauses = 0;
    for (const dmi_gate& gate : gates) clauses = std::max(clauses, uint32_t{gate.clause} + gate.clauses);
    for (uint32_t i = 0; i < std::min<uint32_t>(clauses, DMI_MAX_CLAUSES); ++i) step.clauses[i] = load_words(mapping_.clauses()[i]);
    latch_watches(step);
#ifndef __SANITIZE_THREAD__                               // which does not know fences; the loads above are atomic in any case
    std::atomic_thread_fence(std::memory_order_acquire);  // pairs with the engine's store of the odd version
#endif
    if (load_relaxed(version) == before) {
      step.policy = before;
      return select(lane, gates);
    }
  }
}

void Ring::latch_watches(Lane::Step& step) {
  uint64_t bits = 0;
  ++step.latches;
  for (uint32_t site = 0; site < step.sites; ++site) {
    step.keeps[site] = load_words(mapping_.keeps()[site]);
    bits |= step.keeps[site].watch;
  }
  step.watches.assign(std::bit_width(bits), {});
  for (size_t i = 0; i < step.watches.size(); ++i) {
    if ((bits >> i & 1) == 0) continue;
    const dmi_watch w = load_words(mapping_.watches()[i]);
    Watch& watch = step.watches[i];
    watch.condition = w.condition;
    watch.statistic = w.statistic;
    watch.above = std::bit_cast<double>(w.above);
    watch.below = std::bit_cast<double>(w.below);
    watch.bias = std::bit_cast<double>(w.bias);
    if (w.condition != DMI_CONDITION_PROBE || uint64_t{w.weight} + w.elements > DMI_PROBE_FLOATS)
      continue;  // without weights it is never met
    watch.weight = w.weight;
    watch.elements = w.elements;
    watch.weights.resize(w.elements);
    for (uint32_t n = 0; n < w.elements; ++n) {
      const uint64_t word = load_relaxed(mapping_.probe_words()[(w.weight + n) / 2]);
      watch.weights[n] = std::bit_cast<float>(uint32_t(word >> ((w.weight + n) % 2 * 32)));
    }
  }
}

// What the gates say, in the form that captures ask for it.
void Ring::select(Lane& lane, const std::vector<dmi_gate>& gates) {
  Lane::Step& step = lane.step;
  step.selections.clear();
  for (uint32_t site = 0; site < step.sites; ++site) {
    const dmi_gate& gate = gates[site];
    const bool by_row = gate.clauses != 0 || gate.level == DMI_LEVEL_SAMPLED;
    step.selection[site] = 0;
    step.top[site] = std::min<uint8_t>(gate.top, DMI_MOST_TOP);
    step.level[site] = gate.level < DMI_LEVELS ? gate.level : uint8_t{DMI_LEVEL_FULL};
    if (!by_row || uint32_t{gate.clause} + gate.clauses > DMI_MAX_CLAUSES) continue;
    size_t found = 0;
    while (found < step.selections.size() && !step.selections[found].same(gate)) ++found;
    if (found == step.selections.size()) {
      if (found == UINT16_MAX) continue;
      const auto from = step.clauses.begin() + gate.clause;
      step.selections.emplace_back(gate, std::vector<dmi_clause>(from, from + gate.clauses));
    }
    step.selection[site] = uint16_t(found + 1);
  }
}

// Which rows of the step have which level, and what the sites may need to say of them: the records for all of them together.
uint64_t Ring::select_rows(Lane::Step& step, const Opening& opening) {
  step.runs.clear();
  if (std::any_of(step.selections.begin(), step.selections.end(), [](const Selection& s) { return s.grouped(); })) {
    groups_.find(opening.spans, opening.count, step.members);
  }
  for (size_t i = 0; i < step.selections.size(); ++i) {
    step.selections[i].apply(step.rows, opening.spans, opening.count, step.members, uint16_t(i + 1), step.runs);
  }
  step.left.assign(step.sites, kRecordsPerSite);
  uint64_t records = 0;
  for (uint32_t site = 0; site < step.sites; ++site) {
    if (const uint32_t n = step.selection[site]; n != 0) step.left[site] = uint8_t(step.selections[n - 1].records(sites_[site].space));
    records += step.left[site];
  }
  return records;
}

void Ring::publish_open(Lane& lane, const Opening& opening, std::byte* table, uint64_t table_offset) {
  Lane::Step& step = lane.step;
  dmi_open open{};
  open.step = step.number;
  open.opened_unix_ns = unix_ns();
  open.policy = step.policy;
  open.sites = step.sites;
  open.kind = DMI_KIND_OPEN;
  open.gated = step.gated;
  for (uint32_t space = 0; space < DMI_SPACES; ++space) open.rows[space] = uint32_t(step.rows[space].rows);
  if (table != nullptr) {
    write_table(table, opening, step.runs);
    open.table = table_offset;
    open.table_bytes = table_bytes(opening, step.runs);
    lane.commit_table(table_offset, open.table_bytes);
  }
  if (has_gap_.load(std::memory_order_relaxed)) publish_gap(lane);
  dmi_record& slot = lane.next(false);
  std::memcpy(&slot.step, &open.step, sizeof open - sizeof open.seq);

  dmi_counters& counters = lane.counters();
  add(counters.steps, 1);
  add(counters.records, 1);
  add(counters.outside, outside_.exchange(0, std::memory_order_relaxed));
  if (step.gated) {
    uint64_t rows = 0;
    for (uint32_t site = 0; site < step.sites; ++site) rows += step.rows[sites_[site].space].rows;
    add(counters.other_rows[DMI_REASON_RECORDS_FULL], rows);
  }
  uint64_t aside = 1;
  for (uint8_t left : step.left) aside += step.gated ? 0 : left;
  lane.set_aside(aside);
  lane.publish();
  wake_engine();
}

void Ring::publish_close(Lane& lane, bool aborted) {
  // Sites that fired have given back what they did not use; those that did not have no say any more.
  lane.set_aside(1);
  add(lane.counters().records, 1);
  fill_close(lane.next(true), lane.step, aborted);
  lane.publish();
  wake_engine();
  lane.closed.store(lane.step.number, std::memory_order_release);
  lane.step.number = kNoStep;
}

Lane* Ring::open_step(const Opening& opening, uint32_t preferred) {
  if (finished_.load(std::memory_order_relaxed)) {
    throw Error(DMI_ERROR_CLOSED, "open step " + std::to_string(opening.step) + ": the ring is finished; attach again");
  }
  if (device_ != nullptr) return open_on_device(opening);
  auto missed = [&](const std::string& why) {
    return Error(DMI_ERROR_TIMEOUT, "open step " + std::to_string(opening.step) + ": " + why + " within the " +
                                        milliseconds(wait_bound_ns_) +
                                        " that complete mode waits; its rows are booked as dropped. Is an engine attached and draining? "
                                        "Raise the bound, or attach with mode=\"best-effort\"");
  };
  const uint32_t sites = site_count_.load(std::memory_order_acquire);  // pairs with add_site
  Lane* found = free_lane(preferred);
  if (found == nullptr && complete()) {
    const uint64_t start = monotonic_ns();
    while (found == nullptr && monotonic_ns() - start < wait_bound_ns_ && !stopping_.load(std::memory_order_relaxed)) {
      sleep_ns(50'000);
      found = free_lane(preferred);
    }
  }
  if (found == nullptr) {
    add_gap(opening.step, token_rows(opening.spans, opening.count) * sites);
    if (complete()) throw missed("all " + std::to_string(lanes_.size()) + " lanes stayed taken by other threads' steps");
    return nullptr;
  }

  Lane& lane = *found;
  Lane::Step& step = lane.step;
  try {
    build_row_lists(step.rows, step.source, opening.spans, opening.count, opening.width, (opening.flags & DMI_TABLE_PACKED) != 0);
  } catch (...) {
    lane.release();
    throw;
  }
  step.number = opening.step;
  step.gated = step.gave_up = false;
  step.sites = sites;
  step.keys = opening.keys;
  step.captures = step.wait_ns = step.op_ns = 0;
  step.met.clear();
  lane.set_aside(0);
  latch_gates(lane);
  const uint64_t for_sites = select_rows(step, opening);

  // OPEN, CLOSE, a GAP, what the sites may need, and what gated steps after this one need.
  const uint64_t needed = for_sites + 3 + kHeadroom, bytes = table_bytes(opening, step.runs);
  uint64_t table_offset = 0;
  std::byte* table = nullptr;
  auto room = [&] {
    table = lane.reserve_table(bytes, table_offset);
    return table != nullptr && lane.free_records(needed) >= needed;
  };
  const bool open = room() || (complete() && bytes <= lane.table_capacity() && wait(lane, room));
  if (open) {
    publish_open(lane, opening, table, table_offset);
    return &lane;
  }

  step.gated = true;
  if (lane.free_records(3) >= 3) {  // a GAP perhaps, OPEN, CLOSE
    publish_open(lane, opening, table, table_offset);
    if (!complete()) return &lane;
    publish_close(lane, false);
  } else {
    add_gap(opening.step, step.rows[DMI_SPACE_TOKENS].rows * sites);
    step.number = kNoStep;
  }
  lane.release();
  if (complete() && bytes > lane.table_capacity()) {
    invalid("open step " + std::to_string(opening.step) + ": its row table of " + std::to_string(bytes) + " bytes exceeds the lane's " +
            std::to_string(lane.table_capacity()) + "; create the ring with more table_bytes");
  }
  if (complete()) throw missed("no room for its records and row table");
  return nullptr;
}

void Ring::close_step(Lane& lane, bool aborted, void* stream) {
  if (device_ != nullptr) return close_on_device(lane, aborted, stream);
  const uint64_t number = lane.step.number;
  const bool gave_up = lane.step.gave_up;
  publish_close(lane, aborted);
  lane.release();
  if (gave_up && !aborted) {
    throw Error(DMI_ERROR_TIMEOUT,
                "capture of step " + std::to_string(number) + ": the engine made no room within the " + milliseconds(wait_bound_ns_) +
                    " that complete mode waits; the rows after that are booked as dropped(timeout). Is an engine attached "
                    "and draining? Raise the bound, or attach with mode=\"best-effort\"");
  }
}

bool Ring::finish(uint64_t bound_ns) {
  finished_.store(true, std::memory_order_relaxed);
  const uint64_t start = monotonic_ns();
  bool booked = false;
  if (device_ != nullptr) finish_on_device(bound_ns);
  for (;;) {
    booked = !has_gap_.load(std::memory_order_relaxed);
    if (booked) break;
    if (Lane* lane = device_ != nullptr ? nullptr : free_lane(0)) {
      lane->set_aside(0);
      if (lane->free_records(1) >= 1) {
        publish_gap(*lane);
        lane->publish();
        wake_engine();
      }
      lane->release();
      if (!has_gap_.load(std::memory_order_relaxed)) continue;
    }
    if (monotonic_ns() - start >= bound_ns) break;
    sleep_ns(200'000);
  }
  store_release(mapping_.control().state.value, DMI_STATE_CLOSED);  // pairs with the engine's acquire
  wake_engine();
  return booked;
}

}  // namespace dmi

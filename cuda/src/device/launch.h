// What launches are told of a step and of a group: made on the host, by host code alone.
#pragma once

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <utility>
#include <vector>

#include "device.h"
#include "layout.h"
#include "levels.h"
#include "rows.h"

namespace dmi::device {

constexpr uint32_t kLargestRuns = 1 << 16;  // of a step, all selections together; likewise holders: more are booked as dropped
constexpr uint32_t kMostSelections = 256;   // of a step: likewise
constexpr uint64_t kSlotBytes = 4 << 20;    // host memory for what open launches read
constexpr uint64_t kSmallGroup = 2 << 20;   // bytes up to which blocks share the work in small units

// What a step's open launch is told of rows and gates, beside what goes by value.
struct Told {
  std::vector<Run> runs;
  std::vector<Own> owns;  // of the runs, where some site has keys
  std::vector<Space> lists;
  std::vector<Gate> gates;
  std::vector<Holder> holders;
  std::vector<dmi_keep> keeps;
  std::unordered_map<uint64_t, uint32_t> requests;  // of a watched step: their numbers within it
};

// The conditions that a latch of the gates has.
struct Watched {
  std::vector<Condition> watches;
  std::vector<float> weights;
};

inline void tell_holders(Told& told, const RowList& list, Space& to) {
  to.holders_at = uint32_t(told.holders.size());
  uint32_t start = 0;
  for (const dmi::Own& own : list.owns) {
    const uint32_t request = told.requests.try_emplace(own.request, uint32_t(told.requests.size())).first->second;
    if (told.holders.size() == to.holders_at || told.holders.back().request != request) told.holders.push_back({start, request});
    start += uint32_t(own.count);
  }
  to.holders = uint32_t(told.holders.size()) - to.holders_at;
}

// Gives a list's runs and, where `keyed`, the keys that their rows have; then runs end where those of another request begin.
inline Space tell_list(Told& told, const RowList& list, bool keyed, bool watched) {
  // One form serves tensors of one ROW dimension and of two: where the width is known, runs may go on into the next batch row.
  const std::vector<dmi::Run>& from = list.width != 0 ? list.flat : list.runs;
  Space to{uint32_t(list.rows), 0, uint32_t(list.width), uint32_t(told.runs.size()), 0, 0, 0, 0, list.batches, list.end, list.flat_end};
  if (!from.empty()) to.batch = uint32_t(from[0].batch), to.first = uint32_t(from[0].first);
  uint32_t start = 0;
  size_t own = 0;
  uint64_t of_own = 0;  // rows of it that were told of
  for (const dmi::Run& run : from) {
    for (uint64_t done = 0; done < run.count;) {
      uint64_t count = run.count - done;
      if (keyed) {
        const dmi::Own& keys = list.owns[own];
        count = std::min(count, keys.count - of_own);
        told.owns.push_back({uint32_t(keys.key_first), uint32_t(keys.position + of_own)});
        of_own += count;
        if (of_own == keys.count) ++own, of_own = 0;
      }
      told.runs.push_back({uint32_t(run.batch), uint32_t(run.first + done), uint32_t(count), start});
      start += uint32_t(count);
      done += count;
    }
  }
  to.runs = uint32_t(told.runs.size()) - to.runs_at;
  if (watched) tell_holders(told, list, to);
  return to;
}

// Rows and gates of a step.
inline void tell_step(Opening& o, Told& told, const DeviceStep& step) {
  told.runs.clear(), told.owns.clear(), told.lists.clear(), told.gates.clear();
  told.holders.clear(), told.keeps.clear(), told.requests.clear();
  bool keyed = false;
  o.levelled = o.watched = 0;
  o.aside = 0;
  for (uint32_t site = 0; site < step.sites; ++site) {
    // Where there is a selection, it alone says what is off.
    const uint8_t level = step.selection[site] != 0 ? uint8_t{DMI_LEVEL_FULL} : step.levels[site];
    const Gate gate{level, step.left[site], step.selection[site], step.top[site], {}};
    const bool levelled = gate.selection != 0 || encoded(gate.level);
    const dmi_keep& keeps = step.keeps[site];
    told.gates.push_back(gate);
    o.aside += step.left[site];
    o.levelled |= levelled ? 1 : 0;
    // Conditions change nothing of rows that are full anyway.
    o.watched |= (keeps.keep | keeps.offer) != 0 && (levelled || gate.level != DMI_LEVEL_FULL) ? 1 : 0;
    for (uint32_t d = 0; d < step.table[site].ndim; ++d)
      keyed = keyed || ((levelled || keeps.watch != 0) && step.table[site].role[d] == DMI_ROLE_KEY);
  }
  const bool watched = o.watched != 0;
  if (watched) told.keeps.assign(step.keeps, step.keeps + step.sites);
  for (uint32_t space = 0; space < DMI_SPACES; ++space) o.space[space] = tell_list(told, (*step.rows)[space], keyed, watched);
  for (const Selection& some : *step.selections) {
    for (uint32_t level = 0; level < DMI_LEVELS; ++level) {
      for (uint32_t space = 0; space < DMI_SPACES; ++space) told.lists.push_back(tell_list(told, some.at(level)[space], keyed, watched));
    }
  }
  o.run_count = uint32_t(told.runs.size());
  o.own_count = uint32_t(told.owns.size());
  o.list_count = uint32_t(told.lists.size());
  o.holder_count = uint32_t(told.holders.size());
  o.requests = uint32_t(told.requests.size());
}

// The watches of a latch, one for each bit. Probes that have the same weights have them in one place.
inline void tell_watches(Watched& told, const DeviceStep& step) {
  told.watches.assign(DMI_MAX_WATCHES, {});
  told.weights.clear();
  for (size_t i = 0; i < step.watches->size(); ++i) {
    const Watch& watch = (*step.watches)[i];
    told.watches[i] = watch;
    const size_t end = watch.weight + watch.weights.size();
    if (told.weights.size() < end) told.weights.resize(end);
    std::copy(watch.weights.begin(), watch.weights.end(), told.weights.begin() + watch.weight);
  }
}

// Writes what open launches read, where it is not as it was in the step before: into host memory of kSlotBytes, which launches that are
// through give back.
class Teller {
 public:
  std::byte* slots = nullptr;

  // `read`: what launches have read of the slots. Null, or why the step cannot be told of; what was told holds once told() says that the
  // launch is made.
  const char* tell(Opening& o, const DeviceStep& step, uint64_t unix_ns, uint64_t read) {
    o = {};
    o.step = step.step;
    o.unix_ns = unix_ns;
    o.policy = step.policy;
    o.table = step.row_table;
    o.table_bytes = step.row_table_bytes;
    o.sites = step.sites;
    o.keys = step.keys;
    o.gap_first = step.gap.first;
    o.gap_last = step.gap.last;
    o.gap_steps = step.gap.steps;
    o.gap_rows = step.gap.rows;
    tell_step(o, now_, step);
    if (now_.runs.size() > kLargestRuns || now_.holders.size() > kLargestRuns || now_.lists.size() > kMostSelections * kListsEach)
      return "its rows are more scattered, or its sites' selections more, than a device is told of; select with fewer or wider windows";
    uint64_t bytes = 0;
    const uint64_t runs = changed(now_.runs, sent_.runs, bytes), owns = changed(now_.owns, sent_.owns, bytes);
    const uint64_t lists = changed(now_.lists, sent_.lists, bytes), gates = changed(now_.gates, sent_.gates, bytes);
    const uint64_t holders = changed(now_.holders, sent_.holders, bytes), keeps = changed(now_.keeps, sent_.keeps, bytes);
    const bool latched = o.watched != 0 && step.latches != sent_latch_;
    if (latched) tell_watches(now_watched_, step);
    const uint64_t watches = latched ? changed(now_watched_.watches, {}, bytes) : kNowhere;
    const uint64_t weights = latched ? changed(now_watched_.weights, {}, bytes) : kNowhere;
    now_latch_ = latched ? step.latches : sent_latch_;
    o.slot_end = end_ = head_;
    if (bytes == 0) return nullptr;
    uint64_t at = head_;
    bytes = (bytes + 63) / 64 * 64;
    if (at % kSlotBytes + bytes > kSlotBytes) at += kSlotBytes - at % kSlotBytes;
    if (bytes > kSlotBytes || at + bytes - read > kSlotBytes) return "the device is too far behind to be told of it";
    o.slot_end = end_ = at + bytes;
    o.read = 1;
    std::byte* to = slots + at % kSlotBytes;
    o.runs = put(now_.runs, to, runs);
    o.owns = put(now_.owns, to, owns);
    o.lists = put(now_.lists, to, lists);
    o.gates = put(now_.gates, to, gates);
    o.holders = put(now_.holders, to, holders);
    o.keeps = put(now_.keeps, to, keeps);
    o.watches = put(now_watched_.watches, to, watches);
    o.weights = put(now_watched_.weights, to, weights);
    if (o.weights != nullptr) o.weight_count = uint32_t(now_watched_.weights.size());
    return nullptr;
  }
  void told() {
    head_ = end_;
    std::swap(now_, sent_);
    sent_latch_ = now_latch_;
  }

 private:
  static constexpr uint64_t kNowhere = ~uint64_t{0};

  // Where in a slot it comes, behind `bytes`; nowhere if the same was sent before.
  template <typename T>
  static uint64_t changed(const std::vector<T>& now, const std::vector<T>& sent, uint64_t& bytes) {
    if (now.size() == sent.size() && (now.empty() || std::memcmp(now.data(), sent.data(), now.size() * sizeof(T)) == 0)) return kNowhere;
    const uint64_t at = bytes;
    bytes += (now.size() * sizeof(T) + 15) / 16 * 16;
    return at;
  }
  template <typename T>
  static const T* put(const std::vector<T>& now, std::byte* slot, uint64_t at) {
    if (at == kNowhere || now.empty()) return nullptr;
    std::memcpy(slot + at, now.data(), now.size() * sizeof(T));
    return reinterpret_cast<const T*>(slot + at);
  }

  Told now_, sent_;
  Watched now_watched_;
  uint64_t now_latch_ = 0, sent_latch_ = 0;  // 0: of no watches yet
  uint64_t head_ = 0, end_ = 0;
};

// How far a tensor can be moved at a time, by what is known when the op is called.
inline uint8_t vector_of(const Tensor& t) {
  uint64_t all = reinterpret_cast<uintptr_t>(t.data) | t.row_stride | (t.batch > 1 ? t.batch_stride : 0);
  for (uint32_t d = 0; d < t.inners; ++d) {
    if (t.stride[d] != t.element) all |= t.stride[d];
  }
  uint8_t vector = 16;
  while (all % vector != 0) vector /= 2;
  return vector;
}

inline Tensor describe(const dmi_tensor& given, int ordinal, const dmi_site* sites, uint32_t site_count) {
  Tensor t{};
  t.site = given.site;
  t.dtype = given.dtype;
  t.key = kInnerDims;
  t.batch = t.last = 1;
  if (given.site >= site_count) {
    t.site = UINT32_MAX;
    return t;
  }
  const dmi_site& site = sites[given.site];
  t.space = site.space;
  t.element = uint8_t(dtype_bytes(given.dtype));
  while (2u << t.shift <= t.element) ++t.shift;
  if (given.device != ordinal || t.element == 0 || given.ndim < 1 || given.ndim > DMI_MAX_DIMS ||
      (site.ndim != 0 && site.ndim != given.ndim))
    return t;
  uint32_t rows = 0;
  for (uint32_t d = 0; d < given.ndim; ++d) {
    const uint8_t role = site.ndim != 0 ? site.role[d] : d == 0 ? uint8_t{DMI_ROLE_ROW} : uint8_t{DMI_ROLE_INNER};
    if (given.size[d] < 0 || given.size[d] > int64_t{UINT32_MAX} || given.stride[d] < 0) return t;
    const uint64_t stride = uint64_t(given.stride[d]) * t.element;
    if (role == DMI_ROLE_ROW) {
      if (rows++ != 0) {
        t.batch = t.last;
        t.batch_stride = t.row_stride;
      }
      t.last = uint32_t(given.size[d]);
      t.row_stride = stride;
    } else {
      if (t.inners == kInnerDims) return t;
      if (role == DMI_ROLE_KEY) t.key = t.inners;
      t.size[t.inners] = uint32_t(given.size[d]);
      t.stride[t.inners++] = stride;
    }
  }
  t.data = static_cast<const std::byte*>(given.data);
  t.rows = uint8_t(rows);
  t.vector = vector_of(t);
  bool contiguous = t.key == kInnerDims;
  uint64_t row = t.element;
  for (uint32_t d = t.inners; d-- > 0;) {
    contiguous = contiguous && (t.size[d] == 1 || t.stride[d] == row);
    row *= t.size[d];
  }
  if (contiguous && row < (uint64_t{1} << 32) - kLargestUnit) t.row_bytes = uint32_t(row);
  return t;
}

// Fills the group's tensors and its unit; returns their bytes.
inline uint64_t describe_group(Group& group, const dmi_tensor* tensors, int ordinal, const dmi_site* sites, uint32_t site_count) {
  uint64_t bytes = 0;
  for (uint32_t i = 0; i < group.count; ++i) {
    group.tensor[i] = describe(tensors[i], ordinal, sites, site_count);
    uint64_t size = dtype_bytes(tensors[i].dtype);
    for (uint32_t d = 0; d < tensors[i].ndim; ++d) size *= uint64_t(tensors[i].size[d]);
    bytes += size;
  }
  group.unit_shift = bytes <= kSmallGroup ? 13 : 15;
  return bytes;
}

}  // namespace dmi::device

// The device's protocol, compiled for the host: blocks, streams and an engine as threads, under the thread sanitizer too. Every byte that
// is captured is compared with a plain gather, every row with the books.
#include <atomic>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "device/capture.h"
#include "device/launch.h"
#include "host_device.h"

namespace dmi::device {
namespace {

// A source as a model has it, and what a capture of it must give: rows in row-list order, each dense.
struct Source {
  std::vector<std::byte> memory;
  std::vector<int64_t> size, stride;
  dmi_tensor tensor{};
  std::vector<std::byte> expected;
  uint64_t row_bytes = 0;
};

struct Want {  // of a step
  std::map<uint32_t, Source> source;
  std::map<uint32_t, uint64_t> owed, seen;  // rows by site
  uint64_t total = 0;
  std::vector<uint8_t> levels;  // by site
  bool watched = false;         // rows may be kept, and are told of in another order then
};

constexpr uint32_t kSites = 12;
constexpr size_t kStreams = 3;
constexpr uint64_t kPayload = 16 << 10, kSpill = 8 << 10, kRecords = 64, kManyRecords = 16384;

struct World {
  explicit World(bool complete, bool watched = false)
      : payload(kPayload),
        spill(kSpill),
        records(watched ? kManyRecords : kRecords),
        runs(4096),
        gates(kSites),
        left(kSites),
        holders(4096),
        keeps(kSites),
        watches(DMI_MAX_WATCHES),
        met(4096),
        lots(kManyRecords),
        watched(watched) {
    Fixed& f = state.fixed;
    f = {};
    f.payload = payload.data();
    f.payload_bytes = kPayload;
    f.spill = spill.data();
    f.spill_bytes = kSpill;
    f.records = records.data();
    f.record_capacity = records.size();
    f.record_tail = &record_tail;
    f.payload_tail = &payload_tail;
    f.spill_tail = &spill_tail;
    f.runs = runs.data();
    f.gates = gates.data();
    f.left = left.data();
    f.holders = holders.data();
    f.keeps = keeps.data();
    f.watches = watches.data();
    f.met = met.data();
    f.lots = lots.data();
    f.wait_bound_ns = 60'000'000'000;
    f.complete = complete;
    state.counters_out = &counters;
    state.notice = &notice;
    for (uint32_t i = 0; i < kSites; ++i) {
      sites[i] = {};
      sites[i].layer = DMI_NO_LAYER;
      sites[i].space = DMI_SPACE_TOKENS;
      sites[i].ndim = 3;
      sites[i].role[0] = sites[i].role[1] = DMI_ROLE_ROW;
      sites[i].role[2] = DMI_ROLE_INNER;
    }
  }
  std::vector<std::byte> payload, spill;
  std::vector<dmi_record> records;
  std::vector<Run> runs;
  std::vector<Gate> gates;
  std::vector<uint8_t> left;
  std::vector<Holder> holders;
  std::vector<dmi_keep> keeps;
  std::vector<Condition> watches;
  std::vector<uint64_t> met;
  std::vector<Lot> lots;
  const bool watched;
  uint64_t record_tail = 0, payload_tail = 0, spill_tail = 0;
  dmi_counters counters{};
  Notice notice{};
  State state{};
  dmi_site sites[kSites];

  std::mutex mutex;
  std::map<uint64_t, Want> wants;  // by step
  uint64_t captured = 0, kept = 0, offered = 0, dropped = 0, skipped = 0, compared_bytes = 0, gap_rows = 0;
  std::atomic<bool> over{false};
};

Source make_source(std::mt19937_64& random, uint32_t site, uint32_t batch, uint32_t width, const std::vector<dmi_span>& spans) {
  Source s;
  const uint32_t inner = 1 + uint32_t(random() % 700), pad = random() % 3 == 0 ? uint32_t(random() % 5) : 0;
  s.row_bytes = inner * 2;
  s.memory.resize(uint64_t{batch} * width * (inner + pad) * 2);
  for (std::byte& b : s.memory) b = std::byte(random());
  s.tensor.data = s.memory.data();
  s.tensor.site = site;
  s.tensor.dtype = DMI_DTYPE_BF16;
  s.tensor.device = 0;
  s.tensor.ndim = 3;
  const int64_t row = inner + pad;
  s.size = {batch, width, inner};
  s.stride = {row * width, row, 1};
  s.tensor.size = s.size.data();
  s.tensor.stride = s.stride.data();
  for (const dmi_span& span : spans) {
    for (uint32_t i = 0; i < span.count; ++i) {
      const std::byte* from = s.memory.data() + (uint64_t{span.batch} * width + span.first + i) * uint64_t(row) * 2;
      s.expected.insert(s.expected.end(), from, from + s.row_bytes);
    }
  }
  return s;
}

// Ranges that were reserved one after another and are given back in any order.
class Ring {
 public:
  Ring(std::vector<std::byte>& memory, uint64_t& tail) : memory_(memory), tail_(tail) {}
  std::vector<std::byte> read(uint64_t offset, uint64_t bytes) {
    std::vector<std::byte> out(bytes);
    for (uint64_t i = 0; i < bytes; ++i) out[i] = memory_[(offset + i) % memory_.size()];
    free_[offset] = offset + aligned(bytes);
    uint64_t to = tail_;  // ours alone to write
    while (!free_.empty() && free_.begin()->first == to) {
      to = free_.begin()->second;
      free_.erase(free_.begin());
    }
    store_release_sys(tail_, to);
    return out;
  }
  bool idle(uint64_t head) const { return tail_ == head; }

 private:
  std::vector<std::byte>& memory_;
  uint64_t& tail_;
  std::map<uint64_t, uint64_t> free_;
};

void check_capture(World& w, const dmi_record& r, Ring& payload, Ring& spill) {
  std::lock_guard lock(w.mutex);
  Want& want = w.wants.at(r.step);
  const uint64_t first = want.seen[r.site];
  if (r.outcome == DMI_OUTCOME_CAPTURED) {
    Ring& ring = r.place == DMI_PLACE_SPILL ? spill : payload;
    const std::vector<std::byte> got = ring.read(r.payload, r.payload_bytes);
    if (r.rows == 0 && r.payload_bytes != r.tensor_bytes) return;  // the corner of the spill region
    const Source& source = want.source.at(r.site);
    if (!want.watched) CHECK_EQ(r.row_first, first);
    CHECK_EQ(r.payload_bytes, r.rows * source.row_bytes);
    CHECK(r.row_first + r.rows <= want.owed.at(r.site));
    CHECK(std::memcmp(got.data(), source.expected.data() + r.row_first * source.row_bytes, got.size()) == 0);
    w.compared_bytes += got.size();
    const bool offered = (r.flags & DMI_RECORD_OFFER) != 0, kept = (r.flags & DMI_RECORD_KEPT) != 0;
    CHECK_EQ(uint32_t{want.levels[r.site]}, uint32_t{offered || kept ? DMI_LEVEL_OFF : DMI_LEVEL_FULL});
    if (offered) {
      w.offered += got.size();
      return;
    }
    w.captured += r.rows;
    w.kept += kept ? r.rows : 0;
  } else if (r.outcome == DMI_OUTCOME_SKIPPED) {
    CHECK_EQ(uint32_t{r.reason}, uint32_t{DMI_REASON_POLICY});
    w.skipped += r.rows;
  } else {
    CHECK_EQ(uint32_t{r.outcome}, uint32_t{DMI_OUTCOME_DROPPED});
    CHECK_EQ(uint32_t{r.reason}, uint32_t{DMI_REASON_RING_FULL});
    if (!want.watched) CHECK_EQ(r.row_first, first);
    w.dropped += r.rows;
  }
  want.seen[r.site] += r.rows;
}

// Takes records as they come, slowly at times; at a CLOSE every row of the step must have been told of.
void engine(World& w, uint64_t seed) {
  std::mt19937_64 random(seed);
  Ring payload(w.payload, w.payload_tail), spill(w.spill, w.spill_tail);
  for (uint64_t index = 0;;) {
    dmi_record& slot = w.records[index % w.records.size()];
    if (load_acquire_sys(slot.seq) != index + 1) {
      if (w.over.load(std::memory_order_acquire) && load_acquire_sys(slot.seq) != index + 1) break;
      pause_ns(20'000);
      continue;
    }
    const dmi_record record = slot;
    store_release_sys(w.record_tail, ++index);
    if (random() % 64 == 0) pause_ns(uint32_t(random() % 3'000'000));
    if (record.kind == DMI_KIND_CAPTURE) {
      check_capture(w, record, payload, spill);
    } else if (record.kind == DMI_KIND_CLOSE) {
      std::lock_guard lock(w.mutex);
      const Want& want = w.wants.at(record.step);
      for (const auto& [site, rows] : want.seen) CHECK_EQ(rows, want.owed.at(site));
      w.wants.erase(record.step);
    } else if (record.kind == DMI_KIND_GAP) {
      std::lock_guard lock(w.mutex);
      w.gap_rows += reinterpret_cast<const dmi_gap&>(record).rows;
    }
  }
  CHECK(payload.idle(w.state.payload_head));
  CHECK(spill.idle(w.state.spill_head));
}

// A step: three streams capture groups of random tensors, several blocks a launch, between an open and a close.
uint64_t step(World& w, std::mt19937_64& random, uint64_t number, uint64_t& owed_gated) {
  const uint32_t batch = 1 + uint32_t(random() % 3), width = 1 + uint32_t(random() % 6);
  std::vector<dmi_span> spans;
  uint64_t rows = 0;
  for (uint32_t b = 0; b < batch; ++b) {
    dmi_span span{};
    span.request = span.batch = b;
    span.first = uint32_t(random() % width);
    span.count = width - span.first;
    rows += span.count;
    spans.push_back(span);
  }
  const uint32_t widths[DMI_SPACES] = {width, width, 0};
  RowLists lists;
  RowSource source;
  build_row_lists(lists, source, spans.data(), uint32_t(spans.size()), widths, false);
  Opening o{};
  o.step = number;
  o.sites = kSites;
  std::vector<uint8_t> levels(kSites, DMI_LEVEL_FULL), left(kSites, kRecordsPerSite);
  for (uint8_t& level : levels) level = random() % 5 == 0 ? uint8_t(DMI_LEVEL_OFF) : uint8_t(DMI_LEVEL_FULL);
  const std::vector<uint16_t> selection(kSites);
  const std::vector<uint8_t> top(kSites);
  std::vector<dmi_keep> keeps(kSites);
  std::vector<Watch> watches(1);
  watches[0].condition = DMI_CONDITION_NONFINITE;
  for (dmi_keep& keep : keeps) {
    if (!w.watched || number % 5 == 0) continue;
    keep.watch = random() % 3 == 0 ? 1 : 0;
    keep.keep = random() % 2;
    keep.offer = random() % 3 == 0 ? 1 : 0;
  }
  const std::vector<Selection> selections;
  DeviceStep from{};
  from.sites = kSites;
  from.rows = &lists;
  from.levels = levels.data();
  from.selection = selection.data();
  from.top = top.data();
  from.left = left.data();
  from.selections = &selections;
  from.watches = &watches;
  from.keeps = keeps.data();
  from.table = w.sites;
  Told told_rows;
  tell_step(o, told_rows, from);
  o.runs = told_rows.runs.data();
  o.gates = told_rows.gates.data();
  Watched told_watches;
  tell_watches(told_watches, from);
  if (o.watched != 0) {
    o.holders = told_rows.holders.data();
    o.keeps = told_rows.keeps.data();
    o.watches = told_watches.watches.data();
  }
  o.read = 1;

  std::vector<std::vector<uint32_t>> groups(1 + random() % 6);
  Want want;
  want.levels = levels;
  want.watched = o.watched != 0;
  for (uint32_t site = 0; site < kSites; ++site) {
    if (random() % 4 == 0) continue;
    groups[random() % groups.size()].push_back(site);
    want.source.emplace(site, make_source(random, site, batch, width, spans));
    want.owed[site] = rows;
    want.total += rows;
  }
  const uint64_t total = want.total;
  std::vector<std::unique_ptr<Group>> told;
  std::vector<Meeting> meetings(groups.size());
  for (size_t i = 0; i < groups.size(); ++i) {
    if (groups[i].empty()) continue;
    std::vector<dmi_tensor> tensors;
    for (uint32_t site : groups[i]) tensors.push_back(want.source.at(site).tensor);
    auto group = std::make_unique<Group>();
    group->state = &w.state;
    group->meeting = &meetings[i];
    group->count = uint32_t(tensors.size());
    describe_group(*group, tensors.data(), 0, w.sites, kSites);
    group->unit_shift = 10;
    told.push_back(std::move(group));
  }
  {
    std::lock_guard lock(w.mutex);
    w.wants.emplace(number, std::move(want));
  }
  launch(1, [&](HostBlock& block) { open_step(block, w.state, o, rows * kSites, rows * kSites); });
  CHECK_EQ(w.state.notice->slot_end, o.slot_end);
  const bool gated = w.state.fixed.gated != 0 || w.state.fixed.lost != 0;
  auto stream = [&](size_t which, uint64_t seed) {
    std::mt19937_64 own(seed);
    for (size_t i = which; i < told.size(); i += kStreams) {
      launch(1 + uint32_t(own() % 4), [&](HostBlock& block) { capture(block, *told[i], block.shared.scratch); });
    }
  };
  std::vector<std::thread> streams;
  for (size_t which = 0; which < kStreams; ++which) streams.emplace_back(stream, which, random());
  for (std::thread& thread : streams) thread.join();
  for (const Meeting& m : meetings) CHECK(m.arrived == 0 && m.ready == 0 && m.done == 0);
  launch(1, [&](HostBlock& block) { close_step(block, w.state, Closing{}); });
  CHECK_EQ(w.state.aside, 0u);
  if (gated) {
    std::lock_guard lock(w.mutex);
    owed_gated += total;
    if (w.state.fixed.lost != 0) w.wants.erase(number);
  }
  return total;
}

void test(bool complete, uint64_t seed, uint64_t steps, bool watched = false) {
  World w(complete, watched);
  std::mt19937_64 random(seed);
  std::thread consumer(engine, std::ref(w), random());
  uint64_t owed = 0, gated = 0;
  for (uint64_t number = 1; number <= steps; ++number) owed += step(w, random, number, gated);
  w.over.store(true, std::memory_order_release);
  consumer.join();
  CHECK_EQ(w.captured + w.dropped + w.skipped + gated, owed);
  CHECK_EQ(w.counters.captured_rows, w.captured);
  CHECK_EQ(w.counters.kept_rows, w.kept);
  CHECK_EQ(w.counters.offered_bytes, w.offered);
  CHECK_EQ(watched, w.kept != 0 && w.offered != 0);
  CHECK_EQ(w.counters.other_rows[DMI_REASON_RING_FULL], w.dropped);
  CHECK_EQ(w.counters.other_rows[DMI_REASON_POLICY], w.skipped);
  if (complete) CHECK_EQ(w.dropped + gated, 0u);
  if (!complete) CHECK(w.dropped != 0);
  CHECK(w.compared_bytes > kPayload);
  std::printf(
      "device protocol, %s%s: %llu steps, %llu rows captured (%llu bytes compared), %llu dropped, %llu in gated steps, %llu waits\n",
      complete ? "complete" : "best-effort", watched ? ", watched" : "", static_cast<unsigned long long>(steps),
      static_cast<unsigned long long>(w.captured), static_cast<unsigned long long>(w.compared_bytes),
      static_cast<unsigned long long>(w.dropped), static_cast<unsigned long long>(gated),
      static_cast<unsigned long long>(w.counters.waits));
}

// Nothing but reservations, from several streams at once, while the engine gives back all it can: no range may reach into one that it has
// not had yet, however old the words are that a stream read.
void test_reservations(uint64_t seed) {
  constexpr size_t kThreads = 6;
  World w(false);
  std::map<uint64_t, uint64_t> held;  // begin to end, of ranges that were had; under w.mutex
  std::atomic<size_t> running{kThreads};
  std::vector<std::thread> streams;
  for (size_t which = 0; which < kThreads; ++which) {
    streams.emplace_back([&, which] {
      std::mt19937_64 random(seed + which);
      auto x = std::make_unique<Scratch>();
      x->fixed = w.state.fixed;
      x->plain = 0;
      Group group{};
      group.count = 1;
      x->plan[0] = Plan{};
      x->plan[0].fate = Fate::kCapture;
      for (int had = 0; had < 2'000;) {
        Plan& plan = x->plan[0];
        plan.row_bytes = 16 * (1 + random() % 32);
        plan.rows = uint32_t(1 + random() % 24);
        x->total = room_of<false>(plan);
        x->at[0] = 0;
        x->own[0] = kRecordsPerSite;
        Meeting m{};
        reserve<false>(w.state, group, *x, m);
        const uint64_t end = m.base + (m.whole == 1 ? x->total : aligned(m.rows * plan.row_bytes));
        if (end == m.base) continue;
        ++had;
        CHECK(end - load_acquire_sys(w.payload_tail) <= kPayload);
        std::lock_guard lock(w.mutex);
        held[m.base] = end;
      }
      running.fetch_sub(1);
    });
  }
  uint64_t tail = 0;
  for (bool more = true; more;) {
    const bool over = running.load() == 0;
    pause_ns(2'000);  // else the streams would wait for the lock most of the time
    std::lock_guard lock(w.mutex);
    for (auto first = held.begin(); first != held.end() && first->first == tail; first = held.erase(first)) tail = first->second;
    store_release_sys(w.payload_tail, tail);
    more = !over || !held.empty();
  }
  for (std::thread& stream : streams) stream.join();
  CHECK_EQ(tail, w.state.payload_head);
  std::printf("reservations: %llu bytes through a ring of %llu\n", static_cast<unsigned long long>(tail),
              static_cast<unsigned long long>(kPayload));
}

}  // namespace
}  // namespace dmi::device

int main() {
  const uint64_t seed = test_seed();
  dmi::device::test_reservations(seed);
  dmi::device::test(true, seed, 200);
  dmi::device::test(false, seed + 1, 200);
  dmi::device::test(true, seed + 2, 200, true);
  dmi::device::test(false, seed + 3, 200, true);
  return 0;
}

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
    f.little = little_of(kSpill);
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
  uint64_t spilled = 0, corners = 0;  // bytes; ranges that were skipped
  std::atomic<bool> over{false};
};

Source make_source(std::mt19937_64& random, uint32_t site, uint32_t batch, uint32_t width, const std::vector<dmi_span>& spans,
                   uint32_t most = 700) {
  Source s;
  const uint32_t inner = 1 + uint32_t(random() % most), pad = random() % 3 == 0 ? uint32_t(random() % 5) : 0;
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
    if (r.rows == 0 && r.payload_bytes != r.tensor_bytes) {  // the corner of the spill region
      CHECK_EQ(r.place, DMI_PLACE_SPILL);
      CHECK_EQ((r.payload + r.payload_bytes) % kSpill, 0u);
      ++w.corners;
      return;
    }
    if (r.place == DMI_PLACE_SPILL) {
      CHECK(r.payload % kSpill + r.payload_bytes <= kSpill);
      w.spilled += r.payload_bytes;
    }
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
  const uint32_t most = random() % 2 == 0 ? 700 : 50;  // of a row: so that some groups are little, and some are not
  Want want;
  want.levels = levels;
  want.watched = o.watched != 0;
  for (uint32_t site = 0; site < kSites; ++site) {
    if (random() % 4 == 0) continue;
    groups[random() % groups.size()].push_back(site);
    want.source.emplace(site, make_source(random, site, batch, width, spans, most));
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
  CHECK_EQ(w.counters.spilled_bytes, w.spilled);
  CHECK(w.spilled != 0 && w.corners != 0);
  CHECK_EQ(watched, w.kept != 0 && w.offered != 0);
  CHECK_EQ(w.counters.other_rows[DMI_REASON_RING_FULL], w.dropped);
  CHECK_EQ(w.counters.other_rows[DMI_REASON_POLICY], w.skipped);
  if (complete) CHECK_EQ(w.dropped + gated, 0u);
  if (!complete) CHECK(w.dropped != 0);
  CHECK(w.compared_bytes > kPayload);
  std::printf(
      "device protocol, %s%s: %llu steps, %llu rows captured (%llu bytes compared, %llu spilled, %llu corners), %llu dropped, %llu in "
      "gated "
      "steps, %llu waits\n",
      complete ? "complete" : "best-effort", watched ? ", watched" : "", static_cast<unsigned long long>(steps),
      static_cast<unsigned long long>(w.captured), static_cast<unsigned long long>(w.compared_bytes),
      static_cast<unsigned long long>(w.spilled), static_cast<unsigned long long>(w.corners), static_cast<unsigned long long>(w.dropped),
      static_cast<unsigned long long>(gated), static_cast<unsigned long long>(w.counters.waits));
}

// Nothing but reservations, from several streams at once, while the engine gives back all it can: no range may reach into one that it has
// not had yet, however old the words are that a stream read. Those that are little are in the spill region or, where it is full, not.
void test_reservations(uint64_t seed) {
  constexpr size_t kThreads = 6;
  World w(false);
  struct Held {
    std::map<uint64_t, uint64_t> ranges;  // begin to end, of those that were had; under w.mutex
    uint64_t tail = 0;
  } payload, spill;
  uint64_t fell_back = 0;
  std::atomic<size_t> running{kThreads};
  std::vector<std::thread> streams;
  for (size_t which = 0; which < kThreads; ++which) {
    streams.emplace_back([&, which] {
      std::mt19937_64 random(seed + which);
      auto x = std::make_unique<Scratch>();
      x->fixed = w.state.fixed;
      x->plain = 1;
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
        for (const Region region : {kPayloadRegion, kSpillRegion}) x->seen[region] = look(w.state, region);
        const Grant grant = reserve<false>(w.state, group, *x, m);
        const bool spilled = grant.near == 1;
        const uint64_t base = spilled ? grant.spilled : grant.base;
        const uint64_t end = base + (grant.whole == 1 ? x->total : aligned(grant.rows * plan.row_bytes));
        if (end == base) continue;
        ++had;
        CHECK(end - load_acquire_sys(spilled ? w.spill_tail : w.payload_tail) <= (spilled ? kSpill : kPayload));
        if (spilled) CHECK(x->total <= little_of(kSpill) && base % kSpill + x->total <= kSpill && grant.whole == 1);
        std::lock_guard lock(w.mutex);
        (spilled ? spill : payload).ranges[base - m.corner] = end;
        if (!spilled && x->total <= little_of(kSpill)) ++fell_back;
      }
      running.fetch_sub(1);
    });
  }
  auto free = [](Held& held, uint64_t& word) {
    auto& ranges = held.ranges;
    for (auto first = ranges.begin(); first != ranges.end() && first->first == held.tail; first = ranges.erase(first))
      held.tail = first->second;
    store_release_sys(word, held.tail);
    return ranges.empty();
  };
  for (bool more = true; more;) {
    const bool over = running.load() == 0;
    pause_ns(2'000);  // else the streams would wait for the lock most of the time
    std::lock_guard lock(w.mutex);
    const bool none = free(payload, w.payload_tail) & free(spill, w.spill_tail);
    more = !over || !none;
  }
  for (std::thread& stream : streams) stream.join();
  CHECK_EQ(payload.tail, w.state.payload_head);
  CHECK_EQ(spill.tail, w.state.spill_head);
  CHECK(spill.tail > 10 * kSpill && fell_back != 0);
  std::printf(
      "reservations: %llu bytes through a ring of %llu, %llu through a spill region of %llu; %llu little ones did not find it free\n",
      static_cast<unsigned long long>(payload.tail), static_cast<unsigned long long>(kPayload), static_cast<unsigned long long>(spill.tail),
      static_cast<unsigned long long>(kSpill), static_cast<unsigned long long>(fell_back));
}

// One group at a time, and an engine that gives back what it is told to: where each goes, byte by byte.
class Little {
 public:
  explicit Little(bool complete) : w_(complete), random_(test_seed()) {}

  // A step of `count` tensors that have `rows` rows of `row_bytes`, or the last one of `last`. Its records, but OPEN and CLOSE.
  std::vector<dmi_record> step(uint32_t count, uint32_t rows, uint32_t most_bytes, uint32_t last = 0) {
    std::vector<dmi_span> spans(1);
    spans[0].count = rows;
    const uint32_t widths[DMI_SPACES] = {rows, rows, 0};
    RowLists lists;
    RowSource source;
    build_row_lists(lists, source, spans.data(), 1, widths, false);
    const std::vector<uint8_t> levels(kSites, DMI_LEVEL_FULL), left(kSites, kRecordsPerSite), top(kSites);
    const std::vector<uint16_t> selection(kSites);
    const std::vector<dmi_keep> keeps(kSites);
    const std::vector<Selection> selections;
    const std::vector<Watch> watches;
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
    from.table = w_.sites;
    Opening o{};
    o.step = ++number_;
    o.sites = kSites;
    Told told;
    tell_step(o, told, from);
    o.runs = told.runs.data();
    o.gates = told.gates.data();
    sources_.clear();
    std::vector<dmi_tensor> tensors;
    for (uint32_t site = 0; site < count; ++site) {
      const uint32_t row_bytes = last != 0 && site + 1 == count ? last : most_bytes;
      Source& s = sources_[site];
      s.row_bytes = row_bytes;
      s.expected.resize(uint64_t{rows} * row_bytes);
      for (std::byte& b : s.expected) b = std::byte(random_());
      s.size = {1, rows, row_bytes / 2};
      s.stride = {int64_t(rows * row_bytes / 2), row_bytes / 2, 1};
      s.tensor = {s.expected.data(), s.size.data(), s.stride.data(), site, DMI_DTYPE_BF16, 3, 0};
      tensors.push_back(s.tensor);
    }
    Group group{};
    Meeting meeting{};
    group.state = &w_.state;
    group.meeting = &meeting;
    group.count = count;
    describe_group(group, tensors.data(), 0, w_.sites, kSites);
    launch(1, [&](HostBlock& block) { open_step(block, w_.state, o, rows * kSites, rows * kSites); });
    launch(3, [&](HostBlock& block) { capture(block, group, block.shared.scratch); });
    launch(1, [&](HostBlock& block) { close_step(block, w_.state, Closing{}); });
    std::vector<dmi_record> got;
    for (dmi_record r; (r = w_.records[next_ % kRecords]).seq == next_ + 1; ++next_) {
      if (r.kind == DMI_KIND_CAPTURE) got.push_back(r);
    }
    store_release_sys(w_.record_tail, next_);
    return got;
  }

  // All of the group, behind each other from `at` on.
  void check(const std::vector<dmi_record>& records, dmi_place place, uint64_t at) {
    CHECK_EQ(records.size(), sources_.size());
    for (const dmi_record& r : records) {
      CHECK_EQ(r.payload_bytes, sources_.at(r.site).expected.size());
      check_one(r, place, at);
      at += aligned(r.payload_bytes);
    }
  }

  // Some of a tensor's first rows.
  void check_one(const dmi_record& r, dmi_place place, uint64_t at) {
    CHECK_EQ(r.outcome, DMI_OUTCOME_CAPTURED);
    CHECK_EQ(uint32_t{r.place}, uint32_t(place));
    CHECK_EQ(r.payload, at);
    CHECK_EQ(r.row_first, 0u);
    CHECK_EQ(r.payload_bytes, r.rows * sources_.at(r.site).row_bytes);
    CHECK_EQ(r.tensor_bytes, r.payload_bytes);
    const std::vector<std::byte>& ring = place == DMI_PLACE_SPILL ? w_.spill : w_.payload;
    for (uint64_t i = 0; i < r.payload_bytes; ++i) CHECK(ring[(r.payload + i) % ring.size()] == sources_.at(r.site).expected[i]);
  }

  World w_;

 private:
  std::mt19937_64 random_;
  uint64_t number_ = 0, next_ = 0;
  std::map<uint32_t, Source> sources_;
};

void test_little(bool complete) {
  Little x(complete);
  x.check(x.step(3, 2, 500), DMI_PLACE_SPILL, 0);  // 3 * 1024
  x.check(x.step(5, 2, 500), DMI_PLACE_RING, 0);   // larger than half of the region
  x.check(x.step(4, 2, 512), DMI_PLACE_SPILL, 3072);
  x.check(x.step(1, 2, 1024), DMI_PLACE_RING, 5 * 1024);  // 1 KiB is left
  x.check(x.step(1, 1, 1024), DMI_PLACE_SPILL, 7168);     // which is filled to its end
  x.check(x.step(1, 1, 2), DMI_PLACE_RING, 7 * 1024);
  store_release_sys(x.w_.spill_tail, 3072);
  x.check(x.step(2, 1, 1200), DMI_PLACE_SPILL, 8192);  // twice 1216
  store_release_sys(x.w_.spill_tail, 8192);
  x.check(x.step(4, 2, 500), DMI_PLACE_SPILL, 8192 + 2432);
  // 1,664 bytes to the end: a group that does not fit leaves them, says so, and begins anew.
  store_release_sys(x.w_.spill_tail, 8192 + 2432);
  std::vector<dmi_record> records = x.step(2, 1, 1000);
  const dmi_record corner = records[0];
  CHECK_EQ(corner.payload, uint64_t{8192 + 2432 + 4096});
  CHECK_EQ(corner.payload_bytes, 1664u);
  CHECK(corner.tensor_bytes > corner.payload_bytes);
  CHECK_EQ(corner.place, DMI_PLACE_SPILL);
  CHECK_EQ(corner.rows, 0u);
  CHECK_EQ(corner.size[0], 1u);
  CHECK_EQ(corner.site, records[1].site);
  records.erase(records.begin());
  x.check(records, DMI_PLACE_SPILL, 2 * 8192);
  CHECK_EQ(x.w_.counters.spilled_bytes, uint64_t{3 * 1000 + 4 * 1024 + 1024 + 2 * 1200 + 4 * 1000 + 2 * 1000});
  // A tail that claims what was never written is not believed.
  store_release_sys(x.w_.spill_tail, 1 << 20);
  x.check(x.step(4, 2, 500), DMI_PLACE_RING, 7 * 1024 + 64);
  CHECK_EQ(x.w_.counters.captured_rows, uint64_t{6 + 10 + 8 + 2 + 1 + 1 + 2 + 8 + 2 + 8});
  CHECK_EQ(x.w_.counters.other_rows[DMI_REASON_RING_FULL], 0u);
  CHECK_EQ(x.w_.state.aside, 0u);
}

// Little tensors with a large one behind them, which goes to the payload ring, or does not.
void test_little_and_large() {
  Little x(false);
  uint64_t spilled = 0, kept = 0;
  auto step = [&](uint64_t spill, uint64_t payload, uint32_t last) {
    std::vector<dmi_record> records = x.step(4, 2, 500, last);
    if (records.size() > 4 && records[0].rows == 0) {
      CHECK_EQ(records[0].payload + records[0].payload_bytes, spill);
      records.erase(records.begin());
    }
    CHECK(records.size() >= 4);
    for (uint32_t i = 0; i < 3; ++i) x.check_one(records[i], DMI_PLACE_SPILL, spill + i * 1024);
    if (records[3].outcome == DMI_OUTCOME_CAPTURED) x.check_one(records[3], DMI_PLACE_RING, payload);
    spilled += 3 * 1000;
    kept += 6 + (records[3].outcome == DMI_OUTCOME_CAPTURED ? records[3].rows : 0);
    return records;
  };
  CHECK_EQ(step(0, 0, 2000).size(), 4u);
  CHECK_EQ(step(3072, 4032, 2000).size(), 4u);
  x.check(x.step(4, 2, 500, 2000), DMI_PLACE_RING, 2 * 4032);  // 2 KiB of the region are left, all of them a corner
  kept += 8;
  store_release_sys(x.w_.spill_tail, 6144);
  std::vector<dmi_record> records = step(8192, 0, 2000);  // 1,216 bytes of the ring are left: no row of the last one fits
  CHECK_EQ(records.size(), 4u);
  CHECK_EQ(records[3].outcome, DMI_OUTCOME_DROPPED);
  CHECK_EQ(records[3].rows, 2u);
  records = step(8192 + 3072, 2 * 4032 + 7104, 1000);
  CHECK_EQ(records.size(), 5u);
  CHECK_EQ(records[3].rows, 1u);
  CHECK_EQ(records[4].outcome, DMI_OUTCOME_DROPPED);
  CHECK_EQ(records[4].row_first, 1u);
  CHECK_EQ(x.w_.counters.spilled_bytes, spilled);
  CHECK_EQ(x.w_.counters.captured_rows, kept);
  CHECK_EQ(x.w_.counters.other_rows[DMI_REASON_RING_FULL], 3u);
  CHECK_EQ(x.w_.state.aside, 0u);
}

}  // namespace
}  // namespace dmi::device

int main() {
  const uint64_t seed = test_seed();
  dmi::device::test_reservations(seed);
  dmi::device::test_little(false);
  dmi::device::test_little(true);
  dmi::device::test_little_and_large();
  dmi::device::test(true, seed, 200);
  dmi::device::test(false, seed + 1, 200);
  dmi::device::test(true, seed + 2, 200, true);
  dmi::device::test(false, seed + 3, 200, true);
  return 0;
}

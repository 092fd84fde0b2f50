// The protocol between lanes, pump and engine: wrap, full, spill, gates, gaps, aborts, closing; each byte and row accounted for.
#include <sys/wait.h>

#include <algorithm>
#include <string>

#include "engine.h"

namespace {

constexpr uint64_t kKiB = 1024;

dmi_ring_options options(dmi_mode mode) {
  dmi_ring_options o{};
  o.mode = mode;
  o.device = -1;
  o.lanes = 4;
  o.record_capacity = 256;
  o.command_capacity = 8;
  o.site_capacity = 64;
  o.payload_bytes = 64 * kKiB;
  o.table_bytes = 4 * kKiB;
  o.staging_bytes = 16 * kKiB;
  o.spill_bytes = 16 * kKiB;
  o.wait_bound_ns = 120'000'000'000;
  return o;
}

uint32_t add_site(int64_t ring, const std::string& name, std::initializer_list<uint8_t> roles, uint8_t flags = 0) {
  dmi_site site{};
  site.layer = DMI_NO_LAYER;
  site.space = DMI_SPACE_TOKENS;
  site.flags = flags;
  site.ndim = uint8_t(roles.size());
  std::copy(roles.begin(), roles.end(), site.role);
  site.name_bytes = uint32_t(name.size());
  std::copy(name.begin(), name.end(), site.name);
  const int64_t id = dmi_ring_add_site(ring, &site);
  if (id < 0) std::fprintf(stderr, "%s\n", dmi_last_error());
  CHECK(id >= 0);
  return uint32_t(id);
}

// Batch rows of one length, some of whose leading positions are pads.
struct Batch {
  uint32_t batch, width;
  std::vector<dmi_span> spans;
  uint64_t rows = 0;

  Batch(uint32_t batch, uint32_t width, std::mt19937_64* pads = nullptr) : batch(batch), width(width) {
    for (uint32_t b = 0; b < batch; ++b) {
      dmi_span span{};
      span.request = b;
      span.batch = b;
      span.first = pads != nullptr ? uint32_t((*pads)() % width) : 0;
      span.count = width - span.first;
      rows += span.count;
      if (span.count != 0) spans.push_back(span);
    }
  }
  int32_t open(int64_t ring, uint64_t step) const {
    const uint32_t widths[DMI_SPACES] = {width, 0, 0};
    return dmi_step_open(ring, step, spans.data(), uint32_t(spans.size()), widths, 0, 0, nullptr);
  }
};

// A [batch, width, inner] tensor in memory of its own, laid out as the order of dimensions says, outermost first.
struct Source {
  std::vector<uint32_t> data;
  int64_t size[3];
  int64_t stride[3];

  Source(uint64_t step, uint32_t site, const Batch& b, uint32_t inner, std::array<int, 3> order = {0, 1, 2})
      : data(size_t{b.batch} * b.width * inner), size{b.batch, b.width, inner} {
    int64_t next = 1;
    for (int d = 3; d-- > 0;) {
      stride[order[size_t(d)]] = next;
      next *= size[order[size_t(d)]];
    }
    for (uint64_t i = 0; i < b.batch; ++i) {
      for (uint64_t j = 0; j < b.width; ++j) {
        for (uint64_t k = 0; k < inner; ++k) {
          data[size_t(int64_t(i) * stride[0] + int64_t(j) * stride[1] + int64_t(k) * stride[2])] = value_of(step, site, i << 32 | j, k);
        }
      }
    }
  }
  dmi_tensor tensor(uint32_t site) const { return {data.data(), size, stride, site, DMI_DTYPE_U32, 3, -1}; }
};

void capture(int64_t ring, uint64_t step, uint32_t site, const Batch& batch, uint32_t inner) {
  const Source source(step, site, batch, inner);
  const dmi_tensor tensor = source.tensor(site);
  dmi_capture(ring, &tensor, 1, 0, nullptr);
}

struct Totals {
  dmi_counters sum{};
  dmi_gauges gauges{};

  explicit Totals(int64_t ring) {
    dmi_counters lanes[DMI_MAX_LANES];
    const int32_t count = dmi_ring_counters(ring, lanes, DMI_MAX_LANES, &gauges);
    CHECK(count > 0);
    for (int32_t i = 0; i < count; ++i) {
      auto* to = reinterpret_cast<uint64_t*>(&sum);
      auto* from = reinterpret_cast<uint64_t*>(&lanes[i]);
      for (size_t w = 0; w < sizeof sum / 8; ++w) to[w] += from[w];
    }
  }
};

void expect_books_agree(int64_t ring, const Books& books) {
  const Totals totals(ring);
  CHECK_EQ(totals.sum.records, books.records);
  CHECK_EQ(totals.sum.steps, books.steps + books.gap_steps);
  CHECK_EQ(totals.sum.captured_rows, books.captured);
  CHECK_EQ(totals.sum.captured_bytes, books.bytes);
  CHECK_EQ(totals.sum.spilled_bytes, books.spilled);
  for (int reason = 0; reason < DMI_REASONS; ++reason) {
    const uint64_t gap = reason == DMI_REASON_RECORDS_FULL ? books.gap_rows : 0;
    CHECK_EQ(totals.sum.other_rows[reason], books.other[reason] + gap);
  }
}

// Several threads, an engine now fast, now slow: every row of every site has one outcome, every captured byte is right.
void test_traffic(dmi_mode mode, uint32_t laziness_us) {
  const dmi_ring_options o = options(mode);
  const int64_t ring = dmi_ring_create(&o);
  CHECK(ring > 0);
  constexpr uint32_t kSites = 6;
  for (uint32_t site = 0; site < kSites; ++site) add_site(ring, "s" + std::to_string(site), {DMI_ROLE_ROW, DMI_ROLE_ROW, DMI_ROLE_INNER});
  Books books;
  {
    Engine engine(ring);
    engine.start(laziness_us);
    std::atomic<uint64_t> produced{0}, steps{0};
    std::vector<std::thread> threads;
    for (uint64_t t = 0; t < 5; ++t) {  // one more than lanes: best-effort books a gap, complete mode waits
      threads.emplace_back([&, t] {
        std::mt19937_64 random(test_seed() * 31 + t);
        for (uint64_t n = 0; n < 60; ++n) {
          const uint64_t step = n * 8 + t;
          const Batch batch(1 + uint32_t(random() % 4), 1 + uint32_t(random() % 12), random() % 2 ? &random : nullptr);
          const int32_t opened = batch.open(ring, step);
          CHECK(opened >= 0);
          steps++;
          produced += batch.rows * kSites;
          if (opened == 1) {
            std::vector<Source> sources;
            std::vector<dmi_tensor> group;
            for (uint32_t site = 0; site < kSites; ++site) {
              const uint32_t inner = 1 + uint32_t(random() % 300);
              std::array<int, 3> order = {0, 1, 2};
              std::shuffle(order.begin(), order.end(), random);
              sources.emplace_back(step, site, batch, inner, order);
            }
            for (uint32_t site = 0; site < kSites; ++site) group.push_back(sources[site].tensor(site));
            const uint32_t split = uint32_t(random() % (kSites + 1));
            dmi_capture(ring, group.data(), split, 0, nullptr);
            dmi_capture(ring, group.data() + split, kSites - split, 0, nullptr);
            for (Source& source : sources) std::fill(source.data.begin(), source.data.end(), 0xdeadbeef);
          }
          CHECK_EQ(dmi_step_close(ring, step, 0, nullptr), DMI_OK);
          // Nobody waits for the engine in best-effort mode: leave it time, or all that is tested is dropping.
          if (mode == DMI_MODE_BEST_EFFORT) usleep(useconds_t(random() % 4000));
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK_EQ(dmi_ring_finish(ring, 120'000'000'000), DMI_OK);
    engine.stop();
    CHECK(!engine.mid_step());
    books = engine.books();
    CHECK_EQ(books.steps + books.gap_steps, steps.load());
    uint64_t outcomes = books.captured + books.gap_rows;
    for (uint64_t rows : books.other) outcomes += rows;
    CHECK_EQ(outcomes, produced.load());
    if (mode == DMI_MODE_COMPLETE) CHECK_EQ(books.captured, produced.load());
  }
  expect_books_agree(ring, books);
  const Totals totals(ring);
  if (mode == DMI_MODE_BEST_EFFORT) CHECK_EQ(totals.sum.waits, 0u);
  std::printf("  traffic: %llu rows captured, %llu ring_full, %llu gated, %llu gap steps, %llu spilled bytes, %llu waits\n",
              (unsigned long long)books.captured, (unsigned long long)books.other[DMI_REASON_RING_FULL], (unsigned long long)books.gated,
              (unsigned long long)books.gap_steps, (unsigned long long)books.spilled, (unsigned long long)totals.sum.waits);
  CHECK_EQ(dmi_ring_close(ring), DMI_OK);
}

// No engine: the ring takes what fits, whole rows of it, then drops; records fill up, then steps are gated, then they are a gap. Later an
// engine finds it all.
void test_fill_up() {
  dmi_ring_options o = options(DMI_MODE_BEST_EFFORT);
  o.record_capacity = 64;
  const int64_t ring = dmi_ring_create(&o);
  add_site(ring, "a", {DMI_ROLE_ROW, DMI_ROLE_ROW, DMI_ROLE_INNER});
  const Batch batch(1, 10);
  const uint32_t inner = 1000;  // 4,000 bytes a row, 64 KiB of ring: one step of 10 rows, then 6 rows
  uint64_t step = 0;
  for (; step < 2; ++step) {
    CHECK_EQ(batch.open(ring, step), 1);
    capture(ring, step, 0, batch, inner);
    CHECK_EQ(dmi_step_close(ring, step, 0, nullptr), DMI_OK);
  }
  CHECK_EQ(Totals(ring).sum.captured_rows, 16u);
  CHECK_EQ(Totals(ring).sum.other_rows[DMI_REASON_RING_FULL], 4u);
  uint64_t open = 0, gated = 0, gaps = 0;
  for (; step < 100; ++step) {
    const uint64_t before = Totals(ring).sum.steps;
    const int32_t opened = batch.open(ring, step);
    CHECK(opened >= 0);
    capture(ring, step, 0, batch, inner);
    CHECK_EQ(dmi_step_close(ring, step, 0, nullptr), DMI_OK);
    open += opened == 1;
    const bool said = Totals(ring).sum.steps != before;
    gated += opened == 0 && said;
    gaps += !said;
    if (gaps != 0) CHECK(!said);
  }
  CHECK(open > 0);
  CHECK(gated >= 5);
  CHECK(gaps > 0);
  CHECK_EQ(Totals(ring).gauges.gap_steps, gaps);
  CHECK_EQ(Totals(ring).gauges.gap_rows, gaps * 10);
  Books books;
  {
    Engine engine(ring);
    while (engine.drain()) {
    }
    CHECK_EQ(engine.books().gap_steps, 0u);
    CHECK_EQ(batch.open(ring, step), 1);  // room again: the gap comes first
    capture(ring, step, 0, batch, inner);
    CHECK_EQ(dmi_step_close(ring, step, 0, nullptr), DMI_OK);
    while (engine.drain()) {
    }
    books = engine.books();
  }
  CHECK_EQ(books.gap_steps, gaps);
  CHECK_EQ(books.gap_rows, gaps * 10);
  CHECK_EQ(books.gated, gated);
  CHECK_EQ(books.captured, 16u + 10);
  CHECK_EQ(books.other[DMI_REASON_RECORDS_FULL], gated * 10);
  CHECK_EQ(books.other[DMI_REASON_RING_FULL], 4 + open * 10);
  expect_books_agree(ring, books);
  CHECK_EQ(dmi_ring_close(ring), DMI_OK);
}

// Complete mode streams what is larger than the ring, and rows larger than the ring, through ring and spill.
void test_larger_than_the_ring() {
  const dmi_ring_options o = options(DMI_MODE_COMPLETE);
  const int64_t ring = dmi_ring_create(&o);
  add_site(ring, "wide", {DMI_ROLE_ROW, DMI_ROLE_ROW, DMI_ROLE_INNER});
  add_site(ring, "long", {DMI_ROLE_ROW, DMI_ROLE_ROW, DMI_ROLE_INNER});
  add_site(ring, "odd", {DMI_ROLE_ROW, DMI_ROLE_ROW, DMI_ROLE_INNER});
  Books books;
  {
    Engine engine(ring);
    engine.start();
    const Batch batch(2, 40);
    for (uint64_t step = 0; step < 4; ++step) {
      CHECK_EQ(batch.open(ring, step), 1);
      capture(ring, step, 0, batch, 20'000);  // 80 kB a row
      capture(ring, step, 1, batch, 4'000);   // 1.3 MB of 16 kB rows
      capture(ring, step, 2, batch, 1'237);
      CHECK_EQ(dmi_step_close(ring, step, 0, nullptr), DMI_OK);
    }
    engine.stop();
    books = engine.books();
  }
  CHECK_EQ(books.captured, 4u * 80 * 3);
  CHECK(books.parts > 0);
  CHECK(books.spilled > 0);
  expect_books_agree(ring, books);
  CHECK_EQ(dmi_ring_close(ring), DMI_OK);
}

// Complete mode without an engine: the wait ends at its bound, once a step, and the boundary says so.
void test_timeout() {
  dmi_ring_options o = options(DMI_MODE_COMPLETE);
  o.wait_bound_ns = 50'000'000;
  o.record_capacity = 64;
  const int64_t ring = dmi_ring_create(&o);
  add_site(ring, "a", {DMI_ROLE_ROW, DMI_ROLE_ROW, DMI_ROLE_INNER});
  add_site(ring, "b", {DMI_ROLE_ROW, DMI_ROLE_ROW, DMI_ROLE_INNER});
  const Batch batch(1, 10);
  uint64_t failed_closes = 0, failed_opens = 0;
  const uint64_t start = dmi::monotonic_ns();
  for (uint64_t step = 0; step < 12; ++step) {
    const int32_t opened = batch.open(ring, step);
    if (opened == DMI_ERROR_TIMEOUT) {
      CHECK(std::string(dmi_last_error()).find("engine") != std::string::npos);
      ++failed_opens;
      continue;
    }
    CHECK_EQ(opened, 1);
    capture(ring, step, 0, batch, 1000);
    capture(ring, step, 1, batch, 1000);
    const int32_t closed = dmi_step_close(ring, step, 0, nullptr);
    CHECK(closed == DMI_OK || closed == DMI_ERROR_TIMEOUT);
    failed_closes += closed == DMI_ERROR_TIMEOUT;
  }
  const uint64_t waits = failed_opens + failed_closes;
  CHECK(failed_opens > 0);
  CHECK(failed_closes > 0);
  CHECK_EQ(Totals(ring).sum.waits, waits);
  CHECK(Totals(ring).sum.wait_ns >= waits * o.wait_bound_ns);
  CHECK(dmi::monotonic_ns() - start < waits * o.wait_bound_ns + 60'000'000'000);
  Books books;
  {
    Engine engine(ring);
    while (engine.drain()) {
    }
    CHECK_EQ(dmi_ring_finish(ring, 120'000'000'000), DMI_OK);
    while (engine.drain()) {
    }
    books = engine.books();
  }
  uint64_t outcomes = books.captured + books.gap_rows;
  for (uint64_t rows : books.other) outcomes += rows;
  CHECK_EQ(outcomes, 12u * 20);
  CHECK(books.spilled > 0);
  CHECK(books.other[DMI_REASON_TIMEOUT] > 0);
  CHECK(books.parts > 0);  // of a row that met the spill ring's end, and was given up there
  expect_books_agree(ring, books);
  CHECK_EQ(dmi_ring_close(ring), DMI_OK);
}

// Closing ends the waits of other threads; a handle that is closed is harmless.
void test_close_while_waiting() {
  dmi_ring_options o = options(DMI_MODE_COMPLETE);
  o.wait_bound_ns = 600'000'000'000;
  const int64_t ring = dmi_ring_create(&o);
  add_site(ring, "a", {DMI_ROLE_ROW, DMI_ROLE_ROW, DMI_ROLE_INNER});
  std::atomic<bool> opened{false};
  std::thread thread([&] {
    const Batch batch(1, 100);
    CHECK_EQ(batch.open(ring, 0), 1);
    opened = true;
    capture(ring, 0, 0, batch, 1000);  // 400 kB: fills ring and spill, then waits
    CHECK_EQ(dmi_step_close(ring, 0, 0, nullptr), DMI_ERROR_CLOSED);
  });
  while (!opened || Totals(ring).sum.spilled_bytes == 0) usleep(1000);
  CHECK_EQ(dmi_ring_close(ring), DMI_OK);
  thread.join();
  CHECK_EQ(dmi_ring_close(ring), DMI_OK);
  const Batch batch(1, 1);
  CHECK_EQ(batch.open(ring, 1), DMI_ERROR_CLOSED);
  capture(ring, 1, 0, batch, 4);
}

// What a forward that raised leaves behind: an explicit abort, an open over an open step, a thread that ends.
void test_aborts() {
  const dmi_ring_options o = options(DMI_MODE_BEST_EFFORT);
  const int64_t ring = dmi_ring_create(&o);
  add_site(ring, "a", {DMI_ROLE_ROW, DMI_ROLE_ROW, DMI_ROLE_INNER});
  const Batch batch(1, 4);
  capture(ring, 0, 0, batch, 8);  // outside a step
  CHECK_EQ(batch.open(ring, 0), 1);
  CHECK_EQ(dmi_step_close(ring, 0, 1, nullptr), DMI_OK);
  CHECK_EQ(dmi_step_close(ring, 0, 0, nullptr), DMI_OK);  // not open any more
  CHECK_EQ(batch.open(ring, 1), 1);
  CHECK_EQ(batch.open(ring, 2), 1);
  CHECK_EQ(dmi_step_close(ring, 1, 0, nullptr), DMI_OK);  // nor this
  capture(ring, 2, 0, batch, 8);
  CHECK_EQ(dmi_step_close(ring, 2, 0, nullptr), DMI_OK);
  std::thread([&] { CHECK_EQ(batch.open(ring, 3), 1); }).join();
  for (uint64_t step = 4; step < 20; ++step) {  // lanes of threads that ended are used again
    std::thread([&] {
      CHECK_EQ(batch.open(ring, step), 1);
      capture(ring, step, 0, batch, 8);
      CHECK_EQ(dmi_step_close(ring, step, 0, nullptr), DMI_OK);
    }).join();
  }
  uint64_t closed[DMI_MAX_LANES];
  CHECK_EQ(dmi_ring_closed_steps(ring, closed, DMI_MAX_LANES), 4);
  CHECK_EQ(*std::max_element(closed, closed + 4, [](uint64_t a, uint64_t b) { return a + 1 < b + 1; }), 19u);
  Books books;
  {
    Engine engine(ring);
    while (engine.drain()) {
    }
    books = engine.books();
    CHECK(!engine.mid_step());
  }
  CHECK_EQ(books.steps, 20u);
  CHECK_EQ(books.aborted, 3u);
  CHECK_EQ(books.captured, 17u * 4);
  CHECK_EQ(Totals(ring).sum.outside, 1u);
  CHECK_EQ(dmi_ring_close(ring), DMI_OK);
}

// A site that fires again and again takes what is left of the record ring, but not what the others and the CLOSE need.
void test_records_set_aside() {
  dmi_ring_options o = options(DMI_MODE_BEST_EFFORT);
  o.record_capacity = 64;
  const int64_t ring = dmi_ring_create(&o);
  add_site(ring, "event", {DMI_ROLE_ROW, DMI_ROLE_ROW, DMI_ROLE_INNER}, DMI_SITE_EVENT | DMI_SITE_OPTIONAL);
  for (int i = 1; i < 8; ++i) add_site(ring, "s" + std::to_string(i), {DMI_ROLE_ROW, DMI_ROLE_ROW, DMI_ROLE_INNER});
  const Batch batch(1, 1);
  CHECK_EQ(batch.open(ring, 0), 1);
  for (int i = 0; i < 200; ++i) capture(ring, 0, 0, batch, 2);
  for (uint32_t site = 1; site < 8; ++site) capture(ring, 0, site, batch, 2);
  CHECK_EQ(dmi_step_close(ring, 0, 0, nullptr), DMI_OK);
  const Totals totals(ring);
  {
    Engine engine(ring);
    while (engine.drain()) {
    }
    CHECK(!engine.mid_step());
    CHECK(engine.books().captured > 40);
    CHECK_EQ(totals.sum.captured_rows, engine.books().captured);
    CHECK_EQ(totals.sum.captured_rows + totals.sum.other_rows[DMI_REASON_RECORDS_FULL], 207u);
    CHECK(engine.books().records <= 64);
  }
  CHECK_EQ(dmi_ring_close(ring), DMI_OK);
}

// A gate at OFF acts at the next step; the odd version of an engine that died while writing does not stop the model.
void test_gates() {
  const dmi_ring_options o = options(DMI_MODE_BEST_EFFORT);
  const int64_t ring = dmi_ring_create(&o);
  add_site(ring, "a", {DMI_ROLE_ROW, DMI_ROLE_ROW, DMI_ROLE_INNER});
  add_site(ring, "b", {DMI_ROLE_ROW, DMI_ROLE_ROW, DMI_ROLE_INNER});
  const Batch batch(1, 4);
  auto use = std::make_unique<dmi::Use>(ring);
  const dmi::Mapping& mapping = (*use)->mapping();
  dmi_control& control = mapping.control();
  auto set = [&](uint64_t version, uint32_t site, uint8_t level) {
    dmi::store_release(control.policy.value, version - 1);
    std::atomic_ref(mapping.gates()[site].level).store(level, std::memory_order_relaxed);
    dmi::store_release(control.policy.value, version);
  };
  uint64_t step = 0;
  auto run = [&](auto during) {
    CHECK_EQ(batch.open(ring, step), 1);
    during();
    capture(ring, step, 0, batch, 8);
    capture(ring, step, 1, batch, 8);
    CHECK_EQ(dmi_step_close(ring, step, 0, nullptr), DMI_OK);
    ++step;
  };
  auto nothing = [] {};
  run(nothing);
  CHECK_EQ(Totals(ring).sum.captured_rows, 8u);
  run([&] { set(2, 1, DMI_LEVEL_OFF); });  // latched at open: too late for this step
  CHECK_EQ(Totals(ring).sum.captured_rows, 16u);
  run(nothing);
  CHECK_EQ(Totals(ring).sum.captured_rows, 20u);
  CHECK_EQ(Totals(ring).sum.other_rows[DMI_REASON_POLICY], 4u);
  dmi::store_release(control.policy.value, 3);
  run(nothing);
  CHECK_EQ(Totals(ring).sum.captured_rows, 24u);
  CHECK_EQ(Totals(ring).sum.other_rows[DMI_REASON_POLICY], 8u);
  set(4, 1, DMI_LEVEL_FULL);
  run(nothing);
  CHECK_EQ(Totals(ring).sum.captured_rows, 32u);
  {
    Engine engine(ring);
    while (engine.drain()) {
    }
    CHECK_EQ(engine.books().other[DMI_REASON_POLICY], 8u);
  }
  use.reset();
  CHECK_EQ(dmi_ring_close(ring), DMI_OK);
}

// An engine that writes nonsense into the words it owns gets nothing out of us but refusals.
void test_hostile_engine() {
  const dmi_ring_options o = options(DMI_MODE_BEST_EFFORT);
  const int64_t ring = dmi_ring_create(&o);
  add_site(ring, "a", {DMI_ROLE_ROW, DMI_ROLE_ROW, DMI_ROLE_INNER});
  {
    dmi::Use use(ring);
    dmi_control& control = use->mapping().control();
    dmi::store_release(control.payload_tail.value, ~uint64_t{0});
    dmi::store_release(control.lane[0].record_tail.value, ~uint64_t{0} / 2);
    dmi::store_release(control.lane[0].table_tail.value, ~uint64_t{0} / 2);
    const Batch batch(1, 10);
    for (uint64_t step = 0; step < 400; ++step) {
      CHECK(batch.open(ring, step) >= 0);
      capture(ring, step, 0, batch, 1000);
      CHECK_EQ(dmi_step_close(ring, step, 0, nullptr), DMI_OK);
    }
    CHECK_EQ(Totals(ring).sum.captured_rows, 16u);  // what fits an undrained ring
    CHECK(Totals(ring).gauges.gap_steps > 0);
    dmi_command* commands = use->mapping().commands();
    commands[0] = {0, 64, 16 * kKiB - 32, 0};  // beyond staging
    commands[1] = {0, 65 * kKiB, 0, 1};        // more than the payload ring
    commands[2] = {0, 64, ~uint64_t{0}, 2};
    commands[3] = {0, 64, 0, 7};  // not its index
    commands[4] = {128, 64, 64, 4};
    dmi::store_release(control.commands_head.value, 5);
    dmi::ring_bell(use->mapping().pump_bell());
    while (dmi::load_acquire(control.commands_done.value) != 5) usleep(100);
    CHECK_EQ(Totals(ring).gauges.bad_commands, 4u);
    dmi::store_release(control.commands_head.value, 5000);  // more than the ring of commands holds
    dmi::ring_bell(use->mapping().pump_bell());
    while (Totals(ring).gauges.bad_commands < 5) usleep(100);
    CHECK_EQ(dmi::load_acquire(control.commands_done.value), 5u);
  }
  CHECK_EQ(dmi_ring_close(ring), DMI_OK);
}

// A forked child does nothing to its parent's ring, can have its own, and exits cleanly.
void test_fork() {
  const dmi_ring_options o = options(DMI_MODE_BEST_EFFORT);
  const int64_t ring = dmi_ring_create(&o);
  add_site(ring, "a", {DMI_ROLE_ROW, DMI_ROLE_ROW, DMI_ROLE_INNER});
  const Batch batch(1, 4);
  CHECK_EQ(batch.open(ring, 0), 1);
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    capture(ring, 0, 0, batch, 8);
    CHECK_EQ(dmi_step_close(ring, 0, 0, nullptr), DMI_ERROR_CLOSED);
    CHECK_EQ(batch.open(ring, 1), DMI_ERROR_CLOSED);
    CHECK_EQ(dmi_ring_close(ring), DMI_OK);
#ifndef __SANITIZE_THREAD__  // which cannot follow a thread that a forked child starts
    const int64_t own = dmi_ring_create(&o);
    CHECK(own > 0 && own != ring);
    add_site(own, "a", {DMI_ROLE_ROW, DMI_ROLE_ROW, DMI_ROLE_INNER});
    CHECK_EQ(batch.open(own, 0), 1);
    capture(own, 0, 0, batch, 8);
    CHECK_EQ(dmi_step_close(own, 0, 0, nullptr), DMI_OK);
    {
      Engine engine(own);
      CHECK(engine.drain());
      CHECK_EQ(engine.books().captured, 4u);
    }
    CHECK_EQ(dmi_ring_close(own), DMI_OK);
#endif
    std::exit(0);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  capture(ring, 0, 0, batch, 8);
  CHECK_EQ(dmi_step_close(ring, 0, 0, nullptr), DMI_OK);
  {
    Engine engine(ring);
    CHECK(engine.drain());
    CHECK_EQ(engine.books().captured, 4u);
    CHECK_EQ(engine.books().steps, 1u);
  }
  CHECK_EQ(dmi_ring_close(ring), DMI_OK);
}

void run(const char* name, void (*test)()) {
  std::printf(" %s\n", name);
  std::fflush(stdout);
  test();
}

}  // namespace

int main() {
  test_seed();
  run("traffic, best-effort, prompt engine", [] { test_traffic(DMI_MODE_BEST_EFFORT, 0); });
  run("traffic, best-effort, slow engine", [] { test_traffic(DMI_MODE_BEST_EFFORT, 2000); });
  run("traffic, complete, prompt engine", [] { test_traffic(DMI_MODE_COMPLETE, 0); });
  run("traffic, complete, slow engine", [] { test_traffic(DMI_MODE_COMPLETE, 1000); });
  run("fill up", test_fill_up);
  run("larger than the ring", test_larger_than_the_ring);
  run("timeout", test_timeout);
  run("close while waiting", test_close_while_waiting);
  run("aborts", test_aborts);
  run("records set aside", test_records_set_aside);
  run("gates", test_gates);
  run("hostile engine", test_hostile_engine);
  run("fork", test_fork);
}

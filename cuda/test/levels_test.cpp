// Levels, row selection and what conditions keep: random tensors of every dtype and layout under random gates and watches, against sums and
// codes made anew in double. On the CPU's back end and on a device of threads; built with DMI_TEST_CUDA on a GPU, where a graph that is
// recorded once follows the gates and the watches too.
#ifdef DMI_TEST_CUDA
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <mutex>
#include <set>
#include <string>

#include "engine.h"
#include "levels.h"
#include "oracle.h"

namespace {

constexpr uint32_t kBytes[] = {0, 1, 1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8, 1, 1, 1, 1, 1, 8, 16};
constexpr uint32_t kKeys = 40;  // of the cache, of which keyed sites have the last 37
constexpr uint8_t kLevels[] = {DMI_LEVEL_FULL, DMI_LEVEL_FP8, DMI_LEVEL_INT8, DMI_LEVEL_SAMPLED, DMI_LEVEL_STATS, DMI_LEVEL_OFF};

#ifdef DMI_TEST_CUDA
constexpr bool kCuda = true;

void check_cuda(cudaError_t status) {
  if (status != cudaSuccess) std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  CHECK(status == cudaSuccess);
}

// The GPU's copies of tensors. Never given back: a free would wait for the GPU, which may wait for the engine.
const std::byte* to_gpu(const std::vector<std::byte>& tensor) {
  constexpr size_t kRegion = 1 << 30;
  static std::byte* region = nullptr;
  static size_t used = 0;
  if (region == nullptr) check_cuda(cudaMalloc(reinterpret_cast<void**>(&region), kRegion));
  std::byte* copy = region + used;
  used += (tensor.size() + 255) / 256 * 256;
  CHECK(used <= kRegion);
  check_cuda(cudaMemcpy(copy, tensor.data(), tensor.size(), cudaMemcpyHostToDevice));
  return copy;
}
#else
constexpr bool kCuda = false;
const std::byte* to_gpu(const std::vector<std::byte>& tensor) { return tensor.data(); }
#endif

struct Site {
  uint32_t dtype, inner, heads;
  bool keyed, ended;  // ended: the KEY dimension is not the last one
  dmi_gate gate;
  dmi_keep keep;
};

enum class Ring { kTight, kRoomy };

class World {
 public:
  World(std::mt19937_64& random, dmi_mode mode, int32_t device, Ring ring) : random_(random), device_(int16_t(device)) {
    dmi_ring_options o{};
    o.mode = mode;
    o.device = device;
    o.lanes = 1;
    o.record_capacity = ring == Ring::kTight && mode != DMI_MODE_COMPLETE ? 4096 : 16384;
    o.command_capacity = 8;
    o.site_capacity = 64;
    // Small enough that rows are dropped, and in complete mode spilled and cut; or with room for everything. What is little is spilled.
    o.payload_bytes = ring == Ring::kRoomy ? 64 << 20 : mode == DMI_MODE_COMPLETE ? 16 << 10 : 256 << 10;
    o.table_bytes = 256 << 10;
    o.staging_bytes = 64 << 10;
    o.spill_bytes = mode == DMI_MODE_COMPLETE ? 8 << 10 : 32 << 10;
    o.wait_bound_ns = 120'000'000'000;
    ring_ = dmi_ring_create(&o);
    CHECK(ring_ > 0);
    for (uint32_t i = 0; i < 24; ++i) {
      Site site{1 + i % 20, uint32_t(1 + below(70)), uint32_t(1 + below(3)), i % 5 == 4, below(2) == 0, {}, {}};
      dmi_site told{};
      told.layer = DMI_NO_LAYER;
      told.space = DMI_SPACE_TOKENS;
      told.ndim = 4;
      const uint8_t other = site.keyed ? DMI_ROLE_KEY : DMI_ROLE_INNER;
      const uint8_t roles[] = {DMI_ROLE_ROW, DMI_ROLE_ROW, site.ended ? other : uint8_t{DMI_ROLE_INNER},
                               site.ended ? uint8_t{DMI_ROLE_INNER} : other};
      std::copy_n(roles, 4, told.role);
      std::string name = "s";
      name += std::to_string(i);
      told.name_bytes = uint32_t(name.size());
      std::copy(name.begin(), name.end(), told.name);
      CHECK_EQ(dmi_ring_add_site(ring_, &told), int64_t(i));
      sites_.push_back(site);
    }
    engine_ = std::make_unique<Engine>(ring_);
    engine_->together = below(2) == 0;
    engine_->observe = [this](const Engine::Lane& lane, const dmi_record& r, const std::vector<std::byte>& bytes) { see(lane, r, bytes); };
    exact_ = ring == Ring::kRoomy || mode == DMI_MODE_COMPLETE;
    threaded_ = mode == DMI_MODE_COMPLETE;
    if (threaded_) engine_->start();
  }
  ~World() {
    engine_.reset();
    CHECK_EQ(dmi_ring_close(ring_), DMI_OK);
  }

  void step(uint64_t number) {
    if (below(3) == 0 || number == 0) gates();
    // A copy to the GPU waits in the driver for what is under way there, with its locks: the pump's copies, which that may wait for, come
    // behind it.
    if (kCuda) settle();
    std::vector<dmi_span> moving = spans_;
    if (number != 0 && below(2) == 0 && move_on()) {
      draw_data(uint32_t(spans_.size()));
      keep(number);
      const dmi_series series{ring_, moving.data(), uint32_t(moving.size()), {width_, 0, 0}, 0};
      CHECK_EQ(dmi_step_next(&series, number, kKeys, nullptr), 1);
      CHECK(std::memcmp(moving.data(), spans_.data(), spans_.size() * sizeof(dmi_span)) == 0);
    } else {
      make(number);
      const uint32_t widths[DMI_SPACES] = {width_, 0, 0};
      CHECK_EQ(dmi_step_open(ring_, number, spans_.data(), uint32_t(spans_.size()), widths, kKeys, 0, nullptr), 1);
    }
    offer(nullptr);
    CHECK_EQ(dmi_step_close(ring_, number, 0, nullptr), DMI_OK);
    if (threaded_) return;
    settle();
    if (exact_ || below(2) == 0) engine_->drain();
  }
#ifdef DMI_TEST_CUDA
  // All captures of a step of one shape in a graph; then steps of that shape, under other gates each time.
  void replay(uint64_t steps) {
    make(0);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t recorded;
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    offer(stream);
    check_cuda(cudaStreamEndCapture(stream, &graph));
    check_cuda(cudaGraphInstantiate(&recorded, graph, 0));
    for (uint64_t number = 1; number <= steps; ++number) {
      gates();
      draw_spans(number, uint32_t(spans_.size()));
      keep(number);
      const uint32_t widths[DMI_SPACES] = {width_, 0, 0};
      CHECK_EQ(dmi_step_open(ring_, number, spans_.data(), uint32_t(spans_.size()), widths, kKeys, 0, stream), 1);
      check_cuda(cudaGraphLaunch(recorded, stream));
      CHECK_EQ(dmi_step_close(ring_, number, 0, stream), DMI_OK);
      settle();
      engine_->drain();
    }
    check_cuda(cudaGraphExecDestroy(recorded));
    check_cuda(cudaGraphDestroy(graph));
    check_cuda(cudaStreamDestroy(stream));
  }
#endif
  void drain() { engine_->drain(); }
  void stop() {
    settle();
    engine_->stop();
  }
  const Books& books() const { return engine_->books(); }
  dmi_counters counters() const {
    dmi_counters counters{};
    dmi_gauges gauges{};
    CHECK_EQ(dmi_ring_counters(ring_, &counters, 1, &gauges), 1);
    return counters;
  }
  uint64_t levels[DMI_LEVELS] = {}, kept = 0, stayed = 0;  // stayed: below full, beside rows of the site that are kept

 private:
  struct Step {
    std::vector<dmi_span> spans;
    std::vector<std::vector<std::byte>> data;
    std::vector<std::array<int64_t, 4>> size, stride;
    std::vector<dmi_gate> gates;
    std::vector<dmi_keep> keeps;
    std::vector<dmi_clause> clauses;
    std::map<uint64_t, uint64_t> members;
    uint64_t groups;
    std::vector<std::map<uint64_t, uint64_t>> surely, perhaps;  // by site, by request: watches that were met
    std::set<std::pair<uint32_t, uint32_t>> offered;            // site and row
  };

  uint64_t below(uint64_t n) { return random_() % n; }

  // All tensors, in groups of some.
  void offer(void* stream) {
    std::vector<dmi_tensor> group;
    for (uint32_t i = 0; i < sites_.size(); ++i) {
      group.push_back({at_[i], size_[i].data(), stride_[i].data(), i, uint8_t(sites_[i].dtype), 4, device_});
      if (i + 1 != sites_.size() && group_[i + 1] == group_[i]) continue;
      dmi_capture(ring_, group.data(), uint32_t(group.size()), 0, stream);
      group.clear();
    }
  }
  // What was closed is there to be drained when this returns.
  void settle() {
    if (device_ >= 0) CHECK_EQ(dmi_ring_settle(ring_, 60'000'000'000), DMI_OK);
  }

  void gates() {
    dmi::Use use(ring_);
    const dmi::Mapping& mapping = use->mapping();
    dmi_control& control = mapping.control();
    const uint64_t version = (control.policy.value | 1) + 1;
    dmi::store_release(control.policy.value, version - 1);
    std::vector<dmi_clause> clauses(12);
    for (size_t i = 0; i < clauses.size(); ++i) {
      dmi_clause& c = clauses[i];
      c = {};
      c.seed = below(5);
      c.threshold = below(2) == 0 ? 0 : random_();
      c.region = uint8_t(below(3));
      c.one = below(4) == 0 ? 1 : 0;
      c.request = below(12);
      c.groups = 70 + below(2);
      c.group = uint8_t(below(2) == 0 ? 0 : below(4) == 0 ? DMI_GROUP_UNKNOWN : 1 + below(2) * (DMI_MAX_GROUPS - 1));
      c.phases = uint8_t(1 + below(3));
      c.step = uint32_t(1 + below(4));
      c.stride = uint16_t(1 + below(4));
      c.level = kLevels[below(6)];
      const int64_t from = int64_t(below(9)) - (c.region == DMI_REGION_PROMPT ? 4 : 0);
      c.start = uint64_t(from);
      c.stop = below(2) == 0 ? DMI_OPEN_END : uint64_t(from + 1 + int64_t(below(9)));
      if (from < 0 && int64_t(c.stop) >= 0 && c.stop != DMI_OPEN_END) c.stop = DMI_OPEN_END;
      mapping.clauses()[i] = c;
    }
    for (size_t i = 0; i < sites_.size(); ++i) {
      dmi_gate& g = sites_[i].gate;
      g = {};
      g.level = kLevels[below(6)];
      g.stride = uint16_t(1 + below(5));
      g.top = uint8_t(below(2) == 0 ? 0 : below(3) == 0 ? DMI_MOST_TOP : 1 + below(9));
      g.clause = uint16_t(below(10));
      g.clauses = uint16_t(below(2) == 0 ? 0 : 1 + below(2));
      uint64_t word;
      std::memcpy(&word, &g, sizeof word);
      std::atomic_ref(reinterpret_cast<uint64_t&>(mapping.gates()[i])).store(word, std::memory_order_relaxed);
    }
    clauses_ = clauses;
    groups();
    watch(mapping);
    dmi::store_release(control.policy.value, version);
  }

  // Says of some requests which groups they are in, and forgets some.
  void groups() {
    const uint64_t named = 70 + below(3);
    if (named != groups_) members_.clear();
    groups_ = named;
    std::vector<uint64_t> requests, members;
    for (uint64_t request = 0; request < 12; ++request) {
      if (below(3) == 0) continue;
      requests.push_back(request);
      members.push_back(random_());
      members_[request] = members.back();
    }
    CHECK_EQ(dmi_ring_set_groups(ring_, named, requests.data(), members.data(), uint32_t(requests.size())), DMI_OK);
    const uint64_t over = below(12);
    CHECK_EQ(dmi_ring_set_groups(ring_, named, &over, nullptr, 1), DMI_OK);
    members_.erase(over);
  }

  // Some conditions, on some sites, for some sites.
  void watch(const dmi::Mapping& mapping) {
    watches_.assign(4, {});
    uint32_t used = 0;
    for (Watching& w : watches_) {
      const double bounds[] = {0, 2, 5, 9, 15, 25, 50, 1000};
      w.watch.condition = uint8_t(1 + below(3));
      w.watch.statistic = uint8_t(below(DMI_STATS));
      w.watch.above = std::bit_cast<uint64_t>(below(4) == 0 ? INFINITY : bounds[below(8)]);
      w.watch.below = std::bit_cast<uint64_t>(below(4) != 0 ? -INFINITY : -bounds[below(8)]);
      w.watch.bias = std::bit_cast<uint64_t>(double(below(7)) - 3);
      if (w.watch.condition == DMI_CONDITION_PROBE) {
        const Site& site = sites_[below(sites_.size())];
        std::normal_distribution<float> normal(0, 1);
        for (uint32_t i = 0; i < site.inner * site.heads; ++i) w.weights.push_back(normal(random_));
        w.watch.weight = used;
        w.watch.elements = uint32_t(w.weights.size());
        for (float weight : w.weights) {
          uint64_t& word = mapping.probe_words()[used / 2];
          const uint32_t shift = used++ % 2 * 32;
          dmi::store_release(word, (word & ~(0xffffffffull << shift)) | uint64_t{std::bit_cast<uint32_t>(weight)} << shift);
        }
      }
    }
    for (size_t i = 0; i < watches_.size(); ++i) put(mapping.watches()[i], watches_[i].watch);
    const bool any = below(4) != 0;
    for (size_t i = 0; i < sites_.size(); ++i) {
      dmi_keep& k = sites_[i].keep;
      k = {};
      k.watch = any && below(5) == 0 ? 1 + below(15) : 0;
      k.keep = any && below(2) == 0 ? 1 + below(15) : 0;
      k.offer = any && below(5) == 0 ? 1 : 0;
      put(mapping.keeps()[i], k);
    }
  }
  template <typename T>
  static void put(T& to, const T& value) {
    uint64_t words[sizeof(T) / 8];
    std::memcpy(words, &value, sizeof value);
    for (size_t i = 0; i < sizeof(T) / 8; ++i)
      std::atomic_ref(reinterpret_cast<uint64_t*>(&to)[i]).store(words[i], std::memory_order_relaxed);
  }

  void make(uint64_t number) {
    if (!spans_.empty() && below(3) == 0) {  // almost as it was
      dmi_span& span = spans_[below(spans_.size())];
      span.key_first = uint32_t(below(3));
      span.first = uint32_t(below(width_));
      span.count = width_ - span.first;
    } else {
      width_ = uint32_t(1 + below(14));
      draw_spans(number, uint32_t(1 + below(4)));
    }
    draw_data(uint32_t(spans_.size()));
    group_.assign(sites_.size(), 0);
    for (size_t i = 1; i < sites_.size(); ++i) group_[i] = group_[i - 1] + (below(3) == 0 ? 1 : 0);
    keep(number);
  }

  // What a model that decodes mostly does: the rows of the step before, a token later. False where there are no keys for that.
  bool move_on() {
    for (const dmi_span& span : spans_) {
      if (span.position >= 20) return false;
    }
    for (dmi_span& span : spans_) ++span.position, span.phase = DMI_PHASE_DECODE;
    return true;
  }

  void draw_spans(uint64_t number, uint32_t batch) {
    spans_.clear();
    for (uint32_t b = 0; b < batch; ++b) {
      dmi_span span{};
      span.request = number * 100 + b;
      span.batch = b;
      span.first = uint32_t(below(width_));
      span.count = width_ - span.first;
      span.position = uint32_t(below(20));
      span.key_first = uint32_t(below(3));
      span.phase = uint8_t(below(2));
      span.prompt = uint32_t(below(3) == 0 ? 0 : 1 + below(25));
      spans_.push_back(span);
    }
  }

  void draw_data(uint32_t batch) {
    data_.assign(sites_.size(), {});
    size_.assign(sites_.size(), {});
    stride_.assign(sites_.size(), {});
    at_.clear();
    for (size_t i = 0; i < sites_.size(); ++i) {
      const Site& s = sites_[i];
      const int64_t last = s.keyed ? 37 : int64_t{s.inner};
      size_[i] = {batch, width_, s.ended ? last : int64_t{s.heads}, s.ended ? int64_t{s.heads} : last};
      std::array<int, 4> order = {0, 1, 2, 3};
      std::shuffle(order.begin(), order.end(), random_);
      int64_t next = 1 + int64_t(below(2));  // every other element, sometimes
      for (int d = 4; d-- > 0;) {
        stride_[i][size_t(order[size_t(d)])] = next;
        next *= size_[i][size_t(order[size_t(d)])];
      }
      data_[i].resize(size_t(next) * kBytes[s.dtype]);
      // Any bits at all, a common magnitude, or zeros.
      const uint64_t kind = below(4);
      if (kind != 0) {
        for (size_t at = 0; at + 8 <= data_[i].size(); at += 8) {
          const uint64_t bits = random_();
          std::memcpy(&data_[i][at], &bits, 8);
        }
      }
      if (kind > 1 && s.dtype == DMI_DTYPE_F32) {
        std::normal_distribution<float> normal(1, 3);
        for (size_t at = 0; at + 4 <= data_[i].size(); at += 4) {
          const float v = below(200) == 0 ? (below(2) == 0 ? NAN : -INFINITY) : normal(random_);
          std::memcpy(&data_[i][at], &v, 4);
        }
      }
      if (s.dtype == DMI_DTYPE_BOOL) {
        for (std::byte& b : data_[i]) b &= std::byte{1};
      }
      at_.push_back(to_gpu(data_[i]));
    }
  }

  // What see() compares with.
  void keep(uint64_t number) {
    Step step{spans_, data_, size_, stride_, {}, {}, clauses_, members_, groups_, {}, {}, {}};
    for (const Site& s : sites_) {
      step.gates.push_back(s.gate);
      step.keeps.push_back(s.keep);
    }
    hold(step);
    std::lock_guard lock(mutex_);
    steps_.emplace(number, std::move(step));
  }

  // Which watches each request has met, surely and perhaps, when a site's rows are given: at sites before it, and at those that are
  // captured with it, which the CPU takes one after the other.
  void hold(Step& step) {
    std::map<uint64_t, uint64_t> surely, perhaps;
    for (size_t i = 0, next = 0; i < sites_.size(); ++i) {
      for (; next < sites_.size() && (device_ < 0 ? next <= i : group_[next] <= group_[i]); ++next) {
        const Site& site = sites_[next];
        const uint64_t bits = site.keep.watch;
        if (bits == 0 || site.dtype == DMI_DTYPE_C64 || site.dtype == DMI_DTYPE_C128) continue;
        for (const dmi_span& span : step.spans) {
          for (uint32_t row = 0; row < span.count; ++row) {
            std::vector<double> values, counted;
            each_element(step, uint32_t(next), span, row, [&](const std::byte* from, bool own) {
              values.push_back(element(site.dtype, from));
              if (own) counted.push_back(values.back());
            });
            for (size_t w = 0; w < watches_.size(); ++w) {
              if ((bits >> w & 1) == 0) continue;
              const Met met = meets(watches_[w], values, counted, site.keyed);
              if (met == Met::kYes) surely[span.request] |= uint64_t{1} << w;
              if (met != Met::kNo) perhaps[span.request] |= uint64_t{1} << w;
            }
          }
        }
      }
      step.surely.push_back(surely);
      step.perhaps.push_back(perhaps);
    }
  }

  void see(const Engine::Lane& lane, const dmi_record& r, const std::vector<std::byte>& bytes) {
    Step& step = [&]() -> Step& {
      std::lock_guard lock(mutex_);
      return steps_.at(r.step);
    }();
    const Site& site = sites_[r.site];
    const dmi_gate& gate = step.gates[r.site];
    // Every row of the step, and the level that it should have, in the order that the record counts in.
    struct Row {
      const dmi_span* span;
      uint32_t index;
      uint8_t level;
    };
    std::vector<Row> rows;
    for (const dmi_span& span : step.spans) {
      for (uint32_t i = 0; i < span.count; ++i) {
        uint8_t level = gate.level;
        uint32_t stride = gate.stride;
        for (uint32_t c = 0; c < gate.clauses; ++c) {
          const dmi_clause& clause = step.clauses[gate.clause + c];
          if (!takes(clause, span, span.position + i, step.members, step.groups)) continue;
          level = clause.level;
          stride = clause.stride;
          break;
        }
        if (level == DMI_LEVEL_SAMPLED) level = (span.position + i) % stride == 0 ? DMI_LEVEL_FULL : DMI_LEVEL_OFF;
        rows.push_back({&span, i, level});
      }
    }
    if (r.selection != 0) {
      std::vector<Row> listed;
      for (const dmi_run& run : lane.runs) {
        if (run.selection != r.selection || run.space != DMI_SPACE_TOKENS) continue;
        for (uint32_t i = 0; i < run.count; ++i) {
          const Row& row = rows.at(run.first + i * run.stride);
          CHECK_EQ(row.level, run.level);
          CHECK(listed.empty() || listed.back().level <= row.level);
          listed.push_back(row);
        }
      }
      CHECK_EQ(listed.size(), rows.size());
      rows = listed;
    }
    const bool complex = site.dtype == DMI_DTYPE_C64 || site.dtype == DMI_DTYPE_C128;
    const dmi_keep& keeps = step.keeps[r.site];
    auto met = [&](const std::map<uint64_t, uint64_t>& requests, const Row& row) {
      const auto found = requests.find(row.span->request);
      return found != requests.end() && (found->second & keeps.keep) != 0;
    };
    uint64_t at = 0;
    for (uint32_t n = r.row_first; n < r.row_first + r.rows; ++n) {
      const Row& row = rows[n];
      const uint8_t level = complex && dmi::encoded(row.level) ? uint8_t{DMI_LEVEL_FULL} : row.level;
      if (r.flags & (DMI_RECORD_KEPT | DMI_RECORD_OFFER)) {
        CHECK_EQ(r.level, uint8_t{DMI_LEVEL_FULL});
        CHECK(level != DMI_LEVEL_FULL);
        const bool offered = (r.flags & DMI_RECORD_OFFER) != 0;
        if (offered) {
          CHECK(keeps.offer != 0);
          CHECK(step.offered.emplace(r.site, n).second);
        } else {
          CHECK(met(step.perhaps[r.site], row));
          ++kept;
        }
        at += check(step, site, r, *row.span, row.index, bytes.data() + at);
        continue;
      }
      if (exact_ && level != DMI_LEVEL_FULL) {
        CHECK(!met(step.surely[r.site], row));
        // An offer does not wait for room.
        if (!threaded_) CHECK_EQ(step.offered.count({r.site, n}), size_t{keeps.offer != 0});
        stayed += keeps.keep != 0 ? 1 : 0;
      }
      if (r.outcome == DMI_OUTCOME_SKIPPED) {
        CHECK_EQ(row.level, uint8_t{DMI_LEVEL_OFF});
        ++levels[DMI_LEVEL_OFF];
        continue;
      }
      CHECK(row.level != DMI_LEVEL_OFF);
      if (r.outcome == DMI_OUTCOME_DROPPED) continue;
      CHECK_EQ(r.outcome, uint8_t{DMI_OUTCOME_CAPTURED});
      CHECK_EQ(r.level, level);
      ++levels[level];
      if (!(r.flags & DMI_RECORD_GATHERED)) {
        CHECK_EQ(level, uint8_t{DMI_LEVEL_FULL});
        continue;  // protocol_test checks those
      }
      at += check(step, site, r, *row.span, row.index, bytes.data() + at);
    }
    if (r.flags & DMI_RECORD_GATHERED) CHECK_EQ(at, bytes.size());
  }

  // Calls visit(where it is, whether it counts) for each element of a row.
  template <typename Visit>
  void each_element(const Step& step, uint32_t number, const dmi_span& span, uint32_t index, Visit visit) const {
    const Site& site = sites_[number];
    const auto &size = step.size[number], &stride = step.stride[number];
    const int64_t base = site.keyed ? kKeys - 37 : 0;  // as many slots as there are keys, the last ones of the cache
    for (int64_t i = 0; i < size[2]; ++i) {
      for (int64_t k = 0; k < size[3]; ++k) {
        const int64_t at = span.batch * stride[0] + (span.first + index) * stride[1] + i * stride[2] + k * stride[3];
        const int64_t slot = base + (site.ended ? i : k);
        visit(step.data[number].data() + size_t(at) * kBytes[site.dtype],
              !site.keyed || (slot >= span.key_first && slot <= int64_t{span.key_first} + span.position + index));
      }
    }
  }

  // Checks a row, and says how many bytes it has.
  uint64_t check(const Step& step, const Site& site, const dmi_record& r, const dmi_span& span, uint32_t index, const std::byte* got) {
    const auto& size = step.size[r.site];
    const uint32_t bytes = kBytes[site.dtype];
    std::vector<double> values, counted;
    std::vector<bool> own;
    size_t n = 0;
    each_element(step, r.site, span, index, [&](const std::byte* from, bool is) {
      if (!dmi::encoded(r.level)) {
        CHECK_EQ(std::memcmp(from, got + n++ * bytes, bytes), 0);
        return;
      }
      values.push_back(element(site.dtype, from));
      own.push_back(is);
      if (is) counted.push_back(values.back());
    });
    if (r.level == DMI_LEVEL_STATS) {
      check_statistics(got, counted);
      const uint32_t top = step.gates[r.site].top;
      check_top(got + DMI_STATS * 4, top, counted);
      return (DMI_STATS + 2 * top) * 4;
    }
    if (!dmi::encoded(r.level)) return uint64_t(size[2] * size[3]) * bytes;
    check_quantised(r.level, got, values, own);
    return 4 + (values.size() + 3) / 4 * 4;
  }

  std::mt19937_64& random_;
  const int16_t device_;
  int64_t ring_;
  std::unique_ptr<Engine> engine_;
  std::vector<Site> sites_;
  std::vector<dmi_clause> clauses_;
  std::map<uint64_t, uint64_t> members_;  // of what was said of requests
  uint64_t groups_ = 0;
  std::vector<Watching> watches_;
  std::vector<uint32_t> group_;  // by site: which of the step's captures
  std::vector<dmi_span> spans_;
  bool threaded_ = false;
  bool exact_ = false;  // nothing is short: what is wanted in full comes in full
  uint32_t width_ = 0;
  std::vector<std::vector<std::byte>> data_;
  std::vector<const std::byte*> at_;  // where the op finds them
  std::vector<std::array<int64_t, 4>> size_, stride_;
  std::mutex mutex_;
  std::map<uint64_t, Step> steps_;
};

void test_random(dmi_mode mode, int32_t device, uint64_t steps, Ring ring, bool replayed = false) {
  std::mt19937_64 random(test_seed() + mode);
  World world(random, mode, device, ring);
#ifdef DMI_TEST_CUDA
  if (replayed) world.replay(steps);
#endif
  for (uint64_t number = 0; number < steps && !replayed; ++number) world.step(number);
  world.stop();
  world.drain();
  CHECK_EQ(world.counters().kept_rows, world.books().kept);
  CHECK_EQ(world.counters().offered_bytes, world.books().offered);
  CHECK_EQ(world.kept, world.books().kept);
  CHECK_EQ(world.counters().spilled_bytes, world.books().spilled);
  if (steps < 60) return;  // too few for what follows
  CHECK(world.kept > 0 && world.books().offered > 0);
  if (ring == Ring::kRoomy) CHECK(world.stayed > 0);
  CHECK(world.books().spilled > 0);
  for (uint8_t level : {DMI_LEVEL_FULL, DMI_LEVEL_FP8, DMI_LEVEL_INT8, DMI_LEVEL_STATS, DMI_LEVEL_OFF}) CHECK(world.levels[level] > 0);
  if (mode == DMI_MODE_COMPLETE) {
    CHECK_EQ(world.books().other[DMI_REASON_TIMEOUT], 0u);
    if (device < 0) CHECK(world.books().parts > 0);  // a device does not cut rows
  }
}

// Every code of both formats comes back as itself.
void test_codes() {
  for (int code = 0; code < 256; ++code) {
    const double v = floating(uint32_t(code), 4, 3, 7, false, true, true);
    if (std::isfinite(v) && std::fabs(v) <= 416) CHECK_EQ(dmi::fp8_code(float(v), 1), uint8_t(code));
    const int8_t whole = int8_t(uint8_t(code));
    if (whole >= -126 && whole <= 126) CHECK_EQ(dmi::int8_code(float(whole), 1), uint8_t(code));
  }
}

}  // namespace

// levels_test [steps]
int main(int argc, char** argv) {
  const uint64_t steps = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 120;
  test_seed();
  test_codes();
  for (int32_t device : {-1, 0}) {  // the CPU's own back end, and what a device runs
    if (kCuda && device < 0) continue;
    test_random(DMI_MODE_BEST_EFFORT, device, steps, Ring::kTight);
    test_random(DMI_MODE_BEST_EFFORT, device, steps, Ring::kRoomy);
    test_random(DMI_MODE_COMPLETE, device, steps / 2, Ring::kTight);
    if (kCuda) test_random(DMI_MODE_BEST_EFFORT, device, steps, Ring::kTight, true);
    if (kCuda) test_random(DMI_MODE_BEST_EFFORT, device, steps, Ring::kRoomy, true);
  }
}

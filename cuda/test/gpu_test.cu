// Kernels, pump and streams on a real GPU, from native code alone, so that compute-sanitizer can watch: random traffic in eager launches
// and in a replayed graph, on two streams; every source is poisoned right behind its capture, and every captured byte compared.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <string>

#include "engine.h"

namespace {

#define CUDA(call)                                                                                    \
  do {                                                                                                \
    const cudaError_t status = (call);                                                                \
    if (status != cudaSuccess) {                                                                      \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(status)); \
      std::abort();                                                                                   \
    }                                                                                                 \
  } while (0)

struct Shape {
  int64_t size[3], stride[3];
};

// As value_of in engine.h.
__global__ void fill(uint32_t* to, Shape s, const uint64_t* step, uint32_t site) {
  const int64_t count = s.size[0] * s.size[1] * s.size[2];
  for (int64_t n = blockIdx.x * blockDim.x + threadIdx.x; n < count; n += int64_t(gridDim.x) * blockDim.x) {
    const int64_t k = n % s.size[2], j = n / s.size[2] % s.size[1], i = n / s.size[2] / s.size[1];
    uint64_t x = (*step * 65537 + site) * 0x9e3779b97f4a7c15ull ^ uint64_t(i << 32 | j) * 0xc2b2ae3d27d4eb4full ^
                 uint64_t(k) * 0x165667b19e3779f9ull;
    to[i * s.stride[0] + j * s.stride[1] + k * s.stride[2]] = uint32_t(x ^ x >> 29);
  }
}

__global__ void set(uint64_t* to, uint64_t value) { *to = value; }

constexpr uint32_t kSites = 70;  // more than a launch takes
constexpr uint32_t kLargest = 40'000;

struct Device {
  uint32_t* memory = nullptr;  // kSites sources
  uint64_t* step = nullptr;
  cudaStream_t stream[2];
  Device() {
    CUDA(cudaMalloc(&memory, sizeof(uint32_t) * kLargest * kSites));
    CUDA(cudaMalloc(&step, sizeof *step));
    for (cudaStream_t& s : stream) CUDA(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
  }
  ~Device() {
    for (cudaStream_t s : stream) CUDA(cudaStreamDestroy(s));
    CUDA(cudaFree(memory));
    CUDA(cudaFree(step));
  }
  uint32_t* source(uint32_t site) const { return memory + size_t{kLargest} * site; }
};

std::vector<dmi_tensor> filled(const Device& device, const std::vector<uint32_t>& sites, const std::vector<Shape>& shapes,
                               cudaStream_t stream) {
  std::vector<dmi_tensor> group;
  for (uint32_t i = 0; i < sites.size(); ++i) {
    const Shape& s = shapes[i];
    fill<<<4, 128, 0, stream>>>(device.source(sites[i]), s, device.step, sites[i]);
    group.push_back({device.source(sites[i]), s.size, s.stride, sites[i], DMI_DTYPE_U32, 3, 0});
  }
  return group;
}

void poison(const Device& device, uint32_t site, cudaStream_t stream) {
  CUDA(cudaMemsetAsync(device.source(site), 0xd5, sizeof(uint32_t) * kLargest, stream));
}

// What a graph is made of, and an eager step runs: fill, capture in groups, poison.
void forward(int64_t ring, const Device& device, const std::vector<uint32_t>& sites, const std::vector<Shape>& shapes, uint32_t split,
             cudaStream_t stream) {
  const std::vector<dmi_tensor> group = filled(device, sites, shapes, stream);
  dmi_capture(ring, group.data(), split, 0, stream);
  dmi_capture(ring, group.data() + split, uint32_t(sites.size()) - split, 0, stream);
  for (uint32_t site : sites) poison(device, site, stream);
}

// What another graph is made of: groups on branches, each poisoned as soon as the next one is told of.
void forward_beside(int64_t ring, const Device& device, const std::vector<uint32_t>& sites, const std::vector<Shape>& shapes, uint32_t each,
                    cudaStream_t stream) {
  const std::vector<dmi_tensor> group = filled(device, sites, shapes, stream);
  CHECK_EQ(dmi_ring_branch(ring, 1, stream), DMI_OK);
  for (uint32_t first = 0, before = 0; before < sites.size();) {
    const uint32_t count = std::min(each, uint32_t(sites.size()) - first);
    dmi_capture(ring, group.data() + first, count, 1, stream);  // in the end of no tensors
    for (; before < first; ++before) poison(device, sites[before], stream);
    first += count;
  }
  CHECK_EQ(dmi_ring_branch(ring, 0, stream), DMI_OK);
}

Shape random_shape(std::mt19937_64& random, uint32_t batch, uint32_t width, uint32_t most) {
  Shape s{{batch, width, 1 + int64_t(random() % (most / (batch * width)))}, {}};
  std::array<int, 3> order = {0, 1, 2};
  if (random() % 2) std::shuffle(order.begin(), order.end(), random);
  int64_t next = 1;
  for (int d = 3; d-- > 0;) {
    s.stride[order[size_t(d)]] = next;
    next *= s.size[order[size_t(d)]];
  }
  return s;
}

void test_traffic(dmi_mode mode, uint64_t steps, uint32_t laziness_us) {
  dmi_ring_options o{};
  o.mode = mode;
  o.device = 0;
  o.lanes = 1;
  o.record_capacity = 1024;
  o.command_capacity = 8;
  o.site_capacity = 128;
  o.payload_bytes = 256 << 10;
  o.table_bytes = 64 << 10;
  o.staging_bytes = 64 << 10;
  o.spill_bytes = 64 << 10;
  o.wait_bound_ns = 60'000'000'000;
  const int64_t ring = dmi_ring_create(&o);
  if (ring <= 0) std::fprintf(stderr, "%s\n", dmi_last_error());
  CHECK(ring > 0);
  for (uint32_t i = 0; i < kSites; ++i) {
    dmi_site site{};
    site.layer = DMI_NO_LAYER;
    site.space = DMI_SPACE_TOKENS;
    site.ndim = 3;
    site.role[0] = site.role[1] = DMI_ROLE_ROW;
    site.role[2] = DMI_ROLE_INNER;
    const std::string name = std::to_string(i);
    site.name_bytes = uint32_t(name.size());
    std::copy(name.begin(), name.end(), site.name);
    CHECK_EQ(dmi_ring_add_site(ring, &site), int64_t{i});
  }
  Device device;
  std::mt19937_64 random(test_seed());
  Books books;
  uint64_t captured_steps = 0, produced = 0;
  {
    Engine engine(ring);
    engine.start(laziness_us);
    // The graph: all sites, of one shape of step.
    constexpr uint32_t kBatch = 3, kWidth = 5;
    std::vector<uint32_t> all(kSites);
    for (uint32_t i = 0; i < kSites; ++i) all[i] = i;
    std::vector<Shape> shapes;
    for (uint32_t i = 0; i < kSites; ++i) shapes.push_back(random_shape(random, kBatch, kWidth, 4000));
    cudaGraph_t graphs[2];
    cudaGraphExec_t replays[2];
    for (int beside = 0; beside < 2; ++beside) {
      CUDA(cudaStreamBeginCapture(device.stream[0], cudaStreamCaptureModeGlobal));
      if (beside) {
        forward_beside(ring, device, all, shapes, 1 + uint32_t(random() % kSites), device.stream[0]);
      } else {
        forward(ring, device, all, shapes, kSites, device.stream[0]);
      }
      CUDA(cudaStreamEndCapture(device.stream[0], &graphs[beside]));
      CUDA(cudaGraphInstantiate(&replays[beside], graphs[beside], 0));
    }
    for (uint64_t step = 0; step < steps; ++step) {
      const bool replayed = random() % 2;
      const uint32_t batch = replayed ? kBatch : 1 + uint32_t(random() % 4), width = replayed ? kWidth : 1 + uint32_t(random() % 12);
      std::vector<dmi_span> spans;
      for (uint32_t b = 0; b < batch; ++b) {
        dmi_span span{};
        span.request = span.batch = b;
        span.first = random() % 3 == 0 ? uint32_t(random() % width) : 0;
        span.count = width - span.first;
        produced += span.count * kSites;
        spans.push_back(span);
      }
      cudaStream_t stream = device.stream[random() % 2];
      // The other stream may still read what this one rewrites.
      for (cudaStream_t s : device.stream) CUDA(cudaStreamSynchronize(s));
      set<<<1, 1, 0, stream>>>(device.step, step);
      const uint32_t widths[DMI_SPACES] = {width, 0, 0};
      const int32_t opened = dmi_step_open(ring, step, spans.data(), uint32_t(spans.size()), widths, 0, 0, stream);
      CHECK_EQ(opened, 1);
      if (replayed) {
        CUDA(cudaGraphLaunch(replays[random() % 2], stream));
      } else {
        std::vector<Shape> now;
        for (uint32_t i = 0; i < kSites; ++i) now.push_back(random_shape(random, batch, width, random() % 20 == 0 ? kLargest : 4000));
        forward(ring, device, all, now, uint32_t(random() % (kSites + 1)), stream);
      }
      CHECK_EQ(dmi_step_close(ring, step, 0, stream), DMI_OK);
      ++captured_steps;
    }
    for (cudaStream_t s : device.stream) CUDA(cudaStreamSynchronize(s));
    CHECK_EQ(dmi_ring_finish(ring, 60'000'000'000), DMI_OK);
    engine.stop();
    CHECK(!engine.mid_step());
    books = engine.books();
    for (cudaGraphExec_t replay : replays) CUDA(cudaGraphExecDestroy(replay));
    for (cudaGraph_t graph : graphs) CUDA(cudaGraphDestroy(graph));
  }
  uint64_t outcomes = books.captured + books.gap_rows;
  for (uint64_t rows : books.other) outcomes += rows;
  CHECK_EQ(outcomes, produced);
  CHECK_EQ(books.steps + books.gap_steps, captured_steps);
  if (mode == DMI_MODE_COMPLETE) CHECK_EQ(books.captured, produced);
  dmi_counters counters;
  dmi_gauges gauges;
  CHECK_EQ(dmi_ring_counters(ring, &counters, 1, &gauges), 1);
  CHECK_EQ(counters.captured_rows, books.captured);
  CHECK_EQ(counters.captured_bytes, books.bytes);
  CHECK_EQ(counters.spilled_bytes, books.spilled);
  CHECK_EQ(counters.records, books.records);
  std::printf("GPU traffic, %s: %llu steps, %llu of %llu rows captured (%llu bytes compared), %llu spilled bytes, %llu waits\n",
              mode == DMI_MODE_COMPLETE ? "complete" : "best-effort", (unsigned long long)captured_steps,
              (unsigned long long)books.captured, (unsigned long long)produced, (unsigned long long)books.bytes,
              (unsigned long long)books.spilled, (unsigned long long)counters.waits);
  std::fflush(stdout);
  CHECK_EQ(dmi_ring_close(ring), DMI_OK);
}

// So many records, 1,024 a replay of one graph, on rings that wrap all the time: every row of every step is on the books, exactly.
void soak(dmi_mode mode, uint64_t records) {
  constexpr uint32_t kTensors = 1024, kRows = 2, kWidth = 16;
  dmi_ring_options o{};
  o.mode = mode;
  o.device = 0;
  o.lanes = 1;
  o.record_capacity = 1 << 14;
  o.command_capacity = 4096;
  o.site_capacity = kTensors;
  o.payload_bytes = 1 << 20;
  o.table_bytes = 1 << 20;
  o.staging_bytes = 1 << 20;
  o.spill_bytes = 1 << 20;
  o.wait_bound_ns = 60'000'000'000;
  const int64_t ring = dmi_ring_create(&o);
  CHECK(ring > 0);
  for (uint32_t i = 0; i < kTensors; ++i) {
    dmi_site site{};
    site.layer = DMI_NO_LAYER;
    site.ndim = 2;
    site.role[0] = DMI_ROLE_ROW;
    site.role[1] = DMI_ROLE_INNER;
    const std::string name = std::to_string(i);
    site.name_bytes = uint32_t(name.size());
    std::copy(name.begin(), name.end(), site.name);
    CHECK_EQ(dmi_ring_add_site(ring, &site), int64_t{i});
  }
  uint32_t* source = nullptr;
  cudaStream_t stream;
  CUDA(cudaMalloc(&source, sizeof(uint32_t) * kTensors * kRows * kWidth));
  CUDA(cudaMemset(source, 0x5a, sizeof(uint32_t) * kTensors * kRows * kWidth));
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const int64_t size[] = {kRows, kWidth}, stride[] = {kWidth, 1};
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  std::vector<dmi_tensor> group;
  for (uint32_t i = 0; i < kTensors; ++i) group.push_back({source + size_t{i} * kRows * kWidth, size, stride, i, DMI_DTYPE_U32, 2, 0});
  dmi_capture(ring, group.data(), kTensors, 0, stream);
  CUDA(cudaStreamEndCapture(stream, &graph));
  CUDA(cudaGraphInstantiate(&replay, graph, 0));
  const uint64_t steps = (records + kTensors - 1) / kTensors;
  dmi_span span{};
  span.count = kRows;
  const uint32_t widths[DMI_SPACES] = {kRows, 0, 0};
  uint64_t seen = 0;
  Books books;
  {
    Engine engine(ring);
    engine.observe = [&](const Engine::Lane&, const dmi_record& r, const std::vector<std::byte>& bytes) {
      ++seen;
      if (r.outcome != DMI_OUTCOME_CAPTURED) return;
      CHECK_EQ(bytes.size(), r.rows * kWidth * sizeof(uint32_t));
      for (std::byte b : bytes) CHECK(b == std::byte{0x5a});
    };
    engine.together = true;
    engine.start();
    auto told = std::chrono::steady_clock::now();
    for (uint64_t step = 0; step < steps; ++step) {
      const int32_t opened = dmi_step_open(ring, step, &span, 1, widths, 0, 0, stream);
      CHECK(opened == 1 || (opened == 0 && mode == DMI_MODE_BEST_EFFORT));
      CUDA(cudaGraphLaunch(replay, stream));
      CHECK_EQ(dmi_step_close(ring, step, 0, stream), DMI_OK);
      if (step % 64 == 63) CUDA(cudaStreamSynchronize(stream));  // as a loop that looks at its tokens does
      if (std::chrono::steady_clock::now() - told > std::chrono::seconds(5)) {
        told = std::chrono::steady_clock::now();
        std::printf("  %llu of %llu steps\n", (unsigned long long)(step + 1), (unsigned long long)steps);
        std::fflush(stdout);
      }
    }
    CUDA(cudaStreamSynchronize(stream));
    CHECK_EQ(dmi_ring_finish(ring, 60'000'000'000), DMI_OK);
    engine.stop();
    CHECK(!engine.mid_step());
    books = engine.books();
  }
  uint64_t outcomes = books.captured + books.gap_rows;
  for (uint64_t rows : books.other) outcomes += rows;
  CHECK_EQ(outcomes, steps * kTensors * kRows);
  if (mode == DMI_MODE_COMPLETE) CHECK_EQ(books.captured, steps * kTensors * kRows);
  std::printf("GPU soak, %s: %llu records of %llu steps; %llu of %llu rows captured, the others on the books\n",
              mode == DMI_MODE_COMPLETE ? "complete" : "best-effort", (unsigned long long)seen, (unsigned long long)steps,
              (unsigned long long)books.captured, (unsigned long long)(steps * kTensors * kRows));
  CUDA(cudaGraphExecDestroy(replay));
  CUDA(cudaGraphDestroy(graph));
  CUDA(cudaStreamDestroy(stream));
  CUDA(cudaFree(source));
  CHECK_EQ(dmi_ring_close(ring), DMI_OK);
}

}  // namespace

// gpu_test [steps], or gpu_test --records N
int main(int argc, char** argv) {
  test_seed();
  if (argc > 2 && std::string(argv[1]) == "--records") {
    soak(DMI_MODE_COMPLETE, std::strtoull(argv[2], nullptr, 10) / 2);
    soak(DMI_MODE_BEST_EFFORT, std::strtoull(argv[2], nullptr, 10) / 2);
    return 0;
  }
  const uint64_t steps = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 300;
  test_traffic(DMI_MODE_COMPLETE, steps, 0);
  test_traffic(DMI_MODE_BEST_EFFORT, steps, 0);
  test_traffic(DMI_MODE_BEST_EFFORT, steps / 4, 200);
  return 0;
}

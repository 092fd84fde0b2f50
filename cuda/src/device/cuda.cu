// The CUDA device: memory, launches and copies. What the launches do is capture.h's.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>

#include "capture.h"
#include "device.h"
#include "error.h"
#include "launch.h"
#include "ring.h"
#include "shared.h"

namespace dmi {
namespace device {
namespace {

constexpr uint32_t kThreads = 256;
static_assert(kThreads / 32 <= kMostWarps);
// A copy engine serves one stream until that has nothing left for it, whoever else waits: the model's own copies too, of the tokens that it
// sampled. So it gets bursts of 40 us, or as many small copies as take about that, and nothing more before it is through with one: in the
// gap others have their turn. Draining comes first where the payload ring is nearly full, and in complete mode where much is to be copied:
// the model is going to wait for that. Then bursts are queued, and larger, since between two the engine does nothing for a moment; still
// larger ones keep those who read the bytes waiting for word of their ends, until they are in no processor's cache any more.
constexpr uint64_t kBurst = 2 << 20, kLargeBurst = 8 << 20;
constexpr uint32_t kPieces = 32;
constexpr size_t kQueued = 4;
constexpr uint64_t kMuch = 8 << 20;
constexpr uint64_t kLookNs = 10'000'000;  // after so long without an end of a burst the stream is asked whether it has failed
constexpr bool nearly_full(uint64_t used, uint64_t capacity) { return used > capacity / 4 * 3; }
constexpr uint64_t kAhead = 4;                    // steps that the host may be ahead of the device in complete mode
constexpr uint32_t kMeetings = 4096;              // of eager launches, in turn: far more than a stream can hold
constexpr uint32_t kGraphMeetings = 4096;         // allocated at a time, for launches that graphs keep
constexpr uint32_t kMostGraphMeetings = 1 << 20;  // 96 MiB: a bound that only a mistake exceeds

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    cudaGetLastError();
    throw Error(DMI_ERROR_SYSTEM, std::string(what) + ": " + cudaGetErrorString(status));
  }
}

// Makes a device current for a scope, and lets calls that a recording would refuse (allocations) through.
class Scope {
 public:
  explicit Scope(int ordinal) : ordinal_(ordinal) {
    cudaGetDevice(&before_);
    if (before_ != ordinal) cudaSetDevice(ordinal);
    cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  ~Scope() {
    cudaThreadExchangeStreamCaptureMode(&mode_);
    if (before_ != ordinal_) cudaSetDevice(before_);
  }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

 private:
  const int ordinal_;
  int before_ = 0;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

struct ThreadBlock {
  uint64_t* total;  // shared
  __device__ uint32_t thread() const { return threadIdx.x; }
  __device__ uint32_t threads() const { return blockDim.x; }
  __device__ uint32_t index() const { return blockIdx.x; }
  __device__ uint32_t count() const { return gridDim.x; }
  __device__ void sync() const { __syncthreads(); }
  // The warps of one of the teams of so many. Each has a barrier of its own, since some of a team's warps may come to its barrier while
  // others are still at that of a smaller team; number 0 is that of all threads.
  __device__ void sync(uint32_t team, uint32_t warps) const {
    asm volatile("bar.sync %0, %1;" ::"r"(blockDim.x / 32 / warps + team), "r"(warps * 32) : "memory");
  }
  __device__ uint32_t lane() const { return threadIdx.x % 32; }
  __device__ uint32_t lanes() const { return 32; }
  __device__ uint32_t warp() const { return threadIdx.x / 32; }
  __device__ uint32_t warps() const { return blockDim.x / 32; }

  // By all lanes of a warp.
  template <typename T, typename Merge>
  __device__ T across(T value, Merge merge) const {
    static_assert(sizeof(T) % 4 == 0);
#pragma unroll
    for (uint32_t mask = 16; mask != 0; mask /= 2) {
      uint32_t words[sizeof(T) / 4];
      memcpy(words, &value, sizeof value);
#pragma unroll
      for (uint32_t& word : words) word = __shfl_xor_sync(0xffffffffu, word, mask);
      T other;
      memcpy(&other, words, sizeof other);
      merge(value, other);
    }
    return value;
  }

  // 16 bytes a thread: one round trip to memory. From a launch's parameters too, which are read as memory here: as the constants that the
  // compiler takes them for, every block would miss them line by line.
  template <typename T>
  __device__ void load(T* to, const T* from, uint32_t count) const {
    static_assert(sizeof(T) % 16 == 0);
    asm volatile("" : "+l"(from));
    const auto* source = reinterpret_cast<const uint4*>(from);
    for (uint32_t i = threadIdx.x; i < count * (sizeof(T) / 16); i += blockDim.x) reinterpret_cast<uint4*>(to)[i] = source[i];
  }

  // The first warp, some numbers a lane.
  template <typename T>
  __device__ T prefix(T* values, uint32_t n) const {
    constexpr uint32_t kEach = kGroupTensors / 32;
    static_assert(kGroupTensors % 32 == 0);
    if (threadIdx.x < 32) {
      const uint32_t at = kEach * threadIdx.x;
      T value[kEach], own = 0;
#pragma unroll
      for (uint32_t i = 0; i < kEach; ++i) own += value[i] = at + i < n ? values[at + i] : 0;
      T sum = own;
#pragma unroll
      for (uint32_t step = 1; step < 32; step *= 2) {
        const T other = __shfl_up_sync(0xffffffffu, sum, step);
        if (threadIdx.x >= step) sum += other;
      }
      T before = sum - own;
#pragma unroll
      for (uint32_t i = 0; i < kEach; ++i) {
        if (at + i < n) values[at + i] = before;
        before += value[i];
      }
      if (threadIdx.x == 31) *total = sum;
    }
    __syncthreads();
    return T(*total);
  }
  __device__ uint64_t sum(uint64_t* values, uint32_t n) const {
    const uint64_t all = prefix(values, n);
    __syncthreads();
    return all;
  }
  __device__ void sum(uint32_t* values, uint32_t n) const {
    const uint32_t all = prefix(values, n);
    if (threadIdx.x == 0) values[n] = all;
    __syncthreads();
  }
};

__global__ void __launch_bounds__(kThreads)
    open_kernel(State* state, const __grid_constant__ Opening opening, uint64_t rows, uint64_t gap_rows) {
  ThreadBlock block{nullptr};
  open_step(block, *state, opening, rows, gap_rows);
}

__global__ void gap_kernel(State* state, uint64_t first, uint64_t last, uint64_t steps, uint64_t rows) {
  dmi::device::tell_gap(*state, first, last, steps, rows);
}

__global__ void close_kernel(State* state, const __grid_constant__ Closing closing) {
  ThreadBlock block{nullptr};
  close_step(block, *state, closing);
}

__global__ void __launch_bounds__(kThreads, 2) capture_kernel(const __grid_constant__ Group group) {
  __shared__ Scratch scratch;
  __shared__ uint64_t total;
  ThreadBlock block{&total};
  capture(block, group, scratch);
}

class Cuda final : public Device {
 public:
  Cuda(const Mapping& mapping, int ordinal, uint64_t wait_bound_ns);
  ~Cuda() override;

  void* token() const override { return state_; }
  int ordinal() const override { return ordinal_; }
  uint64_t bytes() const override { return bytes_; }
  const char* open(const DeviceStep& step, void* stream) override;
  void close(const DeviceClose& step, void* stream, bool same_stream) override;
  void tell_gap(const Gap& gap) override;
  bool recording(void* stream) const override;
  void capture(const dmi_tensor* tensors, uint32_t count, const dmi_site* sites, uint32_t site_count, bool beside, void* stream) override;
  void branch(bool may, void* stream) override;
  bool begin_copy(std::byte* staging, uint64_t payload, uint64_t bytes) override;
  uint64_t copies_complete() override;
  bool failed() const override { return failed_; }
  bool busy() const override { return load_acquire(notice_->closes) != opened_.load(std::memory_order_acquire); }
  uint64_t payload_head() const override { return load_relaxed(notice_->payload_head); }
  uint64_t spill_head() const override { return load_relaxed(notice_->spill_head); }
  uint64_t gave_up() const override { return load_relaxed(notice_->gave_up); }
  bool settle(uint64_t bound_ns) override;
  bool quiesce(uint64_t bound_ns) override;

 private:
  // Words that the device writes are read as any shared word is.
  static uint64_t load_acquire(uint64_t& word) { return dmi::load_acquire(word); }
  static uint64_t load_relaxed(uint64_t& word) { return dmi::load_relaxed(word); }

  template <typename T>
  T* allocate(uint64_t count, const char* what) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, count * sizeof(T)), what);
    bytes_ += count * sizeof(T);
    return static_cast<T*>(memory);
  }
  Meeting* meeting(bool keep);
  void follow(cudaStream_t stream);
  void come_back();
  void let_catch_up() const;
  void release();

  const Mapping& mapping_;
  const int ordinal_;
  uint32_t blocks_ = 1;  // of a large group: what the device runs at once
  const dmi_header header_;
  const uint64_t wait_bound_ns_;
  uint64_t bytes_ = 0;

  State* state_ = nullptr;  // kept for good, as are left_, level_, runs_ and the meetings: graphs point at them
  Meeting* eager_ = nullptr;
  std::byte* payload_ = nullptr;
  Notice* notice_ = nullptr;    // page-locked; kept for good
  std::byte* slots_ = nullptr;  // page-locked
  bool registered_ = false;
  cudaStream_t copies_ = nullptr;

  std::mutex mutex_;  // what opens, captures and closes share; they come from one thread at a time, but from several threads
  uint32_t next_eager_ = 0;
  Meeting* graph_ = nullptr;
  uint32_t graph_used_ = kGraphMeetings, graph_total_ = 0;
  Teller teller_;
  cudaStream_t last_stream_ = nullptr;
  cudaEvent_t last_done_ = nullptr;
  bool any_step_ = false;
  // Of a recording that may branch: its stream, the branch's, and what orders them.
  bool may_branch_ = false, away_ = false;  // away_: a branch has not come back
  cudaStream_t trunk_ = nullptr, branch_ = nullptr;
  cudaEvent_t left_ = nullptr, back_ = nullptr;
  std::atomic<uint64_t> opened_{0};  // steps whose open and close are, or will be, launched
  std::atomic<uint64_t> closed_{0};  // those whose close is

  // The pump's: copies of which the copy engine has not been given all, and bursts of them that it has.
  struct Copy {
    std::byte* to;
    uint64_t payload, bytes;  // what is left of it
  };
  void copy_on();
  void give_burst(uint64_t most);
  cudaError_t tell_end(uint64_t burst);
  std::deque<Copy> waiting_;
  uint64_t waiting_bytes_ = 0;
  std::deque<uint64_t> bursts_;        // copies that end in each
  uint64_t burst_ = 0, complete_ = 0;  // bursts that were given, copies that are complete
  uint64_t looked_ns_ = 0;             // when the stream was last asked how it is
  decltype(&cuStreamWriteValue64) write_value_ = nullptr;
  bool failed_ = false;
};

Cuda::Cuda(const Mapping& mapping, int ordinal, uint64_t wait_bound_ns)
    : mapping_(mapping), ordinal_(ordinal), header_(mapping.header()), wait_bound_ns_(wait_bound_ns) {
  int devices = 0;
  check(cudaGetDeviceCount(&devices), "create ring: ask CUDA for its devices");
  if (ordinal < 0 || ordinal >= devices)
    invalid("create ring: no CUDA device " + std::to_string(ordinal) + "; there are " + std::to_string(devices));
  Scope scope(ordinal);
  try {
    check(cudaHostRegister(mapping.base(), header_.total_bytes, cudaHostRegisterMapped | cudaHostRegisterPortable),
          "create ring: page-lock the shared memory (is the limit of locked memory, ulimit -l, below the ring's size?)");
    registered_ = true;
    void* seen = nullptr;
    check(cudaHostGetDevicePointer(&seen, mapping.base(), 0), "create ring: map the shared memory");
    auto at = [&](uint64_t offset) { return static_cast<std::byte*>(seen) + offset; };

    payload_ = allocate<std::byte>(header_.payload_bytes, "create ring: allocate the payload ring (smaller with ring_mib=)");
    state_ = allocate<State>(1, "create ring: allocate its state");
    eager_ = allocate<Meeting>(kMeetings, "create ring: allocate its state");
    check(cudaMemset(eager_, 0, kMeetings * sizeof(Meeting)), "create ring: clear its state");
    void* locked = nullptr;
    check(cudaHostAlloc(&locked, sizeof(Notice), cudaHostAllocMapped | cudaHostAllocPortable), "create ring: allocate page-locked memory");
    notice_ = new (locked) Notice{};
    check(cudaHostAlloc(&locked, kSlotBytes, cudaHostAllocMapped | cudaHostAllocPortable), "create ring: allocate page-locked memory");
    teller_.slots = slots_ = static_cast<std::byte*>(locked);

    State s{};
    Fixed& f = s.fixed;
    f.payload = payload_;
    f.payload_bytes = header_.payload_bytes;
    f.spill = at(header_.spill_offset);
    f.spill_bytes = header_.spill_bytes;
    f.little = little_of(header_.spill_bytes);
    f.records = reinterpret_cast<dmi_record*>(at(header_.records_offset));  // lane 0: the steps of a device follow each other
    f.record_capacity = header_.record_capacity;
    auto* control = reinterpret_cast<dmi_control*>(at(header_.control_offset));
    f.record_tail = &control->lane[0].record_tail.value;
    f.payload_tail = &control->payload_tail.value;
    f.spill_tail = &control->spill_tail.value;
    f.runs = allocate<Run>(kLargestRuns, "create ring: allocate its state");
    f.left = allocate<uint8_t>(header_.site_capacity, "create ring: allocate its state");
    f.owns = allocate<Own>(kLargestRuns, "create ring: allocate its state");
    f.lists = allocate<Space>(kMostSelections * kListsEach, "create ring: allocate its state");
    f.gates = allocate<Gate>(header_.site_capacity, "create ring: allocate its state");
    f.holders = allocate<Holder>(kLargestRuns, "create ring: allocate its state");
    f.keeps = allocate<dmi_keep>(header_.site_capacity, "create ring: allocate its state");
    f.watches = allocate<Condition>(DMI_MAX_WATCHES, "create ring: allocate its state");
    f.weights = allocate<float>(DMI_PROBE_FLOATS, "create ring: allocate its state");
    f.met = allocate<uint64_t>(kLargestRuns, "create ring: allocate its state");
    f.lots = allocate<Lot>(header_.record_capacity, "create ring: allocate its state");
    f.wait_bound_ns = wait_bound_ns;
    f.complete = header_.mode == DMI_MODE_COMPLETE;
    s.counters_out = &control->lane[0].counters;
    s.notice = notice_;
    check(cudaMemcpy(state_, &s, sizeof s, cudaMemcpyHostToDevice), "create ring: write its state");
    check(cudaStreamCreateWithFlags(&copies_, cudaStreamNonBlocking), "create ring: make a stream");
    void* found = nullptr;
    cudaDriverEntryPointQueryResult how{};
    check(cudaGetDriverEntryPointByVersion("cuStreamWriteValue64", &found, 12000, cudaEnableDefault, &how),
          "create ring: look a function of the driver up");
    if (how != cudaDriverEntryPointSuccess)
      throw Error(DMI_ERROR_SYSTEM, "create ring: the driver has no cuStreamWriteValue64; update it (CUDA 12 or later is needed)");
    write_value_ = reinterpret_cast<decltype(write_value_)>(found);
    for (cudaEvent_t* event : {&last_done_, &left_, &back_})
      check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "create ring: make an event");
    int least = 0, most = 0;
    check(cudaDeviceGetStreamPriorityRange(&least, &most), "create ring: ask for the priorities of streams");
    check(cudaStreamCreateWithPriority(&branch_, cudaStreamNonBlocking, least), "create ring: make a stream");
    check(cudaDeviceSynchronize(), "create ring");
    // Kernels are loaded at their first launch, which must not be one that a recording or a step waits for.
    int processors = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, ordinal_), "create ring: ask for the device's size");
    blocks_ = std::min(2 * uint32_t(processors), kMostBlocks);
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, open_kernel), "create ring: load libdmi's kernels (was it built for this GPU?)");
    check(cudaFuncGetAttributes(&attributes, close_kernel), "create ring: load libdmi's kernels");
    check(cudaFuncGetAttributes(&attributes, capture_kernel), "create ring: load libdmi's kernels");
  } catch (...) {
    release();
    throw;
  }
}

Cuda::~Cuda() {
  Scope scope(ordinal_);
  release();
}

// What graphs that were captured may still point at stays: state, meetings, row runs, notice.
void Cuda::release() {
  if (copies_ != nullptr) {
    cudaStreamSynchronize(copies_);
    cudaStreamDestroy(copies_);
  }
  if (branch_ != nullptr) cudaStreamDestroy(branch_);
  for (cudaEvent_t event : {last_done_, left_, back_}) {
    if (event != nullptr) cudaEventDestroy(event);
  }
  if (slots_ != nullptr) cudaFreeHost(slots_);
  if (payload_ != nullptr) cudaFree(payload_);
  if (registered_) cudaHostUnregister(mapping_.base());
  cudaGetLastError();
}

// A graph keeps its meeting; eager launches take turns.
Meeting* Cuda::meeting(bool keep) {
  if (!keep) return eager_ + next_eager_++ % kMeetings;
  if (graph_used_ == kGraphMeetings) {
    if (graph_total_ >= kMostGraphMeetings)
      invalid("capture: graphs hold " + std::to_string(graph_total_) + " captures of this ring already; make fewer graphs, or attach anew");
    graph_ = allocate<Meeting>(kGraphMeetings, "capture: allocate state for a graph's captures");
    cudaStream_t clearing = copies_;  // not the stream that records
    check(cudaMemsetAsync(graph_, 0, kGraphMeetings * sizeof(Meeting), clearing), "capture: clear state for a graph's captures");
    check(cudaStreamSynchronize(clearing), "capture: clear state for a graph's captures");
    graph_used_ = 0;
    graph_total_ += kGraphMeetings;
  }
  return graph_ + graph_used_++;
}

// The default stream: unlike others it is still there, to be waited for, when a step is opened on another one.
bool lasts(cudaStream_t stream) { return stream == nullptr || stream == cudaStreamLegacy; }

// Steps of one ring follow each other on the device, whichever streams they run on.
void Cuda::follow(cudaStream_t stream) {
  if (!any_step_ || stream == last_stream_) return;
  if (lasts(last_stream_)) check(cudaEventRecord(last_done_, last_stream_), "open step: order it behind the last one");
  check(cudaStreamWaitEvent(stream, last_done_, 0), "open step: order it behind the last one");
}

// A thread that runs far ahead of the device comes to wait within the driver, with its locks, and the pump's copies behind it: in complete
// mode, where the device may be waiting for just these copies, it waits here instead. No device is idle for that.
void Cuda::let_catch_up() const {
  if (header_.mode != DMI_MODE_COMPLETE) return;
  const uint64_t start = monotonic_ns();
  while (opened_.load(std::memory_order_relaxed) - load_acquire(notice_->closes) > kAhead && monotonic_ns() - start < wait_bound_ns_)
    sleep_ns(20'000);
}

const char* Cuda::open(const DeviceStep& step, void* on) {
  let_catch_up();
  std::lock_guard lock(mutex_);
  Scope scope(ordinal_);
  auto stream = static_cast<cudaStream_t>(on);
  Opening o{};
  if (const char* why = teller_.tell(o, step, unix_ns(), load_acquire(notice_->slot_end))) return why;
  follow(stream);
  open_kernel<<<1, kThreads, 0, stream>>>(state_, o, step.owed, uint64_t{o.space[DMI_SPACE_TOKENS].rows} * step.sites);
  check(cudaGetLastError(), "open step: launch");
  teller_.told();
  opened_.fetch_add(1, std::memory_order_release);
  last_stream_ = stream;
  any_step_ = true;
  return nullptr;
}

void Cuda::close(const DeviceClose& step, void* on, bool same_stream) {
  std::lock_guard lock(mutex_);
  Scope scope(ordinal_);
  auto stream = same_stream ? last_stream_ : static_cast<cudaStream_t>(on);
  if (stream != last_stream_) {  // opened on another: everything there comes first
    check(cudaEventRecord(last_done_, last_stream_), "close step: order it");
    check(cudaStreamWaitEvent(stream, last_done_, 0), "close step: order it");
    last_stream_ = stream;
  }
  close_kernel<<<1, 32, 0, stream>>>(state_,
                                     Closing{unix_ns(), step.op_calls, step.op_ns, step.waits, step.wait_ns, step.outside, step.aborted});
  check(cudaGetLastError(), "close step: launch");
  closed_.fetch_add(1, std::memory_order_release);
  if (!lasts(stream)) check(cudaEventRecord(last_done_, stream), "close step: record its end");
}

void Cuda::tell_gap(const Gap& gap) {
  std::lock_guard lock(mutex_);
  Scope scope(ordinal_);
  follow(copies_);
  gap_kernel<<<1, 1, 0, copies_>>>(state_, gap.first, gap.last, gap.steps, gap.rows);
  check(cudaGetLastError(), "tell of steps that were dropped: launch");
  check(cudaStreamSynchronize(copies_), "tell of steps that were dropped");
}

bool Cuda::recording(void* stream) const {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  Scope scope(ordinal_);
  return cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess && status == cudaStreamCaptureStatusActive;
}

void Cuda::branch(bool may, void* on) {
  std::lock_guard lock(mutex_);
  const auto stream = static_cast<cudaStream_t>(on);
  if (!may && stream == trunk_ && recording(on)) {
    Scope scope(ordinal_);
    come_back();
  }
  away_ = false;  // of a recording that was given up
  may_branch_ = may;
  trunk_ = may ? stream : nullptr;
}

// What follows on the recording's stream waits for the branch.
void Cuda::come_back() {
  if (!away_) return;
  away_ = false;
  check(cudaStreamWaitEvent(trunk_, back_, 0), "capture: join a branch");
}

void Cuda::capture(const dmi_tensor* tensors, uint32_t count, const dmi_site* sites, uint32_t site_count, bool beside, void* on) {
  std::lock_guard lock(mutex_);
  const bool keep = recording(on);
  Scope scope(ordinal_);
  auto stream = static_cast<cudaStream_t>(on);
  // Also where the recording has this call on another of its streams: what was held is not held from here on.
  if (keep) come_back();
  const bool leaves = keep && may_branch_ && stream == trunk_ && beside && count != 0;
  if (leaves) {
    check(cudaEventRecord(left_, stream), "capture: begin a branch");
    check(cudaStreamWaitEvent(branch_, left_, 0), "capture: begin a branch");
    stream = branch_;
  }
  Group group;
  group.state = state_;
  for (uint32_t done = 0; done < count; done += group.count) {
    group.count = std::min(count - done, kGroupTensors);
    group.meeting = meeting(keep);
    const uint64_t bytes = describe_group(group, tensors + done, ordinal_, sites, site_count);
    const auto blocks = uint32_t(std::clamp<uint64_t>((bytes >> group.unit_shift) + group.count, 1, blocks_));
    capture_kernel<<<blocks, kThreads, 0, stream>>>(group);
    check(cudaGetLastError(), "capture: launch");
  }
  if (!leaves) return;
  check(cudaEventRecord(back_, branch_), "capture: end a branch");
  away_ = true;
}

bool Cuda::begin_copy(std::byte* staging, uint64_t payload, uint64_t bytes) {
  if (failed_) return false;
  waiting_bytes_ += bytes;
  waiting_.push_back({staging, payload, bytes});
  copy_on();
  return !failed_;
}

// Gives the copy engine what it may have.
void Cuda::copy_on() {
  const uint64_t head = payload_head(), tail = load_acquire(mapping_.control().payload_tail.value);
  const bool behind = head > tail && nearly_full(head - tail, header_.payload_bytes);
  const bool first = behind || (header_.mode == DMI_MODE_COMPLETE && waiting_bytes_ > kMuch);
  while (!failed_ && !waiting_.empty() && bursts_.size() < (first ? kQueued : 1)) give_burst(first ? kLargeBurst : kBurst);
}

void Cuda::give_burst(uint64_t most) {
  Scope scope(ordinal_);
  cudaError_t status = cudaSuccess;
  uint64_t bytes = 0, copies = 0;
  for (uint32_t n = 0; n < kPieces && !waiting_.empty() && status == cudaSuccess; ++n) {
    Copy& copy = waiting_.front();
    const uint64_t at = copy.payload % header_.payload_bytes, piece = std::min({copy.bytes, header_.payload_bytes - at, most - bytes});
    if (piece == 0 && copy.bytes != 0) break;
    if (piece != 0) status = cudaMemcpyAsync(copy.to, payload_ + at, piece, cudaMemcpyDeviceToHost, copies_);
    copy = {copy.to + piece, copy.payload + piece, copy.bytes - piece};
    bytes += piece;
    if (copy.bytes == 0) {
      waiting_.pop_front();
      ++copies;
    }
  }
  waiting_bytes_ -= bytes;
  if (status == cudaSuccess) status = tell_end(burst_ + 1);
  if (status != cudaSuccess) {
    failed_ = true;
    std::fprintf(stderr,
                 "dmi: copy %llu bytes of payload from CUDA device %d: %s; nothing more is copied for the engine, whose rows are lost\n",
                 static_cast<unsigned long long>(bytes), ordinal_, cudaGetErrorString(status));
    return;
  }
  ++burst_;
  bursts_.push_back(copies);
  looked_ns_ = monotonic_ns();
}

// The stream counts its bursts in memory of ours: asking the driver how far it is would take locks that the model's launches need.
cudaError_t Cuda::tell_end(uint64_t burst) {
  const CUresult result = write_value_(copies_, reinterpret_cast<CUdeviceptr>(&notice_->bursts), burst, CU_STREAM_WRITE_VALUE_DEFAULT);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorUnknown;
}

uint64_t Cuda::copies_complete() {
  // Pairs with the stream's write, before which all of its copies are there.
  const uint64_t through = load_acquire(notice_->bursts);
  for (uint64_t burst = burst_ - bursts_.size(); burst != through && !bursts_.empty(); ++burst) {
    complete_ += bursts_.front();
    bursts_.pop_front();
  }
  if (!bursts_.empty() && !failed_ && monotonic_ns() - looked_ns_ > kLookNs) {  // a device that failed counts nothing any more
    Scope scope(ordinal_);
    looked_ns_ = monotonic_ns();
    const cudaError_t status = cudaStreamQuery(copies_);
    if (status != cudaSuccess && status != cudaErrorNotReady) {
      failed_ = true;
      std::fprintf(stderr, "dmi: CUDA device %d failed: %s; nothing more is copied for the engine, whose rows are lost\n", ordinal_,
                   cudaGetErrorString(status));
    }
  }
  if (!waiting_.empty()) copy_on();
  return complete_;
}

bool Cuda::settle(uint64_t bound_ns) {
  const uint64_t start = monotonic_ns(), closed = closed_.load(std::memory_order_acquire);
  while (load_acquire(notice_->closes) < closed) {
    if (monotonic_ns() - start >= bound_ns) return false;
    sleep_ns(50'000);
  }
  return true;
}

bool Cuda::quiesce(uint64_t bound_ns) {
  const uint64_t start = monotonic_ns();
  while (busy()) {
    if (monotonic_ns() - start >= bound_ns) return false;
    sleep_ns(50'000);
  }
  return true;
}

}  // namespace
}  // namespace device

std::unique_ptr<Device> make_device(const Mapping& mapping, int ordinal, uint64_t wait_bound_ns) {
  return std::make_unique<device::Cuda>(mapping, ordinal, wait_bound_ns);
}

bool has_devices() { return true; }

}  // namespace dmi

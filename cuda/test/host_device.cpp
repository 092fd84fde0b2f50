// A device of threads: what device/ does on a GPU is done here by the host, blocks beside each other, so that rings with a device can be
// tested whole, under the sanitizers too. There are two of them. Linked with tests alone.
#include "host_device.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "device.h"
#include "device/capture.h"
#include "device/launch.h"
#include "error.h"
#include "ring.h"
#include "shared.h"

namespace dmi {
namespace device {
namespace {

class Host final : public Device {
 public:
  Host(const Mapping& mapping, int ordinal, uint64_t wait_bound_ns)
      : ordinal_(ordinal),
        header_(mapping.header()),
        payload_(header_.payload_bytes),
        runs_(kLargestRuns),
        owns_(kLargestRuns),
        lists_(kMostSelections * kListsEach),
        gates_(header_.site_capacity),
        left_(header_.site_capacity),
        holders_(kLargestRuns),
        keeps_(header_.site_capacity),
        watches_(DMI_MAX_WATCHES),
        weights_(DMI_PROBE_FLOATS),
        met_(kLargestRuns),
        lots_(header_.record_capacity),
        slots_(kSlotBytes),
        random_(test_seed()) {
    Fixed& f = state_->fixed;
    f.payload = payload_.data();
    f.payload_bytes = header_.payload_bytes;
    f.spill = mapping.spill();
    f.spill_bytes = header_.spill_bytes;
    f.little = little_of(header_.spill_bytes);
    f.records = mapping.records(0);
    f.record_capacity = header_.record_capacity;
    dmi_control& control = mapping.control();
    f.record_tail = &control.lane[0].record_tail.value;
    f.payload_tail = &control.payload_tail.value;
    f.spill_tail = &control.spill_tail.value;
    f.runs = runs_.data();
    f.owns = owns_.data();
    f.lists = lists_.data();
    f.gates = gates_.data();
    f.left = left_.data();
    f.holders = holders_.data();
    f.keeps = keeps_.data();
    f.watches = watches_.data();
    f.weights = weights_.data();
    f.met = met_.data();
    f.lots = lots_.data();
    f.wait_bound_ns = wait_bound_ns;
    f.complete = header_.mode == DMI_MODE_COMPLETE;
    state_->counters_out = &control.lane[0].counters;
    state_->notice = &notice_;
    teller_.slots = slots_.data();
  }

  void* token() const override { return state_.get(); }
  int ordinal() const override { return ordinal_; }
  uint64_t bytes() const override { return payload_.size(); }
  const char* open(const DeviceStep& step, void*) override {
    Opening o{};
    if (const char* why = teller_.tell(o, step, unix_ns(), load_acquire(notice_.slot_end))) return why;
    const uint64_t gap_rows = uint64_t{o.space[DMI_SPACE_TOKENS].rows} * step.sites;
    opened_.fetch_add(1, std::memory_order_release);
    launch(1, [&](HostBlock& block) { open_step(block, *state_, o, step.owed, gap_rows); });
    teller_.told();
    return nullptr;
  }
  void close(const DeviceClose& step, void*, bool) override {
    const Closing closing{unix_ns(), step.op_calls, step.op_ns, step.waits, step.wait_ns, step.outside, step.aborted};
    launch(1, [&](HostBlock& block) { close_step(block, *state_, closing); });
  }
  void tell_gap(const Gap& gap) override { device::tell_gap(*state_, gap.first, gap.last, gap.steps, gap.rows); }
  bool recording(void*) const override { return false; }
  void capture(const dmi_tensor* tensors, uint32_t count, const dmi_site* sites, uint32_t site_count, bool, void*) override {
    auto group = std::make_unique<Group>();
    group->state = state_.get();
    group->meeting = &meeting_;
    for (uint32_t done = 0; done < count; done += group->count) {
      group->count = std::min(count - done, kGroupTensors);
      describe_group(*group, tensors + done, ordinal_, sites, site_count);
      group->unit_shift = 6 + uint32_t(random_() % 6);
      launch(1 + uint32_t(random_() % 3), [&](HostBlock& block) { device::capture(block, *group, block.shared.scratch); });
    }
  }
  void branch(bool, void*) override {}
  bool begin_copy(std::byte* staging, uint64_t payload, uint64_t bytes) override {
    const uint64_t at = payload % payload_.size(), before = std::min<uint64_t>(bytes, payload_.size() - at);
    std::memcpy(staging, payload_.data() + at, before);
    std::memcpy(staging + before, payload_.data(), bytes - before);
    ++copies_;
    return true;
  }
  uint64_t copies_complete() override { return copies_; }
  bool failed() const override { return false; }
  bool busy() const override { return load_acquire(notice_.closes) != opened_.load(std::memory_order_acquire); }
  uint64_t payload_head() const override { return load_relaxed(notice_.payload_head); }
  uint64_t spill_head() const override { return load_relaxed(notice_.spill_head); }
  uint64_t gave_up() const override { return load_relaxed(notice_.gave_up); }
  bool settle(uint64_t) override { return true; }
  bool quiesce(uint64_t) override { return true; }

 private:
  const int ordinal_;
  const dmi_header header_;
  std::vector<std::byte> payload_;
  std::vector<Run> runs_;
  std::vector<Own> owns_;
  std::vector<Space> lists_;
  std::vector<Gate> gates_;
  std::vector<uint8_t> left_;
  std::vector<Holder> holders_;
  std::vector<dmi_keep> keeps_;
  std::vector<Condition> watches_;
  std::vector<float> weights_;
  std::vector<uint64_t> met_;
  std::vector<Lot> lots_;
  std::vector<std::byte> slots_;
  Teller teller_;
  mutable Notice notice_{};
  std::unique_ptr<State> state_ = std::make_unique<State>();
  Meeting meeting_{};
  std::mt19937_64 random_;
  std::atomic<uint64_t> opened_{0};
  uint64_t copies_ = 0;  // the pump's
};

}  // namespace
}  // namespace device

std::unique_ptr<Device> make_device(const Mapping& mapping, int ordinal, uint64_t wait_bound_ns) {
  if (ordinal > 1) invalid("create ring: no device " + std::to_string(ordinal) + "; there are 2");
  return std::make_unique<device::Host>(mapping, ordinal, wait_bound_ns);
}

bool has_devices() { return true; }

}  // namespace dmi

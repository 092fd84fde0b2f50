// A ring as its process holds it: the shared mapping, the payload, the lanes and the pump.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "device.h"
#include "groups.h"
#include "lane.h"
#include "mapping.h"
#include "pump.h"
#include "reservation.h"

namespace dmi {

uint64_t monotonic_ns();
uint64_t unix_ns();
void sleep_ns(uint64_t ns);

// What the caller of open_step says of a step. Borrowed.
struct Opening {
  uint64_t step;
  const dmi_span* spans;
  uint32_t count;
  const uint32_t* width;  // DMI_SPACES of them
  uint32_t keys;
  uint32_t flags;  // DMI_TABLE_*
  void* stream;    // where the device is to open it; nothing on the CPU
};
inline uint64_t table_bytes(const Opening& opening, const std::vector<dmi_run>& runs = {}) {
  return sizeof(dmi_table) + uint64_t{opening.count} * sizeof(dmi_span) + runs.size() * sizeof(dmi_run);
}
void write_table(std::byte* to, const Opening& opening, const std::vector<dmi_run>& runs = {});

// Whichever stream the step was opened on.
inline void* const kSameStream = reinterpret_cast<void*>(~uintptr_t{0});

class Ring {
 public:
  explicit Ring(const dmi_ring_options& options);
  ~Ring();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  const Mapping& mapping() const { return mapping_; }
  uint32_t add_site(const dmi_site& site);
  void set_attached(bool attached);
  uint32_t counters(dmi_counters* counters, uint32_t lanes, dmi_gauges& gauges);
  uint32_t closed_steps(uint64_t* steps, uint32_t lanes) const;

  // ---- steps (step.cpp). A lane belongs to the calling thread from open to close.
  // Returns the lane, its step open or gated; nullptr where the step was booked as a gap. Throws in complete mode on shortage,
  // with no step open.
  Lane* open_step(const Opening& opening, uint32_t preferred_lane);
  // Publishes CLOSE and gives the lane back; then throws Error(TIMEOUT) if the step gave up and was not aborted.
  void close_step(Lane& lane, bool aborted, void* stream);
  // No step opens any more; publishes pending gaps. False where there was no room for them within the bound.
  bool finish(uint64_t bound_ns);
  // What was closed by now is published when this returns. Throws Error at the bound.
  void settle(uint64_t bound_ns);

  // Who requests are to the policy: from the next step on.
  Groups& groups() { return groups_; }

  // ---- captures (capture.cpp; with a device, device_step.cpp)
  void capture(Lane& lane, const dmi_tensor* tensors, uint32_t count, void* stream);
  // Part of the graph that the stream records, if it records one: then a step need not be open.
  bool record(const dmi_tensor* tensors, uint32_t count, bool beside, void* stream);
  // Whether what a stream records may branch.
  void branch(bool may, void* stream);
  void count_outside(uint32_t tensors) { outside_.fetch_add(tensors, std::memory_order_relaxed); }

  // ---- the end
  void end_waits() { stopping_.store(true, std::memory_order_relaxed); }
  void stop_pump() { pump_.stop(); }
  void forked_in_child();  // async-signal-safe: nothing here is ours any more
  const Device* device() const { return device_.get(); }
  bool foreign() const { return foreign_.load(std::memory_order_relaxed); }

 private:
  friend class Capture;

  bool complete() const { return mapping_.header().mode == DMI_MODE_COMPLETE; }
  void wake_engine();  // if it blocks; after publishing
  template <typename Room>
  bool wait(Lane& lane, Room room);
  void book_wait(Lane& lane, uint64_t ns);
  void device_used(dmi_gauges& gauges) const;

  Lane* free_lane(uint32_t preferred);
  Lane* open_on_device(const Opening& opening);
  void close_on_device(Lane& lane, bool aborted, void* stream);
  void finish_on_device(uint64_t bound_ns);
  Gap take_gap();
  void put_gap_back(const Gap& gap);
  void latch_gates(Lane& lane);
  void latch_watches(Lane::Step& step);
  void select(Lane& lane, const std::vector<dmi_gate>& gates);
  uint64_t select_rows(Lane::Step& step, const Opening& opening);
  void add_gap(uint64_t step, uint64_t rows);
  void publish_gap(Lane& lane);
  void publish_open(Lane& lane, const Opening& opening, std::byte* table, uint64_t table_offset);
  void publish_close(Lane& lane, bool aborted);

  Mapping mapping_;
  const uint64_t wait_bound_ns_;
  std::unique_ptr<Device> device_;  // null on the CPU
  std::byte* const payload_;        // null where a device has it
  Reservation payload_space_;
  Reservation spill_space_;
  std::vector<std::unique_ptr<Lane>> lanes_;

  std::mutex sites_mutex_;       // writers of the site table
  std::vector<dmi_site> sites_;  // our own copy, never reallocated; entries below site_count_ never change
  std::atomic<uint32_t> site_count_{0};

  Groups groups_;

  std::mutex gap_mutex_;
  Gap gap_;                           // not yet published; by whichever lane has room first
  std::atomic<bool> has_gap_{false};  // a hint that saves the lock
  std::atomic<bool> finished_{false};

  std::atomic<bool> attached_{false};
  std::atomic<bool> stopping_{false};
  std::atomic<bool> foreign_{false};
  std::atomic<uint64_t> outside_{0};

  // What the device is told at the next close. Writer: whoever has lane 0.
  struct HostWork {
    uint64_t op_calls = 0, op_ns = 0, waits = 0, wait_ns = 0;
  } host_work_;
  uint64_t gave_up_seen_ = 0;

  Pump pump_;  // last: its thread uses what is above
};

// Complete mode: waits for the engine until room() or the bound, and books it. Once a step has given up it waits no more.
template <typename Room>
bool Ring::wait(Lane& lane, Room room) {
  if (lane.step.gave_up) return room();
  lane.publish();  // what the engine must take to make room
  wake_engine();
  const uint64_t start = monotonic_ns();
  uint64_t now = start;
  bool found = false;
  for (uint64_t pause_ns = 2'000;; pause_ns = pause_ns < 1'000'000 ? pause_ns * 2 : pause_ns) {
    found = room();
    now = monotonic_ns();
    if (found || now - start >= wait_bound_ns_ || stopping_.load(std::memory_order_relaxed)) break;
    sleep_ns(pause_ns);
  }
  lane.step.gave_up = !found;
  book_wait(lane, now - start);
  return found;
}

}  // namespace dmi

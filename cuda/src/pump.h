// The pump: one thread that carries out the engine's copy commands, in order, and wakes the engine for what a device has published.
// It holds no policy.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>

#include "device.h"
#include "mapping.h"

namespace dmi {

class Pump {
 public:
  // The payload is in our memory, or a device has it.
  Pump(const Mapping& mapping, std::byte* payload, Device* device, const std::atomic<bool>& attached);
  ~Pump() { stop(); }

  // A device has been given something to do: it is watched until it is done.
  void look();
  // Carries out what has been posted by now, then ends the thread. Idempotent.
  void stop();

  uint64_t refused() const { return refused_.load(std::memory_order_relaxed); }

 private:
  void run();
  bool drain();
  bool settle();
  bool watch();
  bool copy(const dmi_command& command, uint64_t index);
  void done_through(uint64_t commands);
  void wake_engine();

  const Mapping& mapping_;
  std::byte* const payload_;
  Device* const device_;
  const std::atomic<bool>& attached_;
  uint64_t begun_ = 0;    // commands taken
  uint64_t done_ = 0;     // commands that are complete
  uint64_t records_ = 0;  // of the device, that the engine was woken for
  uint64_t busy_until_ = 0;
  uint64_t spin_until_ = 0;
  std::atomic<uint64_t> refused_{0};
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace dmi

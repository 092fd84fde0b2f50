// Space in a byte ring that all lanes share: the payload ring and the spill ring.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "dmi/dmi.h"
#include "shared.h"

namespace dmi {

constexpr uint64_t aligned(uint64_t bytes) { return (bytes + DMI_PAYLOAD_ALIGN - 1) / DMI_PAYLOAD_ALIGN * DMI_PAYLOAD_ALIGN; }

struct Range {
  uint64_t offset = 0;  // virtual
  uint64_t units = 0;   // granted; 0: no room
};

class Reservation {
 public:
  // `tail` is the engine's word. `wraps`: whether a range may cross the end.
  Reservation(uint64_t capacity, uint64_t& tail, bool wraps) : capacity_(capacity), tail_(tail), wraps_(wraps) {}

  // Reserves up to `count` units of `unit` bytes each, at least `least` of them or none.
  Range take(uint64_t unit, uint64_t count, uint64_t least) {
    if (capacity_ == 0) return {};
    uint64_t head = head_.load(std::memory_order_relaxed);
    // Pairs with the release below, in whichever lane saw the engine's tail.
    uint64_t tail = tail_seen_.load(std::memory_order_acquire);
    bool fresh = false;
    for (;;) {
      uint64_t room = capacity_ - std::min(head - tail, capacity_);
      if (!wraps_) room = std::min(room, capacity_ - head % capacity_);
      const uint64_t granted = unit == 0 ? count : std::min(count, room / unit);
      if (granted < std::max<uint64_t>(least, 1)) {
        if (fresh) return {};
        tail = refresh();
        head = head_.load(std::memory_order_relaxed);
        fresh = true;
        continue;
      }
      // Relaxed: the range is ours by the swap alone; its bytes are published by a record's seq.
      if (head_.compare_exchange_weak(head, head + aligned(unit * granted), std::memory_order_relaxed)) return {head, granted};
    }
  }

  uint64_t head() const { return head_.load(std::memory_order_relaxed); }
  uint64_t used() {
    const uint64_t tail = refresh();
    return head() - tail;
  }
  uint64_t capacity() const { return capacity_; }
  // Bytes up to the end of the ring from where the next range starts.
  uint64_t to_end() const { return capacity_ == 0 ? 0 : capacity_ - head() % capacity_; }

 private:
  // Reads the engine's tail: only here, on shortage. Pairs with the engine's release after the last copy from below it.
  uint64_t refresh() {
    uint64_t seen = tail_seen_.load(std::memory_order_acquire);
    const uint64_t tail = load_acquire(tail_) / DMI_PAYLOAD_ALIGN * DMI_PAYLOAD_ALIGN;
    const uint64_t head = head_.load(std::memory_order_relaxed);  // after the tail: an honest one is not beyond it
    // An engine that goes back, or claims what was never written, is not believed.
    while (tail > seen && tail <= head) {
      if (tail_seen_.compare_exchange_weak(seen, tail, std::memory_order_acq_rel, std::memory_order_acquire)) return tail;
    }
    return seen;
  }

  const uint64_t capacity_;
  uint64_t& tail_;
  const bool wraps_;
  alignas(128) std::atomic<uint64_t> head_{0};
  alignas(128) std::atomic<uint64_t> tail_seen_{0};
};

}  // namespace dmi

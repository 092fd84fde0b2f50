// Launches of the device's functions with threads for what a GPU has.
#pragma once

#include <algorithm>
#include <barrier>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "device/capture.h"

namespace dmi::device {

// A block of a launch. Its threads are as many as it takes for a race between them to show; each is a warp.
constexpr uint32_t kBlockThreads = 4;

struct Shared {
  std::barrier<> meet{kBlockThreads};
  std::barrier<> pair[2] = {std::barrier<>(2), std::barrier<>(2)};
  Scratch scratch;
};

struct HostBlock {
  Shared& shared;
  uint32_t thread_, index_, count_;
  uint32_t thread() const { return thread_; }
  uint32_t threads() const { return kBlockThreads; }
  uint32_t index() const { return index_; }
  uint32_t count() const { return count_; }
  uint32_t lane() const { return 0; }
  uint32_t lanes() const { return 1; }
  uint32_t warp() const { return thread_; }
  uint32_t warps() const { return kBlockThreads; }
  void sync() const { shared.meet.arrive_and_wait(); }
  void sync(uint32_t team, uint32_t warps) const { warps == kBlockThreads ? sync() : shared.pair[team].arrive_and_wait(); }
  template <typename T, typename Merge>
  T across(T value, Merge) const {
    return value;
  }
  template <typename T>
  void load(T* to, const T* from, uint32_t n) const {
    if (thread_ == 0) std::copy_n(from, n, to);
  }
  uint64_t sum(uint64_t* values, uint32_t n) const {
    uint64_t total = 0;
    for (uint32_t i = 0; i < n; ++i) total += values[i];
    sync();
    if (thread_ == 0) exclusive(values, n);
    sync();
    return total;
  }
  void sum(uint32_t* values, uint32_t n) const {
    if (thread_ == 0) values[n] = exclusive(values, n);
    sync();
  }

 private:
  template <typename T>
  static T exclusive(T* values, uint32_t n) {
    T before = 0;
    for (uint32_t i = 0; i < n; ++i) before += std::exchange(values[i], before);
    return before;
  }
};

inline void launch(uint32_t blocks, const std::function<void(HostBlock&)>& kernel) {
  std::vector<std::unique_ptr<Shared>> shared;
  std::vector<std::thread> threads;
  for (uint32_t b = 0; b < blocks; ++b) shared.push_back(std::make_unique<Shared>());
  for (uint32_t b = 0; b < blocks; ++b) {
    for (uint32_t t = 0; t < kBlockThreads; ++t) {
      threads.emplace_back([&, b, t] {
        HostBlock block{*shared[b], t, b, blocks};
        kernel(block);
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace dmi::device

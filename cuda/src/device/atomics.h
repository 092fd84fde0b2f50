// Words that blocks of a launch, launches of several streams, the pump and the engine share, named op, order and scope.
// Compiled by nvcc they are CUDA's; by a host compiler, for the protocol's tests under ThreadSanitizer, the standard library's.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda/atomic>
#define DMI_HD __host__ __device__
#define DMI_APART __noinline__
#else
#include <time.h>

#include <atomic>
#define DMI_HD
#define DMI_APART
#endif

namespace dmi::device {

#ifdef __CUDACC__
template <typename T>
using gpu_ref = cuda::atomic_ref<T, cuda::thread_scope_device>;
template <typename T>
using sys_ref = cuda::atomic_ref<T, cuda::thread_scope_system>;
using cuda::std::memory_order_acq_rel;
using cuda::std::memory_order_acquire;
using cuda::std::memory_order_relaxed;
using cuda::std::memory_order_release;
#else
template <typename T>
using gpu_ref = std::atomic_ref<T>;
template <typename T>
using sys_ref = std::atomic_ref<T>;
using std::memory_order_acq_rel;
using std::memory_order_acquire;
using std::memory_order_relaxed;
using std::memory_order_release;
#endif

template <typename T>
DMI_HD T load_relaxed_gpu(T& word) {
  return gpu_ref<T>(word).load(memory_order_relaxed);
}
template <typename T>
DMI_HD T load_acquire_gpu(T& word) {
  return gpu_ref<T>(word).load(memory_order_acquire);
}
template <typename T>
DMI_HD void store_relaxed_gpu(T& word, T value) {
  gpu_ref<T>(word).store(value, memory_order_relaxed);
}
template <typename T>
DMI_HD void store_release_gpu(T& word, T value) {
  gpu_ref<T>(word).store(value, memory_order_release);
}
template <typename T>
DMI_HD T add_relaxed_gpu(T& word, T value) {
  return gpu_ref<T>(word).fetch_add(value, memory_order_relaxed);
}
template <typename T>
DMI_HD T add_acq_rel_gpu(T& word, T value) {
  return gpu_ref<T>(word).fetch_add(value, memory_order_acq_rel);
}
// Counts up to `last`, and from there begins anew. Returns what was there.
DMI_HD inline uint32_t wrap_relaxed_gpu(uint32_t& word, uint32_t last) {
#ifdef __CUDA_ARCH__
  return atomicInc(&word, last);
#else
  gpu_ref<uint32_t> counter(word);
  uint32_t was = counter.load(memory_order_relaxed);
  while (!counter.compare_exchange_weak(was, was >= last ? 0 : was + 1, memory_order_relaxed)) {
  }
  return was;
#endif
}
template <typename T>
DMI_HD void or_relaxed_gpu(T& word, T value) {
  gpu_ref<T>(word).fetch_or(value, memory_order_relaxed);
}
template <typename T>
DMI_HD bool swap_relaxed_gpu(T& word, T& expected, T desired) {
  return gpu_ref<T>(word).compare_exchange_strong(expected, desired, memory_order_relaxed, memory_order_relaxed);
}
template <typename T>
DMI_HD bool swap_acq_rel_gpu(T& word, T& expected, T desired) {
  return gpu_ref<T>(word).compare_exchange_strong(expected, desired, memory_order_acq_rel, memory_order_acquire);
}
DMI_HD inline uint64_t load_acquire_sys(uint64_t& word) { return sys_ref<uint64_t>(word).load(memory_order_acquire); }
DMI_HD inline void store_release_sys(uint64_t& word, uint64_t value) { sys_ref<uint64_t>(word).store(value, memory_order_release); }
DMI_HD inline void store_relaxed_sys(uint64_t& word, uint64_t value) { sys_ref<uint64_t>(word).store(value, memory_order_relaxed); }

// Nanoseconds of a clock that only serves to measure waits.
DMI_HD inline uint64_t clock_ns() {
#ifdef __CUDA_ARCH__
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
#elif defined(__CUDACC__)
  return 0;  // the host half of nvcc's compilation never runs this
#else
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return uint64_t(now.tv_sec) * 1'000'000'000 + uint64_t(now.tv_nsec);
#endif
}

DMI_HD inline void pause_ns([[maybe_unused]] uint32_t ns) {
#ifdef __CUDA_ARCH__
  __nanosleep(ns);
#elif !defined(__CUDACC__)
  const timespec duration{0, long(ns)};
  nanosleep(&duration, nullptr);
#endif
}

}  // namespace dmi::device

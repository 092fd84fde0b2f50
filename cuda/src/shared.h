// Words of the shared mapping, as atomics. Each call site names its partner; abi/ring.h has the table of them.
#pragma once

#include <atomic>
#include <cstdint>

namespace dmi {

static_assert(std::atomic_ref<uint64_t>::is_always_lock_free, "a lock would live in one process only");

inline uint64_t load_acquire(uint64_t& word) { return std::atomic_ref(word).load(std::memory_order_acquire); }
inline uint64_t load_relaxed(uint64_t& word) { return std::atomic_ref(word).load(std::memory_order_relaxed); }
inline void store_release(uint64_t& word, uint64_t value) { std::atomic_ref(word).store(value, std::memory_order_release); }
inline void store_seq_cst(uint64_t& word, uint64_t value) { std::atomic_ref(word).store(value, std::memory_order_seq_cst); }

// A structure of whole words that another process writes word by word.
template <typename T>
T load_words(T& shared) {
  uint64_t words[sizeof(T) / 8];
  static_assert(sizeof words == sizeof(T));
  auto* from = reinterpret_cast<uint64_t*>(&shared);
  for (size_t i = 0; i < sizeof(T) / 8; ++i) words[i] = load_relaxed(from[i]);
  T value;
  __builtin_memcpy(&value, words, sizeof value);
  return value;
}

// A counter with one writer: no read-modify-write needed, but a reader elsewhere must see whole words.
inline void add(uint64_t& counter, uint64_t n) {
  std::atomic_ref ref(counter);
  ref.store(ref.load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
}

// Orders "I published" before "are you waiting?"; the waiter orders "I wait" before "is there anything?" the same way, so
// that one of the two sees the other. ThreadSanitizer does not know fences, hence its own form.
inline void full_fence() {
#ifdef __SANITIZE_THREAD__
  static std::atomic<uint64_t> word;
  word.fetch_add(1, std::memory_order_seq_cst);
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

}  // namespace dmi

#include "registry.h"

#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>

#include "error.h"

namespace dmi {
namespace {

constexpr uint32_t kSlotBits = 8;
constexpr uint32_t kSlots = 1 << kSlotBits;  // rings open at once

struct Slot {
  std::atomic<int64_t> handle{0};
  std::atomic<const void*> token{nullptr};
  std::atomic<Ring*> ring{nullptr};
  std::atomic<uint64_t> users{0};
};

// Never destroyed: threads may outlive the end of main.
struct Rings {
  std::mutex mutex;  // creating and closing
  std::array<Slot, kSlots> slots;
  int64_t created = 0;
  std::vector<const void*> tokens;  // all that there ever were
  std::atomic<uint32_t> used{0};    // no slot from here on was ever taken
};

Rings& rings() {
  static Rings* all = new Rings;
  return *all;
}

void before_fork() { rings().mutex.lock(); }
void after_fork_in_parent() { rings().mutex.unlock(); }
void after_fork_in_child() {
  for (Slot& slot : rings().slots) {
    if (Ring* ring = slot.ring.load()) ring->forked_in_child();
  }
  rings().mutex.unlock();
}

// Threads must not run on into the tear-down of a process that forgot to close.
void stop_pumps() {
  for (Slot& slot : rings().slots) {
    if (Ring* ring = slot.ring.load(); ring != nullptr && !ring->foreign()) ring->stop_pump();
  }
}

}  // namespace

Use::Use(int64_t handle) : slot_(uint32_t(handle) & (kSlots - 1)) {
  Slot& slot = rings().slots[slot_];
  // All three seq_cst: either the closer sees us among the users, or we see that it took the ring away.
  slot.users.fetch_add(1);
  Ring* ring = slot.ring.load();
  if (ring != nullptr && slot.handle.load() == handle && !ring->foreign()) ring_ = ring;
}

Use::~Use() { rings().slots[slot_].users.fetch_sub(1); }

int64_t create_ring(const dmi_ring_options& options) {
  static std::once_flag once;
  std::call_once(once, [] {
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    std::atexit(stop_pumps);
  });
  Rings& all = rings();
  std::lock_guard lock(all.mutex);
  for (uint32_t i = 0; i < kSlots; ++i) {
    Slot& slot = all.slots[i];
    if (slot.ring.load() != nullptr) continue;
    Ring* ring = new Ring(options);
    const int64_t handle = (++all.created << kSlotBits) | i;
    slot.handle.store(handle);
    slot.token.store(ring->device() == nullptr ? nullptr : ring->device()->token());
    if (ring->device() != nullptr) all.tokens.push_back(ring->device()->token());
    slot.ring.store(ring);
    if (i >= all.used.load()) all.used.store(i + 1);
    return handle;
  }
  invalid("create ring: " + std::to_string(kSlots) + " rings are open in this process; close some");
}

int64_t ring_of_token(const void* token) {
  Rings& all = rings();
  for (uint32_t i = 0, used = all.used.load(); i < used; ++i) {
    // A token is never used again, so a handle that changes meanwhile is one that finds nothing.
    if (all.slots[i].token.load() == token && token != nullptr) return all.slots[i].handle.load();
  }
  std::lock_guard lock(all.mutex);
  return std::find(all.tokens.begin(), all.tokens.end(), token) != all.tokens.end() ? 0 : -1;
}

void close_ring(int64_t handle) {
  Rings& all = rings();
  Ring* ring = nullptr;
  Slot& slot = all.slots[uint32_t(handle) & (kSlots - 1)];
  {
    std::lock_guard lock(all.mutex);
    if (slot.handle.load() != handle) return;
    ring = slot.ring.exchange(nullptr);
  }
  // A parent's ring is left alone: its memory is shared with the parent, its threads do not exist here.
  if (ring == nullptr || ring->foreign()) return;
  ring->end_waits();
  while (slot.users.load() != 0) sleep_ns(20'000);
  delete ring;
}

}  // namespace dmi

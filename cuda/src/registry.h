// The rings of this process, by handle. An op that comes late, from a replayed graph or a forked child, finds nothing.
#pragma once

#include <cstdint>

#include "ring.h"

namespace dmi {

// Keeps a ring from being freed while it is used. Null where the handle is closed, unknown or a parent's.
class Use {
 public:
  explicit Use(int64_t handle);
  ~Use();
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;
  explicit operator bool() const { return ring_ != nullptr; }
  Ring* operator->() const { return ring_; }
  Ring& operator*() const { return *ring_; }

 private:
  uint32_t slot_;
  Ring* ring_ = nullptr;
};

int64_t create_ring(const dmi_ring_options& options);
// 0 where the token is no open ring's.
int64_t ring_of_token(const void* token);
// Idempotent. Waits for the ops that are inside.
void close_ring(int64_t handle);

}  // namespace dmi

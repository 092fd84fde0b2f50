// Which groups of requests, as rules by ids and tags mean them, a request is in: told by the adapter, asked when a step opens.
#pragma once

#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "levels.h"

namespace dmi {

class Groups {
 public:
  // Requests and, of each, the groups that it is in. What was said of other groups before is forgotten.
  void tell(uint64_t groups, const uint64_t* requests, const uint64_t* members, uint32_t count) {
    std::lock_guard lock(mutex_);
    if (groups != groups_) members_.clear();
    groups_ = groups;
    for (uint32_t i = 0; i < count; ++i) members_[requests[i]] = members[i];
  }

  // Requests that have no rows from here on.
  void forget(const uint64_t* requests, uint32_t count) {
    std::lock_guard lock(mutex_);
    for (uint32_t i = 0; i < count; ++i) members_.erase(requests[i]);
  }

  // By span.
  void find(const dmi_span* spans, uint32_t count, std::vector<Membership>& found) const {
    std::lock_guard lock(mutex_);
    found.assign(count, {});
    for (uint32_t i = 0; i < count; ++i) {
      const auto at = members_.find(spans[i].request);
      if (at != members_.end()) found[i] = {groups_, at->second};
    }
  }

 private:
  mutable std::mutex mutex_;
  uint64_t groups_ = 0;
  std::unordered_map<uint64_t, uint64_t> members_;  // of requests that are not over: the adapter bounds them
};

}  // namespace dmi

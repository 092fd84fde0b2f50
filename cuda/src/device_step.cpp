// Steps and captures of a ring whose payload a device holds: what the host does of them. What becomes of them the device finds out.
#include <algorithm>
#include <string>
#include <utility>

#include "error.h"
#include "ring.h"

namespace dmi {

Lane* Ring::open_on_device(const Opening& opening) {
  if (device_->recording(opening.stream)) {
    invalid("open step " + std::to_string(opening.step) +
            ": the stream records a CUDA graph, in which a step would be frozen; open it around the graph's replay: with "
            "session.step(rows=...)");
  }
  const uint32_t sites = site_count_.load(std::memory_order_acquire);  // pairs with add_site
  Lane& lane = *lanes_[0];
  const uint64_t tokens = token_rows(opening.spans, opening.count);
  auto missed = [&](const std::string& why) {
    add_gap(opening.step, tokens * sites);
    if (complete()) {
      throw Error(
          DMI_ERROR_TIMEOUT,
          "open step " + std::to_string(opening.step) + ": " + why +
              "; its rows are booked as dropped. Is an engine attached and draining? Raise the bound, or attach with mode=\"best-effort\"");
    }
    return nullptr;
  };
  if (!lane.acquire()) return missed("another thread has a step of this ring open");

  Lane::Step& step = lane.step;
  try {
    build_row_lists(step.rows, step.source, opening.spans, opening.count, opening.width, (opening.flags & DMI_TABLE_PACKED) != 0);
    step.number = opening.step;
    step.gated = step.gave_up = false;
    step.sites = sites;
    step.keys = opening.keys;
    latch_gates(lane);
    select_rows(step, opening);
    const uint64_t bytes = table_bytes(opening, step.runs);
    uint64_t offset = 0;
    std::byte* table = nullptr;
    auto room = [&] { return (table = lane.reserve_table(bytes, offset)) != nullptr; };
    if (!room() && !(complete() && bytes <= lane.table_capacity() && wait(lane, room))) {
      lane.release();
      return missed("no room for its row table of " + std::to_string(bytes) + " bytes");
    }
    write_table(table, opening, step.runs);
    lane.commit_table(offset, bytes);
    DeviceStep told{};
    told.step = opening.step;
    told.row_table = offset;
    told.row_table_bytes = bytes;
    told.policy = step.policy;
    told.sites = sites;
    told.keys = opening.keys;
    told.rows = &step.rows;
    told.levels = step.level.data();
    told.selection = step.selection.data();
    told.top = step.top.data();
    told.left = step.left.data();
    told.selections = &step.selections;
    told.watches = &step.watches;
    told.keeps = step.keeps.data();
    told.latches = step.latches;
    told.table = sites_.data();
    told.gap = take_gap();
    for (uint32_t site = 0; site < sites; ++site) told.owed += step.rows[sites_[site].space].rows;
    if (const char* why = device_->open(told, opening.stream)) {
      put_gap_back(told.gap);
      lane.release();
      return missed(why);
    }
  } catch (...) {
    lane.release();
    throw;
  }
  pump_.look();
  return &lane;
}

void Ring::close_on_device(Lane& lane, bool aborted, void* stream) {
  const uint64_t number = lane.step.number;
  DeviceClose told{aborted,          host_work_.op_calls, host_work_.op_ns,
                   host_work_.waits, host_work_.wait_ns,  outside_.exchange(0, std::memory_order_relaxed)};
  host_work_ = {};
  lane.step.number = kNoStep;
  try {
    device_->close(told, stream, stream == kSameStream);
  } catch (...) {
    lane.release();
    throw;
  }
  lane.closed.store(number, std::memory_order_release);
  const uint64_t gave_up = device_->gave_up();
  const bool news = gave_up != gave_up_seen_;
  gave_up_seen_ = gave_up;
  lane.release();
  if (news && !aborted) {
    throw Error(DMI_ERROR_TIMEOUT,
                "capture of a step before " + std::to_string(number + 1) + ": the engine made no room within the " +
                    std::to_string(wait_bound_ns_ / 1'000'000) +
                    " ms that complete mode waits; the rows after that are booked as dropped(timeout). Is an engine attached "
                    "and draining? Raise the bound, or attach with mode=\"best-effort\"");
  }
}

void Ring::finish_on_device(uint64_t bound_ns) {
  const uint64_t start = monotonic_ns();
  if (has_gap_.load(std::memory_order_relaxed)) device_->tell_gap(take_gap());
  if (!device_->quiesce(bound_ns)) {
    throw Error(DMI_ERROR_TIMEOUT, "finish the ring: the device has not come to the end of the last step within " +
                                       std::to_string((monotonic_ns() - start) / 1'000'000) + " ms");
  }
}

void Ring::settle(uint64_t bound_ns) {
  if (device_ == nullptr || device_->settle(bound_ns)) return;
  throw Error(DMI_ERROR_TIMEOUT, "wait for the steps that were closed: the device has not come to the end of the last one within " +
                                     std::to_string(bound_ns / 1'000'000) + " ms; is it still computing?");
}

bool Ring::record(const dmi_tensor* tensors, uint32_t count, bool beside, void* stream) {
  if (device_ == nullptr || !device_->recording(stream)) return false;
  device_->capture(tensors, count, sites_.data(), site_count_.load(std::memory_order_acquire), beside, stream);
  return true;
}

void Ring::branch(bool may, void* stream) {
  if (device_ != nullptr) device_->branch(may, stream);
}

Gap Ring::take_gap() {
  std::lock_guard lock(gap_mutex_);
  has_gap_.store(false, std::memory_order_relaxed);
  return std::exchange(gap_, {});
}

void Ring::put_gap_back(const Gap& gap) {
  std::lock_guard lock(gap_mutex_);
  if (gap.steps == 0) return;
  gap_.first = gap.first;
  if (gap_.steps == 0) gap_.last = gap.last;
  gap_.steps += gap.steps;
  gap_.rows += gap.rows;
  has_gap_.store(true, std::memory_order_relaxed);
}

}  // namespace dmi

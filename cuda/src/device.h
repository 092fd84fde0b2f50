// The device that holds a ring's payload where the model runs on one. Everything here is stream-ordered: it says what will happen
// when the model's stream gets there, and never waits for it. A build without CUDA has no device to give.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "mapping.h"
#include "rows.h"
#include "watch.h"

namespace dmi {

// Steps that found no room even for a gated OPEN.
struct Gap {
  uint64_t first = 0, last = 0, steps = 0, rows = 0;
  void add(uint64_t step, uint64_t lost_rows) {
    if (steps++ == 0) first = step;
    last = step;
    rows += lost_rows;
  }
};

// A step as its host side knows it. Borrowed.
struct DeviceStep {
  uint64_t step;
  uint64_t row_table, row_table_bytes;
  uint64_t policy;
  uint32_t sites, keys;
  const RowLists* rows;
  // By site, `sites` of them: the level of all rows or the selection that says theirs, how many of the greatest
  // elements rows at STATS have, and the records set aside.
  const uint8_t* levels;
  const uint16_t* selection;
  const uint8_t* top;
  const uint8_t* left;
  const std::vector<Selection>* selections;
  // Conditions that rows are held against; by site, what they keep. Watches are those of the latch before unless `latches` says another.
  const std::vector<Watch>* watches;
  const dmi_keep* keeps;
  uint64_t latches;
  const dmi_site* table;
  uint64_t owed;  // rows of all sites together
  Gap gap;        // what the host has dropped since the last one
};

// What the host has to add to the books when a step closes: since the last one.
struct DeviceClose {
  bool aborted;
  uint64_t op_calls, op_ns, waits, wait_ns, outside;
};

class Device {
 public:
  virtual ~Device() = default;

  // The op's `ring` argument: device memory of ours, eight bytes at least, for as long as the process lives.
  virtual void* token() const = 0;
  virtual int ordinal() const = 0;
  virtual uint64_t bytes() const = 0;  // of device memory in use

  // On `stream`, which from here on all of the step's captures follow. Null, or why nothing was launched.
  virtual const char* open(const DeviceStep& step, void* stream) = 0;
  virtual void close(const DeviceClose& step, void* stream, bool same_stream) = 0;
  // Steps that the host dropped and no step follows.
  virtual void tell_gap(const Gap& gap) = 0;
  // Whether the stream is recording a graph: its captures run later, in steps that are not open yet.
  virtual bool recording(void* stream) const = 0;
  // `beside`: the tensors stay as they are up to the next capture, so that a recording which may branch has this one on a branch.
  virtual void capture(const dmi_tensor* tensors, uint32_t count, const dmi_site* sites, uint32_t site_count, bool beside,
                       void* stream) = 0;
  // Whether what a stream records may branch; before its recording ends it may no more.
  virtual void branch(bool may, void* stream) = 0;

  // ---- of the pump's thread
  // Begins to copy payload to staging; false after an error that the device cannot recover from.
  virtual bool begin_copy(std::byte* staging, uint64_t payload, uint64_t bytes) = 0;
  // How many of the copies begun are complete, in order, since the ring was made.
  virtual uint64_t copies_complete() = 0;
  // After an error that it cannot recover from.
  virtual bool failed() const = 0;
  // Whether the stream has not come to the end of a step that was opened.
  virtual bool busy() const = 0;

  virtual uint64_t payload_head() const = 0;  // as of the last step that closed, and spill_head
  virtual uint64_t spill_head() const = 0;
  virtual uint64_t gave_up() const = 0;  // steps in which complete mode gave rows up
  // Waits until all of the steps that were closed by now are published, to a bound; false at the bound.
  virtual bool settle(uint64_t bound_ns) = 0;
  // Nothing of the ring is touched any more after this: waits for the streams, to a bound.
  virtual bool quiesce(uint64_t bound_ns) = 0;
};

// Throws Error, in a build without CUDA always.
std::unique_ptr<Device> make_device(const Mapping& mapping, int ordinal, uint64_t wait_bound_ns);
// Whether this build can.
bool has_devices();

}  // namespace dmi

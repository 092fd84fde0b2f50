// A lane: one ring of records and one of row tables, written by whichever thread has a step open on it.
#pragma once

#include <atomic>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "mapping.h"
#include "rows.h"
#include "watch.h"

namespace dmi {

constexpr uint64_t kNoStep = ~uint64_t{0};

// Records a site may always publish in a step: one captured, and one for rows that found no room.
constexpr uint32_t kRecordsPerSite = 2;
// Records that a step leaves free when it opens, so that gated steps (an OPEN and a CLOSE each) can still say so.
constexpr uint64_t kHeadroom = 16;

class Lane {
 public:
  Lane(const Mapping& mapping, uint32_t index);

  // ---- ownership: the thread whose step is open. Everything below belongs to it.
  bool acquire() { return !busy_.exchange(true, std::memory_order_acquire); }  // pairs with release()
  void release() { busy_.store(false, std::memory_order_release); }

  // ---- records
  // Free slots besides those set aside for the open step. Reads the engine's tail on shortage only: when fewer than `wanted` are known of.
  uint64_t free_records(uint64_t wanted);
  // Sets aside slots for what an open step must be able to say.
  void set_aside(uint64_t slots) { aside_ = slots; }
  uint64_t aside() const { return aside_; }

  // The next slot, to be filled and then published. There must be room; `from_aside`: it was set aside.
  dmi_record& next(bool from_aside);
  // Makes all slots handed out by next() visible to the engine.
  void publish();

  // ---- row tables
  // Room for a table, or nullptr. `offset` is its virtual place; nothing is taken until commit_table.
  std::byte* reserve_table(uint64_t bytes, uint64_t& offset);
  void commit_table(uint64_t offset, uint64_t bytes) { table_head_ = offset + bytes; }
  uint64_t table_capacity() const { return table_bytes_; }

  dmi_counters& counters() { return shared_.counters; }
  uint32_t index() const { return index_; }

  // ---- the open step
  struct Step {
    uint64_t number = kNoStep;
    bool gated = false;
    bool gave_up = false;  // complete mode: a wait reached its bound, the rest of the step does not wait again
    uint32_t sites = 0;
    uint32_t keys = 0;
    uint64_t captures = 0;  // CAPTURE records
    uint64_t wait_ns = 0;
    uint64_t op_ns = 0;
    RowLists rows;
    RowSource source;           // of rows
    std::vector<uint8_t> left;  // by site: records still set aside for it
    // Latched from the gates, by site: the level of all rows, or which of the selections (from 1 on) says what level each has.
    std::vector<uint8_t> level;
    std::vector<uint16_t> selection;
    std::vector<uint8_t> top;  // of rows at STATS
    std::vector<dmi_clause> clauses;
    std::vector<Selection> selections;
    std::vector<Membership> members;             // by span, where a selection asks
    std::vector<dmi_run> runs;                   // of all selections
    std::vector<Watch> watches;                  // by index; those that no site names have no condition
    std::vector<dmi_keep> keeps;                 // by site
    uint64_t latches = 0;                        // how often the watches were read
    std::unordered_map<uint64_t, uint64_t> met;  // request -> watches that rows of it met in this step
    uint64_t policy = ~uint64_t{0};
  };
  Step step;

  // Last step closed. Writer: the lane; readers: anyone, relaxed.
  std::atomic<uint64_t> closed{kNoStep};

 private:
  dmi_lane& shared_;
  dmi_record* const records_;
  std::byte* const tables_;
  const uint64_t record_capacity_;
  const uint64_t table_bytes_;
  const uint32_t index_;
  uint64_t head_ = 0;       // next record's index
  uint64_t published_ = 0;  // records below it are visible
  uint64_t tail_seen_ = 0;
  uint64_t aside_ = 0;
  uint64_t table_head_ = 0;
  uint64_t table_tail_seen_ = 0;
  alignas(128) std::atomic<bool> busy_{false};
};

}  // namespace dmi

// A small engine for tests: drains a ring's lanes as abi/ring.h allows, checks every byte against what the producers are known to have
// written, and keeps the books. It shares the producer's mapping, so that ThreadSanitizer sees both sides of every word.
#pragma once

#include <poll.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <map>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "registry.h"
#include "shared.h"

// What element `i` of a row holds, in all tests.
inline uint32_t value_of(uint64_t step, uint32_t site, uint64_t row, uint64_t i) {
  uint64_t x = (step * 65537 + site) * 0x9e3779b97f4a7c15ull ^ row * 0xc2b2ae3d27d4eb4full ^ i * 0x165667b19e3779f9ull;
  return uint32_t(x ^ x >> 29);
}

struct Books {
  uint64_t steps = 0, gated = 0, aborted = 0, gap_steps = 0, gap_rows = 0;
  uint64_t captured = 0, bytes = 0, records = 0, parts = 0, spilled = 0, kept = 0, offered = 0;
  uint64_t other[DMI_REASONS] = {};
};

class Engine {
 public:
  explicit Engine(int64_t handle) : use_(handle), mapping_(use_->mapping()), control_(mapping_.control()), lanes_(mapping_.header().lanes) {
    CHECK(bool(use_));
    use_->set_attached(true);
  }
  ~Engine() { stop(); }

  void start(uint32_t laziness_us = 0) {
    laziness_us_ = laziness_us;
    stop_ = false;
    thread_ = std::thread([this] { run(); });
  }
  // Drains what there is, then ends.
  void stop() {
    if (!thread_.joinable()) return;
    stop_ = true;
    dmi::ring_bell(mapping_.engine_bell());
    thread_.join();
  }

  bool drain() {
    bool any = false;
    for (uint32_t lane = 0; lane < mapping_.header().lanes; ++lane) {
      while (take(lane)) any = true;
    }
    return any;
  }

  const Books& books() const { return books_; }
  bool mid_step() const {
    for (const Lane& lane : lanes_) {
      if (lane.open) return true;
    }
    return false;
  }

 public:
  struct Lane {
    uint64_t next = 0;
    bool open = false;
    uint64_t step = 0;
    dmi_open opened{};
    uint64_t captures = 0;
    std::vector<dmi_span> spans;
    std::vector<dmi_run> runs;
    std::vector<std::vector<uint8_t>> settled;  // by site, by row of its space
    std::vector<std::byte> parts;               // of a row
    uint32_t part_site = 0;
    uint64_t part_spilled = 0;  // bytes of them that came from the spill region
  };

  // Payload that lies together is copied together, as far as records tell of it: where it is their number that counts.
  bool together = false;
  // Instead of the check of values, where it is set: the rows that a record settles, and a captured one's bytes.
  std::function<void(const Lane&, const dmi_record&, const std::vector<std::byte>&)> observe;

 private:
  void run() {
    uint64_t& waiting = control_.engine_waiting.value;
    for (;;) {
      if (drain()) continue;
      dmi::store_seq_cst(waiting, 1);
      dmi::full_fence();
      const bool stopping = stop_;
      if (drain()) {
        dmi::store_seq_cst(waiting, 0);
        continue;
      }
      if (stopping) break;
      wait(5000);
      dmi::store_seq_cst(waiting, 0);
    }
    dmi::store_seq_cst(waiting, 0);
  }

  // A bell that never rings although there is something is a lost wake-up. What is there when nothing rang for long may have come that very
  // moment: then it rings.
  void wait(int ms) {
    pollfd bell{mapping_.engine_bell(), POLLIN, 0};
    if (poll(&bell, 1, ms) == 0 && drain()) CHECK_EQ(poll(&bell, 1, 60'000), 1);
    uint64_t count;
    [[maybe_unused]] ssize_t got = read(mapping_.engine_bell(), &count, sizeof count);
  }

  bool take(uint32_t index) {
    Lane& lane = lanes_[index];
    dmi_record* slot = mapping_.records(index) + (lane.next & (mapping_.header().record_capacity - 1));
    if (dmi::load_acquire(slot->seq) != lane.next + 1) return false;
    if (laziness_us_ != 0 && lane.next % 7 == 0) usleep(laziness_us_);
    const dmi_record record = *slot;
    ++books_.records;
    uint64_t table_end = 0;
    switch (record.kind) {
      case DMI_KIND_OPEN:
        table_end = open(index, lane, std::bit_cast<dmi_open>(record));
        break;
      case DMI_KIND_CAPTURE:
        capture(lane, record);
        break;
      case DMI_KIND_CLOSE:
        close(lane, std::bit_cast<dmi_close>(record));
        break;
      case DMI_KIND_GAP: {
        const dmi_gap gap = std::bit_cast<dmi_gap>(record);
        CHECK(!lane.open);
        books_.gap_steps += gap.steps;
        books_.gap_rows += gap.rows;
        break;
      }
      default:
        CHECK(!"a kind that exists");
    }
    dmi_lane& shared = control_.lane[index];
    if (table_end != 0) dmi::store_release(shared.table_tail.value, table_end);
    dmi::store_release(shared.record_tail.value, ++lane.next);
    return true;
  }

  uint64_t open(uint32_t index, Lane& lane, const dmi_open& open) {
    CHECK(!lane.open);
    lane.open = true;
    lane.opened = open;
    lane.step = open.step;
    lane.captures = 0;
    lane.spans.clear();
    lane.runs.clear();
    books_.steps++;
    books_.gated += open.gated;
    uint64_t rows[DMI_SPACES] = {open.rows[0], open.rows[1], open.rows[2]};
    if (open.table_bytes != 0) {
      const uint64_t at = open.table % mapping_.header().table_bytes;
      CHECK(at + open.table_bytes <= mapping_.header().table_bytes);
      dmi_table table;
      std::memcpy(&table, mapping_.table(index) + at, sizeof table);
      CHECK_EQ(table.magic, DMI_TABLE_MAGIC);
      CHECK_EQ(table.step, open.step);
      CHECK_EQ(table.bytes, open.table_bytes);
      const uint64_t spans_end = sizeof table + table.spans * sizeof(dmi_span);
      CHECK(table.bytes >= spans_end && (table.bytes - spans_end) % sizeof(dmi_run) == 0);
      lane.runs.resize((table.bytes - spans_end) / sizeof(dmi_run));
      if (!lane.runs.empty()) std::memcpy(lane.runs.data(), mapping_.table(index) + at + spans_end, lane.runs.size() * sizeof(dmi_run));
      lane.spans.resize(table.spans);
      if (!lane.spans.empty()) std::memcpy(lane.spans.data(), mapping_.table(index) + at + sizeof table, table.spans * sizeof(dmi_span));
      uint64_t counted[DMI_SPACES] = {};
      for (const dmi_span& span : lane.spans) counted[span.space] += span.count;
      for (int space = 0; space < DMI_SPACES; ++space) CHECK_EQ(counted[space], rows[space]);
    }
    lane.settled.assign(open.sites, {});
    for (uint32_t site = 0; site < open.sites; ++site) lane.settled[site].assign(rows[mapping_.sites()[site].space], 0);
    if (open.gated) {
      for (auto& site : lane.settled) books_.other[DMI_REASON_RECORDS_FULL] += site.size();
    }
    return open.table_bytes != 0 ? open.table + open.table_bytes : 0;
  }

  void close(Lane& lane, const dmi_close& close) {
    CHECK(lane.open);
    CHECK_EQ(close.step, lane.step);
    CHECK_EQ(close.records, lane.captures);
    if (lane.opened.gated) CHECK_EQ(lane.captures, 0u);
    books_.aborted += close.aborted;
    for (const auto& site : lane.settled) {
      uint64_t settled = 0;
      for (uint8_t row : site) settled += row;
      if (!lane.opened.gated && !close.aborted) CHECK_EQ(settled, site.size());
    }
    CHECK(lane.parts.empty());
    lane.open = false;
  }

  void capture(Lane& lane, const dmi_record& r) {
    CHECK(lane.open);
    CHECK_EQ(r.step, lane.step);
    CHECK(r.site < lane.opened.sites);
    ++lane.captures;
    if (!lane.parts.empty() && (r.site != lane.part_site || r.part_offset != lane.parts.size())) {
      CHECK_EQ(r.site, lane.part_site);  // given up in the middle of a row, or, by a device in the corner of its spill, begun anew
      if (r.outcome == DMI_OUTCOME_CAPTURED) {
        CHECK_EQ(lane.parts.size(), lane.part_spilled);
        books_.bytes -= lane.parts.size();
        books_.spilled -= lane.parts.size();
      }
      lane.parts.clear();
      lane.part_spilled = 0;
    }
    std::vector<uint8_t>& settled = lane.settled[r.site];
    CHECK(r.row_first + r.rows <= settled.size());
    if (r.flags & DMI_RECORD_OFFER) {
      CHECK_EQ(r.outcome, DMI_OUTCOME_CAPTURED);
      CHECK_EQ(r.place, DMI_PLACE_RING);
      CHECK(r.flags & DMI_RECORD_GATHERED);
      CHECK_EQ(r.payload_bytes, r.tensor_bytes);
      // What becomes of the rows otherwise follows.
      for (uint32_t row = r.row_first; row < r.row_first + r.rows; ++row) CHECK_EQ(settled[row], 0);
      books_.offered += r.payload_bytes;
      const std::vector<std::byte> bytes = fetch(lane, r);
      if (observe) observe(lane, r, bytes);
      return;
    }
    for (uint32_t row = r.row_first; row < r.row_first + r.rows; ++row) {
      if (!(mapping_.sites()[r.site].flags & DMI_SITE_EVENT)) CHECK_EQ(settled[row], 0);
      settled[row] = 1;
    }
    if (r.outcome != DMI_OUTCOME_CAPTURED) {
      CHECK_EQ(r.place, DMI_PLACE_NONE);
      books_.other[r.reason] += r.rows;
      if (observe) observe(lane, r, {});
      return;
    }
    books_.captured += r.rows;
    if (r.flags & DMI_RECORD_KEPT) books_.kept += r.rows;
    books_.bytes += r.payload_bytes;
    if (!observe) CHECK_EQ(r.dtype, DMI_DTYPE_U32);
    CHECK_EQ(r.payload % DMI_PAYLOAD_ALIGN, 0u);
    std::vector<std::byte> bytes = fetch(lane, r);
    if (r.tensor_bytes != r.payload_bytes) {
      ++books_.parts;
      CHECK(r.flags & DMI_RECORD_GATHERED);
      CHECK_EQ(r.size[0], 1u);
      lane.part_site = r.site;
      if (r.place == DMI_PLACE_SPILL) lane.part_spilled += bytes.size();
      lane.parts.insert(lane.parts.end(), bytes.begin(), bytes.end());
      CHECK(lane.parts.size() <= r.tensor_bytes);
      CHECK_EQ(r.rows, lane.parts.size() == r.tensor_bytes);
      if (lane.parts.size() != r.tensor_bytes) return;
      bytes = std::exchange(lane.parts, {});
      lane.part_spilled = 0;
    }
    if (observe) return observe(lane, r, bytes);
    check(lane, r, bytes);
  }

  // The record's rows against value_of, found through size, stride and role alone.
  void check(const Lane& lane, const dmi_record& r, const std::vector<std::byte>& bytes) {
    const uint32_t space = mapping_.sites()[r.site].space;
    uint32_t listed = 0;
    for (const dmi_span& span : lane.spans) {
      if (span.space != space) continue;
      for (uint32_t i = 0; i < span.count; ++i, ++listed) {
        if (listed < r.row_first || listed >= r.row_first + r.rows) continue;
        uint64_t at = 0, inner = 1;
        int rows_seen = 0;
        for (int d = 0; d < r.ndim; ++d) {
          if (r.role[d] != DMI_ROLE_ROW) {
            inner *= r.size[d];
            continue;
          }
          if (r.flags & DMI_RECORD_GATHERED) {
            at += uint64_t{listed - r.row_first} * r.stride[d];
          } else {
            at += uint64_t{rows_seen++ == 0 ? span.batch : span.first + i} * r.stride[d];
          }
        }
        for (uint64_t n = 0; n < inner; ++n) {
          uint64_t rest = n, element = at;
          for (int d = r.ndim; d-- > 0;) {
            if (r.role[d] == DMI_ROLE_ROW) continue;
            element += rest % r.size[d] * r.stride[d];
            rest /= r.size[d];
          }
          CHECK((element + 1) * 4 <= bytes.size());
          uint32_t got;
          std::memcpy(&got, bytes.data() + element * 4, 4);
          CHECK_EQ(got, value_of(r.step, r.site, uint64_t{span.batch} << 32 | (span.first + i), n));
        }
      }
    }
  }

  std::vector<std::byte> fetch(const Lane& lane, const dmi_record& r) {
    std::vector<std::byte> bytes(r.payload_bytes);
    if (r.place == DMI_PLACE_SPILL) {
      books_.spilled += r.payload_bytes;
      const uint64_t at = r.payload % mapping_.header().spill_bytes;
      CHECK(at + r.payload_bytes <= mapping_.header().spill_bytes);
      std::memcpy(bytes.data(), mapping_.spill() + at, r.payload_bytes);
      free(spill_, control_.spill_tail.value, r);
      return bytes;
    }
    CHECK_EQ(r.place, DMI_PLACE_RING);
    if (!together) {
      copy(r.payload, bytes);
    } else {
      if (r.payload < ahead_at_ || r.payload + r.payload_bytes > ahead_at_ + ahead_.size()) {
        ahead_at_ = r.payload;
        ahead_.resize(reach(lane, r) - r.payload);
        copy(r.payload, ahead_);
      }
      std::copy_n(ahead_.begin() + (r.payload - ahead_at_), r.payload_bytes, bytes.begin());
    }
    free(payload_, control_.payload_tail.value, r);
    return bytes;
  }

  // How far the payload of published records reaches behind a record's, without a hole, to what staging takes.
  uint64_t reach(const Lane& lane, const dmi_record& first) {
    const uint64_t index = uint64_t(&lane - lanes_.data()), capacity = mapping_.header().record_capacity;
    uint64_t end = first.payload + first.payload_bytes;
    for (uint64_t next = lane.next + 1;; ++next) {
      dmi_record* slot = mapping_.records(uint32_t(index)) + (next & (capacity - 1));
      if (dmi::load_acquire(slot->seq) != next + 1) return end;
      const dmi_record r = *slot;
      if (r.kind != DMI_KIND_CAPTURE || r.place != DMI_PLACE_RING || r.payload != dmi::aligned(end)) return end;
      if (r.payload + r.payload_bytes - first.payload > mapping_.header().staging_bytes) return end;
      end = r.payload + r.payload_bytes;
    }
  }

  void copy(uint64_t payload, std::vector<std::byte>& bytes) {
    const uint64_t staging = mapping_.header().staging_bytes;
    for (uint64_t done = 0; done < bytes.size();) {
      const uint64_t piece = std::min<uint64_t>(staging, bytes.size() - done);
      const uint64_t id = posted_++;
      mapping_.commands()[id & (mapping_.header().command_capacity - 1)] = {payload + done, piece, staging - piece, id};
      dmi::store_release(control_.commands_head.value, posted_);
      dmi::full_fence();
      if (dmi::load_relaxed(control_.pump_waiting.value) != 0) dmi::ring_bell(mapping_.pump_bell());
      for (int spins = 0; dmi::load_acquire(control_.commands_done.value) != posted_; ++spins) {
        CHECK(spins < 1'000'000);  // the pump was not woken
        usleep(50);
      }
      std::memcpy(bytes.data() + done, mapping_.staging() + staging - piece, piece);
      done += piece;
    }
  }

  struct Space {
    uint64_t tail = 0;
    std::map<uint64_t, uint64_t> done;  // ranges beyond the tail that are free, when those before are
  };

  void free(Space& space, uint64_t& word, const dmi_record& r) {
    if (r.payload_bytes == 0) return;
    CHECK(space.done.emplace(r.payload, r.payload + dmi::aligned(r.payload_bytes)).second);
    while (!space.done.empty() && space.done.begin()->first == space.tail) {
      space.tail = space.done.begin()->second;
      space.done.erase(space.done.begin());
    }
    if (!space.done.empty()) CHECK(space.done.begin()->first > space.tail);  // ranges do not overlap
    dmi::store_release(word, space.tail);
  }

  dmi::Use use_;
  const dmi::Mapping& mapping_;
  dmi_control& control_;
  std::vector<Lane> lanes_;
  Space payload_, spill_;
  uint64_t posted_ = 0;
  uint64_t ahead_at_ = 0;
  std::vector<std::byte> ahead_;  // payload from there on, already copied
  uint32_t laziness_us_ = 0;
  Books books_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

// Complete mode: what found no room at once, which one block copies alone, in records of their own. To the payload ring, else to the spill
// region.
#pragma once

#include "records.h"
#include "room.h"

namespace dmi::device {

// Rows of tensor i that are of one part: `count` of them, from row `row` of the part's list and row `first` of the step's on. How many were
// captured: all, unless the wait came to its bound. By a block alone.
template <typename Block>
DMI_HD DMI_APART uint32_t stream_rows(Block& block, State& s, Scratch& x, uint32_t i, const Part& part, uint32_t row, uint32_t first,
                                      uint32_t rows, uint8_t flags) {
  const Tensor& t = x.tensor[i];
  const Plan& p = x.plan[i];
  uint32_t done = 0;
  while (done < rows) {
    block.sync();
    if (block.thread() == 0) {
      const uint32_t left = rows - done;
      const uint64_t rest = uint64_t{left} * part.row_bytes, quarter = x.fixed.payload_bytes / 4;
      wait_while_drained(s, rest < quarter ? rest : quarter);
      const bool own = x.own[i] >= kRecordsPerSite;  // one stays, to say that the rest was dropped
      auto room = [&] { return find_room(s, x, part.row_bytes, left, own); };
      x.found = room() || wait(s, room);
    }
    block.sync();
    if (!x.found) break;
    const uint32_t begin = row + done;
    const uint64_t bytes = uint64_t{x.taken} * part.row_bytes;
    if (encoded(part.level)) {
      compute_rows(block, x.meet, x.fixed, t, p, part, begin, begin + x.taken, x.target);
    } else {
      const Rows all = rows_of(t, p.outers, p.flat_stride, p.row_bytes, *part.list);
      for (uint64_t at = 0; at < bytes; at += kLargestUnit) {
        const uint64_t end = at + kLargestUnit < bytes ? at + kLargestUnit : bytes;
        copy_stream(x.fixed, t, p, all, begin, at, end, x.target, block.thread(), block.threads());
      }
    }
    block.sync();
    if (block.thread() == 0) {
      dmi_record r = form_of(x.fixed, t, p, part, first + done, x.taken);
      r.flags |= flags;
      place_at(r, x.place, x.target.offset, bytes);
      if (x.taken == 0) {  // a part of a row that nothing continues: the engine frees it and waits for the row itself
        r.size[0] = 1;
        r.payload_bytes = x.target.capacity - place_in(x.target.capacity, x.target.offset);
        r.tensor_bytes = part.row_bytes;
      }
      if (x.own[i] >= kRecordsPerSite) {
        --x.own[i];
        count(s.aside, ~uint64_t{0});
      }
      publish_one(s, x.fixed, r);
      count(s.captures, 1);
      count(s.counters.captured_rows, x.taken);
      count(s.counters.captured_bytes, bytes);
      if ((flags & DMI_RECORD_KEPT) != 0) count(s.counters.kept_rows, x.taken);
      if (x.place == DMI_PLACE_SPILL) count(s.counters.spilled_bytes, bytes);
    }
    done += x.taken;
  }
  block.sync();
  return done;
}

// Says that `rest` rows of tensor i, from row `first` of the step's on, were waited for in vain. One thread.
DMI_HD inline void give_up(State& s, Scratch& x, uint32_t i, uint32_t first, uint32_t rest) {
  count(s.counters.other_rows[DMI_REASON_TIMEOUT], rest);
  if (x.own[i] != 0) {
    --x.own[i];
    count(s.aside, ~uint64_t{0});
  } else if (!records_free(s, x.fixed, 1)) {
    return;
  }
  dmi_record r = other_record(x.fixed, x.tensor[i], DMI_OUTCOME_DROPPED, DMI_REASON_TIMEOUT, first, rest);
  r.selection = x.plan[i].selection;
  publish_one(s, x.fixed, r);
  count(s.captures, 1);
}

// All of tensor i that was not granted room.
template <bool kLevelled, typename Block>
DMI_HD void stream(Block& block, State& s, Scratch& x, uint32_t i) {
  const Tensor& t = x.tensor[i];
  const Plan& p = x.plan[i];
  uint32_t done = x.granted[i];
  while (done < p.rows) {
    Part part{&x.fixed.space[t.space], 0, p.rows, DMI_LEVEL_FULL, p.row_bytes, 0};
    if constexpr (kLevelled) {
      each_part(x.fixed, t, p, [&](const Part& each) {
        part = each;
        return done >= each.first + each.rows;
      });
    }
    const uint32_t wanted = part.first + part.rows - done;
    const uint32_t got = stream_rows(block, s, x, i, part, done - part.first, done, wanted, 0);
    done += got;
    if (got != wanted) break;
  }
  if (block.thread() != 0) return;
  if (done != p.rows) give_up(s, x, i, done, p.rows - done);
  count(s.aside, 0 - uint64_t{x.own[i]});
}

}  // namespace dmi::device

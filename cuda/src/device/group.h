// A group of tensors that one launch captures. It costs one reservation of payload, by compare-and-swap, and one publication, by the block
// that finishes last. One that is little goes to the spill region in host memory, if there is room for all of it, where the engine reads it
// in place, but for a few large tensors at its end; all else goes to the payload ring. What finds no room is dropped (best-effort). In
// complete mode the reservation waits for as long as the ring is being emptied. What found no room all the same the last block copies
// alone: to the payload ring, else to the spill region in host memory, which needs nobody but the engine to be emptied, else it waits, to a
// bound.
#pragma once

#include "records.h"
#include "room.h"
#include "stream.h"

namespace dmi::device {

constexpr uint32_t kMostRecords = 6;  // of a tensor: one a level, one for rows that found no room, one for those that are off
// Free records that let concurrent groups have more of them than were set aside.
DMI_HD constexpr uint64_t several(bool levelled) { return 4 * kGroupTensors * (levelled ? kMostRecords : kRecordsPerSite); }

// Bytes of the ring that all of a tensor takes.
template <bool kLevelled>
DMI_HD uint64_t room_of(const Plan& p) {
  if (p.fate != Fate::kCapture) return 0;
  return kLevelled ? p.room : aligned(stream_bytes(p));
}

// Records that a tensor gets now: one for what was captured, or for why it was not, one for rows that found no room for good.
template <bool kLevelled>
DMI_HD uint32_t records_of(const Fixed& f, const Tensor& t, const Plan& p, uint32_t granted) {
  if (p.fate == Fate::kOutside) return 0;
  if (kLevelled && p.selection != 0) {
    uint32_t records = p.off != 0 ? 1 : 0;
    if (p.fate != Fate::kCapture) return records + (p.rows != 0 ? 1 : 0);
    each_part(f, t, p, [&](const Part& part) {
      if (granted_of(part, granted) != 0) ++records;
      return true;
    });
    return records + (granted != p.rows && f.complete == 0 ? 1 : 0);
  }
  if (p.fate != Fate::kCapture || granted == p.rows) return 1;
  return (granted != 0 ? 1 : 0) + (f.complete != 0 ? 0 : 1);
}

// Whether records were set aside for a tensor, which another one of its group does not need.
DMI_HD inline bool has_records(const Scratch& x, uint32_t i) {
  if (x.own[i] == 0) return false;
  for (uint32_t j = 0; j < i; ++j) {
    if (x.tensor[j].site == x.tensor[i].site) return false;
  }
  return true;
}

// Room in the spill region for what of the group is little. How many tensors that is; none where there is no room for all of them.
template <bool kLevelled>
DMI_HD uint32_t reserve_near(State& s, const Scratch& x, uint32_t count, uint64_t& at, uint32_t& corner) {
  const Fixed& f = x.fixed;
  uint32_t n = count;
  uint64_t bytes = x.total;
  for (; n != 0 && bytes > f.little && count - n < kFewLarge && large(f, room_of<kLevelled>(x.plan[n - 1])); bytes = x.at[n]) --n;
  return bytes != 0 && bytes <= f.little && reserve_little(s, f, x.seen[kSpillRegion], bytes, at, corner) ? n : 0;
}

// One reservation for the rest of the group: all of it, or, where room is short, whole tensors and then whole rows. By one thread of one
// block.
template <bool kLevelled>
DMI_HD Grant reserve(State& s, const Group& g, const Scratch& x, Meeting& m) {
  const Fixed& f = x.fixed;
  uint32_t whole = g.count, rows = 0, corner = 0;
  uint64_t spilled = 0;
  uint64_t total = x.total;
  uint32_t most = g.count;
  bool more = true;
  if (x.plain == 0 && !records_free(s, f, several(kLevelled))) {
    // Bytes that no record tells of would never be free again: from the first tensor on that may find none, there is no room.
    more = false;
    for (most = 0; most < g.count && has_records(x, most);) ++most;
    if (most < g.count) total = x.at[most];
  }
  // What is in the spill region is there whole. So it needs no records for rows that found no room, of which the corner has one.
  const uint32_t near = more ? reserve_near<kLevelled>(s, x, g.count, spilled, corner) : 0;
  const uint64_t before = near == g.count ? total : x.at[near];
  total -= before;
  uint64_t head = x.seen[kPayloadRegion].head, tail = x.seen[kPayloadRegion].tail;
  for (bool fresh = false, waited = f.complete == 0;;) {
    const uint64_t room = room_left(f.payload_bytes, head, tail);
    if (room < total && !fresh) {
      tail = refresh(s.payload_tail_seen, *f.payload_tail, s.payload_head);
      head = load_relaxed_gpu(s.payload_head);
      fresh = true;
      continue;
    }
    if (room < total && !waited) {
      wait_while_drained(s, total < f.payload_bytes / 2 ? total : f.payload_bytes / 2);
      waited = true;
      fresh = false;
      continue;
    }
    uint64_t taken = total;
    whole = most;
    rows = 0;
    if (room < total) {
      for (whole = near; x.at[whole] - before + room_of<kLevelled>(x.plan[whole]) <= room;) ++whole;
      const uint64_t at = x.at[whole] - before;
      if constexpr (kLevelled) {
        rows = fit_rows(f, x.tensor[whole], x.plan[whole], room - at, taken);
        taken += at;
      } else {
        rows = uint32_t((room - at) / x.plan[whole].row_bytes);
        taken = at + aligned(uint64_t{rows} * x.plan[whole].row_bytes);
      }
    }
    if (taken == 0 || swap_relaxed_gpu(s.payload_head, head, head + taken)) break;
    fresh = false;
  }
  m.more = more ? 1 : 0;
  m.corner = corner;
  return {head - before, spilled, near, whole, rows, 0};
}

// Apart, so that what is long has its registers.
DMI_HD DMI_APART inline Grant reserve_levelled(State& s, const Group& g, const Scratch& x, Meeting& m) { return reserve<true>(s, g, x, m); }

// A grant in a word, Meeting::ready: whoever waits for it then needs to read nothing else. Only of a group that is all in one place; others
// read the meeting.
enum Ready : uint64_t { kNothing, kInRing, kInSpill, kInMeeting };
constexpr uint32_t kBlockBits = 10, kMostBlocks = 1 << kBlockBits;
static_assert(DMI_PAYLOAD_ALIGN == 64);
DMI_HD inline uint64_t ready_word(const Grant& grant, uint32_t tensors) {
  if (grant.whole != tensors || (grant.near != 0 && grant.near != tensors)) return kInMeeting;
  const uint64_t offset = grant.near != 0 ? grant.spilled : grant.base;
  return offset / DMI_PAYLOAD_ALIGN << (kBlockBits + 2) | uint64_t{grant.first} << 2 | (grant.near != 0 ? kInSpill : kInRing);
}
DMI_HD inline Grant granted_in(uint64_t word, uint32_t tensors) {
  const uint64_t offset = (word >> (kBlockBits + 2)) * DMI_PAYLOAD_ALIGN;
  return {offset, offset, (word & 3) == kInSpill ? tensors : 0, tensors, 0, uint32_t(word >> 2) % kMostBlocks};
}

// Thread 0 of a block that does not reserve. Whoever does is running, and waits for none of us.
DMI_HD inline uint64_t wait_until_ready(Meeting& m) {
  uint64_t word = 0;
  for (uint32_t pause = 20; (word = load_acquire_gpu(m.ready)) == kNothing; pause = pause < 500 ? pause * 2 : pause) pause_ns(pause);
  return word;
}

// The group's room in x.grant: reserved by the first block, told to the others. By thread 0 of each.
template <bool kLevelled, typename Block>
DMI_HD void take_grant(Block& block, State& s, const Group& g, Scratch& x, Meeting& m) {
  if (!x.first) {
    const uint64_t word = wait_until_ready(m);
    x.grant = word % 4 == kInMeeting ? m.grant : granted_in(word, g.count);
    return;
  }
  if constexpr (kLevelled) {
    x.grant = reserve_levelled(s, g, x, m);
  } else {
    x.grant = reserve<false>(s, g, x, m);
  }
  x.grant.first = block.index();
  if (block.count() != 1) {
    const uint64_t word = ready_word(x.grant, g.count);
    if (word == kInMeeting) m.grant = x.grant;
    store_release_gpu(m.ready, word);  // pairs with their acquire
  }
  // Of groups that are as they mostly are; of others say() finds the slots. Behind it, since nobody else waits for that.
  if (x.plain != 0 && x.grant.whole == g.count) m.slot = take_slots(s, g.count + (m.corner != 0 ? 1 : 0));
}

// After the others know the reservation: what each tensor has of it. By all threads; x.at and x.unit hold what the whole would need.
template <bool kLevelled, typename Block>
DMI_HD void share_out(Block& block, const Group& g, Scratch& x) {
  const Grant& grant = x.grant;
  for (uint32_t i = block.thread(); i < g.count; i += block.threads()) {
    x.at[i] += i < grant.near ? grant.spilled : grant.base;
    x.start[i] = place_in(i < grant.near ? x.fixed.spill_bytes : x.fixed.payload_bytes, x.at[i]);
    x.granted[i] = x.plan[i].fate != Fate::kCapture || i > grant.whole ? 0 : i < grant.whole ? x.plan[i].rows : grant.rows;
  }
  if (grant.whole == g.count) return;
  block.sync();
  for (uint32_t i = block.thread(); i < g.count; i += block.threads())
    x.unit[i] = kLevelled ? levelled_units(x.fixed, x.tensor[i], x.plan[i], x.granted[i], g.unit_shift)
                          : units_of(uint64_t{x.granted[i]} * x.plan[i].row_bytes, g.unit_shift);
  block.sync();
  block.sum(x.unit, g.count);
}

// Where the payload of tensor i goes.
DMI_HD inline Target target_of(const Scratch& x, uint32_t i) {
  const Fixed& f = x.fixed;
  return i < x.grant.near ? Target{f.spill, f.spill_bytes, x.start[i]} : Target{f.payload, f.payload_bytes, x.start[i]};
}

// Whether a corner is told of before tensor i: before the first that has bytes, so that a row of it follows.
template <bool kLevelled>
DMI_HD bool cornered(const Scratch& x, const Meeting& m, uint32_t i) {
  return m.corner != 0 && i < x.grant.near && x.at[i] == x.grant.spilled && room_of<kLevelled>(x.plan[i]) != 0;
}

// The slots of groups that are not as they mostly are. By all threads; gives x.record, and m.slot.
template <bool kLevelled, typename Block>
DMI_HD void find_slots(Block& block, State& s, const Group& g, Scratch& x, Meeting& m) {
  for (uint32_t i = block.thread(); i < g.count; i += block.threads()) {
    if (!has_records(x, i)) x.own[i] = 0;  // fired twice in a group: the first has what was set aside
    const uint32_t wanted = records_of<kLevelled>(x.fixed, x.tensor[i], x.plan[i], x.granted[i]) + (cornered<kLevelled>(x, m, i) ? 1 : 0);
    // A site that fires again and again may have used up its records: then only the counters know.
    x.record[i] = x.own[i] >= wanted || m.more != 0 ? wanted : x.own[i];
  }
  block.sync();
  block.sum(x.record, g.count);
  if (block.thread() == 0) m.slot = take_slots(s, x.record[g.count]);
  block.sync();
}
template <bool kLevelled>
DMI_HD void say_tensor(State& s, const Fixed& f, const Tensor& t, const Plan& p, uint32_t granted, uint8_t place, uint64_t at,
                       uint64_t slot, uint64_t end) {
  if (p.fate == Fate::kOutside) return count(s.counters.outside, 1);
  if (p.fate == Fate::kOff) return say_other(s, f, t, p, DMI_OUTCOME_SKIPPED, DMI_REASON_POLICY, 0, p.rows, slot, end);
  if (p.fate == Fate::kMismatch) {
    if (p.rows != 0 || p.selection == 0) say_other(s, f, t, p, DMI_OUTCOME_DROPPED, DMI_REASON_MISMATCH, 0, p.rows, slot, end);
  } else {
    if (kLevelled && p.rows != 0) {
      each_part(f, t, p, [&](const Part& part) {
        const uint32_t rows = granted_of(part, granted);
        if (rows != 0)
          say_captured(s, f, form_of(f, t, p, part, part.first, rows), place, at + part.at, uint64_t{rows} * part.row_bytes, slot, end);
        return true;
      });
    } else if (granted != 0 || (p.rows == 0 && p.selection == 0)) {
      say_captured(s, f, form_of(f, t, p, 0, granted), place, at, uint64_t{granted} * p.row_bytes, slot, end);
    }
    if (p.rows != granted && f.complete == 0)
      say_other(s, f, t, p, DMI_OUTCOME_DROPPED, DMI_REASON_RING_FULL, granted, p.rows - granted, slot, end);
  }
  if (kLevelled && p.off != 0) say_other(s, f, t, p, DMI_OUTCOME_SKIPPED, DMI_REASON_POLICY, p.rows, p.off, slot, end);
}

// The records of what is captured at once, and of what will not be, but for what makes them visible. By one block, all its threads: where
// all found room the one that reserved, while the others are at work; else the last one.
template <bool kLevelled, typename Block>
DMI_HD DMI_APART void say(Block& block, State& s, const Group& g, Scratch& x, Meeting& m) {
  const Fixed& f = x.fixed;
  const bool plain = x.plain != 0 && x.grant.whole == g.count;
  if (!plain) find_slots<kLevelled>(block, s, g, x, m);
  if (block.thread() == 0) {
    m.records = plain ? g.count + (m.corner != 0 ? 1 : 0) : x.record[g.count];
    count(s.captures, m.records);
    count(s.counters.records, m.records);
  }
  for (uint32_t i = block.thread(); i < g.count; i += block.threads()) {
    const Tensor& t = x.tensor[i];
    const Plan& p = x.plan[i];
    const bool corner = cornered<kLevelled>(x, m, i);
    const uint32_t given = plain ? (corner ? 2 : 1) : x.record[i + 1] - x.record[i];
    const uint32_t before = plain ? i + (m.corner != 0 && (i >= x.grant.near || x.at[i] != x.grant.spilled) ? 1 : 0) : x.record[i];
    const uint64_t slot = m.slot + before;
    if (corner) say_corner(f, t, p, x.grant.spilled, m.corner, slot);
    say_tensor<kLevelled>(s, f, t, p, x.granted[i], i < x.grant.near ? DMI_PLACE_SPILL : DMI_PLACE_RING, x.at[i], slot + (corner ? 1 : 0),
                          slot + given);
    // What the site did not need is free for others, unless the rest of it is still to come.
    const bool later = f.complete != 0 && p.fate == Fate::kCapture && x.granted[i] < p.rows;
    const uint32_t kept = later && x.own[i] > given ? x.own[i] - given : 0;
    count(s.aside, 0 - uint64_t{x.own[i] - kept});
    x.own[i] = uint8_t(kept);
  }
}

// Makes them visible. The last block, all its threads.
template <typename Block>
DMI_HD void publish(Block& block, const Group& g, const Scratch& x, const Meeting& m) {
  const Fixed& f = x.fixed;
  for (uint32_t r = block.thread(); r < m.records; r += block.threads()) publish_slot(f, m.slot + r);
  for (uint32_t i = block.thread(); i < g.count; i += block.threads()) {
    if (x.tensor[i].site < f.sites) f.left[x.tensor[i].site] = 0;  // others of this launch have read it
  }
}
// By the last block.
template <bool kLevelled>
DMI_HD void leave(Meeting& m) {
  m.ready = m.done = 0;  // for the next launch, which a stream orders after this one
  if constexpr (kLevelled) m.claimed = m.watched = 0;
}

// Which of the tensors from `first` on has a unit of the group.
DMI_HD inline uint32_t whose(const Scratch& x, uint32_t first, uint32_t count, uint32_t unit) {
  uint32_t low = first;
  for (uint32_t high = count; high - low > 1;) {
    const uint32_t middle = (low + high) / 2;
    if (x.unit[middle] <= unit) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Units come in turn, beginning behind the block that reserved, which has the fewest, as it has the records to write.
template <typename Block>
DMI_HD uint32_t first_unit(const Block& block, const Grant& grant) {
  return block.index() - grant.first - 1 + (block.index() <= grant.first ? block.count() : 0);
}

// This block's units of tensors whose rows are all reduced. Apart, so that it has the registers for it.
template <typename Block>
DMI_HD DMI_APART void reduce_units(Block& block, Scratch& x, uint32_t count, uint32_t first) {
  const uint32_t units = x.unit[count], step = block.count();
  for (uint32_t unit = first, i = 0; unit < units; unit += step) {
    i = whose(x, i, count, unit);
    const Plan& p = x.plan[i];
    if (p.reduced != nullptr) reduce_unit(block, x.meet, x.fixed, x.tensor[i], p, x.granted[i], unit - x.unit[i], target_of(x, i));
  }
}

// By all blocks of the launch.
template <bool kLevelled, typename Block>
DMI_HD void capture_group(Block& block, State& s, const Group& g, Scratch& x) {
  const Fixed& f = x.fixed;
  if (block.thread() == 0) x.plain = 1;
  block.sync();
  // The last threads, which have no tensor as a rule, side by side.
  const uint32_t last = block.threads() - 1 - block.thread();
  if (last < kRegions) x.seen[last] = look(s, Region(last));
  for (uint32_t i = block.thread(); i < g.count; i += block.threads()) {
    const Tensor& t = x.tensor[i];
    x.own[i] = t.site < f.sites ? f.left[t.site] : 0;
    if constexpr (kLevelled) {
      x.unit[i] = plan_levelled(x.plan[i], f, t, g.unit_shift);
    } else {
      plan_tensor(x.plan[i], f, t);
      x.unit[i] = units_of(x.plan[i].fate == Fate::kCapture ? stream_bytes(x.plan[i]) : 0, g.unit_shift);
    }
    x.at[i] = room_of<kLevelled>(x.plan[i]);
    // Groups list their sites in order, as a rule: then none is there twice.
    if (x.own[i] == 0 || (i != 0 && x.tensor[i - 1].site >= t.site)) store_relaxed_gpu<uint32_t>(x.plain, 0);
    if (kLevelled && x.plan[i].selection != 0) store_relaxed_gpu<uint32_t>(x.plain, 0);
  }
  block.sync();
  const uint64_t total = block.sum(x.at, g.count);
  if (block.thread() == 0) x.total = total;
  block.sum(x.unit, g.count);
  Meeting& m = *g.meeting;
  if (block.thread() == 0) take_grant<kLevelled>(block, s, g, x, m);
  block.sync();
  share_out<kLevelled>(block, g, x);
  block.sync();
  const bool all = x.grant.whole == g.count;
  if (all && x.first) say<kLevelled>(block, s, g, x, m);
  const uint32_t units = x.unit[g.count], begin = first_unit(block, x.grant);
  if constexpr (kLevelled) reduce_units(block, x, g.count, begin);
  for (uint32_t unit = begin, i = 0; unit < units; unit += block.count()) {
    i = whose(x, i, g.count, unit);
    const Tensor& t = x.tensor[i];
    const Plan& p = x.plan[i];
    const Target to = target_of(x, i);
    const uint32_t n = unit - x.unit[i];
    if constexpr (kLevelled) {
      if (p.reduced == nullptr) move_unit(block, x.meet, f, t, p, x.granted[i], n, g.unit_shift, to);
    } else {
      const uint64_t from = uint64_t{n} << g.unit_shift, end = uint64_t{n + 1} << g.unit_shift, of = uint64_t{x.granted[i]} * p.row_bytes;
      copy_stream(f, t, p, all_rows(f, t, p), 0, from, end < of ? end : of, to, block.thread(), block.threads());
    }
  }
  block.sync();
  if (block.count() != 1) {
    // Release: what this block copied, and the records that it wrote. Acquire, for the last: what all others did.
    if (block.thread() == 0) x.last = add_acq_rel_gpu<uint32_t>(m.done, 1) + 1 == block.count();
    block.sync();
    if (!x.last) return;
  }
  if (!all) say<kLevelled>(block, s, g, x, m);
  block.sync();
  publish(block, g, x, m);
  if (f.complete != 0 && !all) {
    block.sync();
    for (uint32_t i = 0; i < g.count; ++i) {
      if (x.plan[i].fate == Fate::kCapture && x.granted[i] < x.plan[i].rows) stream<kLevelled>(block, s, x, i);
    }
  }
  block.sync();
  if (block.thread() == 0) leave<kLevelled>(m);
}

}  // namespace dmi::device

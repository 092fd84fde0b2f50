// Watched steps: what triggers keep of the very step that sets them off. Before a group is captured its launch holds every row of the sites
// that are watched against their conditions, whatever their level, and marks the requests whose rows met one; marks last as long as the
// step. Its blocks take these rows up a unit at a time, so that none waits for a block that has not started, and whoever finds no more of
// them first decides how the group is captured. As a rule that is the levelled way. Where rows of it are kept, in full because of a mark,
// or offered, in full beside what the gate gives, its rows are divided into lots: each of one fate, and with a record of its own. The lots
// lie in device memory, since others may mark requests meanwhile, and all blocks have to mean the same.
//
// Kept rows have room first, then what gates give, and offers last: they are not made unless there is room for all of the group's. Where
// there is none for kept rows, or no records for lots, rows are at their level.
#pragma once

#include "group.h"

namespace dmi::device {

// ------------------------------------------------------------------ conditions
// This lane's share of the elements of a row that count: visit(which element, its number).
template <typename Block, typename Visit>
DMI_HD void each_counted(const Team<Block>& team, const Tensor& t, const Plan& p, const std::byte* row, const Counting& counts,
                         Visit visit) {
  if (!usual(t, p)) return each_number(t, p, row, counts, team.lane(), team.lanes(), visit);
  each_wide(t, p, row, team.lane(), team.lanes(), [&](uint32_t first, const auto& values) {
    constexpr uint32_t kEach = sizeof values / sizeof values[0];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (uint32_t k = 0; k < kEach; ++k) visit(first + k, double(values[k]));
  });
}

template <typename Block>
DMI_HD double summed(const Team<Block>& team, double own) {
  return team.all(own, team.meet.number, [](double& a, const double& b) { a += b; });
}

template <typename Block>
DMI_HD double product_with_row(const Team<Block>& team, const Tensor& t, const Plan& p, const std::byte* row, const float* weights) {
  double sum = 0;
  each_counted(team, t, p, row, {0, 0, 0}, [&](uint32_t element, double v) { sum += double(weights[element]) * v; });
  return summed(team, sum);
}

// The watches, of those whose bits are set, that a row meets: to all lanes. Bounds are doubles, and so is all that is held against them.
template <typename Block>
DMI_HD uint64_t met_by_row(const Team<Block>& team, const Fixed& f, const Tensor& t, const Plan& p, const std::byte* row,
                           const Counting& counts, uint64_t bits) {
  Sums all;
  all.least = INFINITY;
  all.greatest = -INFINITY;
  each_counted(team, t, p, row, counts, [&](uint32_t, double v) {
    if (!finite(v)) return;
    all.sum += v;
    all.squares += v * v;
    all.least = fmin(all.least, v);
    all.greatest = fmax(all.greatest, v);
    ++all.finite;
  });
  all.sum = summed(team, all.sum);
  all.squares = summed(team, all.squares);
  all.least = team.all(all.least, team.meet.number, [](double& a, const double& b) { a = fmin(a, b); });
  all.greatest = team.all(all.greatest, team.meet.number, [](double& a, const double& b) { a = fmax(a, b); });
  all.finite = uint64_t(summed(team, double(all.finite)));
  all.count = counts.all(p.elements);
  if (all.finite == 0) all.least = all.greatest = 0;
  uint64_t met = 0;
  for (uint32_t i = 0; i < DMI_MAX_WATCHES; ++i) {
    if ((bits >> i & 1) == 0) continue;
    const Condition watch = f.watches[i];
    bool is = false;
    if (watch.condition != DMI_CONDITION_PROBE) {
      is = watch.met_by(all);
    } else if (t.key >= t.inners && watch.elements == p.elements) {
      is = watch.outside(watch.bias + product_with_row(team, t, p, row, f.weights + watch.weight));
    }
    met |= uint64_t{is} << i;
  }
  return met;
}

// Says of a request which watches a row of it met. Before a launch is through with its rows: relaxed, and ordered by how it says that it
// is.
DMI_HD inline void mark(State& s, const Fixed& f, const Space& list, uint32_t row, uint64_t met) {
  const Holder* holders = f.holders + list.holders_at;
  uint64_t& marks = f.met[holders[piece_of(holders, list.holders, row)].request];
  if ((met & ~load_relaxed_gpu(marks)) != 0) or_relaxed_gpu(marks, met);
  if ((met & ~load_relaxed_gpu(s.met)) != 0) or_relaxed_gpu(s.met, met);
}

// Rows [begin, end) of a tensor, of all that its space has in the step.
template <typename Block>
DMI_HD DMI_APART void watch_rows(Block& block, Rendezvous& meet, State& s, const Fixed& f, const Tensor& t, const Plan& p, uint32_t begin,
                                 uint32_t end) {
  const uint64_t bits = f.keeps[t.site].watch;
  const Space& list = f.space[t.space];
  const Team<Block> team(block, meet, team_shift(p, p.rows));
  const uint32_t at_once = block.warps() / team.warps;
  for (uint32_t row = begin + block.warp() / team.warps; row < end; row += at_once) {
    const std::byte* from = row_address(f, t, p, list, row);
    const Counting counts = counting(f, t, p, list, row);
    const uint64_t met = met_by_row(team, f, t, p, from, counts, bits);
    if (met != 0 && team.lane() == 0) mark(s, f, list, row, met);
  }
}

DMI_HD inline void plan_watched(Plan& p, const Fixed& f, const Tensor& t) {
  p = Plan{};
  p.rows = f.space[t.space].rows;
  p.fate = Fate::kOutside;
  if (t.site >= f.sites) return;
  plan_source(p, f, t);
  if (p.fate == Fate::kCapture) p.elements = p.row_bytes >> t.shift;
  const Gate gate = f.gates[t.site];
  p.selection = gate.selection;
  p.top = gate.top;
  p.level = gate.level == DMI_LEVEL_SAMPLED ? uint8_t{DMI_LEVEL_FULL} : gate.level;
}

// Units of rows that are to be held against conditions.
DMI_HD inline uint32_t watched_units(const Fixed& f, const Tensor& t, const Plan& p) {
  const bool complex = t.dtype == DMI_DTYPE_C64 || t.dtype == DMI_DTYPE_C128;
  if (p.fate != Fate::kCapture || complex || f.keeps[t.site].watch == 0) return 0;
  return units_of(p.rows, unit_shift_of(p, p.rows));
}

// Holds the group's rows against the conditions. Says whether it is for this block to decide how they are captured: then all marks are
// there.
template <typename Block>
DMI_HD bool watch_group(Block& block, State& s, const Group& g, Scratch& x) {
  const Fixed& f = x.fixed;
  Meeting& m = *g.meeting;
  for (uint32_t i = block.thread(); i < g.count; i += block.threads()) {
    x.own[i] = x.tensor[i].site < f.sites ? f.left[x.tensor[i].site] : 0;
    plan_watched(x.plan[i], f, x.tensor[i]);
    x.unit[i] = watched_units(f, x.tensor[i], x.plan[i]);
  }
  block.sync();
  block.sum(x.unit, g.count);
  const uint32_t units = x.unit[g.count];
  for (uint32_t i = 0;;) {
    if (block.thread() == 0) x.taken = add_relaxed_gpu<uint32_t>(m.claimed, 1);
    block.sync();
    const uint32_t unit = x.taken;
    if (unit > units) return false;
    if (unit == units) break;
    while (x.unit[i + 1] <= unit) ++i;
    const uint32_t rows = x.plan[i].rows, each = 1u << unit_shift_of(x.plan[i], rows), begin = (unit - x.unit[i]) * each;
    watch_rows(block, x.meet, s, f, x.tensor[i], x.plan[i], begin, rows - begin < each ? rows : begin + each);
    block.sync();
    // Release: the marks of this block. Acquire, for the one that decides, below.
    if (block.thread() == 0) add_acq_rel_gpu<uint32_t>(m.watched, 1);
  }
  if (block.thread() == 0) {
    // Whoever took a unit up is running.
    for (uint32_t pause = 20; load_acquire_gpu(m.watched) != units; pause = pause < 500 ? pause * 2 : pause) pause_ns(pause);
  }
  block.sync();
  return true;
}

// ------------------------------------------------------------------ lots
// The rows of a tensor that its gate gives at one level; of a gate without a selection all of them.
DMI_HD inline const Space& list_of(const Fixed& f, const Tensor& t, const Plan& p, uint32_t level) {
  if (p.selection == 0) return f.space[t.space];
  return f.lists[(uint64_t{p.selection} - 1) * kListsEach + level * DMI_SPACES + t.space];
}

// A tensor's rows in row-list order, lot by lot.
class Lots {
 public:
  // `met`: watches that rows of the step have met; 0: nothing is kept.
  DMI_HD Lots(const Fixed& f, const Tensor& t, const Plan& p, uint64_t met) : f_(f), t_(t), p_(p) {
    if (p.fate != Fate::kCapture) return;
    bits_ = f.keeps[t.site].keep & met;
    offers_ = f.keeps[t.site].offer != 0 && p.row_bytes != 0;
  }

  // The next one in `lot`, which holds the one before; false behind the last.
  DMI_HD bool next(Lot& lot) {
    if (any_ && lot.what == Lot::kOffered) return give(lot);
    for (; level_ < DMI_LEVELS && p_.fate != Fate::kOutside; ++level_, row_ = 0) {
      if (p_.selection == 0 && level_ != p_.level) continue;
      const Space& list = list_of(f_, t_, p_, level_);
      if (row_ == list.rows) {
        first_ += list.rows;
        continue;
      }
      const bool less = level_for(uint8_t(level_), t_.dtype) != DMI_LEVEL_FULL;
      bool kept = false;
      uint32_t end = list.rows;
      if (less && bits_ != 0) end = alike(list, kept);
      lot.first = first_ + row_;
      lot.row = row_;
      lot.rows = end - row_;
      lot.gate = uint8_t(level_);
      row_ = end;
      any_ = true;
      if (!kept && !(less && offers_)) return give(lot);
      lot.what = kept ? Lot::kKept : Lot::kOffered;
      lot.level = DMI_LEVEL_FULL;
      lot.row_bytes = p_.row_bytes;
      return true;
    }
    if (any_) return false;
    any_ = true;  // the site fired, though it has no rows
    lot.first = lot.row = lot.rows = 0;
    lot.gate = p_.level;
    return give(lot);
  }

 private:
  DMI_HD bool give(Lot& lot) const {
    lot.level = level_for(lot.gate, t_.dtype);
    const bool off = lot.level == DMI_LEVEL_OFF;
    lot.what = p_.fate == Fate::kOutside ? Lot::kOutside : off ? Lot::kSkipped : p_.fate == Fate::kMismatch ? Lot::kMismatch : Lot::kGiven;
    lot.row_bytes = lot.what != Lot::kGiven ? 0 : uint32_t(level_row_bytes(lot.level, p_.elements, t_.element, p_.top));
    return true;
  }
  // Up to which row of the list the requests are kept as the one at hand is, or are not.
  DMI_HD uint32_t alike(const Space& list, bool& kept) const {
    const Holder* holders = f_.holders + list.holders_at;
    uint32_t n = piece_of(holders, list.holders, row_);
    auto keeps = [&] { return (load_relaxed_gpu(f_.met[holders[n].request]) & bits_) != 0; };
    kept = keeps();
    for (++n; n < list.holders; ++n) {
      if (keeps() != kept) return holders[n].start;
    }
    return list.rows;
  }

  const Fixed& f_;
  const Tensor& t_;
  const Plan& p_;
  uint64_t bits_ = 0;
  bool offers_ = false, any_ = false;
  uint32_t level_ = 0, row_ = 0, first_ = 0;
};

DMI_HD inline uint64_t bytes_of(const Lot& lot) { return uint64_t{lot.rows} * lot.row_bytes; }

// Its rows that found room, where the lots were given so many bytes: all, some, or of an offer none.
DMI_HD inline uint32_t granted_of(const Lot& lot, uint64_t taken) {
  if (lot.at + bytes_of(lot) <= taken || bytes_of(lot) == 0) return lot.rows;
  return lot.at >= taken || lot.what == Lot::kOffered ? 0 : uint32_t((taken - lot.at) / lot.row_bytes);
}

DMI_HD inline Part part_of(const Fixed& f, const Tensor& t, const Plan& p, const Lot& lot) {
  const Space& list = list_of(f, t, p, lot.gate);
  return {&list, lot.first - lot.row, list.rows, lot.level, lot.row_bytes, 0};
}

DMI_HD inline uint32_t units_of(const Scratch& x, const Lot& lot, uint32_t unit_shift) {
  if (lot.row_bytes == 0) return 0;
  const Plan& p = x.plan[lot.tensor];
  return part_units(p, part_of(x.fixed, x.tensor[lot.tensor], p, lot), lot.rows, unit_shift);
}

// Calls visit(lot) for those of tensor i, of `lots`. What it changes of one stays.
template <typename Visit>
DMI_HD void each_lot_of(const Scratch& x, Lot* lots, uint32_t i, Visit visit) {
  for (uint32_t n = x.record[i]; n < x.record[i + 1]; ++n) visit(lots[n]);
}

// Makes the group's lots, by all threads of a block: false where it has no need of them, or there is no room for them. x.record: those
// before each tensor's. The first `keeping` tensors keep rows. Marks only ever come to a step, so they are made anew a bounded number of
// times.
template <typename Block>
DMI_HD bool make_lots(Block& block, State& s, const Group& g, Scratch& x, uint32_t keeping) {
  const Fixed& f = x.fixed;
  Meeting& m = *g.meeting;
  for (bool again = true; again;) {
    if (block.thread() == 0) {
      x.plain = 1;
      x.changed = 0;
      x.slot = load_relaxed_gpu(s.met);
    }
    block.sync();
    const uint64_t met = x.slot;
    for (uint32_t i = block.thread(); i < g.count; i += block.threads()) {
      uint32_t records = 0;
      Lot lot{};
      for (Lots lots(f, x.tensor[i], x.plan[i], i < keeping ? met : 0); lots.next(lot); ++records) {
        if (lot.what == Lot::kKept || lot.what == Lot::kOffered) store_relaxed_gpu<uint32_t>(x.plain, 0);
      }
      x.record[i] = records;
    }
    block.sync();
    block.sum(x.record, g.count);
    if (x.plain != 0) return false;
    const uint32_t n = x.record[g.count];
    if (block.thread() == 0) {
      m.lots = n;
      m.lots_at = add_relaxed_gpu(s.lots, n);
      // Each may have one record more, for rows that found no room; bytes that no record tells of would never be free again.
      x.found = uint64_t{m.lots_at} + n <= f.record_capacity && records_free(s, f, several(true) + 2 * uint64_t{n});
    }
    block.sync();
    if (!x.found) return false;
    for (uint32_t i = block.thread(); i < g.count; i += block.threads()) {
      uint32_t next = x.record[i];
      Lot lot{};
      for (Lots lots(f, x.tensor[i], x.plan[i], i < keeping ? met : 0); lots.next(lot); ++next) {
        lot.tensor = i;
        if (next < x.record[i + 1]) f.lots[m.lots_at + next] = lot;
      }
      if (next != x.record[i + 1]) store_relaxed_gpu<uint32_t>(x.changed, 1);  // another stream marked a request between the two
    }
    block.sync();
    again = x.changed != 0;
    block.sync();
  }
  return true;
}

// Gives the lots of some fate their places from `at` on. Returns where they end.
template <typename Block>
DMI_HD uint64_t place_lots(Block& block, const Group& g, Scratch& x, Lot* lots, Lot::What what, uint64_t at) {
  for (uint32_t i = block.thread(); i < g.count; i += block.threads()) {
    x.at[i] = 0;
    each_lot_of(x, lots, i, [&](const Lot& lot) { x.at[i] += lot.what == what ? aligned(bytes_of(lot)) : 0; });
  }
  block.sync();
  const uint64_t all = block.sum(x.at, g.count);
  for (uint32_t i = block.thread(); i < g.count; i += block.threads()) {
    uint64_t next = at + x.at[i];
    each_lot_of(x, lots, i, [&](Lot& lot) {
      if (lot.what != what) return;
      lot.at = next;
      next += aligned(bytes_of(lot));
    });
  }
  block.sync();
  return at + all;
}

// One reservation for all lots: with offers, without, or, where room is short, whole lots and then whole rows. `needed`: bytes without
// offers.
template <typename Block>
DMI_HD void reserve_lots(Block& block, State& s, Scratch& x, Meeting& m, const Lot* lots, uint64_t needed, uint64_t all) {
  const Fixed& f = x.fixed;
  uint64_t head = 0;
  for (bool waited = f.complete == 0;; waited = true) {
    if (block.thread() == 0) {
      auto room = [&] {
        head = load_relaxed_gpu(s.payload_head);
        return room_left(f.payload_bytes, head, load_acquire_gpu(s.payload_tail_seen));
      };
      x.total = room();
      if (x.total < all) {
        refresh(s.payload_tail_seen, *f.payload_tail, s.payload_head);
        x.total = room();
      }
      if (x.total < needed && !waited) {
        wait_while_drained(s, needed < f.payload_bytes / 2 ? needed : f.payload_bytes / 2);
        x.total = room();
      }
      x.slot = x.total >= all ? all : needed;
    }
    block.sync();
    if (x.total < needed) {
      // The one that is cut.
      for (uint32_t n = block.thread(); n < m.lots; n += block.threads()) {
        const Lot& lot = lots[n];
        if (lot.what == Lot::kOffered || lot.at > x.total || lot.at + aligned(bytes_of(lot)) <= x.total) continue;
        x.slot = lot.at + aligned((x.total - lot.at) / lot.row_bytes * lot.row_bytes);
      }
      block.sync();
    }
    if (block.thread() == 0) x.found = swap_relaxed_gpu(s.payload_head, head, head + x.slot);
    block.sync();
    if (x.found) break;
  }
  if (block.thread() == 0) {
    m.grant.base = head;
    m.taken = x.slot;
  }
}

// By the block that decides: whether the group is captured lot by lot; if so the lots are there, and their room is reserved.
template <typename Block>
DMI_HD DMI_APART bool divide(Block& block, State& s, const Group& g, Scratch& x) {
  Meeting& m = *g.meeting;
  const Fixed& f = x.fixed;
  for (uint32_t keeping = g.count;;) {  // fewer each time
    if (!make_lots(block, s, g, x, keeping)) {
      block.sync();
      if (block.thread() == 0) m.lots = 0;
      return false;
    }
    Lot* lots = f.lots + m.lots_at;
    const uint64_t kept = place_lots(block, g, x, lots, Lot::kKept, 0);
    if (f.complete == 0) {
      // From the first tensor on whose kept rows find no room, rows are at their level.
      if (block.thread() == 0) {
        const uint64_t tail = refresh(s.payload_tail_seen, *f.payload_tail, s.payload_head);
        const uint64_t room = room_left(f.payload_bytes, load_relaxed_gpu(s.payload_head), tail);
        for (x.taken = keeping; x.taken > 0 && (x.taken == g.count ? kept : x.at[x.taken]) > room;) --x.taken;
      }
      block.sync();
      const bool fits = x.taken == keeping;
      keeping = x.taken;
      block.sync();
      if (!fits) continue;
    }
    const uint64_t needed = place_lots(block, g, x, lots, Lot::kGiven, kept);
    const uint64_t all = place_lots(block, g, x, lots, Lot::kOffered, needed);
    for (uint32_t i = block.thread(); i < g.count; i += block.threads()) {
      x.unit[i] = 0;
      each_lot_of(x, lots, i, [&](const Lot& lot) { x.unit[i] += units_of(x, lot, g.unit_shift); });
    }
    block.sync();
    block.sum(x.unit, g.count);
    for (uint32_t i = block.thread(); i < g.count; i += block.threads()) {
      uint32_t next = x.unit[i];
      each_lot_of(x, lots, i, [&](Lot& lot) {
        lot.unit = next;
        next += units_of(x, lot, g.unit_shift);
      });
    }
    reserve_lots(block, s, x, m, lots, needed, all);
    block.sync();
    if (block.thread() == 0) store_release_gpu<uint64_t>(m.ready, kInMeeting);  // pairs with the acquire of the others
    block.sync();
    return true;
  }
}

// By the other blocks: what was decided.
template <typename Block>
DMI_HD bool divided(Block& block, const Group& g) {
  if (block.thread() == 0) wait_until_ready(*g.meeting);
  block.sync();
  return g.meeting->lots != 0;
}

// ------------------------------------------------------------------ capture
// Unit `unit` of a lot, of which `granted` rows found room.
template <typename Block>
DMI_HD void move_lot(Block& block, Scratch& x, const Lot& lot, uint32_t granted, uint32_t unit, uint32_t unit_shift, uint64_t base) {
  const Fixed& f = x.fixed;
  const Tensor& t = x.tensor[lot.tensor];
  const Plan& p = x.plan[lot.tensor];
  const Part part = part_of(f, t, p, lot);
  if (unit >= part_units(p, part, granted, unit_shift)) return;
  const Target to{f.payload, f.payload_bytes, base + lot.at};
  if (encoded(lot.level)) {
    const uint32_t each = 1u << unit_shift_of(p, part.rows), begin = unit * each, end = granted - begin < each ? granted : begin + each;
    compute_rows(block, x.meet, f, t, p, part, lot.row + begin, lot.row + end,
                 {to.ring, to.capacity, to.offset + uint64_t{begin} * lot.row_bytes});
  } else {
    const uint64_t begin = uint64_t{unit} << unit_shift, end = uint64_t{unit + 1} << unit_shift, all = uint64_t{granted} * lot.row_bytes;
    copy_stream(f, t, p, rows_of(t, p.outers, p.flat_stride, p.row_bytes, *part.list), lot.row, begin, end < all ? end : all, to,
                block.thread(), block.threads());
  }
}

// Records that a lot gets now.
DMI_HD inline uint32_t records_of(const Fixed& f, const Plan& p, const Lot& lot, uint32_t granted) {
  if (lot.what == Lot::kOutside || (lot.rows == 0 && p.selection != 0)) return 0;
  if (lot.what == Lot::kOffered) return granted != 0 ? 1 : 0;
  if (lot.what == Lot::kSkipped || lot.what == Lot::kMismatch || granted == lot.rows) return 1;
  return (granted != 0 ? 1 : 0) + (f.complete != 0 ? 0 : 1);
}

DMI_HD inline void say_lot(State& s, const Fixed& f, const Tensor& t, const Plan& p, const Lot& lot, uint32_t granted, uint64_t base,
                           uint64_t& slot, uint64_t end) {
  switch (lot.what) {
    case Lot::kOutside:
      return count(s.counters.outside, 1);
    case Lot::kSkipped:
      return say_other(s, f, t, p, DMI_OUTCOME_SKIPPED, DMI_REASON_POLICY, lot.first, lot.rows, slot, end);
    case Lot::kMismatch:
      return say_other(s, f, t, p, DMI_OUTCOME_DROPPED, DMI_REASON_MISMATCH, lot.first, lot.rows, slot, end);
    default:
      break;
  }
  const uint64_t bytes = uint64_t{granted} * lot.row_bytes;
  dmi_record r = form_of(f, t, p, part_of(f, t, p, lot), lot.first, granted);
  if (lot.what == Lot::kOffered) {
    if (granted == 0) return;
    r.flags |= DMI_RECORD_OFFER;
    place_at(r, DMI_PLACE_RING, base + lot.at, bytes);
    write_record(slot_of(f, slot++), r);
    return count(s.counters.offered_bytes, bytes);
  }
  if (lot.what == Lot::kKept) {
    r.flags |= DMI_RECORD_KEPT;
    count(s.counters.kept_rows, granted);
  }
  if (granted != 0 || lot.rows == 0) say_captured(s, f, r, DMI_PLACE_RING, base + lot.at, bytes, slot, end);
  if (granted != lot.rows && f.complete == 0)
    say_other(s, f, t, p, DMI_OUTCOME_DROPPED, DMI_REASON_RING_FULL, lot.first + granted, lot.rows - granted, slot, end);
}

// Makes the records of all lots visible, as say() and publish() do those of tensors. The last block, all its threads.
template <typename Block>
DMI_HD void say_lots(Block& block, State& s, const Group& g, Scratch& x, const Meeting& m, Lot* lots) {
  const Fixed& f = x.fixed;
  for (uint32_t i = block.thread(); i < g.count; i += block.threads()) {
    if (!has_records(x, i)) x.own[i] = 0;
    x.unit[i] = 0;
    each_lot_of(x, lots, i, [&](const Lot& lot) { x.unit[i] += records_of(f, x.plan[i], lot, granted_of(lot, m.taken)); });
  }
  block.sync();
  block.sum(x.unit, g.count);
  const uint32_t records = x.unit[g.count];
  if (block.thread() == 0) {
    x.slot = take_slots(s, records);
    count(s.captures, records);
    count(s.counters.records, records);
  }
  block.sync();
  const uint64_t first = x.slot;
  for (uint32_t i = block.thread(); i < g.count; i += block.threads()) {
    const uint32_t given = x.unit[i + 1] - x.unit[i];
    uint64_t slot = first + x.unit[i];
    bool later = false;
    each_lot_of(x, lots, i, [&](const Lot& lot) {
      const uint32_t granted = granted_of(lot, m.taken);
      say_lot(s, f, x.tensor[i], x.plan[i], lot, granted, m.grant.base, slot, first + x.unit[i + 1]);
      later = later || (f.complete != 0 && lot.what != Lot::kOffered && granted < lot.rows);
    });
    // What the site did not need is free for others, unless the rest of it is still to come.
    const uint32_t kept = later && x.own[i] > given ? x.own[i] - given : 0;
    count(s.aside, 0 - uint64_t{x.own[i] - kept});
    if (x.tensor[i].site < f.sites && x.own[i] != 0) f.left[x.tensor[i].site] = 0;
    x.own[i] = uint8_t(kept);
  }
  block.sync();
  for (uint32_t r = block.thread(); r < records; r += block.threads()) publish_slot(f, first + r);
}

// Complete mode: what of a lot found no room at once.
template <typename Block>
DMI_HD void stream_lot(Block& block, State& s, Scratch& x, const Lot& lot, uint32_t granted) {
  const uint32_t i = lot.tensor, wanted = lot.rows - granted;
  const Part part = part_of(x.fixed, x.tensor[i], x.plan[i], lot);
  const uint8_t flags = lot.what == Lot::kKept ? DMI_RECORD_KEPT : 0;
  const uint32_t got = stream_rows(block, s, x, i, part, lot.row + granted, lot.first + granted, wanted, flags);
  if (block.thread() == 0 && got != wanted) give_up(s, x, i, lot.first + granted + got, wanted - got);
}

// By the last block alone.
template <typename Block>
DMI_HD void stream_lots(Block& block, State& s, const Group& g, Scratch& x, const Meeting& m, const Lot* lots) {
  for (uint32_t n = 0; n < m.lots; ++n) {
    const uint32_t granted = granted_of(lots[n], m.taken);
    if (lots[n].what != Lot::kOffered && granted < lots[n].rows) stream_lot(block, s, x, lots[n], granted);
  }
  block.sync();
  for (uint32_t i = block.thread(); i < g.count; i += block.threads()) count(s.aside, 0 - uint64_t{x.own[i]});
}

// By all blocks of a launch whose group was divided.
template <typename Block>
DMI_HD DMI_APART void capture_lots(Block& block, State& s, const Group& g, Scratch& x) {
  const Fixed& f = x.fixed;
  Meeting& m = *g.meeting;
  Lot* lots = f.lots + m.lots_at;
  // Every tensor has one at least.
  for (uint32_t n = block.thread(); n < m.lots; n += block.threads()) {
    if (n != 0 && lots[n - 1].tensor == lots[n].tensor) continue;
    x.record[lots[n].tensor] = n;
    x.unit[lots[n].tensor] = lots[n].unit;
  }
  if (block.thread() == 0) {
    const Lot& last = lots[m.lots - 1];
    x.record[g.count] = m.lots;
    x.unit[g.count] = last.unit + units_of(x, last, g.unit_shift);
  }
  block.sync();
  const uint32_t units = x.unit[g.count];
  for (uint32_t unit = block.index(), i = 0; unit < units; unit += block.count()) {
    while (x.unit[i + 1] <= unit) ++i;
    uint32_t n = x.record[i];
    while (n + 1 < x.record[i + 1] && lots[n + 1].unit <= unit) ++n;
    move_lot(block, x, lots[n], granted_of(lots[n], m.taken), unit - lots[n].unit, g.unit_shift, m.grant.base);
  }
  block.sync();
  if (block.count() != 1) {
    // Release: what this block copied. Acquire, for the last: what all others did.
    if (block.thread() == 0) x.last = add_acq_rel_gpu<uint32_t>(m.done, 1) + 1 == block.count();
    block.sync();
    if (!x.last) return;
  }
  say_lots(block, s, g, x, m, lots);
  if (f.complete != 0) {
    block.sync();
    stream_lots(block, s, g, x, m, lots);
  }
  block.sync();
  if (block.thread() == 0) leave<true>(m);
}

}  // namespace dmi::device

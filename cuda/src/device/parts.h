// Levelled steps: the rows of a tensor that are wanted lie in parts, one for each level that some of them have, in row-list order. Rows of
// a FULL part are copied; those of the others are computed, here, before they reach the ring. A warp has a row, or, where there are few and
// they are long, a block has one.
#pragma once

#include "atomics.h"
#include "elements.h"
#include "rows.h"
#include "state.h"

namespace dmi::device {

struct Part {
  const Space* list;
  uint32_t first, rows;  // in the row list
  uint8_t level;         // of its payload
  uint32_t row_bytes;    // of its payload
  uint64_t at;           // its first byte, behind the tensor's first one
};

// Calls visit(part) for one part after the other; the last one for which it says false.
template <typename Visit>
DMI_HD void each_part(const Fixed& f, const Tensor& t, const Plan& p, Visit visit) {
  const Space* lists = p.selection == 0 ? nullptr : f.lists + (uint64_t{p.selection} - 1) * kListsEach + t.space;
  const uint32_t begin = lists == nullptr ? p.level : 0, end = lists == nullptr ? p.level + 1 : DMI_LEVEL_OFF;
  uint32_t first = 0;
  uint64_t at = 0;
#ifdef __CUDA_ARCH__
#pragma unroll 1  // `visit` may be long
#endif
  for (uint32_t level = begin; level < end; ++level) {
    const Space* list = lists == nullptr ? &f.space[t.space] : lists + level * DMI_SPACES;
    const uint32_t rows = list->rows;
    if (rows == 0) continue;
    const uint8_t own = level_for(uint8_t(level), t.dtype);
    // What does not fit its site has no bytes, and may have no elements either.
    const uint32_t bytes = p.fate != Fate::kCapture ? 0 : uint32_t(level_row_bytes(own, p.elements, t.element, p.top));
    if (!visit(Part{list, first, rows, own, bytes, at})) return;
    first += rows;
    at += aligned(uint64_t{rows} * bytes);
  }
}

DMI_HD inline Plan plan_levelled(const Fixed& f, const Tensor& t) {
  Plan p = plan_of(f, t);
  if (p.fate == Fate::kOff || p.fate == Fate::kOutside) return p;
  const Gate gate = f.gates[t.site];
  p.selection = gate.selection;
  p.top = gate.top;
  p.elements = p.fate == Fate::kCapture ? p.row_bytes / t.element : 0;
  p.level = gate.level == DMI_LEVEL_SAMPLED ? uint8_t{DMI_LEVEL_FULL} : gate.level;
  const uint32_t all = p.rows;
  p.rows = 0;
  each_part(f, t, p, [&](const Part& part) {
    p.rows += part.rows;
    p.room = part.at + aligned(uint64_t{part.rows} * part.row_bytes);
    return true;
  });
  p.off = all - p.rows;
  return p;
}

// How many of the rows fit into `room` bytes, a multiple of the alignment; `taken`: the bytes that they take of it.
DMI_HD inline uint32_t fit_rows(const Fixed& f, const Tensor& t, const Plan& p, uint64_t room, uint64_t& taken) {
  uint32_t rows = 0;
  taken = 0;
  each_part(f, t, p, [&](const Part& part) {
    const uint64_t bytes = aligned(uint64_t{part.rows} * part.row_bytes);
    if (bytes <= room - taken) {
      rows += part.rows;
      taken += bytes;
      return true;
    }
    const auto some = uint32_t((room - taken) / part.row_bytes);
    rows += some;
    taken += aligned(uint64_t{some} * part.row_bytes);
    return false;
  });
  return rows;
}

// Rows of a part that are among the first `granted` of the row list.
DMI_HD inline uint32_t granted_of(const Part& part, uint32_t granted) {
  return granted <= part.first ? 0 : granted - part.first < part.rows ? granted - part.first : part.rows;
}

constexpr uint32_t kMostWarps = 8;       // of a block
constexpr uint32_t kLongRow = 64 << 10;  // bytes that would keep a warp too long

// Rows of a computed part that a block has at a time, which is a unit of work: one for each of its warps, or one.
DMI_HD inline uint32_t unit_rows(const Plan& p, uint32_t rows) { return rows < kMostWarps || p.row_bytes >= kLongRow ? 1 : kMostWarps; }

DMI_HD inline uint32_t part_units(const Plan& p, const Part& part, uint32_t rows, uint32_t unit_bytes) {
  if (!encoded(part.level)) return uint32_t((uint64_t{rows} * part.row_bytes + unit_bytes - 1) / unit_bytes);
  const uint32_t each = unit_rows(p, part.rows);
  return rows / each + (rows % each != 0 ? 1 : 0);
}

DMI_HD inline uint32_t levelled_units(const Fixed& f, const Tensor& t, const Plan& p, uint32_t granted, uint32_t unit_bytes) {
  uint32_t units = 0;
  if (p.fate != Fate::kCapture) return 0;
  each_part(f, t, p, [&](const Part& part) {
    units += part_units(p, part, granted_of(part, granted), unit_bytes);
    return true;
  });
  return units;
}

// ------------------------------------------------------------------ rows that are computed
// Of the finite elements of a row, as far as some lanes have seen them. No default values: it lies in shared memory.
struct Tally {
  double sum, squares;
  float least, greatest;  // what figures round them to; +-infinity while there are none
  uint32_t finite, spare;

  DMI_HD void merge(const Tally& o) {
    sum += o.sum;
    squares += o.squares;
    least = fminf(least, o.least);
    greatest = fmaxf(greatest, o.greatest);
    finite += o.finite;
  }
  // `count`: elements in all.
  DMI_HD Sums sums(uint32_t count) const {
    Sums sums;
    sums.sum = sum;
    sums.squares = squares;
    sums.least = finite == 0 ? 0 : least;
    sums.greatest = finite == 0 ? 0 : greatest;
    sums.finite = finite;
    sums.count = count;
    return sums;
  }
};
DMI_HD inline Tally nothing() { return {0, 0, INFINITY, -INFINITY, 0, 0}; }

// An element of a row, and where it stands.
struct Standing {
  double value;
  uint32_t index, spare;
  DMI_HD void merge(const Standing& o) {
    if (stands_before(o.value, o.index, value, index)) *this = o;
  }
};
// Behind all elements.
DMI_HD inline Standing nowhere() { return {-INFINITY, kNoElement, 0}; }

// Where the warps of a block meet over a row.
struct Rendezvous {
  Tally tally[kMostWarps];
  Standing standing[kMostWarps];
  float most[kMostWarps];
  double number[kMostWarps];
};

// Lanes that have a row together: those of a warp, or of the block.
template <typename Block>
struct Team {
  Block& block;
  Rendezvous& meet;
  bool whole;  // the block

  DMI_HD uint32_t lane() const { return whole ? block.thread() : block.lane(); }
  DMI_HD uint32_t lanes() const { return whole ? block.threads() : block.lanes(); }

  // What merging those of all lanes gives, to all lanes.
  template <typename T, typename Merge>
  DMI_HD T all(T own, T* shared, Merge merge) const {
    own = block.across(own, merge);
    if (!whole) return own;
    if (block.lane() == 0) shared[block.warp()] = own;
    block.sync();
    own = shared[0];
    for (uint32_t warp = 1; warp < block.warps(); ++warp) merge(own, shared[warp]);
    block.sync();
    return own;
  }
};

// The elements of a row that count: those of the keys that its token had. `length` 0: all of them.
struct Counting {
  uint32_t length, from, to;
  DMI_HD bool operator()(uint32_t element) const { return length == 0 || (element % length >= from && element % length < to); }
  // How many do, of so many.
  DMI_HD uint32_t all(uint32_t elements) const { return length == 0 ? elements : elements / length * (to - from); }
  // How many that count are before it.
  DMI_HD uint32_t before(uint32_t element) const {
    return length == 0 ? element : element / length * (to - from) + element % length - from;
  }
};

DMI_HD inline Counting counting(const Fixed& f, const Tensor& t, const Plan& p, const Space& list, uint32_t row) {
  if (t.key >= t.inners) return {0, 0, 0};
  const uint32_t run = list.runs_at + run_of(f, list, row);
  const Own own = f.owns[run];
  uint64_t after = 1;
  for (uint32_t d = t.key + 1; d < t.inners; ++d) after *= p.size[d];
  const uint64_t keys = p.size[t.key], base = p.key_base, first = own.key_first;
  const uint64_t end = first + own.position + (row - f.runs[run].start) + 1;
  const uint64_t to = end <= base ? 0 : end - base < keys ? end - base : keys;
  const uint64_t from = first <= base ? 0 : first - base < to ? first - base : to;
  // A row without elements has none that could be asked about.
  return {uint32_t(keys * after), uint32_t(from * after), uint32_t(to * after)};
}

// Apart, as they are seldom needed and would be there many times.
DMI_HD DMI_APART inline const std::byte* within_strided_row(const Plan& p, const std::byte* row, uint32_t within) {
  return within_row(p, row, within);
}
DMI_HD DMI_APART inline double number_at(const Tensor& t, const Plan& p, const std::byte* row, uint32_t element) {
  return element_of<double>(t.dtype, within_row(p, row, element * t.element));
}
DMI_HD DMI_APART inline float float_at(const Tensor& t, const Plan& p, const std::byte* row, uint32_t element) {
  return element_of<float>(t.dtype, within_row(p, row, element * t.element));
}

// Rows as nearly all are: of a usual dtype, every element counts, and 16 bytes can be read at once.
DMI_HD inline bool usual(const Tensor& t, const Plan& p, const Counting& counts) {
  return p.vector == 16 && counts.length == 0 && (t.dtype == DMI_DTYPE_BF16 || t.dtype == DMI_DTYPE_F16 || t.dtype == DMI_DTYPE_F32);
}

// This lane's share of such a row, 16 bytes at a time: visit(which element is the first, an array of all of them). kBatch of them are read
// before the first is looked at, where the row is in one piece. What is done for an element stands here 8 * kBatch times, and for each
// dtype: it has to be little, or the processor waits for code and not for memory.
template <uint32_t kBytes, uint32_t kBatch, typename Convert, typename Visit>
DMI_HD void each_wide_of(const Plan& p, const std::byte* row, uint32_t lane, uint32_t lanes, Convert convert, Visit visit) {
  constexpr uint32_t kEach = 16 / kBytes;
  const uint32_t wides = p.row_bytes / 16;
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
  for (uint32_t first = lane; first < wides; first += kBatch * lanes) {
    Wide moved[kBatch];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (uint32_t b = 0; b < kBatch; ++b) {
      const uint32_t i = first + b * lanes;
      if (i < wides)
        moved[b] = *reinterpret_cast<const Wide*>(kBatch == 1 && p.outers != 0 ? within_strided_row(p, row, i * 16) : row + i * 16);
    }
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (uint32_t b = 0; b < kBatch; ++b) {
      const uint32_t i = first + b * lanes;
      if (i >= wides) break;
      float values[kEach];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
      for (uint32_t k = 0; k < kEach; ++k) values[k] = convert(reinterpret_cast<const std::byte*>(&moved[b]) + k * kBytes);
      visit(i * kEach, values);
    }
  }
}

template <uint32_t kBatch, typename Visit>
DMI_HD void each_wide(const Tensor& t, const Plan& p, const std::byte* row, uint32_t lane, uint32_t lanes, Visit visit) {
  if constexpr (kBatch != 1) {
    if (p.outers != 0) return each_wide<1>(t, p, row, lane, lanes, visit);
  }
  if (t.dtype == DMI_DTYPE_BF16) {
    each_wide_of<2, kBatch>(p, row, lane, lanes, [](const std::byte* at) { return bfloat(load_as<uint16_t>(at)); }, visit);
  } else if (t.dtype == DMI_DTYPE_F16) {
    each_wide_of<2, kBatch>(p, row, lane, lanes, [](const std::byte* at) { return half(load_as<uint16_t>(at)); }, visit);
  } else {
    each_wide_of<4, kBatch>(p, row, lane, lanes, [](const std::byte* at) { return load_as<float>(at); }, visit);
  }
}

// Of any other row: visit(which element, its number) for each that counts.
template <typename Visit>
DMI_HD void each_number(const Tensor& t, const Plan& p, const std::byte* row, const Counting& counts, uint32_t lane, uint32_t lanes,
                        Visit visit) {
  const uint32_t elements = p.elements;
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
  for (uint32_t i = lane; i < elements; i += lanes) {
    if (counts(i)) visit(i, number_at(t, p, row, i));
  }
}

// Where a computed row goes: words of four bytes, in a ring.
struct Words {
  std::byte* ring;
  uint64_t capacity, at;
  DMI_HD void put(uint32_t index, uint32_t word) const {
    uint64_t place = at + uint64_t{index} * 4;
    if (place >= capacity) place -= capacity;
    *reinterpret_cast<uint32_t*>(ring + place) = word;
  }
  DMI_HD void put(uint32_t index, float value) const {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    put(index, word);
  }
};

// This lane's share of any row.
DMI_HD DMI_APART inline Tally tally_any(const Tensor& t, const Plan& p, const std::byte* row, const Counting& counts, uint32_t lane,
                                        uint32_t lanes) {
  Tally seen = nothing();
  each_number(t, p, row, counts, lane, lanes, [&](uint32_t, double v) {
    if (!finite(v)) return;
    seen.merge({v, v * v, float(v), float(v), 1, 0});
  });
  return seen;
}

// Of a usual row whose elements are all finite; of others its sum is not.
DMI_HD inline Tally tally_usual(const Tensor& t, const Plan& p, const std::byte* row, uint32_t lane, uint32_t lanes) {
  Tally seen = nothing();
  each_wide<kInFlight>(t, p, row, lane, lanes, [&](uint32_t, const auto& values) {
    constexpr uint32_t kEach = sizeof values / sizeof values[0];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (uint32_t k = 0; k < kEach; ++k) {
      const double d = values[k];
      seen.sum += d;
      seen.squares += d * d;
      seen.least = fminf(seen.least, values[k]);
      seen.greatest = fmaxf(seen.greatest, values[k]);
    }
    seen.finite += kEach;
  });
  return seen;
}

template <typename Block>
DMI_HD void summarise_row(const Team<Block>& team, const Tensor& t, const Plan& p, const std::byte* row, const Counting& counts,
                          const Words& to) {
  auto all = [&](const Tally& own) { return team.all(own, team.meet.tally, [](Tally& a, const Tally& b) { a.merge(b); }); };
  Tally seen;
  seen.sum = NAN;
  if (usual(t, p, counts)) seen = all(tally_usual(t, p, row, team.lane(), team.lanes()));
  if (!finite(seen.sum)) seen = all(tally_any(t, p, row, counts, team.lane(), team.lanes()));
  const Sums sums = seen.sums(counts.all(p.elements));
  for (uint32_t i = team.lane(); i < DMI_STATS; i += team.lanes()) to.put(i, float(sums.figure(i)));
}

// The greatest finite elements of a row, one after the other: each is what stands first of those behind the one before, in a pass of its
// own, so that none has to be kept anywhere.
template <typename Block>
DMI_HD DMI_APART void greatest_of_row(const Team<Block>& team, const Tensor& t, const Plan& p, const std::byte* row, const Counting& counts,
                                      const Words& to) {
  Standing last{INFINITY, 0, 0};
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
  for (uint32_t n = 0; n < p.top; ++n) {
    Standing first = nowhere();
    auto look = [&](uint32_t at, double v) {
      const Standing one{v, at, 0};
      if (finite(v) && stands_before(last.value, last.index, one.value, one.index)) first.merge(one);
    };
    if (n != 0 && last.index == kNoElement) {
    } else if (usual(t, p, counts)) {
      each_wide<1>(t, p, row, team.lane(), team.lanes(), [&](uint32_t at, const auto& values) {
        constexpr uint32_t kEach = sizeof values / sizeof values[0];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
        for (uint32_t k = 0; k < kEach; ++k) look(at + k, double(values[k]));
      });
    } else {
      each_number(t, p, row, counts, team.lane(), team.lanes(), look);
    }
    if (n == 0 || last.index != kNoElement) last = team.all(first, team.meet.standing, [](Standing& a, const Standing& b) { a.merge(b); });
    if (team.lane() != 0) continue;
    const bool none = last.index == kNoElement;
    to.put(DMI_STATS + n, none ? NAN : float(last.value));
    to.put(DMI_STATS + p.top + n, none ? kNoElement : counts.before(last.index));
  }
}

DMI_HD inline uint32_t code_of(uint8_t level, float v, float inverse) {
  return level == DMI_LEVEL_INT8 ? int8_code(v, inverse) : fp8_code(v, inverse);
}

template <typename Block>
DMI_HD DMI_APART void quantise_row(const Team<Block>& team, const Tensor& t, const Plan& p, const std::byte* row, const Counting& counts,
                                   uint8_t level, const Words& to) {
  const uint32_t elements = p.elements;
  const bool as_usual = usual(t, p, counts);
  float most = 0;
  auto look = [&](float v) {
    v = v < 0 ? -v : v;
    most = finite(v) && v > most ? v : most;
  };
  if (as_usual) {
    each_wide<kInFlight>(t, p, row, team.lane(), team.lanes(), [&](uint32_t, const auto& values) {
      constexpr uint32_t kEach = sizeof values / sizeof values[0];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
      for (uint32_t k = 0; k < kEach; ++k) look(values[k]);
    });
  } else {
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
    for (uint32_t i = team.lane(); i < elements; i += team.lanes()) {
      if (counts(i)) look(float_at(t, p, row, i));
    }
  }
  most = team.all(most, team.meet.most, [](float& a, const float& b) { a = b > a ? b : a; });
  const float scale = scale_of(level, most), inverse = 1 / scale;
  if (team.lane() == 0) to.put(0, scale);
  // The second time the row is near.
  if (as_usual) {
    each_wide<1>(t, p, row, team.lane(), team.lanes(), [&](uint32_t first, const auto& values) {
      constexpr uint32_t kEach = sizeof values / sizeof values[0];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
      for (uint32_t word = 0; word < kEach / 4; ++word) {
        uint32_t codes = 0;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
        for (uint32_t k = 0; k < 4; ++k) codes |= code_of(level, values[4 * word + k], inverse) << (8 * k);
        to.put(1 + first / 4 + word, codes);
      }
    });
    return;
  }
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
  for (uint32_t word = team.lane(); word < elements / 4 + (elements % 4 != 0 ? 1 : 0); word += team.lanes()) {
    uint32_t codes = 0;
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
    for (uint32_t k = 0; k < 4 && word * 4 + k < elements; ++k) {
      const uint32_t i = word * 4 + k;
      if (counts(i)) codes |= code_of(level, float_at(t, p, row, i), inverse) << (8 * k);
    }
    to.put(1 + word, codes);
  }
}

// Rows [begin, end) of a part; row `begin` goes to the target's offset.
template <typename Block>
DMI_HD DMI_APART void compute_rows(Block& block, Rendezvous& meet, const Fixed& f, const Tensor& t, const Plan& p, const Part& part,
                                   uint32_t begin, uint32_t end, const Target& to) {
  const Team<Block> team{block, meet, unit_rows(p, part.rows) == 1};
  const uint64_t start = to.offset % to.capacity;
  const Rows rows = rows_of(t, p.outers, p.flat_stride, p.row_bytes, *part.list);
  for (uint32_t row = begin + (team.whole ? 0 : block.warp()); row < end; row += team.whole ? 1 : block.warps()) {
    const std::byte* from = rows.linear ? t.data + rows.first + uint64_t{row} * p.row_bytes : row_address(f, t, p, *part.list, row);
    const Counting counts = counting(f, t, p, *part.list, row);
    const uint64_t at = start + uint64_t{row - begin} * part.row_bytes;
    const Words words{to.ring, to.capacity, at < to.capacity ? at : at - to.capacity};
    if (part.level != DMI_LEVEL_STATS) {
      quantise_row(team, t, p, from, counts, part.level, words);
    } else {
      summarise_row(team, t, p, from, counts, words);
      if (p.top != 0) greatest_of_row(team, t, p, from, counts, words);
    }
  }
}

// Unit `unit` of what was granted of a tensor whose payload begins at `to`.
template <typename Block>
DMI_HD void move_unit(Block& block, Rendezvous& meet, const Fixed& f, const Tensor& t, const Plan& p, uint32_t granted, uint32_t unit,
                      uint32_t unit_bytes, const Target& to) {
  each_part(f, t, p, [&](const Part& part) {
    const uint32_t rows = granted_of(part, granted), units = part_units(p, part, rows, unit_bytes);
    if (unit >= units) {
      unit -= units;
      return true;
    }
    const Target at{to.ring, to.capacity, to.offset + part.at};
    if (encoded(part.level)) {
      const uint32_t each = unit_rows(p, part.rows), begin = unit * each, end = rows - begin < each ? rows : begin + each;
      compute_rows(block, meet, f, t, p, part, begin, end, {at.ring, at.capacity, at.offset + uint64_t{begin} * part.row_bytes});
    } else {
      const uint64_t begin = uint64_t{unit} * unit_bytes, all = uint64_t{rows} * part.row_bytes;
      copy_stream(f, t, p, rows_of(t, p.outers, p.flat_stride, p.row_bytes, *part.list), 0, begin,
                  begin + unit_bytes < all ? begin + unit_bytes : all, at, block.thread(), block.threads());
    }
    return false;
  });
}

}  // namespace dmi::device

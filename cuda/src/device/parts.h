// Levelled steps: the rows of a tensor that are wanted lie in parts, one for each level that some of them have, in row-list order. Rows of
// a FULL part are copied; those of the others are computed, here, before they reach the ring, each by as many warps as keeps them all at
// work for about as long.
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

constexpr uint32_t kWarpShift = 3;  // log2 of the warps of a block
constexpr uint32_t kMostWarps = 1u << kWarpShift;
constexpr uint32_t kWarpBytes = 6 << 10;  // of a row that a warp has alone
#ifdef DMI_WARPS_ALONE  // for racecheck, which loses track of a block where some of its warps meet at a barrier of their own
constexpr uint32_t kTeamShift = 0;
#else
constexpr uint32_t kTeamShift = kWarpShift;
#endif

// Log2 of the warps that compute a row together, of so many rows.
DMI_HD inline uint32_t team_shift(const Plan& p, uint32_t rows) {
  uint32_t shift = 0;
  while (shift != kTeamShift && (p.row_bytes > kWarpBytes << shift || rows << shift < kMostWarps)) ++shift;
  return shift;
}

// Log2 of the rows of a computed part that a block has at a time, which is a unit of work.
DMI_HD inline uint32_t unit_shift_of(const Plan& p, uint32_t rows) { return kWarpShift - team_shift(p, rows); }

// How many units of 1 << shift.
DMI_HD inline uint32_t units_of(uint64_t all, uint32_t shift) { return uint32_t((all + (uint64_t{1} << shift) - 1) >> shift); }

DMI_HD inline uint32_t part_units(const Plan& p, const Part& part, uint32_t rows, uint32_t unit_shift) {
  return encoded(part.level) ? units_of(rows, unit_shift_of(p, part.rows)) : units_of(uint64_t{rows} * part.row_bytes, unit_shift);
}

// Rows as nearly all are: of a usual dtype, every element counts, and 16 bytes can be read at once.
DMI_HD inline bool usual(const Tensor& t, const Plan& p) {
  return p.vector == 16 && t.key >= t.inners && (t.dtype == DMI_DTYPE_BF16 || t.dtype == DMI_DTYPE_F16 || t.dtype == DMI_DTYPE_F32);
}

// Gives the units of the work that all of it is.
DMI_HD inline uint32_t plan_levelled(Plan& p, const Fixed& f, const Tensor& t, uint32_t unit_shift) {
  plan_tensor(p, f, t);
  uint32_t units = 0;
  if (p.fate == Fate::kOff || p.fate == Fate::kOutside) return units;
  const Gate gate = f.gates[t.site];
  p.selection = gate.selection;
  p.top = gate.top;
  p.elements = p.fate == Fate::kCapture ? p.row_bytes >> t.shift : 0;
  p.level = gate.level == DMI_LEVEL_SAMPLED ? uint8_t{DMI_LEVEL_FULL} : gate.level;
  const uint32_t all = p.rows;
  p.rows = 0;
  each_part(f, t, p, [&](const Part& part) {
    p.rows += part.rows;
    p.room = part.at + aligned(uint64_t{part.rows} * part.row_bytes);
    if (p.fate == Fate::kCapture) units += part_units(p, part, part.rows, unit_shift);
    p.reduced = part.level == DMI_LEVEL_STATS && part.first == 0 ? part.list : nullptr;
    return true;
  });
  p.off = all - p.rows;
  if (p.reduced == nullptr) return units;
  if (p.fate != Fate::kCapture || p.top != 0 || p.outers != 0 || !usual(t, p)) {
    p.reduced = nullptr;
    return units;
  }
  const Rows rows = rows_of(t, 0, p.flat_stride, p.row_bytes, *p.reduced);
  p.linear = rows.linear;
  p.first = rows.first;
  p.team = uint8_t(team_shift(p, p.rows));
  return units;
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

DMI_HD inline uint32_t levelled_units(const Fixed& f, const Tensor& t, const Plan& p, uint32_t granted, uint32_t unit_shift) {
  uint32_t units = 0;
  if (p.fate != Fate::kCapture) return 0;
  each_part(f, t, p, [&](const Part& part) {
    units += part_units(p, part, granted_of(part, granted), unit_shift);
    return true;
  });
  return units;
}

// ------------------------------------------------------------------ rows that are computed
// Of elements of a row, as far as some lanes have seen them. No default values: it lies in shared memory.
struct Tally {
  double sum, squares;
  float least, greatest;  // what figures round them to; +-infinity while there are none

  DMI_HD void add(float v, double d) {
    sum += d;
    squares += d * d;
    least = fminf(least, v);
    greatest = fmaxf(greatest, v);
  }
  DMI_HD void merge(const Tally& o) {
    sum += o.sum;
    squares += o.squares;
    least = fminf(least, o.least);
    greatest = fmaxf(greatest, o.greatest);
  }
  // Of so many finite elements, and so many in all.
  DMI_HD Sums sums(uint32_t finite, uint32_t count) const {
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
DMI_HD inline Tally nothing() { return {0, 0, INFINITY, -INFINITY}; }

// Of the finite ones.
struct Finite {
  Tally tally;
  uint32_t count, spare;
  DMI_HD void merge(const Finite& o) {
    tally.merge(o.tally);
    count += o.count;
  }
};

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

// Where the warps that have a row together meet.
struct Rendezvous {
  Tally tally[kMostWarps];
  Finite finite[kMostWarps];
  Standing standing[kMostWarps];
  float most[kMostWarps];
  double number[kMostWarps];
};

// Warps of a block that have a row together, beside other such teams.
template <typename Block>
struct Team {
  Block& block;
  Rendezvous& meet;
  uint32_t warps;

  DMI_HD Team(Block& of, Rendezvous& at, uint32_t shift) : block(of), meet(at) {
    warps = 1u << shift < of.warps() ? 1u << shift : of.warps();
  }
  DMI_HD uint32_t first() const { return block.warp() & ~(warps - 1); }  // of its warps
  DMI_HD uint32_t lane() const { return (block.warp() & (warps - 1)) * block.lanes() + block.lane(); }
  DMI_HD uint32_t lanes() const { return warps * block.lanes(); }

  // What merging those of all lanes gives, to all lanes.
  template <typename T, typename Merge>
  DMI_HD T all(T own, T* shared, Merge merge) const {
    own = block.across(own, merge);
    if (warps == 1) return own;
    if (block.lane() == 0) shared[block.warp()] = own;
    block.sync(first() / warps, warps);
    own = shared[first()];
    for (uint32_t warp = 1; warp < warps; ++warp) merge(own, shared[first() + warp]);
    block.sync(first() / warps, warps);
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

// This lane's share of such a row, 16 bytes at a time, of which read(i) gives the i-th: visit(which element is the first, an array of all
// of them). kBatch of them are read at once, and the next ones are on their way while these are looked at. What is done for an element
// stands here 8 * kBatch times, and for each dtype: it has to be little, or the processor waits for code and not for memory.
template <uint32_t kBytes, uint32_t kBatch, typename Read, typename Convert, typename Visit>
DMI_HD void each_wide_of(uint32_t wides, uint32_t lane, uint32_t lanes, Read read, Convert convert, Visit visit) {
  constexpr uint32_t kEach = 16 / kBytes;
  Wide ahead[kBatch];
  auto fetch = [&](uint32_t first) {
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (uint32_t b = 0; b < kBatch; ++b) {
      if (first + b * lanes < wides) ahead[b] = read(first + b * lanes);
    }
  };
  fetch(lane);
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
  for (uint32_t first = lane; first < wides; first += kBatch * lanes) {
    Wide moved[kBatch];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (uint32_t b = 0; b < kBatch; ++b) moved[b] = ahead[b];
    fetch(first + kBatch * lanes);
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

template <uint32_t kBatch, typename Read, typename Visit>
DMI_HD void each_wide_of(uint8_t dtype, uint32_t wides, uint32_t lane, uint32_t lanes, Read read, Visit visit) {
  if (dtype == DMI_DTYPE_BF16) {
    each_wide_of<2, kBatch>(wides, lane, lanes, read, [](const std::byte* at) { return bfloat(load_as<uint16_t>(at)); }, visit);
  } else if (dtype == DMI_DTYPE_F16) {
    each_wide_of<2, kBatch>(wides, lane, lanes, read, [](const std::byte* at) { return half(load_as<uint16_t>(at)); }, visit);
  } else {
    each_wide_of<4, kBatch>(wides, lane, lanes, read, [](const std::byte* at) { return load_as<float>(at); }, visit);
  }
}

// Of a row in one piece.
template <uint32_t kBatch, typename Visit>
DMI_HD void each_wide_in_piece(uint8_t dtype, const std::byte* row, uint32_t bytes, uint32_t lane, uint32_t lanes, Visit visit) {
  each_wide_of<kBatch>(dtype, bytes / 16, lane, lanes, [&](uint32_t i) { return reinterpret_cast<const Wide*>(row)[i]; }, visit);
}

// Of any usual row, for what is seldom done.
template <typename Visit>
DMI_HD void each_wide(const Tensor& t, const Plan& p, const std::byte* row, uint32_t lane, uint32_t lanes, Visit visit) {
  auto read = [&](uint32_t i) { return *reinterpret_cast<const Wide*>(p.outers != 0 ? within_strided_row(p, row, i * 16) : row + i * 16); };
  each_wide_of<1>(t.dtype, p.row_bytes / 16, lane, lanes, read, visit);
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
DMI_HD DMI_APART inline Finite tally_any(const Tensor& t, const Plan& p, const std::byte* row, const Counting& counts, uint32_t lane,
                                         uint32_t lanes) {
  Finite seen{nothing(), 0, 0};
  each_number(t, p, row, counts, lane, lanes, [&](uint32_t, double v) {
    if (!finite(v)) return;
    seen.tally.add(float(v), v);
    ++seen.count;
  });
  return seen;
}

// Of a usual row in one piece whose elements are all finite; of others its sum is not.
DMI_HD inline Tally tally_piece(uint8_t dtype, const std::byte* row, uint32_t bytes, uint32_t lane, uint32_t lanes) {
  Tally seen = nothing();
  each_wide_in_piece<kInFlight>(dtype, row, bytes, lane, lanes, [&](uint32_t, const auto& values) {
    constexpr uint32_t kEach = sizeof values / sizeof values[0];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (uint32_t k = 0; k < kEach; ++k) seen.add(values[k], values[k]);
  });
  return seen;
}

template <typename Block>
DMI_HD void put_figures(const Team<Block>& team, const Sums& sums, const Words& to) {
  for (uint32_t i = team.lane(); i < DMI_STATS; i += team.lanes()) to.put(i, float(sums.figure(i)));
}

// Whatever elements it has.
template <typename Block>
DMI_HD void summarise_any(const Team<Block>& team, const Tensor& t, const Plan& p, const std::byte* row, const Counting& counts,
                          const Words& to) {
  const Finite seen =
      team.all(tally_any(t, p, row, counts, team.lane(), team.lanes()), team.meet.finite, [](Finite& a, const Finite& b) { a.merge(b); });
  put_figures(team, seen.tally.sums(seen.count, counts.all(p.elements)), to);
}

// Whether this was possible: not of a row whose elements are not all finite.
template <typename Block>
DMI_HD bool summarise_piece(const Team<Block>& team, uint8_t dtype, const std::byte* row, uint32_t bytes, uint32_t elements,
                            const Words& to) {
  const Tally seen =
      team.all(tally_piece(dtype, row, bytes, team.lane(), team.lanes()), team.meet.tally, [](Tally& a, const Tally& b) { a.merge(b); });
  if (!finite(seen.sum)) return false;
  put_figures(team, seen.sums(elements, elements), to);
  return true;
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
    } else if (usual(t, p)) {
      each_wide(t, p, row, team.lane(), team.lanes(), [&](uint32_t at, const auto& values) {
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
  const bool as_usual = usual(t, p);
  float most = 0;
  auto look = [&](float v) {
    v = v < 0 ? -v : v;
    most = finite(v) && v > most ? v : most;
  };
  auto look_at_all = [&](uint32_t, const auto& values) {
    constexpr uint32_t kEach = sizeof values / sizeof values[0];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (uint32_t k = 0; k < kEach; ++k) look(values[k]);
  };
  if (as_usual && p.outers == 0) {
    each_wide_in_piece<kInFlight>(t.dtype, row, p.row_bytes, team.lane(), team.lanes(), look_at_all);
  } else if (as_usual) {
    each_wide(t, p, row, team.lane(), team.lanes(), look_at_all);
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
    each_wide(t, p, row, team.lane(), team.lanes(), [&](uint32_t first, const auto& values) {
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

// Where the row `row` of a list is, and where its payload goes: behind that of row `begin`, which goes to the target's offset.
DMI_HD inline Words words_of(const Target& to, uint64_t start, uint32_t row, uint32_t row_bytes) {
  const uint64_t at = start + uint64_t{row} * row_bytes;
  return {to.ring, to.capacity, at < to.capacity ? at : at - to.capacity};
}

// Rows [begin, end) of a part; row `begin` goes to the target's offset.
template <typename Block>
DMI_HD DMI_APART void compute_rows(Block& block, Rendezvous& meet, const Fixed& f, const Tensor& t, const Plan& p, const Part& part,
                                   uint32_t begin, uint32_t end, const Target& to) {
  const Team<Block> team(block, meet, team_shift(p, part.rows));
  const uint64_t start = place_in(to.capacity, to.offset);
  const uint32_t at_once = block.warps() / team.warps;
  for (uint32_t row = begin + block.warp() / team.warps; row < end; row += at_once) {
    const std::byte* from = row_address(f, t, p, *part.list, row);
    const Counting counts = counting(f, t, p, *part.list, row);
    const Words words = words_of(to, start, row - begin, part.row_bytes);
    if (part.level != DMI_LEVEL_STATS) {
      quantise_row(team, t, p, from, counts, part.level, words);
      continue;
    }
    if (!usual(t, p) || p.outers != 0 || !summarise_piece(team, t.dtype, from, p.row_bytes, p.elements, words))
      summarise_any(team, t, p, from, counts, words);
    if (p.top != 0) greatest_of_row(team, t, p, from, counts, words);
  }
}

// Apart, and told no address of what its caller keeps in registers.
template <typename Block>
DMI_HD DMI_APART void summarise_apart(Block& block, Rendezvous& meet, const Tensor& t, const Plan& p, const std::byte* row, std::byte* ring,
                                      uint64_t capacity, uint64_t at) {
  summarise_any(Team<Block>(block, meet, p.team), t, p, row, {0, 0, 0}, {ring, capacity, at});
}

// Unit `unit` of a tensor whose rows are all reduced, of which so many found room; its payload begins at the target. Not apart: a call
// would save and restore more bytes than a row has.
template <typename Block>
DMI_HD void reduce_unit(Block& block, Rendezvous& meet, const Fixed& f, const Tensor& t, const Plan& p, uint32_t granted, uint32_t unit,
                        const Target& to) {
  const Team<Block> team(block, meet, p.team);
  const uint32_t each = kMostWarps >> p.team, at_once = block.warps() / team.warps, begin = unit * each;
  const uint32_t end = granted - begin < each ? granted : begin + each;
  for (uint32_t row = begin + block.warp() / team.warps; row < end; row += at_once) {
    const std::byte* from = p.linear ? t.data + p.first + uint64_t{row} * p.row_bytes : row_address(f, t, p, *p.reduced, row);
    uint64_t at = to.offset + uint64_t{row} * DMI_STATS * sizeof(float);
    if (at >= to.capacity) at -= to.capacity;
    if (!summarise_piece(team, t.dtype, from, p.row_bytes, p.elements, {to.ring, to.capacity, at}))
      summarise_apart(block, meet, t, p, from, to.ring, to.capacity, at);
  }
}

// Unit `unit` of what was granted of a tensor whose payload begins at `to`.
template <typename Block>
DMI_HD DMI_APART void move_unit(Block& block, Rendezvous& meet, const Fixed& f, const Tensor& t, const Plan& p, uint32_t granted,
                                uint32_t unit, uint32_t unit_shift, const Target& to) {
  Part part{};
  uint32_t rows = 0;
  each_part(f, t, p, [&](const Part& each) {
    part = each;
    rows = granted_of(part, granted);
    const uint32_t units = part_units(p, part, rows, unit_shift);
    if (unit < units) return false;
    unit -= units;
    return true;
  });
  const uint64_t offset = to.offset + part.at;
  if (!encoded(part.level)) {
    const uint64_t begin = uint64_t{unit} << unit_shift, end = uint64_t{unit + 1} << unit_shift, all = uint64_t{rows} * part.row_bytes;
    return copy_stream(f, t, p, rows_of(t, p.outers, p.flat_stride, p.row_bytes, *part.list), 0, begin, end < all ? end : all,
                       {to.ring, to.capacity, offset}, block.thread(), block.threads());
  }
  const uint32_t each = 1u << unit_shift_of(p, part.rows), begin = unit * each, end = rows - begin < each ? rows : begin + each;
  compute_rows(block, meet, f, t, p, part, begin, end, {to.ring, to.capacity, offset + uint64_t{begin} * part.row_bytes});
}

}  // namespace dmi::device

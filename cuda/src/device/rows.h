// From a tensor and the step's rows to addresses: which bytes a launch moves, and from where.
#pragma once

#include "atomics.h"
#include "state.h"

namespace dmi::device {

enum class Fate : uint8_t { kCapture, kOff, kMismatch, kOutside };

// What a tensor is in this step: a dense stream of rows in row-list order, each row its remaining dimensions in order.
struct Plan {
  Fate fate;
  uint8_t vector;  // bytes moved at once
  uint8_t outers;  // dimensions of a row above its innermost contiguous piece; collapsed
  bool linear;     // the stream is the source from `first` on
  uint32_t rows;
  uint32_t row_bytes;
  uint32_t piece_bytes;
  uint32_t key_base;
  uint32_t size[kInnerDims];  // of the payload: keys not in use left out
  uint32_t outer_size[kInnerDims];
  uint64_t outer_stride[kInnerDims];
  uint64_t flat_stride;  // bytes from one source row to the next, where the ROW dimensions lie behind each other; else 0
  uint64_t first;        // bytes before the first row of a linear one
  // Of levelled steps. `rows` are those that are wanted, at whatever level; `off` more behind them are not.
  uint64_t room;  // bytes of the ring that they take
  uint32_t off;
  uint32_t elements;  // of a row
  uint16_t selection;
  uint8_t level;  // of all rows, where selection is 0
  uint8_t top;    // of rows at STATS: greatest elements
  uint8_t team;   // log2 of the warps that have a row together, where `reduced` is there
  // The rows that are wanted, where all are reduced to figures and can be read in the usual way; linear and first are then theirs. Else
  // null.
  const Space* reduced;
};

// Rows of a source: those of a step's space, or those of them at one level.
struct Rows {
  const Space& space;
  bool linear;
  uint64_t first;
};

// A stream is copied in units of at most so many bytes.
constexpr uint32_t kLargestUnit = 128 << 10;

// Every range of a ring starts at a multiple of DMI_PAYLOAD_ALIGN.
DMI_HD inline uint64_t aligned(uint64_t bytes) { return (bytes + DMI_PAYLOAD_ALIGN - 1) / DMI_PAYLOAD_ALIGN * DMI_PAYLOAD_ALIGN; }
// Where in a ring of so many bytes an offset is. A GPU divides 64 bits in the time of a trip to memory, and most rings are a power of two.
DMI_HD inline uint64_t place_in(uint64_t capacity, uint64_t offset) {
  if (offset < capacity) return offset;
  return (capacity & (capacity - 1)) == 0 ? offset & (capacity - 1) : offset % capacity;
}
DMI_HD inline uint64_t stream_bytes(const Plan& p) { return uint64_t{p.rows} * p.row_bytes; }

// Whether the rows are all inside the tensor, and the tensor what the step says that its sources are; as in layout.cpp.
DMI_HD inline bool rows_inside(const Tensor& t, const Space& space) {
  const bool cache = t.space == DMI_SPACE_CACHE;
  if (t.rows == 2) {
    if (space.width != 0 && !cache && t.last != space.width) return false;
    return space.batches <= t.batch && space.end <= t.last;
  }
  if (space.width != 0 && !cache && t.last % space.width != 0) return false;
  return space.flat_end <= t.last;
}

DMI_HD inline void plan_keys(Plan& p, const Tensor& t, uint32_t keys) {
  for (uint32_t d = 0; d < t.inners; ++d) p.size[d] = t.size[d];
  p.key_base = 0;
  if (t.key >= t.inners || keys == 0) return;
  if (t.size[t.key] > keys) {
    p.size[t.key] = keys;  // a static cache: what lies beyond is not in use yet
  } else {
    p.key_base = keys - t.size[t.key];  // a sliding window: its last slot is the cache's last
  }
}

// Neighbouring dimensions that lie behind each other become one. False for rows of 4 GiB and more.
DMI_HD inline bool plan_pieces(Plan& p, const Tensor& t) {
  p.outers = 0;
  uint64_t row = t.element;
  for (uint32_t d = 0; d < t.inners; ++d) {
    row *= p.size[d];
    if (p.size[d] == 1) continue;
    if (p.outers > 0 && p.outer_stride[p.outers - 1] == t.stride[d] * p.size[d]) {
      p.outer_size[p.outers - 1] *= p.size[d];
      p.outer_stride[p.outers - 1] = t.stride[d];
    } else {
      p.outer_size[p.outers] = p.size[d];
      p.outer_stride[p.outers++] = t.stride[d];
    }
  }
  p.piece_bytes = t.element;
  if (p.outers > 0 && p.outer_stride[p.outers - 1] == t.element) p.piece_bytes = t.element * p.outer_size[--p.outers];
  p.row_bytes = uint32_t(row);
  return row < (uint64_t{1} << 32) - kLargestUnit;
}

// Rows of a list: whether they are the source from some byte on.
DMI_HD inline Rows rows_of(const Tensor& t, uint32_t outers, uint64_t flat_stride, uint32_t row_bytes, const Space& list) {
  if (outers != 0 || flat_stride != row_bytes || list.runs > 1) return {list, false, 0};
  const uint32_t width = t.rows == 2 ? t.last : list.width;
  return {list, true, (uint64_t{list.batch} * width + list.first) * flat_stride};
}

// Where the rows of a tensor are, whatever is wanted of them.
DMI_HD inline void plan_source(Plan& p, const Fixed& f, const Tensor& t) {
  const Space& space = f.space[t.space];
  p.fate = Fate::kMismatch;
  if (t.rows == 0 || !rows_inside(t, space)) return;
  if (t.row_bytes != 0) {
    for (uint32_t d = 0; d < kInnerDims; ++d) p.size[d] = t.size[d];
    p.row_bytes = p.piece_bytes = t.row_bytes;
  } else {
    plan_keys(p, t, f.keys);
    if (!plan_pieces(p, t)) return;
  }
  p.fate = Fate::kCapture;
  if (t.rows == 1 || t.batch == 1) {
    p.flat_stride = t.row_stride;
  } else if (t.last == 1) {
    p.flat_stride = t.batch_stride;
  } else if (t.batch_stride == t.row_stride * t.last) {
    p.flat_stride = t.row_stride;
  }
  const Rows all = rows_of(t, p.outers, p.flat_stride, p.row_bytes, space);
  p.linear = all.linear;
  p.first = all.first;
  p.vector = t.vector;
  while (((p.row_bytes | p.piece_bytes) & (p.vector - 1u)) != 0) p.vector /= 2;
}

DMI_HD inline void plan_tensor(Plan& p, const Fixed& f, const Tensor& t) {
  p = Plan{};
  p.rows = f.space[t.space].rows;
  if (t.site >= f.sites) {  // the step does not know it
    p.fate = Fate::kOutside;
  } else if (f.gates[t.site].level == DMI_LEVEL_OFF) {
    p.fate = Fate::kOff;
  } else {
    plan_source(p, f, t);
  }
}

DMI_HD inline Rows all_rows(const Fixed& f, const Tensor& t, const Plan& p) { return {f.space[t.space], p.linear, p.first}; }

// Which of the pieces of a list has row `row` of it: the last that starts at or before it.
template <typename Piece>
DMI_HD uint32_t piece_of(const Piece* pieces, uint32_t count, uint32_t row) {
  uint32_t low = 0;
  for (uint32_t high = count; high - low > 1;) {
    const uint32_t middle = (low + high) / 2;
    if (pieces[middle].start <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

DMI_HD inline uint32_t run_of(const Fixed& f, const Space& space, uint32_t row) {
  return piece_of(f.runs + space.runs_at, space.runs, row);
}

// Row `row` of a list, in the source.
DMI_HD inline const std::byte* row_address(const Fixed& f, const Tensor& t, const Plan& p, const Space& space, uint32_t row) {
  const Run run = f.runs[space.runs_at + run_of(f, space, row)];
  const uint64_t flat = uint64_t{run.batch} * (t.rows == 2 ? t.last : space.width) + run.first + (row - run.start);
  if (p.flat_stride != 0) return t.data + flat * p.flat_stride;
  return t.data + flat / t.last * t.batch_stride + flat % t.last * t.row_stride;
}

// What is `within` bytes into a row that begins at `row`.
DMI_HD inline const std::byte* within_row(const Plan& p, const std::byte* row, uint32_t within) {
  if (p.outers == 0) return row + within;
  uint32_t piece = within / p.piece_bytes;
  row += within % p.piece_bytes;
  for (uint32_t d = p.outers; d-- > 0;) {
    row += piece % p.outer_size[d] * p.outer_stride[d];
    piece /= p.outer_size[d];
  }
  return row;
}

struct alignas(16) Wide {
  uint64_t low, high;
};

// Where a stream goes: a byte ring, and the virtual offset of its first byte.
struct Target {
  std::byte* ring;
  uint64_t capacity;
  uint64_t offset;
};

constexpr uint32_t kInFlight = 8;  // loads of a thread before its first store

// This thread's share of `count` vectors that lie behind each other on both sides.
template <typename Vector>
DMI_HD void copy_linear(const Vector* from, Vector* to, uint32_t count, uint32_t thread, uint32_t threads) {
  uint32_t i = thread;
  for (; i + (kInFlight - 1) * threads < count; i += kInFlight * threads) {
    Vector moved[kInFlight];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (uint32_t b = 0; b < kInFlight; ++b) moved[b] = from[i + b * threads];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (uint32_t b = 0; b < kInFlight; ++b) to[i + b * threads] = moved[b];
  }
  for (; i < count; i += threads) to[i] = from[i];
}

// Bytes [begin, end) of the stream whose first row is `first` of the list, at most kLargestUnit of them: this thread's share.
template <typename Vector>
DMI_HD void copy_vectors(const Fixed& f, const Tensor& t, const Plan& p, const Rows& rows, uint32_t first, uint64_t begin, uint64_t end,
                         const Target& to, uint32_t thread, uint32_t threads) {
  const uint64_t at = place_in(to.capacity, to.offset + begin);
  const uint32_t count = uint32_t((end - begin) / sizeof(Vector));
  if (rows.linear) {
    const auto* from = reinterpret_cast<const Vector*>(t.data + rows.first + uint64_t{first} * p.row_bytes + begin);
    const uint64_t to_end = (to.capacity - at) / sizeof(Vector);
    const uint32_t before = to_end < count ? uint32_t(to_end) : count;
    copy_linear(from, reinterpret_cast<Vector*>(to.ring + at), before, thread, threads);
    if (before != count) copy_linear(from + before, reinterpret_cast<Vector*>(to.ring), count - before, thread, threads);
    return;
  }
  const uint64_t row = first + begin / p.row_bytes;
  const uint32_t within = uint32_t(begin % p.row_bytes);
  for (uint32_t i = thread; i < count; i += threads) {
    const uint32_t along = within + i * uint32_t(sizeof(Vector));
    uint64_t place = at + uint64_t{i} * sizeof(Vector);
    if (place >= to.capacity) place -= to.capacity;
    const std::byte* at_row = row_address(f, t, p, rows.space, uint32_t(row + along / p.row_bytes));
    *reinterpret_cast<Vector*>(to.ring + place) = *reinterpret_cast<const Vector*>(within_row(p, at_row, along % p.row_bytes));
  }
}

// Apart: every vector's way of copying stands in it.
DMI_HD DMI_APART inline void copy_stream(const Fixed& f, const Tensor& t, const Plan& p, const Rows& rows, uint32_t first, uint64_t begin,
                                         uint64_t end, const Target& to, uint32_t thread, uint32_t threads) {
  switch (p.vector) {
    case 16:
      return copy_vectors<Wide>(f, t, p, rows, first, begin, end, to, thread, threads);
    case 8:
      return copy_vectors<uint64_t>(f, t, p, rows, first, begin, end, to, thread, threads);
    case 4:
      return copy_vectors<uint32_t>(f, t, p, rows, first, begin, end, to, thread, threads);
    case 2:
      return copy_vectors<uint16_t>(f, t, p, rows, first, begin, end, to, thread, threads);
    default:
      return copy_vectors<uint8_t>(f, t, p, rows, first, begin, end, to, thread, threads);
  }
}

}  // namespace dmi::device

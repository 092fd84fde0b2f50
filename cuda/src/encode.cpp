#include "encode.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <type_traits>

#include "copy.h"
#include "elements.h"
#include "levels.h"

namespace dmi {
namespace {

// Loops over elements are compiled once more for wider vectors, where the processor has them. Sanitizers do not get along with functions
// chosen when a library is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define DMI_WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DMI_WIDE
#endif

DMI_WIDE void floats_of_f16(const std::byte* __restrict from, uint64_t count, float* __restrict to) {
  for (uint64_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, from + 2 * i, sizeof bits);
    to[i] = half(bits);
  }
}

DMI_WIDE void floats_of_bf16(const std::byte* __restrict from, uint64_t count, float* __restrict to) {
  for (uint64_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, from + 2 * i, sizeof bits);
    to[i] = bfloat(bits);
  }
}

DMI_WIDE void int8_codes(const float* __restrict values, uint64_t count, float inverse, uint8_t* __restrict to) {
  for (uint64_t i = 0; i < count; ++i) to[i] = int8_code(values[i], inverse);
}

DMI_WIDE void fp8_codes(const float* __restrict values, uint64_t count, float inverse, uint8_t* __restrict to) {
  for (uint64_t i = 0; i < count; ++i) to[i] = fp8_code(values[i], inverse);
}

const std::array<float, 256>& eighths(uint32_t dtype) {
  static const std::array<std::array<float, 256>, 5> tables = [] {
    std::array<std::array<float, 256>, 5> t;
    for (uint32_t i = 0; i < 5; ++i) {
      for (uint32_t code = 0; code < 256; ++code) t[i][code] = eighth(DMI_DTYPE_F8_E4M3 + i, uint8_t(code));
    }
    return t;
  }();
  return tables[dtype - DMI_DTYPE_F8_E4M3];
}

template <typename Element, typename Value, typename Convert>
void each(const std::byte* from, uint64_t count, Value* to, Convert convert) {
  for (uint64_t i = 0; i < count; ++i) {
    Element e;
    std::memcpy(&e, from + i * sizeof e, sizeof e);
    to[i] = Value(convert(e));
  }
}

// Dense elements as numbers; float is exact for all but 32-bit integers and the 64-bit dtypes, which it rounds.
template <typename Value>
void decode(uint32_t dtype, const std::byte* from, uint64_t count, Value* to) {
  auto same = [](auto v) { return v; };
  switch (dtype) {
    case DMI_DTYPE_BOOL:
    case DMI_DTYPE_U8:
      return each<uint8_t>(from, count, to, same);
    case DMI_DTYPE_I8:
      return each<int8_t>(from, count, to, same);
    case DMI_DTYPE_U16:
      return each<uint16_t>(from, count, to, same);
    case DMI_DTYPE_I16:
      return each<int16_t>(from, count, to, same);
    case DMI_DTYPE_U32:
      return each<uint32_t>(from, count, to, same);
    case DMI_DTYPE_I32:
      return each<int32_t>(from, count, to, same);
    case DMI_DTYPE_U64:
      return each<uint64_t>(from, count, to, same);
    case DMI_DTYPE_I64:
      return each<int64_t>(from, count, to, same);
    case DMI_DTYPE_F16:
      if constexpr (std::is_same_v<Value, float>) return floats_of_f16(from, count, to);
      return;
    case DMI_DTYPE_BF16:
      if constexpr (std::is_same_v<Value, float>) return floats_of_bf16(from, count, to);
      return;
    case DMI_DTYPE_F32:
      return each<float>(from, count, to, same);
    case DMI_DTYPE_F64:
      return each<double>(from, count, to, same);
    default: {
      const std::array<float, 256>& table = eighths(dtype);
      return each<uint8_t>(from, count, to, [&](uint8_t code) { return table[code]; });
    }
  }
}

// Of floats, sums beside each other, so that the compiler may use vectors without changing what is added to what.
constexpr uint64_t kBeside = 16;
struct Partial {
  double sum[kBeside], squares[kBeside];
  float least[kBeside], greatest[kBeside];
  int32_t finite[kBeside];
};

DMI_WIDE void add_blocks(const float* __restrict values, uint64_t blocks, Partial& part) {
  Partial p = part;
  for (uint64_t i = 0; i < blocks; ++i, values += kBeside) {
    float v[kBeside];
    for (uint64_t k = 0; k < kBeside; ++k) {
      const bool is = (std::bit_cast<uint32_t>(values[k]) & 0x7fffffff) < 0x7f800000;
      const float low = is ? values[k] : INFINITY, high = is ? values[k] : -INFINITY;
      v[k] = is ? values[k] : 0.0f;
      p.finite[k] += is ? 1 : 0;
      p.least[k] = low < p.least[k] ? low : p.least[k];
      p.greatest[k] = high > p.greatest[k] ? high : p.greatest[k];
    }
    for (uint64_t k = 0; k < kBeside; ++k) p.sum[k] += double(v[k]);
    for (uint64_t k = 0; k < kBeside; ++k) p.squares[k] += double(v[k]) * double(v[k]);
  }
  part = p;
}

Sums sums_of(const float* values, uint64_t count) {
  constexpr uint64_t kMost = uint64_t{1} << 30;  // blocks that a count of 31 bits can count
  Sums all;
  uint64_t i = 0;
  for (uint64_t blocks; (blocks = std::min((count - i) / kBeside, kMost)) > 0; i += blocks * kBeside) {
    Partial p{};
    std::fill_n(p.least, kBeside, INFINITY);
    std::fill_n(p.greatest, kBeside, -INFINITY);
    add_blocks(values + i, blocks, p);
    for (uint64_t k = 0; k < kBeside; ++k) {
      Sums part;
      part.sum = p.sum[k];
      part.squares = p.squares[k];
      part.least = double(p.least[k]);
      part.greatest = double(p.greatest[k]);
      part.finite = uint64_t(p.finite[k]);
      part.count = blocks;
      all.merge(part);
    }
  }
  for (; i < count; ++i) all.add(double(values[i]));
  return all;
}

Sums sums_of(const double* values, uint64_t count) {
  Sums all;
  for (uint64_t i = 0; i < count; ++i) all.add(values[i]);
  return all;
}

DMI_WIDE float absmax_of(const float* values, uint64_t count) {
  uint32_t most[kBeside] = {};  // magnitudes are ordered as their bits are
  uint64_t i = 0;
  for (; i + kBeside <= count; i += kBeside) {
    for (uint64_t k = 0; k < kBeside; ++k) {
      const uint32_t magnitude = std::bit_cast<uint32_t>(values[i + k]) & 0x7fffffff;
      const uint32_t counts = magnitude < 0x7f800000 ? magnitude : 0;
      most[k] = counts > most[k] ? counts : most[k];
    }
  }
  for (; i < count; ++i) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(values[i]) & 0x7fffffff;
    if (magnitude < 0x7f800000) most[0] = std::max(most[0], magnitude);
  }
  return std::bit_cast<float>(*std::max_element(most, most + kBeside));
}

// How many blocks at the beginning have nothing above a bound. NaN is not.
DMI_WIDE uint64_t blocks_below(const float* __restrict values, uint64_t blocks, float bound) {
  for (uint64_t i = 0; i < blocks; ++i, values += kBeside) {
    uint32_t above = 0;
    for (uint64_t k = 0; k < kBeside; ++k) above += values[k] > bound ? 1 : 0;
    if (above != 0) return i;
  }
  return blocks;
}

uint64_t blocks_below(const double*, uint64_t, double) { return 0; }

// The greatest finite elements of those that it is shown, the greatest first, and which they were.
template <typename Value>
struct Greatest {
  explicit Greatest(uint32_t top) : wanted(top) {}

  const uint32_t wanted;
  uint32_t found = 0;
  uint64_t seen = 0;  // elements that counted so far
  std::array<Value, DMI_MOST_TOP> value;
  std::array<uint32_t, DMI_MOST_TOP> index;

  void add(const Value* values, uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) {
      if (found == wanted) {
        i += kBeside * blocks_below(values + i, (count - i) / kBeside, value[found - 1]);
        if (i == count) break;
      }
      const Value v = values[i];
      if (!finite(v) || (found == wanted && !(v > value[found - 1]))) continue;
      uint32_t place = found < wanted ? found++ : found - 1;
      for (; place > 0 && v > value[place - 1]; --place) value[place] = value[place - 1], index[place] = index[place - 1];
      value[place] = v;
      index[place] = uint32_t(seen + i);
    }
    seen += count;
  }
  void put(std::byte* to) const {
    for (uint32_t i = 0; i < wanted; ++i) {
      const float v = i < found ? float(value[i]) : NAN;
      const uint32_t which = i < found ? index[i] : kNoElement;
      std::memcpy(to + i * sizeof v, &v, sizeof v);
      std::memcpy(to + (wanted + i) * sizeof which, &which, sizeof which);
    }
  }
};

// The elements of a row that count: all of them, or of every line those from `from` to `to`. A line is the keys of one head, `after`
// elements each.
struct Part {
  uint64_t lines = 1, length, from = 0, to;
};

class Encoder {
 public:
  Encoder(const Layout& layout, uint32_t level, uint32_t top)
      : layout_(layout),
        gather_(layout.gather),
        level_(level),
        top_(top),
        dtype_(layout.form.dtype),
        elements_(gather_.row_bytes / dtype_bytes(dtype_)),
        row_bytes_(level_row_bytes(level, elements_, 1, top)),
        wide_(!(level == DMI_LEVEL_FP8 || level == DMI_LEVEL_INT8) && needs_double(dtype_)) {}

  uint64_t row_bytes() const { return row_bytes_; }

  // Calls use with the row's elements as numbers, and which of them count.
  template <typename Use>
  auto with_values(uint64_t row, Use use) {
    const std::byte* elements = dense(row);
    const Part part = own(row);
    if (wide_) {
      doubles_.resize(elements_);
      decode(dtype_, elements, elements_, doubles_.data());
      return use(static_cast<const double*>(doubles_.data()), part);
    }
    if (dtype_ == DMI_DTYPE_F32 && reinterpret_cast<uintptr_t>(elements) % alignof(float) == 0) {
      return use(reinterpret_cast<const float*>(elements), part);
    }
    floats_.resize(elements_);
    decode(dtype_, elements, elements_, floats_.data());
    return use(static_cast<const float*>(floats_.data()), part);
  }

  void rows(uint64_t first, uint64_t count, std::byte* to) {
    for (uint64_t row = first; row < first + count; ++row, to += row_bytes_) one(row, to);
  }
  // The watches, of those whose bits are set, that a row meets.
  uint64_t watched(uint64_t row, const std::vector<Watch>& watches, uint64_t bits) {
    return with_values(row, [&](auto* values, const Part& part) {
      Sums all;
      for (uint64_t line = 0; line < part.lines; ++line) all.merge(sums_of(values + line * part.length + part.from, part.to - part.from));
      uint64_t met = 0;
      for (size_t i = 0; i < watches.size(); ++i) {
        const Watch& watch = watches[i];
        if ((bits >> i & 1) == 0) continue;
        const bool probe = watch.condition == DMI_CONDITION_PROBE;
        const bool is = !probe ? watch.met_by(all) : layout_.key_dim < 0 && watch.weights.size() == elements_ && watch.met_by(values);
        met |= uint64_t{is} << i;
      }
      return met;
    });
  }
  void within_row(uint64_t row, uint64_t begin, uint64_t bytes, std::byte* to) {
    encoded_.resize(row_bytes_);
    one(row, encoded_.data());
    std::memcpy(to, encoded_.data() + begin, bytes);
  }

 private:
  void one(uint64_t row, std::byte* to) {
    with_values(row, [&](auto* values, const Part& part) {
      if (level_ == DMI_LEVEL_STATS) {
        statistics(values, part, to);
      } else if constexpr (std::is_same_v<decltype(values), const float*>) {
        quantise(values, part, to);
      }
    });
  }

  // The row's elements, one after the other: where they are, if they lie so.
  const std::byte* dense(uint64_t row) {
    if (gather_.outer_dims == 0) return row_at(row);
    row_.resize(gather_.row_bytes);
    copy_gathered(gather_, row * gather_.row_bytes, gather_.row_bytes, row_.data());
    return row_.data();
  }

  // Rows are asked for in order, so the run that one is in is mostly that of the one before.
  const std::byte* row_at(uint64_t row) {
    const std::vector<Run>& runs = *gather_.runs;
    if (row < before_) run_ = before_ = 0;
    while (row - before_ >= runs[run_].count) before_ += runs[run_++].count;
    const Run& run = runs[run_];
    return gather_.base + run.batch * gather_.batch_stride + (run.first + row - before_) * gather_.row_stride;
  }

  Part own(uint64_t row) {
    const int key = layout_.key_dim;
    if (key < 0) return {1, elements_, 0, elements_};
    const std::vector<Own>& owns = *layout_.owns;
    if (row < own_before_) own_ = own_before_ = 0;
    while (row - own_before_ >= owns[own_].count) own_before_ += owns[own_++].count;
    const uint64_t keys = layout_.form.size[key], base = layout_.form.key_base;
    uint64_t after = 1;
    for (int d = key + 1; d < layout_.form.ndim; ++d) after *= layout_.form.size[d];
    const uint64_t first = owns[own_].key_first, end = first + owns[own_].position + (row - own_before_) + 1;
    Part part{};
    part.length = keys * after;
    part.lines = part.length == 0 ? 0 : elements_ / part.length;
    part.to = std::min(keys, end > base ? end - base : 0) * after;
    part.from = std::min(part.to, (first > base ? first - base : 0) * after);
    return part;
  }

  template <typename Value>
  void statistics(const Value* values, const Part& part, std::byte* to) {
    Sums all;
    for (uint64_t line = 0; line < part.lines; ++line) all.merge(sums_of(values + line * part.length + part.from, part.to - part.from));
    float figures[DMI_STATS];
    all.figures(figures);
    std::memcpy(to, figures, sizeof figures);
    if (top_ == 0) return;
    Greatest<Value> greatest(top_);
    for (uint64_t line = 0; line < part.lines; ++line) greatest.add(values + line * part.length + part.from, part.to - part.from);
    greatest.put(to + sizeof figures);
  }

  void quantise(const float* values, const Part& part, std::byte* to) {
    float absmax = 0;
    for (uint64_t line = 0; line < part.lines; ++line) {
      absmax = std::max(absmax, absmax_of(values + line * part.length + part.from, part.to - part.from));
    }
    const float scale = scale_of(level_, absmax), inverse = 1 / scale;
    std::memcpy(to, &scale, sizeof scale);
    auto* codes = reinterpret_cast<uint8_t*>(to) + sizeof scale;
    if (layout_.key_dim >= 0) std::memset(codes, 0, elements_);
    for (uint64_t line = 0; line < part.lines; ++line) {
      const uint64_t begin = line * part.length + part.from, end = line * part.length + part.to;
      (level_ == DMI_LEVEL_INT8 ? int8_codes : fp8_codes)(values + begin, end - begin, inverse, codes + begin);
    }
    std::memset(codes + elements_, 0, row_bytes_ - sizeof scale - elements_);
  }

  const Layout& layout_;
  const Gather& gather_;
  const uint32_t level_, top_;
  const uint32_t dtype_;
  const uint64_t elements_, row_bytes_;
  const bool wide_;
  uint64_t run_ = 0, before_ = 0, own_ = 0, own_before_ = 0;
  static thread_local std::vector<std::byte> row_, encoded_;
  static thread_local std::vector<float> floats_;
  static thread_local std::vector<double> doubles_;
};

thread_local std::vector<std::byte> Encoder::row_, Encoder::encoded_;
thread_local std::vector<float> Encoder::floats_;
thread_local std::vector<double> Encoder::doubles_;

}  // namespace

void watch_gathered(const Layout& layout, const std::vector<Watch>& watches, uint64_t bits, std::unordered_map<uint64_t, uint64_t>& met) {
  Encoder encoder(layout, DMI_LEVEL_STATS, 0);
  uint64_t row = 0;
  for (const Own& own : *layout.owns) {
    uint64_t found = 0;
    for (const uint64_t end = row + own.count; row < end; ++row) found |= encoder.watched(row, watches, bits);
    if (found != 0) met[own.request] |= found;
  }
}

void encode_gathered(const Layout& layout, uint32_t level, uint32_t top, uint64_t begin, uint64_t bytes, std::byte* to) {
  if (bytes == 0) return;
  Encoder encoder(layout, level, top);
  const uint64_t row_bytes = encoder.row_bytes();
  uint64_t row = begin / row_bytes;
  if (const uint64_t skip = begin % row_bytes; skip != 0) {
    const uint64_t length = std::min(bytes, row_bytes - skip);
    encoder.within_row(row++, skip, length, to);
    to += length;
    bytes -= length;
  }
  encoder.rows(row, bytes / row_bytes, to);
  if (const uint64_t rest = bytes % row_bytes; rest != 0) encoder.within_row(row + bytes / row_bytes, 0, rest, to + bytes - rest);
}

}  // namespace dmi

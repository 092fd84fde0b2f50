// What abi/ring.h says of levels, in code: which rows a clause takes, how an element is quantised, what the figures of a row are. For host
// and device alike: no library, no memory of its own.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "dmi/dmi.h"

#ifdef __CUDACC__
#define DMI_BOTH __host__ __device__
#else
#define DMI_BOTH
#endif

namespace dmi {

// ---- rows

DMI_BOTH inline uint64_t request_hash(uint64_t seed, uint64_t request) {
  uint64_t x = request + (seed + 1) * 0x9e3779b97f4a7c15ull;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

// The groups that a request is in.
struct Membership {
  uint64_t groups = 0;  // of these; 0: nothing was said of the request
  uint64_t of = 0;      // a bit each
};

inline bool in_group(const dmi_clause& c, const Membership& request) {
  const bool known = request.groups == c.groups;
  return c.group == DMI_GROUP_UNKNOWN ? !known : known && c.group <= DMI_MAX_GROUPS && (request.of >> (c.group - 1) & 1) != 0;
}

// Whether a clause may take rows of a span, whatever their positions.
inline bool clause_asks(const dmi_clause& c, const dmi_span& span, const Membership& request) {
  if (c.one != 0 && span.request != c.request) return false;
  if (c.group != 0 && !in_group(c, request)) return false;
  if (c.threshold != 0 && request_hash(c.seed, span.request) >= c.threshold) return false;
  if ((c.phases >> span.phase & 1) == 0) return false;
  if (span.prompt != 0) return true;
  // Not known: the phase says what is prompt, and nothing where it ends.
  if (c.region == DMI_REGION_PROMPT && span.phase != DMI_PHASE_PREFILL) return false;
  return c.region != DMI_REGION_GENERATED && int64_t(c.start) >= 0 && int64_t(c.stop) >= 0;
}

// Of a clause that asks for some rows of the span: whether this is one of them.
inline bool clause_takes(const dmi_clause& c, const dmi_span& span, uint32_t position) {
  const int64_t start = int64_t(c.start), stop = int64_t(c.stop), none = int64_t(DMI_OPEN_END), prompt = int64_t{span.prompt};
  const int64_t begin = c.region == DMI_REGION_GENERATED ? prompt : 0;
  const int64_t end = c.region == DMI_REGION_PROMPT && prompt != 0 ? prompt : none;
  auto place = [&](int64_t v) -> int64_t {
    if (v == none) return end;
    if (v < 0) return v + end > begin ? v + end : begin;
    return begin + v < end ? begin + v : end;
  };
  const int64_t from = place(start), to = place(stop), p = int64_t{position};
  return p >= from && p < to && (c.step <= 1 || (p - from) % c.step == 0);
}

inline uint8_t sampled_level(uint8_t level, uint32_t stride, uint32_t position) {
  if (level == DMI_LEVEL_SAMPLED) return stride > 1 && position % stride != 0 ? uint8_t{DMI_LEVEL_OFF} : uint8_t{DMI_LEVEL_FULL};
  return level < DMI_LEVEL_OFF ? level : uint8_t{DMI_LEVEL_OFF};
}

// The level of a row. `clauses`: those of the gate's own that ask for rows of its span, in order.
template <typename Clauses>
uint8_t row_level(const dmi_gate& gate, const Clauses& clauses, const dmi_span& span, uint32_t position) {
  for (const dmi_clause* c : clauses) {
    if (clause_takes(*c, span, position)) return sampled_level(c->level, c->stride, position);
  }
  return sampled_level(gate.level, gate.stride, position);
}

// ---- bytes

DMI_BOTH inline bool encoded(uint32_t level) { return level == DMI_LEVEL_FP8 || level == DMI_LEVEL_INT8 || level == DMI_LEVEL_STATS; }

// Complex elements are not encoded.
DMI_BOTH inline uint8_t level_for(uint8_t level, uint32_t dtype) {
  const bool complex = dtype == DMI_DTYPE_C64 || dtype == DMI_DTYPE_C128;
  return complex && encoded(level) ? uint8_t{DMI_LEVEL_FULL} : level;
}

// Bytes of a row of so many elements of so many bytes. `top`: the gate's.
DMI_BOTH inline uint64_t level_row_bytes(uint32_t level, uint64_t elements, uint64_t element_bytes, uint32_t top) {
  if (level == DMI_LEVEL_STATS) return (DMI_STATS + 2 * uint64_t{top}) * sizeof(float);
  if (encoded(level)) return sizeof(float) + (elements + 3) / 4 * 4;
  return elements * element_bytes;
}

// ---- quantised

constexpr float kMostFP8 = 416, kMostInt8 = 126;
constexpr float kLeastScale = 1.17549435e-38f;  // 2^-126: scales and their inverses are never subnormal

DMI_BOTH inline bool finite(float v) { return v - v == 0; }
DMI_BOTH inline bool finite(double v) { return v - v == 0; }

DMI_BOTH inline float scale_of(uint32_t level, float absmax) {
  const float scale = absmax / (level == DMI_LEVEL_FP8 ? kMostFP8 : kMostInt8);
  return scale > kLeastScale ? scale : kLeastScale;
}

// A product that is rounded by itself: compilers that may fuse it with the sum behind it would give other codes than those that may not.
DMI_BOTH inline float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;  // built with -ffp-contract=off
#endif
}

// Rounds |v| < 2^22 to the nearest integer, halves to even.
DMI_BOTH inline float nearest(float v) { return (v + 12582912.0f) - 12582912.0f; }

// Both without a branch, so that compilers make vectors of them.
DMI_BOTH inline uint32_t bits_of(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}

DMI_BOTH inline uint8_t int8_code(float v, float inverse) {
  const uint32_t bits = bits_of(v), magnitude = bits & 0x7fffffff;
  float q = nearest(product(magnitude < 0x7f800000 ? v : 0.0f, inverse));
  q = q > kMostInt8 ? kMostInt8 : q;
  q = q < -kMostInt8 ? -kMostInt8 : q;
  const int32_t special = magnitude > 0x7f800000 ? -128 : int32_t(bits) < 0 ? -127 : 127;
  return uint8_t(magnitude < 0x7f800000 ? int32_t(q) : special);
}

DMI_BOTH inline uint8_t fp8_code(float v, float inverse) {
  const uint32_t bits = bits_of(v), magnitude = bits & 0x7fffffff, sign = bits >> 31 << 7;
  float s = product(magnitude < 0x7f800000 ? v : 0.0f, inverse);
  s = s < 0 ? -s : s;
  s = s > kMostFP8 ? kMostFP8 : s;
  const uint32_t subnormal = uint32_t(int32_t(nearest(product(s < 0.015625f ? s : 0.0f, 512))));  // multiples of 2^-9
  uint32_t up = bits_of(s);
  up += 0x7ffff + (up >> 20 & 1);  // to the nearest, halves to even; may carry into the exponent, as it should
  const uint32_t normal = ((up >> 23) - 120) << 3 | (up >> 20 & 7);
  const uint32_t code = sign | (s < 0.015625f ? subnormal : normal);
  const uint32_t special = magnitude > 0x7f800000 ? 0x7f : sign | 0x7e;
  return uint8_t(magnitude < 0x7f800000 ? code : special);
}

// ---- statistics

// Sums of elements, as far as they go. Figures are of the finite ones.
struct Sums {
  double sum = 0, squares = 0, least = 0, greatest = 0;
  uint64_t finite = 0, count = 0;

  DMI_BOTH void add(double v) {
    ++count;
    if (!(v - v == 0)) return;
    if (finite == 0 || v < least) least = v;
    if (finite == 0 || v > greatest) greatest = v;
    ++finite;
    sum += v;
    squares += v * v;
  }
  DMI_BOTH void merge(const Sums& o) {
    if (o.finite != 0) {
      if (finite == 0 || o.least < least) least = o.least;
      if (finite == 0 || o.greatest > greatest) greatest = o.greatest;
    }
    sum += o.sum;
    squares += o.squares;
    finite += o.finite;
    count += o.count;
  }
  // Figure `i` of abi/ring.h's order. Without a branch, so that lanes that make one each go one way.
  DMI_BOTH double figure(uint32_t i) const {
    const double n = double(finite), nan = n == 0 ? NAN : 0;
    const double mean = (i == 0 ? sum : squares) / (i == 5 || n == 0 ? 1.0 : n), root = sqrt(mean);
    const double extreme = i == 2 ? least : i == 3 || -least < greatest ? greatest : -least;
    const double counted = double(i == 6 ? count - finite : count);
    return i >= 6 ? counted : i == 5 ? root : (i == 0 ? mean : i == 1 ? root : extreme) + nan;
  }
  template <typename Value>
  DMI_BOTH void figures(Value* to) const {
    for (uint32_t i = 0; i < DMI_STATS; ++i) to[i] = Value(figure(i));
  }
};

// ---- the greatest elements

constexpr uint32_t kNoElement = 0xffffffff;

// Whether an element stands before another one: the greater first, and of equal ones that of the lower index.
template <typename Value>
DMI_BOTH bool stands_before(Value a, uint32_t a_index, Value b, uint32_t b_index) {
  return a > b || (a == b && a_index < b_index);
}

}  // namespace dmi

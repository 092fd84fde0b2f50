// What levels, rules and conditions come to, made anew: element by element, in double, from the definitions of the formats and of
// abi/ring.h. It has nothing of the code that is tested.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <vector>

#include "check.h"
#include "dmi/dmi.h"

// By the definitions of the formats, and nothing else.
inline double floating(uint32_t bits, int exponent_bits, int mantissa_bits, int bias, bool infinities, bool zeros, bool top) {
  const uint32_t mantissa = bits & ((1u << mantissa_bits) - 1), ones = (1u << exponent_bits) - 1;
  const uint32_t exponent = bits >> mantissa_bits & ones, sign = bits >> (mantissa_bits + exponent_bits);
  double v = exponent == 0 ? std::ldexp(double(mantissa), 1 - bias - mantissa_bits)
                           : std::ldexp(double(mantissa + (1u << mantissa_bits)), int(exponent) - bias - mantissa_bits);
  if (infinities && exponent == ones) v = mantissa == 0 ? INFINITY : NAN;
  if (top && exponent == ones && mantissa == (1u << mantissa_bits) - 1) v = NAN;
  if (!zeros && bits == 0x80) v = NAN;
  return sign != 0 ? -v : v;
}

template <typename T>
T as(const std::byte* from) {
  T v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline double element(uint32_t dtype, const std::byte* at) {
  switch (dtype) {
    case DMI_DTYPE_BOOL:
    case DMI_DTYPE_U8:
      return as<uint8_t>(at);
    case DMI_DTYPE_I8:
      return as<int8_t>(at);
    case DMI_DTYPE_U16:
      return as<uint16_t>(at);
    case DMI_DTYPE_I16:
      return as<int16_t>(at);
    case DMI_DTYPE_U32:
      return as<uint32_t>(at);
    case DMI_DTYPE_I32:
      return as<int32_t>(at);
    case DMI_DTYPE_U64:
      return double(as<uint64_t>(at));
    case DMI_DTYPE_I64:
      return double(as<int64_t>(at));
    case DMI_DTYPE_F16:
      return floating(as<uint16_t>(at), 5, 10, 15, true, true, false);
    case DMI_DTYPE_BF16:
      return floating(as<uint16_t>(at), 8, 7, 127, true, true, false);
    case DMI_DTYPE_F32:
      return double(as<float>(at));
    case DMI_DTYPE_F64:
      return as<double>(at);
    case DMI_DTYPE_F8_E4M3:
      return floating(as<uint8_t>(at), 4, 3, 7, false, true, true);
    case DMI_DTYPE_F8_E5M2:
      return floating(as<uint8_t>(at), 5, 2, 15, true, true, false);
    case DMI_DTYPE_F8_E4M3FNUZ:
      return floating(as<uint8_t>(at), 4, 3, 8, false, false, false);
    case DMI_DTYPE_F8_E5M2FNUZ:
      return floating(as<uint8_t>(at), 5, 2, 16, false, false, false);
    case DMI_DTYPE_F8_E8M0:
      return as<uint8_t>(at) == 255 ? NAN : std::ldexp(1.0, as<uint8_t>(at) - 127);
    default:
      CHECK(!"a real dtype");
      return 0;
  }
}

inline bool close_to(double got, double want, double relative, double absolute) {
  if (want != want) return got != got;
  if (std::fabs(want) > 3.4028235e38) return std::fabs(got) >= 3.4e38 && (got > 0) == (want > 0);
  return std::fabs(got - want) <= relative * std::fabs(want) + absolute;
}

// Figures of a row against sums in long double.
inline void check_statistics(const std::byte* got, const std::vector<double>& values) {
  long double sum = 0, squares = 0;
  double least = INFINITY, greatest = -INFINITY, size = 0;
  uint64_t finite = 0;
  for (double v : values) {
    if (!std::isfinite(v)) continue;
    ++finite;
    sum += v;
    squares += static_cast<long double>(v) * v;
    size += std::fabs(v);
    least = std::min(least, v);
    greatest = std::max(greatest, v);
  }
  float figure[DMI_STATS];
  std::memcpy(figure, got, sizeof figure);
  const double n = double(finite), none = NAN;
  // A figure is rounded to float32; the mean of values that cancel has the rounding of its sum besides.
  const double rounding = 6e-8, tiny = 1e-44;
  CHECK(close_to(figure[0], finite == 0 ? none : double(sum / finite), rounding, tiny + (finite == 0 ? 0 : 1e-13 * size / n)));
  const double l2 = double(std::sqrt(squares));
  const bool overflows = squares > 1e308L;  // in double: squares of values beyond 1e154
  if (!overflows) CHECK(close_to(figure[1], finite == 0 ? none : double(std::sqrt(squares / finite)), rounding, tiny));
  CHECK(close_to(figure[2], finite == 0 ? none : least, rounding, tiny));
  CHECK(close_to(figure[3], finite == 0 ? none : greatest, rounding, tiny));
  CHECK(close_to(figure[4], finite == 0 ? none : std::max(std::fabs(least), std::fabs(greatest)), rounding, tiny));
  if (!overflows) CHECK(close_to(figure[5], l2, rounding, tiny));
  CHECK_EQ(uint64_t(figure[6]), values.size() - finite);
  CHECK_EQ(uint64_t(figure[7]), values.size());
}

// The greatest elements behind the figures, against all of them sorted.
inline void check_top(const std::byte* got, uint32_t top, const std::vector<double>& values) {
  std::vector<uint32_t> order;
  for (uint32_t i = 0; i < values.size(); ++i) {
    if (std::isfinite(values[i])) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return values[a] > values[b]; });
  for (uint32_t i = 0; i < top; ++i) {
    const auto value = as<float>(got + 4 * i);
    const auto index = as<uint32_t>(got + 4 * (top + i));
    CHECK_EQ(index, i < order.size() ? order[i] : 0xffffffffu);
    if (i < order.size()) CHECK(value == float(values[order[i]]));
    if (i >= order.size()) CHECK(value != value);
  }
}

// A quantised row: each element within half a step of its scale (INT8), or 1/16 of itself and half the least code (FP8).
inline void check_quantised(uint32_t level, const std::byte* got, const std::vector<double>& values, const std::vector<bool>& own) {
  const double scale = as<float>(got);
  double absmax = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const float v = float(values[i]);
    if (own[i] && std::isfinite(v)) absmax = std::max(absmax, std::fabs(double(v)));
  }
  const double most = level == DMI_LEVEL_FP8 ? 416 : 126;
  CHECK(close_to(scale, std::max(absmax / most, std::ldexp(1, -126)), 2e-7, 0));
  for (size_t i = 0; i < values.size(); ++i) {
    const uint8_t code = as<uint8_t>(got + 4 + i);
    if (!own[i]) {
      CHECK_EQ(code, 0);
      continue;
    }
    const double want = double(float(values[i]));
    double value = level == DMI_LEVEL_INT8 ? int8_t(code) * scale : floating(code, 4, 3, 7, false, true, true) * scale;
    if (level == DMI_LEVEL_INT8 && code == 0x80) value = NAN;
    if (code == (level == DMI_LEVEL_INT8 ? 127 : 0x7e)) value = INFINITY;
    if (code == (level == DMI_LEVEL_INT8 ? 129 : 0xfe)) value = -INFINITY;
    if (!std::isfinite(want)) {
      CHECK(want != want ? value != value : value == want);
    } else if (level == DMI_LEVEL_INT8) {
      CHECK(std::fabs(value - want) <= scale * (0.5 + 1e-4));
    } else {
      CHECK(std::fabs(value - want) <= std::fabs(want) * (0.0625 + 1e-6) + scale * std::ldexp(1, -10) * (1 + 1e-4));
    }
  }
}

// The rule, written as slowly as it reads.
inline bool takes(const dmi_clause& c, const dmi_span& span, uint32_t position, const std::map<uint64_t, uint64_t>& members,
                  uint64_t groups) {
  if (c.one == 1 && span.request != c.request) return false;
  if (c.group != 0) {
    const bool said = c.groups == groups && members.contains(span.request);
    if (c.group == DMI_GROUP_UNKNOWN && said) return false;
    if (c.group != DMI_GROUP_UNKNOWN && !(said && (members.at(span.request) & (uint64_t{1} << (c.group - 1))))) return false;
  }
  if (c.threshold != 0) {
    uint64_t x = span.request + (c.seed + 1) * 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    if ((x ^ (x >> 31)) >= c.threshold) return false;
  }
  if (!(c.phases & (1 << span.phase))) return false;
  std::vector<uint32_t> region;  // positions of it, as far as any test goes
  const bool known = span.prompt != 0, counted = int64_t(c.start) < 0 || int64_t(c.stop) < 0;
  if (!known && (c.region == DMI_REGION_GENERATED || counted)) return false;
  if (!known && c.region == DMI_REGION_PROMPT && span.phase != DMI_PHASE_PREFILL) return false;
  for (uint32_t p = 0; p < 300; ++p) {
    if (c.region == DMI_REGION_PROMPT && known && p >= span.prompt) continue;
    if (c.region == DMI_REGION_GENERATED && p < span.prompt) continue;
    region.push_back(p);
  }
  const int64_t size = int64_t(region.size());
  auto bound = [&](uint64_t v) {
    if (v == DMI_OPEN_END) return size;
    const int64_t s = int64_t(v);
    return s < 0 ? std::max<int64_t>(s + size, 0) : std::min(s, size);
  };
  for (int64_t i = bound(c.start); i < bound(c.stop); i += c.step) {
    if (region[size_t(i)] == position) return true;
  }
  return false;
}

// A dmi_watch and its weights.
struct Watching {
  dmi_watch watch;
  std::vector<float> weights;
};

enum class Met { kNo, kPerhaps, kYes };  // perhaps: too near a bound for sums of another order to tell

inline Met outside(const dmi_watch& w, double v, double near) {
  const double above = std::bit_cast<double>(w.above), below = std::bit_cast<double>(w.below);
  if (v != v) return Met::kNo;
  if (std::fabs(v - above) <= near || std::fabs(v - below) <= near) return Met::kPerhaps;
  return v > above || v < below ? Met::kYes : Met::kNo;
}

// Whether a row meets a watch, as abi/ring.h has it. `counted`: those of its elements that count; `own`: whether it has keys of its own.
inline Met meets(const Watching& w, const std::vector<double>& values, const std::vector<double>& counted, bool own) {
  if (w.watch.condition == DMI_CONDITION_PROBE) {
    if (own || values.size() != w.weights.size()) return Met::kNo;
    double sum = std::bit_cast<double>(w.watch.bias), size = std::fabs(sum);
    for (size_t i = 0; i < values.size(); ++i) {
      const double term = double(w.weights[i]) * values[i];
      sum += term;
      if (std::isfinite(term)) size += std::fabs(term);
    }
    return size > 1e300 ? Met::kPerhaps : outside(w.watch, sum, 1e-9 * size);
  }
  long double sum = 0, squares = 0, size = 0;
  double least = INFINITY, greatest = -INFINITY;
  double n = 0;
  for (double v : counted) {
    if (!std::isfinite(v)) continue;
    ++n;
    sum += v;
    size += std::fabs(v);
    squares += static_cast<long double>(v) * v;
    least = std::min(least, v);
    greatest = std::max(greatest, v);
  }
  const double others = double(counted.size()) - n, none = n == 0 ? NAN : 0;
  if (w.watch.condition == DMI_CONDITION_NONFINITE) return others > 0 ? Met::kYes : Met::kNo;
  if (w.watch.condition != DMI_CONDITION_STATISTIC) return Met::kNo;
  const double l2 = double(std::sqrt(squares));
  const double figure[DMI_STATS] = {double(sum / n) + none,
                                    l2 / std::sqrt(n) + none,
                                    least + none,
                                    greatest + none,
                                    std::max(std::fabs(least), std::fabs(greatest)) + none,
                                    l2,
                                    others,
                                    double(counted.size())};
  if (size > 1e150L) return Met::kPerhaps;
  const double v = figure[w.watch.statistic];
  const bool exact = w.watch.statistic >= 6;
  return outside(w.watch, v, exact ? 0 : 1e-9 * std::fabs(v) + (w.watch.statistic == 0 && n != 0 ? double(1e-12L * size / n) : 0));
}

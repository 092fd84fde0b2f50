// Elements of every dtype as numbers, for host and device alike.
#pragma once

#include "levels.h"

namespace dmi {

DMI_BOTH inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

DMI_BOTH inline float bfloat(uint16_t bits) { return float_of(uint32_t{bits} << 16); }

DMI_BOTH inline float half(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fff, sign = uint32_t(bits & 0x8000) << 16;
  // The exponent moves from bias 15 to 127 by a product, which is exact for subnormals as well.
  const uint32_t value = bits_of(float_of(magnitude << 13) * 5.192296858534828e33f);  // 2^112
  const uint32_t special = 0x7f800000 | magnitude << 13;
  return float_of((magnitude >= 0x7c00 ? special : value) | sign);
}

struct Minifloat {
  int mantissa_bits, bias;
  bool infinities;     // has infinities
  bool negative_zero;  // has one; else its pattern is the NaN
  bool top;            // e4m3fn: all ones is NaN
};

// 2^exponent, of those that float has as normal numbers.
DMI_BOTH inline float power_of_two(int exponent) { return float_of(uint32_t(exponent + 127) << 23); }

DMI_BOTH inline float minifloat(const Minifloat& f, uint8_t code) {
  const int m = f.mantissa_bits, exponent = (code & 0x7f) >> m, most = (1 << (7 - m)) - 1;
  const uint32_t mantissa = code & ((1u << m) - 1);
  float v =
      exponent == 0 ? float(mantissa) * power_of_two(1 - f.bias - m) : float(mantissa | 1u << m) * power_of_two(exponent - f.bias - m);
  if (f.infinities && exponent == most) v = mantissa == 0 ? INFINITY : NAN;
  if (f.top && (code & 0x7f) == 0x7f) v = NAN;
  if (!f.negative_zero && code == 0x80) v = NAN;
  return (code & 0x80) != 0 ? -v : v;
}

// An element of one of the 8-bit float dtypes.
DMI_BOTH inline float eighth(uint32_t dtype, uint8_t code) {
  switch (dtype) {
    case DMI_DTYPE_F8_E4M3:
      return minifloat({3, 7, false, true, true}, code);
    case DMI_DTYPE_F8_E5M2:
      return minifloat({2, 15, true, true, false}, code);
    case DMI_DTYPE_F8_E4M3FNUZ:
      return minifloat({3, 8, false, false, false}, code);
    case DMI_DTYPE_F8_E5M2FNUZ:
      return minifloat({2, 16, false, false, false}, code);
    default:  // e8m0: an exponent, no sign
      return code == 255 ? NAN : code == 0 ? kLeastScale / 2 : power_of_two(int(code) - 127);
  }
}

// Float is exact for all but 32-bit integers and the 64-bit dtypes, which it rounds.
DMI_BOTH inline bool needs_double(uint32_t dtype) {
  return dtype == DMI_DTYPE_F64 || dtype == DMI_DTYPE_I64 || dtype == DMI_DTYPE_U64 || dtype == DMI_DTYPE_I32 || dtype == DMI_DTYPE_U32;
}

template <typename Element>
DMI_BOTH Element load_as(const std::byte* at) {
  Element element;
  memcpy(&element, at, sizeof element);
  return element;
}

// The element at an address that its own size divides. Not of complex dtypes.
template <typename Value>
DMI_BOTH Value element_of(uint32_t dtype, const std::byte* at) {
  switch (dtype) {
    case DMI_DTYPE_BOOL:
    case DMI_DTYPE_U8:
      return Value(load_as<uint8_t>(at));
    case DMI_DTYPE_I8:
      return Value(load_as<int8_t>(at));
    case DMI_DTYPE_U16:
      return Value(load_as<uint16_t>(at));
    case DMI_DTYPE_I16:
      return Value(load_as<int16_t>(at));
    case DMI_DTYPE_U32:
      return Value(load_as<uint32_t>(at));
    case DMI_DTYPE_I32:
      return Value(load_as<int32_t>(at));
    case DMI_DTYPE_U64:
      return Value(load_as<uint64_t>(at));
    case DMI_DTYPE_I64:
      return Value(load_as<int64_t>(at));
    case DMI_DTYPE_F16:
      return Value(half(load_as<uint16_t>(at)));
    case DMI_DTYPE_BF16:
      return Value(bfloat(load_as<uint16_t>(at)));
    case DMI_DTYPE_F32:
      return Value(load_as<float>(at));
    case DMI_DTYPE_F64:
      return Value(load_as<double>(at));
    default:
      return Value(eighth(dtype, load_as<uint8_t>(at)));
  }
}

}  // namespace dmi

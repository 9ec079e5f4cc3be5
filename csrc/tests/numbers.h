// Number formats by their definition, not by the conversions under test, and how far sums in fp32 may be from the
// truth.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../plan.h"

namespace gain_ops {

template <class T>
struct Format;
template <>
struct Format<float> {
  static constexpr Dtype kDtype = Dtype::float32;
  static constexpr int kFraction = 23, kLeast = -126;
};
template <>
struct Format<__half> {
  static constexpr Dtype kDtype = Dtype::float16;
  static constexpr int kFraction = 10, kLeast = -14;
};
template <>
struct Format<__nv_bfloat16> {
  static constexpr Dtype kDtype = Dtype::bfloat16;
  static constexpr int kFraction = 7, kLeast = -126;
};

template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

template <class T>
T from_bits(uint32_t bits) {
  const auto narrow = static_cast<Bits<T>>(bits);
  T value;
  std::memcpy(static_cast<void*>(&value), &narrow, sizeof(value));
  return value;
}

template <class T>
uint32_t bits_of(T value) {
  Bits<T> bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <class T>
constexpr uint32_t sign_bit = uint32_t{1} << (8 * sizeof(T) - 1);

template <class T>
constexpr uint32_t infinity_bits = sign_bit<T> - (uint32_t{1} << Format<T>::kFraction);

template <class T>
bool is_finite(uint32_t bits) {
  return (bits & ~sign_bit<T>) < infinity_bits<T>;
}

template <class T>
double decode(T value) {
  constexpr int kFraction = Format<T>::kFraction;
  const uint32_t magnitude = bits_of(value) & ~sign_bit<T>;
  const int exponent = static_cast<int>(magnitude >> kFraction);
  const uint32_t fraction = magnitude & ((uint32_t{1} << kFraction) - 1);
  const double significand = exponent == 0 ? fraction : fraction + (uint32_t{1} << kFraction);
  const double absolute = std::ldexp(significand, std::max(exponent, 1) - 1 + Format<T>::kLeast - kFraction);
  return bits_of(value) & sign_bit<T> ? -absolute : absolute;
}

// Nearest, ties to even, overflow to infinity.
template <class T>
T encode(double value) {
  constexpr int kFraction = Format<T>::kFraction;
  const uint32_t sign = std::signbit(value) ? sign_bit<T> : 0;
  if (value == 0) return from_bits<T>(sign);
  const int exponent = std::max(std::ilogb(value), Format<T>::kLeast);
  const double units = std::nearbyint(std::ldexp(std::fabs(value), kFraction - exponent));
  // The leading one of a normal number's units is what makes its exponent field one more.
  const uint64_t bits =
      (static_cast<uint64_t>(exponent - Format<T>::kLeast) << kFraction) + static_cast<uint64_t>(units);
  return from_bits<T>(sign | static_cast<uint32_t>(std::min<uint64_t>(bits, infinity_bits<T>)));
}

struct Sum {
  double value = 0, magnitude = 0;
  void add(double term) {
    value += term;
    magnitude += std::fabs(term);
  }
  // Whether fp32 additions of at most `terms` rounded terms, in any order, can give `computed`.
  bool allows(float computed, int64_t terms) const {
    const double roundings = static_cast<double>(terms + 1) * 0x1p-24;
    return std::fabs(computed - value) <= roundings / (1 - roundings) * magnitude;  // false for NaN
  }
};

inline int64_t count_wrong(const float* computed, const std::vector<Sum>& truth, int64_t terms) {
  int64_t wrong = 0;
  for (const Sum& sum : truth) wrong += !sum.allows(*computed++, terms);
  return wrong;
}

}  // namespace gain_ops

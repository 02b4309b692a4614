// Element types: 16-bit floats as storage, and dispatch from a run-time DType to a compile-time
// type.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/array.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define INSTEMBED_DTYPE_FUNCTION __host__ __device__
#else
#define INSTEMBED_DTYPE_FUNCTION
#endif

namespace instembed {

template <class To, class From>
INSTEMBED_DTYPE_FUNCTION inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Storage only: arithmetic is in float. Conversions are branch-free so that loops over them
// vectorise.
struct Half {
  uint16_t bits;

  INSTEMBED_DTYPE_FUNCTION operator float() const {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
    // The exponent is rebased by a multiplication, which also normalises subnormals.
    const float rebased = bit_cast<float>(magnitude) * bit_cast<float>(0x77800000u);  // 2^112
    const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;             // inf, NaN
    return bit_cast<float>(bit_cast<uint32_t>(rebased) | special | sign);
#endif
  }

  INSTEMBED_DTYPE_FUNCTION static Half from(float value) {  // rounds to nearest, ties to even
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(value))};
#else
    const uint32_t u = bit_cast<uint32_t>(value);
    const uint32_t sign = (u >> 16) & 0x8000u;
    const uint32_t magnitude = u & 0x7fffffffu;
    // Adding 0.5 aligns the last kept bit of a subnormal result with the float's last bit.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? overflow : result;
    return {static_cast<uint16_t>(result | sign)};
#endif
  }
};

struct BFloat16 {
  uint16_t bits;

  INSTEMBED_DTYPE_FUNCTION operator float() const {
    return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }

  INSTEMBED_DTYPE_FUNCTION static BFloat16 from(float value) {
    const uint32_t u = bit_cast<uint32_t>(value);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint32_t nan = (u >> 16) | 0x40u;
    return {static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
  }
};

// Sums are taken in float for 16- and 32-bit types, in double for double.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename Accumulator<T>::type;

// A sum, rounded to an element.
template <class T>
INSTEMBED_DTYPE_FUNCTION inline T rounded(double value) {
  if constexpr (sizeof(T) == 2) {
    return T::from(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

template <class F>
decltype(auto) dispatch_floating(DType dtype, const char* what, F&& f) {
  switch (dtype) {
    case DType::f16:
      return f(Half{});
    case DType::bf16:
      return f(BFloat16{});
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    default:
      throw std::invalid_argument(std::string(what) + ": expected a floating type, got " +
                                  name(dtype));
  }
}

template <class F>
decltype(auto) dispatch_integer(DType dtype, const char* what, F&& f) {
  switch (dtype) {
    case DType::i8:
      return f(int8_t{});
    case DType::i16:
      return f(int16_t{});
    case DType::i32:
      return f(int32_t{});
    case DType::i64:
      return f(int64_t{});
    case DType::u8:
      return f(uint8_t{});
    case DType::u16:
      return f(uint16_t{});
    case DType::u32:
      return f(uint32_t{});
    case DType::u64:
      return f(uint64_t{});
    default:
      throw std::invalid_argument(std::string(what) + ": expected an integer type, got " +
                                  name(dtype));
  }
}

}  // namespace instembed

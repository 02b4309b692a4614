// Numbers of any type on the device: ids, coordinates, flags, maps that are read here and there.
// One kernel serves all types.
#pragma once

#include "common/array.h"
#include "common/cuda.h"
#include "common/dtype.h"

namespace instembed::cuda {

// f(the elements of an integer array, in their own type)
template <class F>
__device__ __forceinline__ auto with_ids(const void* data, DType type, F&& f) {
  switch (type) {
    case DType::i8:
      return f(static_cast<const int8_t*>(data));
    case DType::i16:
      return f(static_cast<const int16_t*>(data));
    case DType::i32:
      return f(static_cast<const int32_t*>(data));
    case DType::u8:
      return f(static_cast<const uint8_t*>(data));
    case DType::u16:
      return f(static_cast<const uint16_t*>(data));
    case DType::u32:
      return f(static_cast<const uint32_t*>(data));
    default:
      return f(static_cast<const int64_t*>(data));
  }
}

// Element i of an integer array as a 64-bit id.
__device__ __forceinline__ int64_t load_id(const void* data, DType type, int64_t i) {
  return with_ids(data, type, [&](const auto* ids) { return static_cast<int64_t>(ids[i]); });
}

constexpr int kAhead = 4;  // ids that a lane asks for at once

// ids[k] = element at[k] as a 64-bit id, or 0 where that is `left` pixels or more on, for a warp
// that walks over pixels.
__device__ __forceinline__ void load_ids(const void* data, DType type, const int64_t (&at)[kAhead],
                                         int64_t left, int64_t (&ids)[kAhead]) {
  with_ids(data, type, [&](const auto* elements) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) ids[k] = k * kWarp < left ? elements[at[k]] : 0;
  });
}

// Element i of an array of any type.
__device__ __forceinline__ double load_number(const void* data, DType type, int64_t i) {
  switch (type) {
    case DType::f16:
      return static_cast<double>(static_cast<const Half*>(data)[i]);
    case DType::bf16:
      return static_cast<double>(static_cast<const BFloat16*>(data)[i]);
    case DType::f32:
      return static_cast<const float*>(data)[i];
    case DType::f64:
      return static_cast<const double*>(data)[i];
    case DType::u64:
      return static_cast<double>(static_cast<const uint64_t*>(data)[i]);
    default:
      return static_cast<double>(load_id(data, type, i));
  }
}

}  // namespace instembed::cuda

// Numbers of any type on the device: ids, coordinates, flags, maps that are read here and there.
// One kernel serves all types.
#pragma once

#include "common/array.h"
#include "common/cuda.h"
#include "common/dtype.h"

namespace instembed::cuda {

// Element i of an integer array as a 64-bit id.
__device__ __forceinline__ int64_t load_id(const void* data, DType type, int64_t i) {
  switch (type) {
    case DType::i8:
      return static_cast<const int8_t*>(data)[i];
    case DType::i16:
      return static_cast<const int16_t*>(data)[i];
    case DType::i32:
      return static_cast<const int32_t*>(data)[i];
    case DType::u8:
      return static_cast<const uint8_t*>(data)[i];
    case DType::u16:
      return static_cast<const uint16_t*>(data)[i];
    case DType::u32:
      return static_cast<const uint32_t*>(data)[i];
    default:
      return static_cast<const int64_t*>(data)[i];
  }
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

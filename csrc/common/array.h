// A borrowed view of somebody else's array: what every kernel entry point takes.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace instembed {

enum class DType : uint8_t { f16, bf16, f32, f64, i8, i16, i32, i64, u8, u16, u32, u64 };

inline const char* name(DType dtype) {
  constexpr const char* names[] = {"float16", "bfloat16", "float32", "float64", "int8",   "int16",
                                   "int32",   "int64",    "uint8",   "uint16",  "uint32", "uint64"};
  return names[static_cast<int>(dtype)];
}

inline int64_t item_size(DType dtype) {
  constexpr int64_t sizes[] = {2, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8};
  return sizes[static_cast<int>(dtype)];
}

struct Array {
  static constexpr int kMaxDims = 8;

  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;
  std::array<int64_t, kMaxDims> shape{};
  std::array<int64_t, kMaxDims> strides{};  // in elements

  int64_t size() const {
    int64_t n = 1;
    for (int k = 0; k < ndim; ++k) n *= shape[k];
    return n;
  }

  bool contiguous() const {
    if (size() == 0) return true;
    int64_t expected = 1;
    for (int k = ndim - 1; k >= 0; --k) {
      if (shape[k] != 1 && strides[k] != expected) return false;
      expected *= shape[k];
    }
    return true;
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// The Python layer checks what users pass. These guard the core's own boundary, for callers without
// that layer.
inline void expect(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

inline void expect_contiguous(const Array& array, DType dtype, int64_t size, const char* what) {
  expect(array.dtype == dtype,
         std::string(what) + ": expected " + name(dtype) + ", got " + name(array.dtype));
  expect(array.contiguous(), std::string(what) + ": expected a contiguous array");
  expect(array.size() == size, std::string(what) + ": expected " + std::to_string(size) +
                                   " elements, got " + std::to_string(array.size()));
}

// Elements in any order, side by side.
inline void expect_gapless(const Array& array, const char* what) {
  if (array.size() == 0) return;
  int64_t last = 0;
  for (int k = 0; k < array.ndim; ++k) {
    expect(array.shape[k] == 1 || array.strides[k] > 0,
           std::string(what) + ": expected positive strides");
    last += (array.shape[k] - 1) * array.strides[k];
  }
  expect(last + 1 == array.size(), std::string(what) + ": expected an array without gaps");
}

}  // namespace instembed

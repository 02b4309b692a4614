// What native tests share: random numbers, checks, and arrays of exactly the size that they need.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "common/array.h"
#include "common/dtype.h"

namespace instembed {

inline std::mt19937_64 generator(0);

inline int64_t draw(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

#define CHECK(condition)                                                            \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (false)

// An array with memory of its own, exactly as much as it needs.
class Buffer {
 public:
  Buffer(DType dtype, std::vector<int64_t> shape) : Buffer(dtype, shape, order(shape.size())) {}

  // Dimensions are laid out in the given order, outermost first.
  Buffer(DType dtype, std::vector<int64_t> shape, std::vector<int> layout) {
    array_.dtype = dtype;
    array_.ndim = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), array_.shape.begin());
    int64_t stride = 1;
    for (auto k = layout.rbegin(); k != layout.rend(); ++k) {
      array_.strides[*k] = stride;
      stride *= shape[*k];
    }
    memory_.reset(new char[bytes()]);
    std::memset(memory_.get(), 0x5a, bytes());
    array_.data = memory_.get();
  }

  operator const Array&() const { return array_; }
  const Array* operator&() const { return &array_; }
  template <class T>
  T* as() {
    return array_.as<T>();
  }
  int64_t size() const { return array_.size(); }
  size_t bytes() const {
    const size_t width[] = {2, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8};
    return array_.size() * width[static_cast<int>(array_.dtype)];
  }
  const char* raw() const { return memory_.get(); }

 private:
  static std::vector<int> order(size_t n) {
    std::vector<int> identity(n);
    for (size_t k = 0; k < n; ++k) identity[k] = static_cast<int>(k);
    return identity;
  }

  Array array_;
  std::unique_ptr<char[]> memory_;
};

inline void fill_normal(Buffer& buffer, DType dtype) {
  std::normal_distribution<double> normal;
  dispatch_floating(dtype, "test", [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < buffer.size(); ++i) {
      if constexpr (sizeof(T) == 2) {
        buffer.as<T>()[i] = T::from(static_cast<float>(normal(generator)));
      } else {
        buffer.as<T>()[i] = static_cast<T>(normal(generator));
      }
    }
  });
}

// Labels in runs of about `run` pixels.
inline Buffer make_labels(std::vector<int64_t> shape, int64_t instances, int64_t run) {
  Buffer labels(DType::i64, shape);
  int64_t id = 0;
  for (int64_t i = 0; i < labels.size(); ++i) {
    if (draw(1, run) == 1) id = draw(0, instances);
    labels.as<int64_t>()[i] = id * (int64_t{1} << 40);
  }
  return labels;
}

}  // namespace instembed

// The tests of kernels on the simulated device.
#pragma once

#include <cmath>
#include <functional>

#include "common/cuda.h"
#include "testing.h"

namespace instembed {

inline bool same_bits(const Buffer& a, const Buffer& b) {
  return a.bytes() == b.bytes() && std::memcmp(a.raw(), b.raw(), a.bytes()) == 0;
}

inline double value(const Buffer& array, DType dtype, int64_t i) {
  double result = 0;
  dispatch_floating(dtype, "test", [&](auto type) {
    result = static_cast<double>(reinterpret_cast<const decltype(type)*>(array.raw())[i]);
  });
  return result;
}

inline DType sums_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

inline double tolerance_of(DType dtype) {
  if (dtype == DType::f64) return 1e-11;
  if (dtype == DType::bf16) return 8e-3;
  return dtype == DType::f16 ? 1e-3 : 5e-6;
}

// The values of a float64 buffer in another type.
inline void fill_as(const Buffer& exact, DType dtype, Buffer& buffer) {
  dispatch_floating(dtype, "test", [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < exact.size(); ++i) {
      buffer.as<T>()[i] = rounded<T>(value(exact, DType::f64, i));
    }
  });
}

// To the float64 values of `expected`, relative to the largest.
inline void check_close(const Buffer& got, DType dtype, const Buffer& expected, double tolerance) {
  double scale = 0;
  for (int64_t i = 0; i < expected.size(); ++i) {
    scale = std::max(scale, std::abs(value(expected, DType::f64, i)));
  }
  for (int64_t i = 0; i < expected.size(); ++i) {
    const double error = std::abs(value(got, dtype, i) - value(expected, DType::f64, i));
    if (!(error <= tolerance * scale + 1e-300)) {
      std::fprintf(stderr, "element %ld: %g instead of %g, scale %g\n", static_cast<long>(i),
                   value(got, dtype, i), value(expected, DType::f64, i), scale);
      std::exit(1);
    }
  }
}

// Runs `test` under several schedules of threads and blocks.
inline void for_schedules(int schedules, const std::function<void()>& test) {
  static uint64_t seed = 0;
  for (int k = 0; k < schedules; ++k) {
    cuda::simulator::options.seed = ++seed;
    test();
  }
}

void test_associative_embedding(int schedules);
void test_cosine_margin(int schedules);
void test_discriminative(int schedules);
void test_gather_at(int schedules);
void test_group_keypoints(int schedules);
void test_group_on_sphere(int schedules);
void test_instance_pool(int schedules);
void test_label_statistics(int schedules);
void test_mean_shift(int schedules);
void test_pairwise_similarity(int schedules);
void test_recurrent_mean_shift(int schedules);
void test_sample_pixels(int schedules);
void test_seeds(int schedules);
void test_simulator(int schedules);

}  // namespace instembed

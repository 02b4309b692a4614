// The tests of kernels on the simulated device.
#pragma once

#include <functional>

#include "common/cuda.h"
#include "testing.h"

namespace instembed {

inline bool same_bits(const Buffer& a, const Buffer& b) {
  return a.bytes() == b.bytes() && std::memcmp(a.raw(), b.raw(), a.bytes()) == 0;
}

// Runs `test` under several schedules of threads and blocks.
inline void for_schedules(int schedules, const std::function<void()>& test) {
  static uint64_t seed = 0;
  for (int k = 0; k < schedules; ++k) {
    cuda::simulator::options.seed = ++seed;
    test();
  }
}

void test_discriminative(int schedules);
void test_label_statistics(int schedules);
void test_mean_shift(int schedules);
void test_pairwise_similarity(int schedules);
void test_sample_pixels(int schedules);
void test_seeds(int schedules);
void test_simulator(int schedules);

}  // namespace instembed

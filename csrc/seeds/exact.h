// The arithmetic that decides membership (exact.cpp is compiled without fused multiply-adds).
#pragma once

#include <cstdint>

namespace instembed::seeds {

double exact_distance(const float* pixel, int64_t stride, const double* seed, int dims);
double exact_distance(const double* pixel, int64_t stride, const double* seed, int dims);

}  // namespace instembed::seeds

#include "seeds/exact.h"

#include "mean_shift/formula.h"

namespace instembed::seeds {

double exact_distance(const float* pixel, int64_t stride, const double* seed, int dims) {
  return mean_shift::squared_distance(pixel, stride, seed, dims);
}

double exact_distance(const double* pixel, int64_t stride, const double* seed, int dims) {
  return mean_shift::squared_distance(pixel, stride, seed, dims);
}

}  // namespace instembed::seeds

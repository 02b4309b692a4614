// Pools the features of each instance, and spreads a gradient back over its pixels. See cpu.cpp for
// how.
#pragma once

#include <cstdint>
#include <vector>

#include "common/array.h"
#include "common/label_runs.h"

namespace instembed::instance_pool {

enum class Reduce { mean, sum, max };

// Rows are instances in ascending order of id; rows beyond an image's instances become zero (argmax
// -1).
struct Outputs {
  Array pooled;         // (B, capacity, C) in the accumulation type of the features
  Array valid;          // (B, capacity) of bytes: 1 where there is an instance
  Array ids;            // (B, capacity) int64
  Array counts;         // (B, capacity) int64: pixels
  const Array* argmax;  // (B, capacity, C) int64, for max: the pixel, of all N
};

// Which pixels belong to which instance.
class Instances {
 public:
  // labels (B, N), or (1, N) with offsets (B + 1,), of an integer type. They are read once.
  Instances(const Array& labels, const Array* offsets, const LabelRules& rules, int threads);

  int64_t largest() const;  // number of instances in one image

  // features (B, C, N), or (1, C, N) with the labels' offsets. Needs capacity >= largest().
  void pool(const Array& features, const Array* offsets, Reduce reduce, const Outputs& outputs,
            int threads) const;

  // The gradient of mean and sum: grad (B, capacity, C) in the accumulation type; grad_features has
  // the features' shape and type, and its pixels or its channels lie side by side.
  void spread(const Array& grad, const Array* offsets, Reduce reduce, const Array& grad_features,
              int threads) const;

 private:
  void expect_same_pixels(const Batch& batch, const char* what) const;
  void describe(const Outputs& outputs) const;
  template <class T, class Table>
  void pool_into(const Array& features, const Batch& batch, Reduce reduce, const Outputs& outputs,
                 int threads) const;

  std::vector<int64_t> pixels_;  // of each image
  TileGrid grid_;
  LabelRuns runs_;
  std::vector<std::vector<int32_t>> rows_;  // [image][slot]: the instance's row in the outputs
};

// The gradient of max: each element of grad (B, capacity, C) goes to the pixel that argmax names.
void spread_max(const Array& grad, const Array& argmax, const Array* offsets,
                const Array& grad_features, int threads);

}  // namespace instembed::instance_pool

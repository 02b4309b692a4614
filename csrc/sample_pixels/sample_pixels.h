// Random pixels of each instance. See cpu.cpp for how.
#pragma once

#include <cstdint>
#include <vector>

#include "common/array.h"
#include "common/label_runs.h"

namespace instembed::sample_pixels {

class Instances {
 public:
  // labels (B, N), or (1, N) with offsets (B + 1,), of an integer type. They are read once.
  Instances(const Array& labels, const Array* offsets, const LabelRules& rules, int threads);

  int64_t largest() const;  // number of instances in one image

  // words (B,) int64: random. Written: indices (B, capacity, K) int64, for the instances in
  // ascending order of id up to K of their pixels in ascending order, counted over all of N, and -1
  // beyond; valid (B, capacity, K) of bytes: 1 where there is a pixel. Needs capacity >= largest().
  void sample(const Array& words, const Array& indices, const Array& valid, int threads) const;

 private:
  struct Image {
    int64_t first, pixels;
    std::vector<int32_t> rows;  // [slot]: the instance's row in the outputs
  };

  std::vector<Image> images_;
  TileGrid grid_;
  LabelRuns runs_;
};

}  // namespace instembed::sample_pixels

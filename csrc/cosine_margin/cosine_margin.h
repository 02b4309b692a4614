// The cosine margin loss and its gradient. See cpu.cpp for how.
#pragma once

#include <cstdint>

#include "common/array.h"
#include "common/label_runs.h"
#include "cosine_margin/formula.h"

namespace instembed::cosine_margin {

// Which of the pixels that belong to instances take part: those of the least keys.
struct Sampling {
  double fraction = 1;
  int64_t most = 0;
};

struct Options {
  Rule rule;
  LabelRules labels;
  Sampling sampling;  // where there are keys
  int threads = 1;
};

// points (B, D, N) of float32 or float64, labels (B, N), or (1, D, N) and (1, N) with offsets (B +
// 1,); keys float32 like the labels, or null for all pixels; losses (B,) and gradient, of the loss
// of each point's image, like the points in shape and type; gradient may be null.
void forward(const Array& points, const Array& labels, const Array* offsets, const Array* keys,
             const Options& options, const Array& losses, const Array* gradient);

}  // namespace instembed::cosine_margin

// The discriminative loss's terms and their gradient. See cpu.cpp for how.
#pragma once

#include <cstdint>

#include "common/array.h"
#include "common/label_runs.h"

namespace instembed::discriminative {

constexpr int kTerms = 4;  // variance, distance, regularisation, background push

struct Options {
  double delta_var = 0.5;
  double delta_dist = 1.5;
  int norm = 2;                  // 1 or 2
  bool pooled_variance = false;  // a mean over pixels rather than over instances of means
  bool background_push = false;
  LabelRules rules;
  int threads = 1;
};

// What the forward pass leaves for the backward pass, of a capacity that the caller chose. If it
// does not fit, first[images] says so (it exceeds the capacity, or is negative for the runs) and
// the backward pass finds it again.
struct State {
  Array first;    // (images + 1,) int64: each image's first instance
  Array counts;   // (capacity,) int64: pixels of each instance
  Array vectors;  // (4, capacity, D) in the accumulation type: mean, and d term / d mean for terms
                  // 0, 1, 3
  Array runs;     // int32: LabelRuns::save
};

// embeddings (B, D, N) and labels (B, N), or (1, D, N) and (1, N) with offsets (B + 1,); terms (B,
// 4) in the accumulation type.
void forward(const Array& embeddings, const Array& labels, const Array* offsets,
             const Options& options, const Array& terms, const State* state);

// grad_terms (B, 4); grad has the embeddings' shape and type, and strides of its own.
void backward(const Array& embeddings, const Array& labels, const Array* offsets,
              const Options& options, const Array& grad_terms, const State& state,
              const Array& grad);

}  // namespace instembed::discriminative

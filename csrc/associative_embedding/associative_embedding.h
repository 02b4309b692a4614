// The associative embedding loss's terms and their gradient. See cpu.cpp for how.
#pragma once

#include "associative_embedding/formula.h"
#include "common/array.h"

namespace instembed::associative_embedding {

constexpr int kTerms = 2;  // pull, push

// What the forward pass leaves for the backward pass.
struct State {
  Array pixels;  // (B, P, K) int64: the pixel y W + x of a joint that counts, else -1
  Array means;   // (B, P, L) float64: a person's mean tag
  Array pushes;  // (B, P, L) float64: d push / d mean
};

// tags (B, K L, H, W), of joint k channels k L to k L + L - 1, with keypoints (B, P, K, 2), x and y
// in pixels; or tags (B, P, K, L) without keypoints. visible (B, P, K): > 0 counts. Any strides.
// terms (B, 2) in the accumulation type.
void forward(const Array& tags, const Array* keypoints, const Array& visible, const Push& push,
             const Array& terms, const State& state, int threads);

// grad_terms (B, 2); grad has the tags' shape and type, and strides of its own without gaps.
// `gathered`: tags are (B, P, K, L).
void backward(const Array& grad_terms, const Array& tags, const State& state, bool gathered,
              const Array& grad, int threads);

}  // namespace instembed::associative_embedding

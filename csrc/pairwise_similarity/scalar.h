// Terms of one pair of pixels at a squared distance d, and their slopes by d, on any device; the
// CPU kernel takes vectors of pairs (formula.h).
//
// With sigma = 2 / (1 + exp(d)), e = exp(-d) and t = 1 - e, a pair of one instance costs
//   -log sigma = d - 2 artanh(t / (4 - t)),
// which takes half of a small d away from it and cancels nothing, and a pair of two instances
//   -log(1 - sigma) = -log tanh(d / 2) = 2 artanh(e) = log(1 + e) - log t,
// the first where e is small, the second, of two positive numbers, elsewhere.
#pragma once

#include <cmath>

#include "common/scalar.h"

namespace instembed::pairwise_similarity {

constexpr double kNearest = 1e-6;  // pairs of two instances that are nearer count as so far apart
constexpr double kLargest = 1e15;  // coordinates beyond count as this: d of any of them is finite

template <class V>
struct Term {
  V value, slope;
};

template <class A>
INSTEMBED_INLINE Term<A> term_of_same(A d) {
  const A t = -std::expm1(-d);
  return {d - 2 * std::atanh(t / (4 - t)), 1 / (2 - t)};
}

template <class A>
INSTEMBED_INLINE Term<A> term_of_two(A distance) {
  const auto nearest = static_cast<A>(kNearest);
  const A d = distance < nearest ? nearest : distance;
  const A e = std::exp(-d), t = -std::expm1(-d);
  const A value = 3 * e < 1 ? 2 * std::atanh(e) : std::log1p(e) - std::log(t);
  return {value, distance < nearest ? A(0) : -2 * e / (t * (1 + e))};
}

}  // namespace instembed::pairwise_similarity

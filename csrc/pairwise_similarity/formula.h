// Terms of a pair of pixels at a squared distance d, and their slopes by d.
//
// With sigma = 2 / (1 + exp(d)), a pair of one instance costs -log sigma, a pair of two instances
// -log(1 - sigma) = -log tanh(d / 2). Both are twice the area tangent of a number in [0, 1/3]:
//   -log sigma         = d - 2 artanh(t / (4 - t))                        with t = 1 - exp(-d)
//   -log tanh(d / 2)   = 2 artanh(e)                                      with e = exp(-d) <= 1/3
//                      = k log 2 + 2 artanh((1 + e - m) / (1 + e + m))    with m = 2^k t in [4/3,
//                      8/3)
// so that nothing cancels, for near pairs or far ones.
#pragma once

#include <cstdint>

#include "common/exp.h"
#include "common/simd.h"

namespace instembed::pairwise_similarity {

constexpr double kNearest = 1e-6;  // pairs of two instances that are nearer count as so far apart
constexpr double kLargest = 1e15;  // coordinates beyond count as this: d of any of them is finite

// 2 artanh(s) / s as a series of s^2, to rounding for |s| <= 1/3.
template <class A>
constexpr int kArtanhTerms = sizeof(A) == 4 ? 8 : 16;

template <class A>
INSTEMBED_INLINE Vec<A> twice_artanh(const Vec<A>& s) {
  constexpr int n = kArtanhTerms<A>;
  const Vec<A> square = s * s;
  Vec<A> sum = splat(static_cast<A>(2.0 / (2 * n - 1)));
#pragma GCC unroll 16
  for (int k = n - 2; k >= 0; --k) sum = sum * square + static_cast<A>(2.0 / (2 * k + 1));
  return sum * s;
}

template <class A>
struct Decay {
  Vec<A> e, t;  // exp(-d) and 1 - exp(-d), each to a few units in its last place
};

template <class A>
INSTEMBED_INLINE Decay<A> decay(const Vec<A>& d) {
  Decay<A> result;
  result.t = Vec<A>{};
  result.e = exp2_lanes<A>(d * static_cast<A>(-1.44269504088896340736), &result.t);
  return result;
}

// All bits set in the lanes where x is negative, -0 among them.
template <class A>
INSTEMBED_INLINE Vec<MaskLane<A>> negative_lanes(const Vec<A>& x) {
  return reinterpret_cast<Vec<MaskLane<A>>>(x) >> (8 * sizeof(A) - 1);
}

template <class A>
INSTEMBED_INLINE Vec<A> blend(const Vec<MaskLane<A>>& mask, const Vec<A>& yes, const Vec<A>& no) {
  using Mask = Vec<MaskLane<A>>;
  return reinterpret_cast<Vec<A>>((reinterpret_cast<Mask>(yes) & mask) |
                                  (reinterpret_cast<Mask>(no) & ~mask));
}

template <class A>
struct Term {
  Vec<A> value, slope;
};

template <class A>
INSTEMBED_INLINE Term<A> same_instance(const Vec<A>& d) {
  const Decay<A> x = decay<A>(d);
  return {d - twice_artanh<A>(x.t / (4 - x.t)), 1 / (1 + x.e)};
}

template <class A>
INSTEMBED_INLINE Term<A> two_instances(const Vec<A>& distance) {
  using Words = Vec<std::make_unsigned_t<MaskLane<A>>>;
  constexpr int kFraction = sizeof(A) == 4 ? 23 : 52, kBias = sizeof(A) == 4 ? 127 : 1023;
  constexpr auto kWhole = static_cast<A>(uint64_t{1} << kFraction);
  const Vec<A> nearest = splat(static_cast<A>(kNearest));
  const Vec<MaskLane<A>> clamped = negative_lanes<A>(distance - nearest);
  const Vec<A> d = blend<A>(clamped, nearest, distance);
  const Decay<A> x = decay<A>(d);
  const Vec<A> sum = 1 + x.e;
  // m = 2^k t: the exponent of 3 t / 4 is -k. As a number, by the bits of 2^kFraction + its field.
  const Words field = reinterpret_cast<Words>(x.t * static_cast<A>(0.75)) >> kFraction;
  const Words whole = reinterpret_cast<Words>(splat(kWhole));
  const Vec<A> k = (kBias + kWhole) - reinterpret_cast<Vec<A>>(field | whole);
  const Vec<A> m =
      reinterpret_cast<Vec<A>>(reinterpret_cast<Words>(x.t) + ((kBias - field) << kFraction));
  const Vec<MaskLane<A>> far = negative_lanes<A>(x.e - static_cast<A>(1.0 / 3));
  const Vec<A> above = blend<A>(far, 2 * x.e, sum - m);
  const Vec<A> below = blend<A>(far, splat(A(2)), sum + m);
  const Vec<A> product = x.t * sum, inverse = 1 / (product * below);  // one division for two
  Term<A> term;
  term.value = keep(k * static_cast<A>(0.693147180559945309417), ~far) +
               twice_artanh<A>(above * product * inverse);
  term.slope = keep(-2 * x.e * below * inverse, ~clamped);
  return term;
}

}  // namespace instembed::pairwise_similarity

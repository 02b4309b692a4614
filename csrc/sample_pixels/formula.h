// The random key of a pixel: an instance's sample is its pixels with the smallest keys.
#pragma once

#include <cstdint>

#include "common/scalar.h"

namespace instembed::sample_pixels {

// A counter-based generator (SplitMix64: Steele, Lea and Flood 2014): any pixel's key at any time,
// in any order, from its image's random word.
INSTEMBED_INLINE uint64_t key(uint64_t word, uint64_t pixel) {
  uint64_t x = word + (pixel + 1) * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace instembed::sample_pixels

// Flat-kernel mean-shift grouping: the entry points that the bindings call.
#pragma once

#include <cstdint>
#include <vector>

#include "common/array.h"

namespace instembed::mean_shift {

enum class Seeding { peel, all };
enum class Leftovers { noise, nearest };

struct Options {
  double bandwidth = 1.0;
  Seeding seeding = Seeding::peel;
  Leftovers leftovers = Leftovers::noise;
  int64_t min_size = 1;
  int64_t max_iter = 300;
  double tol = 1e-3;  // in bandwidths
};

// The instances of one image, in the order of their labels 1, 2, ...
struct Instances {
  std::vector<double> centers;  // count x channels
  std::vector<int64_t> counts;  // pixels that carry the label
  int64_t iterations = 0;       // the most that one trajectory needed

  int64_t size() const { return static_cast<int64_t>(counts.size()); }
};

struct Result {
  int64_t channels = 0;
  std::vector<Instances> images;

  int64_t largest() const;  // number of instances in one image

  // centers (B, capacity, D) of float32 or float64, counts (B, capacity), instances (B,),
  // iterations (B,). Needs capacity >= largest(); what lies beyond an image's instances becomes
  // zero.
  void copy(const Array& centers, const Array& counts, const Array& instances,
            const Array& iterations) const;
};

// embeddings (B, D, N), or (1, D, N) with offsets (B + 1,); mask (B, N) or (1, N) of an integer
// type, 0 where there is background, or null; labels (B, N) or (1, N) of int64, contiguous,
// written.
Result group(const Array& embeddings, const Array* mask, const Array* offsets,
             const Options& options, const Array& labels, int threads);

}  // namespace instembed::mean_shift

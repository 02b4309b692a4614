// The two ways to find modes, and what they have in common: owners become labels.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "mean_shift/blocks.h"
#include "mean_shift/mean_shift.h"
#include "mean_shift/scan.h"

namespace instembed::mean_shift {

// Clusters of one set in the order found. Points with owner k belong to cluster k - 1.
struct Clusters {
  std::vector<double> centers;  // clusters x dims
  std::vector<int64_t> counts;  // points owned
  std::vector<bool> kept;       // false: its points are leftovers
  int64_t iterations = 0;

  int64_t size() const { return static_cast<int64_t>(counts.size()); }
};

template <class S>
Clusters peel(BlockSet<S>* set, const Options& options, Ownership* ownership, int threads);

template <class S>
Clusters all_points(const BlockSet<S>& set, const Options& options, Ownership* ownership,
                    int threads);

// Finds the nearest of some centres for the points of a block, exactly; ties go to the first.
class NearestCenters {
 public:
  NearestCenters(const std::vector<double>& centers, int dims);

  // owners[i] = 1 + the nearest centre, or 0 if that is farther than `limit`. Returns true if all
  // points have the same owner; then only owners[0] is written. `scratch` is the caller's.
  template <class S>
  bool block(const BlockSet<S>& set, int64_t b, double limit, int32_t* owners,
             std::vector<double>* scratch) const;

  int64_t size() const { return count_; }

 private:
  int dims_;
  int64_t count_;
  std::vector<double> rows_, planar_;
};

// Writes labels: label_of_owner[owner], or for leftovers (0) that of the nearest centre, if
// `nearest` is given: 1 + base + its index. counts[label - 1] is raised by the number of points
// that get a label.
template <class S>
void write_labels(const BlockSet<S>& set, const Ownership& ownership,
                  const std::vector<int64_t>& label_of_owner, const NearestCenters* nearest,
                  int64_t base, int64_t* labels, std::vector<int64_t>* counts, int threads);

}  // namespace instembed::mean_shift

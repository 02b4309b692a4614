// Boxes, areas and centroids of the instances of label maps: the entry points that the bindings
// call.
#pragma once

#include <cstdint>
#include <vector>

#include "common/array.h"
#include "common/label_runs.h"

namespace instembed::label_statistics {

// What is known of one instance, in one cache line. Integers only: any order of adding pixels gives
// the same bits. Axes are x, y, z.
struct alignas(64) Extent {
  int64_t area;
  int64_t sum[3];  // of coordinates
  int32_t low[3];
  int32_t high[3];  // of the last pixel
};

struct Instances {
  std::vector<int64_t> ids;  // ascending
  std::vector<Extent> extents;

  int64_t size() const { return static_cast<int64_t>(ids.size()); }
};

struct Result {
  int axes = 2;  // spatial dimensions
  std::vector<Instances> images;

  int64_t largest() const;  // number of instances in one image

  // ids (B, capacity), boxes (B, capacity, 2 axes) of float32, areas (B, capacity), centroids (B,
  // capacity, axes) of float32, instances (B,). Needs capacity >= largest(); rows beyond an image's
  // instances become zero.
  void copy(const Array& ids, const Array& boxes, const Array& areas, const Array& centroids,
            const Array& instances) const;
};

// labels (B, *spatial) of an integer type, with any strides.
Result measure(const Array& labels, const LabelRules& rules, int threads);

}  // namespace instembed::label_statistics

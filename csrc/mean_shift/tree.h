// Points in no useful order, sorted into the cells of a tree so that neighbours in memory are
// neighbours in space.
#pragma once

#include <cstdint>
#include <vector>

namespace instembed::mean_shift {

// Point i, pixel-major, at data + i * stride.
template <class S>
struct Rows {
  const S* data;
  int64_t stride;
  int dims;
};

struct Leaves {
  std::vector<int64_t> offsets;  // of each leaf in the order; leaves + 1 elements
  int64_t size() const { return static_cast<int64_t>(offsets.size()) - 1; }
};

// Writes `ids`, which are rows, to `order` leaf by leaf, ascending within a leaf of about `leaf`
// points. The tree is grown on a fixed sample, so the result depends on the points alone.
template <class S>
Leaves sort_into_leaves(const Rows<S>& rows, const std::vector<int64_t>& ids, double bandwidth,
                        int64_t leaf, int64_t* order, int threads);

}  // namespace instembed::mean_shift

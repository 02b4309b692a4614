// Peaks of heatmaps, and how high each tile of a heatmap is, in one pass over it.
#pragma once

#include <cstdint>
#include <vector>

#include "group_keypoints/group_keypoints.h"
#include "group_keypoints/maps.h"

namespace instembed::group_keypoints {

constexpr int64_t kTileRows = 8, kTileColumns = 16;

struct Peak {
  double score;
  int64_t pixel;
};

// What is known of one joint in one image.
struct Candidates {
  std::vector<Peak> peaks;      // the highest first, equals by pixel
  std::vector<double> tags;     // peaks x L
  std::vector<double> highest;  // of each tile, row-major; -inf where nothing is finite
};

// Of joint k of image b. At most max_people peaks.
Candidates find_candidates(const Maps& heatmaps, const Maps& tags, int64_t b, int64_t k,
                           const Options& options);

}  // namespace instembed::group_keypoints

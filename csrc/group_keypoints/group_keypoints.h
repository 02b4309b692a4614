// People from keypoint heatmaps and tags: the entry points that the bindings call.
#pragma once

#include <cstdint>
#include <vector>

#include "common/array.h"

namespace instembed::group_keypoints {

struct Options {
  int64_t max_people = 30;
  double peak_threshold = 0.1;
  double tag_threshold = 1.0;
  int64_t nms = 5;                   // pixels, odd
  std::vector<int64_t> joint_order;  // a permutation of the joints
  bool adjust = true;
  bool refine = true;
};

// All contiguous, floats of the accumulation type of the heatmaps, P = max_people.
struct Poses {
  Array keypoints;        // (B, P, K, 2)
  Array scores;           // (B, P)
  Array tags;             // (B, P, L)
  Array num_people;       // (B,) int64
  Array keypoint_scores;  // (B, P, K)
  Array visibility;       // (B, P, K) uint8: 2 for a peak, 1 for what refining found, 0 for nothing
};

// heatmaps (B, K, H, W) and tags (B, K * L, H, W) of floating types, with any strides.
void group(const Array& heatmaps, const Array& tags, const Options& options, const Poses& poses,
           int threads);

// The step between two on a GPU: the candidates (B, K, max_people, 2 + L) of each joint, score,
// pixel and tag, the best first and those that are none, with a pixel of -1, last, to people:
// pixels (B, P, K) int64, -1 where there is no peak, and people (B, P, 1 + L), score and tag. All
// contiguous, in double what is not int64, and on the CPU.
void group_candidates(const Array& candidates, const Options& options, const Array& pixels,
                      const Array& people, const Array& num_people, int threads);

// The person that each candidate goes to, or -1: as many pairs as there can be, at the least sum
// of `round(distance) * 100 - score`; among those, at the least sum of min(distance, threshold)^2.
// Distances are candidates x people.
std::vector<int64_t> match(const std::vector<double>& distances, const std::vector<double>& scores,
                           double tag_threshold);

}  // namespace instembed::group_keypoints

// Grouping of keypoints on CUDA: what is done for every pixel. Between the two, candidates go to
// the host, where group_candidates() makes people of them: the one synchronisation of a batch.
#pragma once

#include "group_keypoints/group_keypoints.h"

namespace instembed::group_keypoints {

int64_t cuda_workspace(const Array& heatmaps);

// Fills the candidates of all joints. Of the options this takes what is said of peaks.
void find_candidates_cuda(const Array& heatmaps, const Array& tags, const Options& options,
                          const Array& candidates, const Array& workspace, int64_t stream);

// Finds the joints that people miss, if options.refine, and writes where all of them are. `pixels`,
// `people` and `num_people` as group_candidates() has filled them, on the device; the last three as
// in Poses.
void finish_cuda(const Array& heatmaps, const Array& tags, const Options& options,
                 const Array& pixels, const Array& people, const Array& num_people,
                 const Array& keypoints, const Array& keypoint_scores, const Array& visibility,
                 int64_t stream);

}  // namespace instembed::group_keypoints

// Where the missing joints of people are, most likely.
#pragma once

#include <cstdint>
#include <vector>

#include "group_keypoints/people.h"

namespace instembed::group_keypoints {

// Sets joint k of those people of image b who have none to the pixel, the first of equals, with the
// largest `heatmap - round(|tag - person's tag|)`, if the heatmap is positive there. `highest` is
// how high each tile of the heatmap is.
void find_missing(const Maps& heatmaps, const Maps& tags, int64_t b, int64_t k,
                  const std::vector<double>& highest, std::vector<Person>* people);

}  // namespace instembed::group_keypoints

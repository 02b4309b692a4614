// Candidates of all joints of an image into people.
#pragma once

#include <cstdint>
#include <vector>

#include "group_keypoints/peaks.h"

namespace instembed::group_keypoints {

struct Person {
  std::vector<Peak> joints;         // K; pixel -1 where there is none
  std::vector<uint8_t> visibility;  // K: 2 for a peak, 1 for what refining found, 0 for nothing
  std::vector<double> tag;          // the mean of the joints'
  double score = 0;
};

// The best max_people, highest score first, equals in order of their start. Candidates are those of
// the image's K joints.
std::vector<Person> group_people(const Candidates* candidates, int64_t joints, int64_t dims,
                                 const Options& options);

}  // namespace instembed::group_keypoints

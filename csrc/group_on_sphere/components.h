// Which points of a cloud hang together.
#pragma once

#include <vector>

#include "sphere/cloud.h"

namespace instembed::group_on_sphere {

// The lowest slot of each slot's connected component, where two points are connected if their
// cosine, in double, is at least `threshold`; -1 where a slot holds no point.
template <class A>
std::vector<int32_t> connect(const sphere::Cloud<A>& cloud, double threshold, int threads);

}  // namespace instembed::group_on_sphere

// Which seeds come first, on any device.
#pragma once

#include "common/host_device.h"

namespace instembed::seeds {

// Larger, and a NaN is below all numbers: of those that are neither better nor worse, the seed that
// was there first comes first.
INSTEMBED_HOST_DEVICE inline bool is_better(double score, double other) {
  return score > other || (score == score && other != other);
}

}  // namespace instembed::seeds

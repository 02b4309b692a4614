// What counts as a point of the unit sphere.
#pragma once

#include "common/host_device.h"

namespace instembed::sphere {

// Whether |x|^2 is that of a unit vector. Zero, NaN and infinity are not.
INSTEMBED_HOST_DEVICE inline bool is_unit(double square) { return square > 0.5 && square < 2; }

}  // namespace instembed::sphere

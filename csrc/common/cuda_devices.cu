#include "common/cuda.h"
#include "common/cuda_devices.h"

namespace instembed::cuda {

int visible_devices() { return device_count(); }

}  // namespace instembed::cuda

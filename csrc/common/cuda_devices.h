// What a binding may ask about devices without a CUDA header.
#pragma once

namespace instembed::cuda {

int visible_devices();  // 0 without a driver

}  // namespace instembed::cuda

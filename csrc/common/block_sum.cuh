// Sums over the threads of a block.
#pragma once

#include "common/cuda.h"

namespace instembed::cuda {

constexpr int kBlockWarps = 8;  // of blocks of 256 threads

// The sum of `value` over the 256 threads of a block, the same for all of them, in a fixed order.
// `room` is kBlockWarps elements of shared memory.
__device__ __forceinline__ double sum_block(double value, SharedPtr<double> room) {
  value = warp_sum(value);
  __syncthreads();  // the sum before has been read
  if (threadIdx.x % kWarp == 0) room[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kBlockWarps; ++warp) sum += room[warp];
  return sum;
}

}  // namespace instembed::cuda

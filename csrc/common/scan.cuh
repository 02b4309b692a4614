// Sums over the threads of a block, in the order of the threads.
#pragma once

#include "common/cuda.h"

namespace instembed::cuda {

// The sum of `value` over the threads of a block of `warps` warps that come before this one, and
// over all. `shared` has an element a warp. Every thread calls it.
template <int warps, class I>
__device__ __forceinline__ I sum_before(I value, SharedPtr<I> shared, I* all) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  I upto = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const I other = __shfl_up_sync(kAllLanes, upto, step);
    if (lane >= step) upto += other;
  }
  __syncthreads();  // what was there before has been read
  if (lane == kWarp - 1) shared[warp] = upto;
  __syncthreads();
  I before = upto - value, total = 0;
#pragma unroll
  for (int w = 0; w < warps; ++w) {
    const I sum = shared[w];
    if (w < warp) before += sum;
    total += sum;
  }
  *all = total;
  return before;
}

}  // namespace instembed::cuda

// A barrier for the blocks of a group, of a kernel that launch_together() started.
#pragma once

#include <cstdint>

#include "common/cuda.h"

namespace instembed::cuda {

class GroupBarrier {
 public:
  // What a thread of the group wrote before is there for all of its threads after. `arrived` is
  // zero at the start of the kernel.
  __device__ void wait(unsigned long long* arrived, int blocks) {
    __syncthreads();
    if (threadIdx.x == 0 && blocks > 1) {
      expected_ += static_cast<unsigned long long>(blocks);
      __threadfence();
      atomicAdd(arrived, 1ull);
      while (*static_cast<const volatile unsigned long long*>(arrived) < expected_) spin();
      __threadfence();
    }
    __syncthreads();
  }

 private:
  unsigned long long expected_ = 0;  // of thread 0; 64 bits do not run out
};

}  // namespace instembed::cuda

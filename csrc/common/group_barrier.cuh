// A barrier for the blocks of a group, of a kernel that launch_together() started.
#pragma once

#include <cstdint>

#include "common/cuda.h"

namespace instembed::cuda {

class GroupBarrier {
 public:
  // `arrived` is zero at the start of the kernel.
  __device__ GroupBarrier(unsigned long long* arrived, int64_t blocks)
      : arrived_(arrived), blocks_(static_cast<unsigned long long>(blocks)) {}

  // What a thread of the group wrote before is there for all of its threads after.
  __device__ void wait() {
    __syncthreads();
    if (threadIdx.x == 0 && blocks_ > 1) {
      expected_ += blocks_;
      __threadfence();
      atomicAdd(arrived_, 1ull);
      while (*static_cast<const volatile unsigned long long*>(arrived_) < expected_) spin();
      __threadfence();
    }
    __syncthreads();
  }

 private:
  unsigned long long* arrived_;
  unsigned long long blocks_;
  unsigned long long expected_ = 0;  // of thread 0; 64 bits do not run out
};

}  // namespace instembed::cuda

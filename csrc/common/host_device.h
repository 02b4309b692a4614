// Marks formulas that CPU and CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define INSTEMBED_HOST_DEVICE __host__ __device__
#else
#define INSTEMBED_HOST_DEVICE
#endif

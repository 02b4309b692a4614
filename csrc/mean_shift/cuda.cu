#include "mean_shift/cuda.cuh"

#include "recurrent_mean_shift/cuda.cuh"

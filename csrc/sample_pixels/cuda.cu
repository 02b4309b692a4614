#include "sample_pixels/cuda.cuh"

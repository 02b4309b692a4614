#include "cosine_margin/cuda.cuh"

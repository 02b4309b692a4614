#include "discriminative/cuda.cuh"

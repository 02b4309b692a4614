#include "gather_at/cuda.cuh"

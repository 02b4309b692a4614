#include "associative_embedding/cuda.cuh"

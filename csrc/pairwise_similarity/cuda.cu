#include "pairwise_similarity/cuda.cuh"

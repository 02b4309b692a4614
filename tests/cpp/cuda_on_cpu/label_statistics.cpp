#include "label_statistics/cuda.cuh"

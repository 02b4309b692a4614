#include "group_on_sphere/cuda.cuh"

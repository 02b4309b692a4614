#include "group_keypoints/cuda.cuh"

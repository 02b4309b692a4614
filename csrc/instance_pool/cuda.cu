#include "instance_pool/cuda.cuh"

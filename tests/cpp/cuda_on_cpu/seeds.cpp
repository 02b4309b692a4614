#include "seeds/cuda.cu"

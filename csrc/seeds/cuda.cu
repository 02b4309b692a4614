#include "seeds/grow.cuh"
#include "seeds/mask_iou.cuh"
#include "seeds/select.cuh"

// Masks of the instances of label maps, as pixels or as COCO run lengths.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/array.h"

namespace instembed::detections {

// labels (H, W) of an integer type, with any strides; ids (K,) int64, distinct; masks (K, H, W) of
// bytes, written: 1 where a pixel has the id.
void fill_masks(const Array& labels, const Array& ids, const Array& masks, int threads);

// COCO's compressed run lengths of the masks of `ids` in labels (H, W). Reads the labels once,
// whatever K.
std::vector<std::string> encode_masks(const Array& labels, const Array& ids, int threads);

}  // namespace instembed::detections

// How large outputs get their memory.
#pragma once

#include <cstddef>

#include "common/array.h"

namespace instembed {

// To be called before the first write to a large output. An allocator maps such a block afresh each
// time, and touching it page by page can cost more than computing what goes there; huge pages make
// that cheap.
void prefer_huge_pages(void* data, size_t bytes);

// Zeroes an array without gaps, in any order of its dimensions: a gradient that few places get.
void fill_zero(const Array& array, int threads);

}  // namespace instembed

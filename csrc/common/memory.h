// How large outputs get their memory.
#pragma once

#include <cstddef>

namespace instembed {

// To be called before the first write to a large output. An allocator maps such a block afresh each
// time, and touching it page by page can cost more than computing what goes there; huge pages make
// that cheap.
void prefer_huge_pages(void* data, size_t bytes);

}  // namespace instembed

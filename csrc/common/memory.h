// How large outputs get their memory.
#pragma once

#include <cstddef>

namespace instembed {

// To be called before the first write to a large output. An allocator maps such a block afresh each
// time, and touching it page by page can cost more than computing what goes there; huge pages make
// that cheap.
void prefer_huge_pages(void* data, size_t bytes);

// Whether an output is so large that whoever reads it next finds little of it in a cache anyway.
// Such an output is best written past the caches: else each of its lines is read from memory first,
// only to be overwritten.
bool outgrows_caches(size_t bytes);

// memcpy past the caches, where the processor can.
void stream_copy(void* target, const void* source, size_t bytes);

// After a thread's last stream_copy: makes what it wrote visible to other threads in order.
void end_stream();

}  // namespace instembed

// How large outputs and large transient tables get their memory.
#pragma once

#include <cstddef>

#include "common/array.h"

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

// Zeroed memory straight from the system: a page costs nothing before it is written, and all go
// back at the end, where an allocator would keep them for later.
class Pages {
 public:
  explicit Pages(size_t bytes);
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  size_t bytes_;
  void* data_;
};

// Zeroes an array without gaps, in any order of its dimensions: a gradient that few places get.
void fill_zero(const Array& array, int threads);

}  // namespace instembed

#include "common/memory.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/parallel.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace instembed {

void prefer_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr size_t kLarge = size_t{4} << 20, kPage = 4096;
  if (bytes < kLarge) return;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin,
          MADV_HUGEPAGE);  // advice: failure changes nothing
#else
  (void)data;
  (void)bytes;
#endif
}

void fill_zero(const Array& array, int threads) {
  constexpr int64_t kChunk = int64_t{1} << 18;
  const int64_t elements = array.size();
  if (elements == 0) return;
  int64_t last = 0;
  for (int k = 0; k < array.ndim; ++k) {
    expect(array.shape[k] == 1 || array.strides[k] > 0, "gradient: expected positive strides");
    last += (array.shape[k] - 1) * array.strides[k];
  }
  expect(last + 1 == elements, "gradient: expected an array without gaps");
  const int64_t bytes = elements * item_size(array.dtype);
  char* data = array.as<char>();
  prefer_huge_pages(data, bytes);
  parallel_for((bytes + kChunk - 1) / kChunk, threads, [&](int64_t k) {
    std::memset(data + k * kChunk, 0, std::min(kChunk, bytes - k * kChunk));
  });
}

}  // namespace instembed

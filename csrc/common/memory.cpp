#include "common/memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "common/parallel.h"

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __SSE2__
#include <emmintrin.h>
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

#ifdef __linux__
Pages::Pages(size_t bytes) : bytes_(bytes ? bytes : 1) {
  data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data_ == MAP_FAILED) throw std::bad_alloc();
}
Pages::~Pages() { munmap(data_, bytes_); }
#else
Pages::Pages(size_t bytes) : bytes_(bytes ? bytes : 1), data_(std::calloc(bytes_, 1)) {
  if (!data_) throw std::bad_alloc();
}
Pages::~Pages() { std::free(data_); }
#endif

bool outgrows_caches(size_t bytes) {
  constexpr size_t kLarge = size_t{8} << 20;
  return bytes >= kLarge;
}

void stream_copy(void* target, const void* source, size_t bytes) {
#ifdef __SSE2__
  constexpr size_t kUnit = sizeof(__m128i);
  auto* to = static_cast<char*>(target);
  const auto* from = static_cast<const char*>(source);
  if (reinterpret_cast<uintptr_t>(to) % kUnit == 0) {
    for (; bytes >= kUnit; to += kUnit, from += kUnit, bytes -= kUnit) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
  }
  std::memcpy(to, from, bytes);
#else
  std::memcpy(target, source, bytes);
#endif
}

void end_stream() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

void fill_zero(const Array& array, int threads) {
  constexpr int64_t kChunk = int64_t{1} << 18;
  const int64_t elements = array.size();
  if (elements == 0) return;
  expect_gapless(array, "gradient");
  const int64_t bytes = elements * item_size(array.dtype);
  char* data = array.as<char>();
  prefer_huge_pages(data, bytes);
  parallel_for((bytes + kChunk - 1) / kChunk, threads, [&](int64_t k) {
    std::memset(data + k * kChunk, 0, std::min(kChunk, bytes - k * kChunk));
  });
}

}  // namespace instembed

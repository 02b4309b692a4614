// Label maps line by line: where ids change along a line, and the runs between.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/array.h"

namespace instembed {

// A batch of label maps (B, *spatial) of 1 to 3 spatial dimensions as (B, z, y, x), whatever the
// strides.
struct LabelGrid {
  int64_t images = 0, depth = 1, height = 1, width = 1;
  int64_t image_stride = 0, z_stride = 0, y_stride = 0, x_stride = 0;

  explicit LabelGrid(const Array& labels);
  int64_t pixels() const { return depth * height * width; }
};

// Bit i % 64 of changed[i / 64] says whether line[i] != line[i - 1], for 0 < i < n; the first bit
// and those from n to the end of a word are 0. For elements of 1, 2, 4 and 8 bytes.
void find_changes(const uint8_t* line, int64_t n, uint64_t* changed);
void find_changes(const uint16_t* line, int64_t n, uint64_t* changed);
void find_changes(const uint32_t* line, int64_t n, uint64_t* changed);
void find_changes(const uint64_t* line, int64_t n, uint64_t* changed);

// Cuts lines into runs of one id. Keeps scratch memory, so that one scanner serves many lines.
template <class L>
class LineScanner {
 public:
  // Lines are scanned in pieces of at most this many pixels: runs end at a piece's end at the
  // latest.
  static constexpr int64_t kPiece = 4096;

  // f(start, end, id) for each run of the n elements at `line`, in order.
  template <class F>
  void scan(const L* line, int64_t stride, int64_t n, F&& f) {
    for (int64_t from = 0; from < n; from += kPiece) {
      const int64_t length = n - from < kPiece ? n - from : kPiece;
      const L* piece = line + from * stride;
      if (stride != 1) {
        gathered_.resize(kPiece);
        for (int64_t i = 0; i < length; ++i) gathered_[i] = piece[i * stride];
        piece = gathered_.data();
      }
      scan_piece(piece, length, from, f);
    }
  }

 private:
  template <class F>
  void scan_piece(const L* piece, int64_t n, int64_t from, F& f) {
    find_changes(reinterpret_cast<const std::make_unsigned_t<L>*>(piece), n, changed_.data());
    int64_t start = 0;
    for (int64_t i = 0; i < n; i += 64) {
      for (uint64_t bits = changed_[i / 64]; bits; bits &= bits - 1) {
        const int64_t end = i + __builtin_ctzll(bits);
        f(from + start, from + end, static_cast<int64_t>(piece[start]));
        start = end;
      }
    }
    f(from + start, from + n, static_cast<int64_t>(piece[start]));
  }

  std::vector<uint64_t> changed_ = std::vector<uint64_t>(kPiece / 64);
  std::vector<L> gathered_;
};

}  // namespace instembed

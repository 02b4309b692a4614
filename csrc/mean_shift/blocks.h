// Points in blocks: a few hundred points that lie together, with their bounding ball and their sum.
//
// A mean-shift step asks which points lie in a ball. Blocks wholly inside it give their sum, blocks
// wholly outside give nothing, and only those that straddle the border are looked into. In an
// image, a block is a run of neighbouring pixels with similar embeddings: rough pixels at a border
// make small blocks of their own and leave the interiors pure. Points in no useful order are sorted
// into the cells of a tree first.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "common/array.h"
#include "common/batch.h"

namespace instembed::mean_shift {

constexpr int kMaxBlock = 256;

// An array that is not initialised: most of these are large and written once.
template <class T>
struct Buffer {
  std::unique_ptr<T[]> data;
  Buffer() = default;
  explicit Buffer(int64_t n) : data(new T[static_cast<size_t>(n)]) {}
  T* get() const { return data.get(); }
  T& operator[](int64_t i) const { return data[static_cast<size_t>(i)]; }
};

template <class S>
struct Block {
  const S* x;  // channel d of point i is x[d * stride + i]
  int64_t stride;
  int64_t first;          // pixel of its first point
  const int64_t* pixels;  // of its points, ascending; null where they follow the first
  int32_t size;

  int64_t pixel(int32_t i) const { return pixels ? pixels[i] : first + i; }
};

// Bounding balls, planar, for scans over many blocks.
template <class S>
struct Balls {
  int64_t count = 0;
  int64_t row = 0;    // from one channel of the centres to the next
  Buffer<S> centers;  // dims x row
  Buffer<S> radius;   // of the points about the centre as stored, rounding included

  void allocate(int64_t blocks, int dims) {
    count = blocks;
    row = blocks;
    centers = Buffer<S>(dims * row);
    radius = Buffer<S>(blocks);
  }
};

// Sum, centre and radius of the points of a block.
void summarize(const Block<float>& block, int dims, float* center, float* radius, double* sum);
void summarize(const Block<double>& block, int dims, double* center, double* radius, double* sum);

// The points of one class of one image.
template <class S>
struct BlockSet {
  int dims = 0;
  int64_t label_class = 0;
  int64_t points = 0;
  Balls<S> balls;
  std::vector<Block<S>> blocks;
  Buffer<double> sums;  // blocks x dims

  int64_t size() const { return static_cast<int64_t>(blocks.size()); }
};

// One image: its sets in ascending order of class, and what they point into.
template <class S>
struct Cloud {
  std::vector<BlockSet<S>> sets;
  std::vector<Buffer<S>> points;
  std::vector<Buffer<int64_t>> pixels;
};

// Consecutive pixels of one class, counted from where the reader started.
struct ClassRun {
  int64_t begin, end, label_class;
};

// A view of one image's classes: 0 is background.
struct ClassMap {
  const Array* mask = nullptr;  // null: all pixels are of class 1
  int64_t first = 0, stride = 1;

  void read(int64_t from, int64_t n, int64_t* classes) const;
  // Appends the runs of what is not background among pixels [from, from + n).
  void find_runs(int64_t from, int64_t n, std::vector<ClassRun>* runs) const;
};

// Reads image b. Points that are not finite are left out: they and the background get label 0.
template <class S>
Cloud<S> build_cloud(const Array& embeddings, const Batch& batch, int64_t b,
                     const ClassMap& classes, double bandwidth, int64_t* labels, int threads);

}  // namespace instembed::mean_shift

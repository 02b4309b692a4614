// Greedy choice of seeds: each is the pixel with the largest log S_p + diversity log(min_t |e_p -
// e_t|^2) over the seeds t before it.
//
// Distances to the nearest seed only fall when seeds are added, and so does the objective: what a
// block of pixels once had at best bounds what it has now. So blocks wait in a queue by that bound,
// and only those that come to its front are brought up to date, with all seeds since at once. Most
// blocks never look at most seeds. This file is compiled without fused multiply-adds: distances are
// those of the reference to the last bit.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <queue>
#include <vector>

#include "common/batch.h"
#include "common/dtype.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/tiles.h"
#include "seeds/seeds.h"

namespace instembed::seeds {
namespace {

constexpr int kBlock = 256;
constexpr int kBlocksPerTask = 8;
constexpr int kBatch = 4 * kBlocksPerTask;  // blocks brought up to date side by side
constexpr double kNever = -std::numeric_limits<double>::infinity();
constexpr double kTaken = -1;  // in place of a distance: no seed can be here

using V = Vec<double>;
using Mask = Vec<int64_t>;
constexpr int L = kLanes<double>;

// The logarithm of normal numbers to 1e-9, whatever their size.
INSTEMBED_INLINE V log_about(const V& x) {
  // x = 2^exponent * m with m from sqrt(1/2) to sqrt(2); log m = 2 artanh((m - 1) / (m + 1)).
  constexpr int64_t kRootHalf = 0x3fe6a09e667f3bcd, kMantissa = 0x000fffffffffffff;
  const Mask bits = reinterpret_cast<Mask>(x) - kRootHalf;
  const Mask exponent = bits >> 52;
  const V m = reinterpret_cast<V>((bits & kMantissa) + kRootHalf);
  const V t = (m - 1.0) / (m + 1.0), t2 = t * t;
  const V series = 1.0 + t2 * (1.0 / 3 + t2 * (1.0 / 5 + t2 * (1.0 / 7 + t2 * (1.0 / 9))));
  return __builtin_convertvector(exponent, V) * 0.6931471805599453 + 2.0 * t * series;
}

double objective(double log_seediness, double distance, double diversity) {
  if (!(distance > 0)) return kNever;  // taken, or the embedding of a seed again
  return diversity > 0 ? log_seediness + diversity * std::log(distance) : log_seediness;
}

struct Best {
  double value = kNever;
  int place = 0;  // in the block
};

// Brings the distances of a block up to date with `count` more seeds (count x dims) and finds the
// first of its best pixels.
template <class A>
INSTEMBED_INLINE Best update_block(const PlanarTile<A>& tile, int n, int dims, const double* seeds,
                                   int64_t count, const double* log_seediness, double* distances,
                                   double diversity) {
  using Narrow = vector_t<A, L>;
  double about[kBlock];
  Mask strange{};
  V largest = splat(kNever);
  for (int i = 0; i < n; i += L) {
    V nearest = load<V>(distances + i);
    for (int64_t s = 0; s < count; ++s) {
      V a{};
      for (int d = 0; d < dims; ++d) {
        const V v = __builtin_convertvector(load<Narrow>(tile.row(d) + i), V) - seeds[s * dims + d];
        a += v * v;
      }
      nearest = a < nearest ? a : nearest;
    }
    store(distances + i, nearest);
    const Mask possible = nearest > 0.0;
    strange |= possible & ((nearest < 1e-300) | (nearest > 1e300));
    V value = load<V>(log_seediness + i);
    if (diversity > 0) value += diversity * log_about(nearest);
    value = possible ? value : splat(kNever);
    store(about + i, value);
    largest = value > largest ? value : largest;
  }
  double least = kNever;
  if (!any_lane(strange)) {
    for (int k = 0; k < L; ++k) least = std::max(least, largest[k]);
    least -= 1e-8 * diversity + 1e-11 * (1 + std::abs(least));
  }
  Best best;
  for (int i = 0; i < n; ++i) {
    if (about[i] < least) continue;
    const double value = objective(log_seediness[i], distances[i], diversity);
    if (value > best.value) best = {value, i};
  }
  return best;
}

INSTEMBED_SIMD Best update(const PlanarTile<float>& tile, int n, int dims, const double* seeds,
                           int64_t count, const double* log_seediness, double* distances,
                           double diversity) {
  return update_block(tile, n, dims, seeds, count, log_seediness, distances, diversity);
}
INSTEMBED_SIMD Best update(const PlanarTile<double>& tile, int n, int dims, const double* seeds,
                           int64_t count, const double* log_seediness, double* distances,
                           double diversity) {
  return update_block(tile, n, dims, seeds, count, log_seediness, distances, diversity);
}

// A block in the queue: the seeds before `seen` are in its distances, and its best pixel among
// those is at `place`.
struct Entry {
  double bound;
  int64_t block;
  int place;
  int64_t seen;

  bool operator<(const Entry& other) const {
    return bound != other.bound ? bound < other.bound : block > other.block;
  }
};

template <class T>
class Selector {
  using A = accumulator_t<T>;

 public:
  Selector(const Image<const T>& image, const Selection& selection, int threads)
      : image_(image),
        selection_(selection),
        threads_(threads),
        dims_(static_cast<int>(image.channels)),
        blocks_((image.pixels + kBlock - 1) / kBlock),
        // Vectors may go on past the last pixel.
        log_seediness_(new double[blocks_ * kBlock]),
        distances_(new double[blocks_ * kBlock]) {
    prefer_huge_pages(log_seediness_.get(), blocks_ * kBlock * sizeof(double));
    prefer_huge_pages(distances_.get(), blocks_ * kBlock * sizeof(double));
  }

  // read(pixel) is its seediness, NaN for pixels that may be no seed.
  template <class Read>
  void run(Read&& read, int64_t count, int64_t* indices, double* scores) {
    std::vector<Entry> first(blocks_);
    for_blocks(blocks_, [&](int64_t b) { first[b] = start(b, read); });
    std::vector<Entry> waiting;
    for (const Entry& entry : first) {
      if (entry.bound > kNever) waiting.push_back(entry);
    }
    if (count == 0 || waiting.empty()) return;
    // The first seed has the largest seediness; then all distances count.
    const Entry top = *std::max_element(waiting.begin(), waiting.end());
    take(top, read, indices, scores, 0);
    for (Entry& entry : waiting) entry.bound = std::numeric_limits<double>::infinity();
    std::priority_queue<Entry> queue({}, std::move(waiting));
    std::vector<Entry> batch;
    for (int64_t k = 1; k < count;) {
      batch.clear();
      // More than are needed at times, and no more than would be soon.
      const size_t most = k == 1 ? queue.size() : kBatch;
      while (!queue.empty() && queue.top().seen < k && batch.size() < most) {
        batch.push_back(queue.top());
        queue.pop();
      }
      if (batch.empty()) {
        if (queue.empty()) return;
        const Entry best = queue.top();
        take(best, read, indices, scores, k++);
        continue;
      }
      for_blocks(static_cast<int64_t>(batch.size()), [&](int64_t e) { refresh(&batch[e], k); });
      for (const Entry& entry : batch) {
        if (entry.bound > kNever) queue.push(entry);
      }
    }
  }

 private:
  template <class Task>
  void for_blocks(int64_t count, Task&& task) {
    parallel_for((count + kBlocksPerTask - 1) / kBlocksPerTask, threads_, [&](int64_t k) {
      const int64_t end = std::min(count, (k + 1) * kBlocksPerTask);
      for (int64_t b = k * kBlocksPerTask; b < end; ++b) task(b);
    });
  }

  int size(int64_t b) const {
    return static_cast<int>(std::min<int64_t>(kBlock, image_.pixels - b * kBlock));
  }

  template <class Read>
  Entry start(int64_t b, Read&& read) {
    Entry entry{kNever, b, 0, 0};
    const int64_t from = b * kBlock;
    const int n = size(b);
    std::fill_n(&log_seediness_[from], kBlock, kNever);
    std::fill_n(&distances_[from], kBlock, kTaken);
    bool finite[kBlock];
    std::fill(finite, finite + n, true);
    for (int d = 0; d < dims_; ++d) {
      const T* row = image_.data + d * image_.channel_stride + from * image_.pixel_stride;
      for (int i = 0; i < n; ++i) {
        finite[i] &= std::isfinite(convert<A>(row[i * image_.pixel_stride]));
      }
    }
    for (int i = 0; i < n; ++i) {
      const double seediness = read(from + i);
      if (!finite[i] || !(seediness > 0) || !(seediness >= selection_.min_seediness) ||
          !std::isfinite(seediness)) {
        continue;
      }
      log_seediness_[from + i] = std::log(seediness);
      distances_[from + i] = std::numeric_limits<double>::infinity();
      if (seediness > entry.bound) {
        entry.bound = seediness;
        entry.place = i;
      }
    }
    return entry;
  }

  void refresh(Entry* entry, int64_t seeds) {
    const int64_t from = entry->block * kBlock;
    const int n = size(entry->block);
    const std::unique_ptr<A[]> scratch(new A[dims_ * planar_stride(kBlock)]);
    const PlanarTile<A> tile =
        load_planar<A>(image_, from, n, scratch.get(), planar_stride(kBlock));
    const Best best =
        update(tile, n, dims_, seeds_.data() + entry->seen * dims_, seeds - entry->seen,
               log_seediness_.get() + from, distances_.get() + from, selection_.diversity);
    *entry = {best.value, entry->block, best.place, seeds};
  }

  template <class Read>
  void take(const Entry& entry, Read&& read, int64_t* indices, double* scores, int64_t k) {
    const int64_t pixel = entry.block * kBlock + entry.place;
    indices[k] = pixel;
    scores[k] = read(pixel);
    for (int d = 0; d < dims_; ++d) {
      seeds_.push_back(static_cast<double>(
          convert<A>(image_.data[d * image_.channel_stride + pixel * image_.pixel_stride])));
    }
  }

  const Image<const T> image_;
  const Selection selection_;
  const int threads_;
  const int dims_;
  const int64_t blocks_;
  std::unique_ptr<double[]> log_seediness_, distances_;
  std::vector<double> seeds_;
};

}  // namespace

void select(const Array& embeddings, const Array& seediness, const Array* mask,
            const Selection& selection, const Array& indices, const Array& scores, int threads) {
  const Batch batch = Batch::of_embeddings(embeddings, nullptr);
  const int64_t images = batch.images, pixels = batch.pixels;
  expect(seediness.ndim == 2 && seediness.shape[0] == images && seediness.shape[1] == pixels,
         "seediness: expected the embeddings' shape without channels");
  if (mask) {
    expect(mask->dtype == DType::u8 && mask->ndim == 2 && mask->shape[0] == images &&
               mask->shape[1] == pixels,
           "mask: expected bytes in the embeddings' shape without channels");
  }
  expect(indices.ndim == 2 && indices.shape[0] == images, "indices: expected (images, seeds)");
  const int64_t count = indices.shape[1];
  expect_contiguous(indices, DType::i64, images * count, "indices");
  expect(scores.dtype == DType::f32 || scores.dtype == DType::f64,
         "scores: expected float32 or float64");
  expect_contiguous(scores, scores.dtype, images * count, "scores");
  const bool side_by_side = images >= threads;
  parallel_for(images, side_by_side ? threads : 1, [&](int64_t b) {
    int64_t* found = indices.as<int64_t>() + b * count;
    std::vector<double> values(count, 0.0);
    std::fill(found, found + count, int64_t{-1});
    dispatch_floating(seediness.dtype, "seediness", [&](auto seediness_zero) {
      using U = decltype(seediness_zero);
      const U* source = seediness.as<const U>() + b * seediness.strides[0];
      const auto read = [&](int64_t pixel) {
        const bool outside =
            mask && !mask->as<const uint8_t>()[b * mask->strides[0] + pixel * mask->strides[1]];
        return outside ? std::numeric_limits<double>::quiet_NaN()
                       : static_cast<double>(
                             convert<accumulator_t<U>>(source[pixel * seediness.strides[1]]));
      };
      dispatch_floating(embeddings.dtype, "embeddings", [&](auto zero) {
        using T = decltype(zero);
        Selector<T> selector(Image<const T>(embeddings, batch, b), selection,
                             side_by_side ? 1 : threads);
        selector.run(read, count, found, values.data());
      });
    });
    for (int64_t k = 0; k < count; ++k) {
      if (scores.dtype == DType::f32) {
        scores.as<float>()[b * count + k] = static_cast<float>(values[k]);
      } else {
        scores.as<double>()[b * count + k] = values[k];
      }
    }
  });
}

}  // namespace instembed::seeds

// Greedy choice of seeds: each is the pixel with the largest log S_p + diversity log(min_t |e_p -
// e_t|^2) over the seeds t before it.
//
// Distances to the nearest seed only fall when seeds are added, and so does the objective: what a
// block of pixels once had at best bounds what it has now. So blocks wait in a queue by that bound,
// and only those that come to its front are brought up to date, with all seeds since at once. Seeds
// that are farther from the box around a block than any of its pixels is from its nearest seed
// change nothing there, and a sum in float tells most pixels that a seed is not their nearest. What
// is left is summed in double. This file is compiled without fused multiply-adds: distances are
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
#include "common/simd_widths.h"
#include "common/tiles.h"
#include "mean_shift/formula.h"
#include "seeds/seeds.h"

namespace instembed::seeds {
namespace {

constexpr int kBlock = 64;
constexpr int kBlocksPerTask = 16;
constexpr int kBatch = 4 * kBlocksPerTask;  // blocks brought up to date side by side
constexpr double kNever = -std::numeric_limits<double>::infinity();
constexpr double kSmall = 1e-300;   // log_about is for numbers from there to its inverse
constexpr double kSmallLog = -690;  // of such numbers; log_about gives less below 1e-300, too
constexpr double kTaken = -1;       // in place of a distance: no seed can be here

// The logarithm of normal numbers to 1e-9, whatever their size.
template <class V>
INSTEMBED_INLINE V log_about(const V& x) {
  using Bits = vector_t<int64_t, sizeof(V) / 8>;
  // x = 2^exponent * m with m from sqrt(1/2) to sqrt(2); log m = 2 artanh((m - 1) / (m + 1)).
  constexpr int64_t kRootHalf = 0x3fe6a09e667f3bcd, kMantissa = 0x000fffffffffffff;
  const Bits bits = reinterpret_cast<Bits>(x) - kRootHalf;
  const V m = reinterpret_cast<V>((bits & kMantissa) + kRootHalf);
  const V t = (m - 1.0) / (m + 1.0), t2 = t * t;
  const V series = 1.0 + t2 * (1.0 / 3 + t2 * (1.0 / 5 + t2 * (1.0 / 7 + t2 * (1.0 / 9))));
  // The exponent as a number, by way of the mantissa of one that is large.
  constexpr int64_t kLarge = 0x4338000000000000;  // 1.5 * 2^52
  const V exponent = reinterpret_cast<V>((bits >> 52) + kLarge) - 6755399441055744.0;
  return exponent * 0.6931471805599453 + 2.0 * t * series;
}

double objective(double seediness, double distance, double diversity) {
  if (!(distance > 0)) return kNever;  // taken, or the embedding of a seed again
  const double value = std::log(seediness);
  return diversity > 0 ? value + diversity * std::log(distance) : value;
}

struct Best {
  double value = kNever;
  int place = 0;  // in the block
};

// Seeds in the order in which they were chosen.
template <class A>
struct Chosen {
  int dims;
  int64_t row;               // room for seeds, in whole vectors
  std::vector<double> rows;  // seed after seed
  std::vector<A> planar;     // channel after channel

  Chosen(int dims, int64_t count)
      : dims(dims), row((count + 2 * kLanes<A> - 1) / kLanes<A> * kLanes<A>), planar(dims * row) {}
};

// A block of pixels as it is when seeds before `seen` are in its distances.
template <class A>
struct Block {
  PlanarTile<A> tile;
  int n;
  A* box;  // lowest and highest values, channel after channel
  const double* seediness;
  double* logs;  // of seediness, about
  double* distances;
  double* farthest;  // the largest distance
};

// The box, the lanes of pixels that are finite, and the logarithms of their seediness.
template <int kBytes, class A>
INSTEMBED_INLINE void open_block(const Block<A>& block, int dims, MaskLane<A>* finite) {
  constexpr int W = kBytes / static_cast<int>(sizeof(A)), L = kBytes / 8;
  using V = vector_t<A, W>;
  using Lanes = vector_t<MaskLane<A>, W>;
  const V infinity = splat_as<V>(std::numeric_limits<A>::infinity());
  std::fill_n(finite, kBlock, MaskLane<A>{-1});
  for (int d = 0; d < dims; ++d) {
    V low = infinity, high = -infinity;
    for (int i = 0; i < block.n; i += W) {
      const auto inside = first_lanes<A, Lanes>(block.n - i);
      const V x = load<V>(block.tile.row(d) + i);
      store(finite + i, load<Lanes>(finite + i) & (x - x == V{}));
      low = inside & (x < low) ? x : low;  // passes over NaN
      high = inside & (x > high) ? x : high;
    }
    block.box[2 * d] = low[0];
    block.box[2 * d + 1] = high[0];
    for (int k = 1; k < W; ++k) {
      block.box[2 * d] = std::min(block.box[2 * d], low[k]);
      block.box[2 * d + 1] = std::max(block.box[2 * d + 1], high[k]);
    }
  }
  for (int i = 0; i < block.n; i += L) {
    store(block.logs + i, log_about(load<vector_t<double, L>>(block.seediness + i)));
  }
}

// The seeds from `seen` to `count` that may be nearer to a pixel than what it has.
template <int kBytes, class A>
INSTEMBED_INLINE void find_nearer(const Block<A>& block, const Chosen<A>& chosen, int64_t seen,
                                  int64_t count, std::vector<int32_t>* nearer) {
  constexpr int L = kBytes / static_cast<int>(sizeof(A));
  using V = vector_t<A, L>;
  const double error = 1 + 4 * mean_shift::distance_error<A>(chosen.dims);
  const A limit =
      static_cast<A>(*block.farthest * error) + static_cast<A>(sizeof(A) == 4 ? 1e-35 : 1e-299);
  nearer->clear();
  for (int64_t k = seen; k < count; k += L) {
    V sum{};
    for (int d = 0; d < chosen.dims; ++d) {
      const V seed = load<V>(chosen.planar.data() + d * chosen.row + k);
      const V below = block.box[2 * d] - seed, above = seed - block.box[2 * d + 1];
      V beyond = below > above ? below : above;
      beyond = beyond > A(0) ? beyond : V{};
      sum += beyond * beyond;
    }
    const auto outside = sum > limit;
    if (!any_lane(~outside)) continue;
    for (int64_t lane = 0; lane < std::min<int64_t>(L, count - k); ++lane) {
      if (!outside[lane]) nearer->push_back(static_cast<int32_t>(k + lane));
    }
  }
}

// Brings distances up to date with seed k. Returns whether one is nearer now.
template <int kBytes, class A>
INSTEMBED_INLINE bool approach(const Block<A>& block, const Chosen<A>& chosen, int64_t k,
                               A* limits) {
  constexpr int L = kBytes / 8;                            // in double
  constexpr int W = kBytes / static_cast<int>(sizeof(A));  // in A
  constexpr int kHeld = kLanes<A> / W;                     // as many as may be read past the end
  using V = vector_t<double, L>;
  using Narrow = vector_t<A, L>;
  using Wide = vector_t<A, W>;
  const A error = static_cast<A>(1 + 4 * mean_shift::distance_error<A>(chosen.dims));
  const double* seed = chosen.rows.data() + k * chosen.dims;
  vector_t<int64_t, L> nearer{};
  for (int i = 0; i < block.n; i += kLanes<A>) {
    Wide sums[kHeld] = {};
    if constexpr (W > L) {
      for (int d = 0; d < chosen.dims; ++d) {
        const A* row = block.tile.row(d) + i;
        const Wide value = splat_as<Wide>(chosen.planar[d * chosen.row + k]);
#pragma GCC unroll 4
        for (int h = 0; h < kHeld; ++h) {
          const Wide difference = load<Wide>(row + h * W) - value;
          sums[h] += difference * difference;
        }
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeld; ++h) {
      if (W > L && !any_lane(~(sums[h] > load<Wide>(limits + i + h * W)))) continue;
      for (int at = i + h * W; at < i + (h + 1) * W; at += L) {
        V sum{};
        for (int d = 0; d < chosen.dims; ++d) {
          const V difference =
              __builtin_convertvector(load<Narrow>(block.tile.row(d) + at), V) - seed[d];
          sum += difference * difference;
        }
        V nearest = load<V>(block.distances + at);
        nearer |= sum < nearest;
        nearest = sum < nearest ? sum : nearest;
        store(block.distances + at, nearest);
        if constexpr (W > L) {
          store(limits + at, __builtin_convertvector(nearest, Narrow) * error + A(1e-35));
        }
      }
    }
  }
  return any_lane(nearer);
}

// The first of the best pixels.
template <int kBytes, class A>
INSTEMBED_INLINE Best find_best(const Block<A>& block, double diversity) {
  constexpr int L = kBytes / 8;
  using V = vector_t<double, L>;
  using Mask = vector_t<int64_t, L>;
  double about[kBlock];
  Mask strange{};
  V largest = kNever - V{}, farthest = largest;
  for (int i = 0; i < block.n; i += L) {
    const V nearest = load<V>(block.distances + i);
    const Mask possible = nearest > 0.0;
    V value = load<V>(block.logs + i);
    strange |= possible & ((nearest < kSmall) | (nearest > 1 / kSmall) | (value < kSmallLog) |
                           (value > -kSmallLog));
    if (diversity > 0) value += diversity * log_about(nearest);
    value = possible ? value : kNever - V{};
    store(about + i, value);
    largest = value > largest ? value : largest;
    farthest = nearest > farthest ? nearest : farthest;
  }
  double least = kNever;
  *block.farthest = kNever;
  for (int k = 0; k < L; ++k) {
    least = std::max(least, largest[k]);
    *block.farthest = std::max(*block.farthest, farthest[k]);
  }
  least =
      any_lane(strange) ? kNever : least - 1e-8 * (1 + diversity) - 1e-11 * (1 + std::abs(least));
  Best best;
  for (int i = 0; i < block.n; i += L) {
    if (!any_lane(~(load<V>(about + i) < least))) continue;
    for (int k = i; k < std::min(i + L, block.n); ++k) {
      if (about[k] < least) continue;
      const double value = objective(block.seediness[k], block.distances[k], diversity);
      if (value > best.value) best = {value, k};
    }
  }
  return best;
}

// Brings a block up to date with the seeds from `seen` to `count`. Returns whether that changed its
// distances, and then its best pixel.
template <int kBytes, class A>
INSTEMBED_INLINE bool update_block(const Block<A>& block, const Chosen<A>& chosen, int64_t seen,
                                   int64_t count, double diversity, std::vector<int32_t>* nearer,
                                   Best* best) {
  find_nearer<kBytes>(block, chosen, seen, count, nearer);
  if (nearer->empty()) return false;
  const double error = 1 + 4 * mean_shift::distance_error<A>(chosen.dims);
  A limits[kBlock];  // of sums in A that may be smaller than a distance
  for (int i = 0; i < kBlock; ++i) {
    limits[i] = static_cast<A>(block.distances[i] * error) + A(1e-35);
  }
  bool changed = std::isinf(*block.farthest);  // nothing is known of its best pixel yet
  for (const int32_t k : *nearer) changed |= approach<kBytes>(block, chosen, k, limits);
  if (changed) *best = find_best<kBytes>(block, diversity);
  return changed;
}

#define INSTEMBED_UPDATE(A)                                                                    \
  INSTEMBED_SIMD_WIDTHS(                                                                       \
      bool update(const Block<A>& block, const Chosen<A>& chosen, int64_t seen, int64_t count, \
                  double diversity, std::vector<int32_t>* nearer, Best* best),                 \
      return update_block<kBytes>(block, chosen, seen, count, diversity, nearer, best))
INSTEMBED_UPDATE(float)
INSTEMBED_UPDATE(double)
#undef INSTEMBED_UPDATE

#define INSTEMBED_OPEN(A)                                                                \
  INSTEMBED_SIMD_WIDTHS(void open(const Block<A>& block, int dims, MaskLane<A>* finite), \
                        open_block<kBytes>(block, dims, finite))
INSTEMBED_OPEN(float)
INSTEMBED_OPEN(double)
#undef INSTEMBED_OPEN

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
        seediness_(new double[blocks_ * kBlock]),
        logs_(new double[blocks_ * kBlock]),
        distances_(new double[blocks_ * kBlock]),
        farthest_(blocks_, std::numeric_limits<double>::infinity()),
        boxes_(blocks_ * dims_ * 2) {
    for (const auto* values : {&seediness_, &logs_, &distances_}) {
      prefer_huge_pages(values->get(), blocks_ * kBlock * sizeof(double));
    }
  }

  // read(pixel) is its seediness, NaN for pixels that may be no seed.
  template <class Read>
  void run(Read&& read, int64_t count, int64_t* indices, double* scores) {
    Chosen<A> chosen(dims_, count);
    std::vector<Entry> first(blocks_);
    for_blocks(blocks_, [&](int64_t b, Room* room) { first[b] = start(b, read, room); });
    std::vector<Entry> waiting;
    for (const Entry& entry : first) {
      if (entry.bound > kNever) waiting.push_back(entry);
    }
    if (count == 0 || waiting.empty()) return;
    // The first seed has the largest seediness; then all distances count.
    const Entry top = *std::max_element(waiting.begin(), waiting.end());
    take(top, read, &chosen, indices, scores, 0);
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
        take(best, read, &chosen, indices, scores, k++);
        continue;
      }
      for_blocks(static_cast<int64_t>(batch.size()), [&](int64_t e, Room* room) {
        if (e + 1 < static_cast<int64_t>(batch.size())) prefetch(batch[e + 1].block);
        refresh(&batch[e], chosen, k, room);
      });
      for (const Entry& entry : batch) {
        if (entry.bound > kNever) queue.push(entry);
      }
    }
  }

 private:
  struct Room {  // of a task
    std::vector<VecSlot<A>> pixels;
    std::vector<int32_t> nearer;
  };

  template <class Task>
  void for_blocks(int64_t count, Task&& task) {
    parallel_for((count + kBlocksPerTask - 1) / kBlocksPerTask, threads_, [&](int64_t k) {
      Room room;
      const int64_t end = std::min(count, (k + 1) * kBlocksPerTask);
      for (int64_t b = k * kBlocksPerTask; b < end; ++b) task(b, &room);
    });
  }

  int size(int64_t b) const {
    return static_cast<int>(std::min<int64_t>(kBlock, image_.pixels - b * kBlock));
  }

  Block<A> load_block(int64_t b, Room* room) {
    const int64_t from = b * kBlock, stride = planar_stride(kBlock);
    const int n = size(b);
    if (room->pixels.empty()) room->pixels.resize(dims_ * stride / kLanes<A> + 1);
    auto* scratch = reinterpret_cast<A*>(room->pixels.data());
    return {load_planar<A>(image_, from, n, scratch, stride),
            n,
            boxes_.data() + 2 * b * dims_,
            seediness_.get() + from,
            logs_.get() + from,
            distances_.get() + from,
            &farthest_[b]};
  }

  // Blocks come from all over the image.
  void prefetch(int64_t b) const {
    const int64_t from = b * kBlock;
    constexpr int kStep = 64 / static_cast<int>(sizeof(T));
    if (image_.pixel_stride == 1) {
      for (int d = 0; d < dims_; ++d) {
        const T* row = image_.data + d * image_.channel_stride + from;
        for (int i = 0; i < size(b); i += kStep) __builtin_prefetch(row + i);
      }
    }
    for (int i = 0; i < kBlock; i += 8) {
      __builtin_prefetch(&logs_[from + i]);
      __builtin_prefetch(&distances_[from + i], 1);
    }
  }

  template <class Read>
  Entry start(int64_t b, Read&& read, Room* room) {
    Entry entry{kNever, b, 0, 0};
    const Block<A> block = load_block(b, room);
    double* seediness = &seediness_[b * kBlock];
    for (int i = 0; i < kBlock; ++i) {
      const double value = i < block.n ? read(b * kBlock + i) : 0;
      const bool possible = value > 0 && value >= selection_.min_seediness && std::isfinite(value);
      seediness[i] = possible ? value : 0;
    }
    MaskLane<A> finite[kBlock];
    open(block, dims_, finite);
    for (int i = 0; i < kBlock; ++i) {
      const bool possible = finite[i] && seediness[i] > 0;
      block.distances[i] = possible ? std::numeric_limits<double>::infinity() : kTaken;
      if (possible && seediness[i] > entry.bound) {
        entry.bound = seediness[i];
        entry.place = i;
      }
    }
    return entry;
  }

  void refresh(Entry* entry, const Chosen<A>& chosen, int64_t seeds, Room* room) {
    const Block<A> block = load_block(entry->block, room);
    Best best;
    if (update(block, chosen, entry->seen, seeds, selection_.diversity, &room->nearer, &best)) {
      entry->bound = best.value;
      entry->place = best.place;
    }
    entry->seen = seeds;
  }

  template <class Read>
  void take(const Entry& entry, Read&& read, Chosen<A>* chosen, int64_t* indices, double* scores,
            int64_t k) {
    const int64_t pixel = entry.block * kBlock + entry.place;
    indices[k] = pixel;
    scores[k] = read(pixel);
    for (int d = 0; d < dims_; ++d) {
      const A value =
          convert<A>(image_.data[d * image_.channel_stride + pixel * image_.pixel_stride]);
      chosen->rows.push_back(static_cast<double>(value));
      chosen->planar[d * chosen->row + k] = value;
    }
  }

  const Image<const T> image_;
  const Selection selection_;
  const int threads_;
  const int dims_;
  const int64_t blocks_;
  std::unique_ptr<double[]> seediness_, logs_, distances_;
  std::vector<double> farthest_;  // a block
  std::vector<A> boxes_;
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

// Instances from seeds. One pass over the pixels counts the masks of all seeds and their pairwise
// intersections, from which the accepted ones follow; a second gives every pixel to the accepted
// seed that is most similar.
#include <algorithm>
#include <cstdint>
#include <mutex>
#include <numeric>
#include <vector>

#include "common/batch.h"
#include "common/dtype.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "seeds/order.h"
#include "seeds/scan.h"
#include "seeds/seeds.h"

namespace instembed::seeds {
namespace {

constexpr int64_t kTaskPixels = 16384;
constexpr int kWord = 64;  // pixels whose membership of one seed is held in a word

// Seeds and what decides their masks.
template <class A>
struct Balls {
  SeedSet<A> seeds;
  std::vector<Radius<A>> radii;

  Balls(std::vector<double> values, int dims, const std::vector<double>& squared_radii)
      : seeds(std::move(values), dims, squared_radii) {
    for (const double squared : squared_radii) radii.emplace_back(squared, dims);
  }
};

// Which pixels of a vector lie in the ball of a seed, exactly.
template <class A, class T, class V, class Mask>
INSTEMBED_INLINE Mask members(const Balls<A>& balls, const LazyTile<A, T>& tile, int s, int64_t i,
                              const V& squared, const Mask& lanes) {
  const Radius<A>& radius = balls.radii[s];
  Mask inside = (squared <= radius.inner) & lanes;
  const Mask unsure = (squared <= radius.outer) & lanes & ~inside;
  if (!any_lane(unsure)) return inside;
  for (size_t k = 0; k < sizeof(V) / sizeof(A); ++k) {
    if (!unsure[k]) continue;
    inside[k] = tile.exact_distance(s, i + k) <= radius.exact ? -1 : 0;
  }
  return inside;
}

// The tiles of an image, and which of their pixels take part.
template <class T>
struct Pixels {
  Image<const T> image;
  const uint8_t* mask;  // or null
  int64_t mask_stride;
  int tile;

  int64_t tiles() const { return (image.pixels + tile - 1) / tile; }
  int64_t tasks() const { return (tiles() + tiles_a_task() - 1) / tiles_a_task(); }
  int64_t tiles_a_task() const { return std::max<int64_t>(1, kTaskPixels / tile); }
  int size(int64_t t) const {
    return static_cast<int>(std::min<int64_t>(tile, image.pixels - t * tile));
  }

  // Returns whether any pixel does.
  template <class M>
  INSTEMBED_INLINE bool read_mask(int64_t t, M* counted) const {
    const int n = size(t);
    if (mask == nullptr) {
      std::fill(counted, counted + n, M(-1));
      return true;
    }
    M any = 0;
    const uint8_t* source = mask + t * tile * mask_stride;
    for (int i = 0; i < n; ++i) {
      counted[i] = source[i * mask_stride] ? -1 : 0;
      any |= counted[i];
    }
    return any != 0;
  }
};

// Scans the tiles of a task with a visitor of sums of squared differences, which products only rule
// out: visit(tile, seed, i, squared, lanes), and after(tile index) when one is done.
template <class A, int kBytes, class Tile, class Visit>
struct Squares {
  using V = typename Scanner<A, kBytes>::V;
  using Mask = typename Scanner<A, kBytes>::Mask;

  const Balls<A>& balls;
  const Tile& tile;
  Visit& visit;

  void start(int, int) {}
  INSTEMBED_INLINE void about(int s, int64_t, const V (&low)[kWide], const V (&)[kWide],
                              const Mask (&lanes)[kWide], Mask (&open)[kWide]) {
#pragma GCC unroll 2
    for (int w = 0; w < kWide; ++w) open[w] = lanes[w] & ~(low[w] > balls.radii[s].outer);
  }
  INSTEMBED_INLINE void fine(int s, int64_t i, const V& squared, const Mask& lanes) {
    visit(tile, s, i, squared, lanes);
  }
};

template <int kBytes, class A, class T, class Visit, class After>
INSTEMBED_INLINE void scan_task(const Balls<A>& balls, const Pixels<T>& pixels, int64_t task,
                                A* scratch, Visit&& visit, After&& after) {
  Scanner<A, kBytes> scanner(balls.seeds);
  LazyTile<A, T> tile(balls.seeds, pixels.image, pixels.tile, scratch);
  MaskLane<A> counted[kMaxTile] = {};
  const int64_t begin = task * pixels.tiles_a_task();
  const int64_t end = std::min(pixels.tiles(), begin + pixels.tiles_a_task());
  for (int64_t t = begin; t < end; ++t) {
    if (pixels.read_mask(t, counted)) {
      const int n = pixels.size(t);
      tile.start(t * pixels.tile, n);
      scanner.scan(tile, n, counted, Squares<A, kBytes, LazyTile<A, T>, Visit>{balls, tile, visit});
    }
    after(t);
  }
}

// pairs[a * seeds + b] for a <= b: the pixels in the masks of both.
template <int kBytes, class A, class T>
INSTEMBED_INLINE void count_pairs_of(const Balls<A>& balls, const Pixels<T>& pixels, int64_t task,
                                     A* scratch, int64_t* pairs) {
  using V = typename Scanner<A, kBytes>::V;
  using Lanes = typename Scanner<A, kBytes>::Mask;
  constexpr int L = Scanner<A, kBytes>::L;
  const int count = balls.seeds.size();
  std::vector<uint64_t> words(count, 0);
  std::vector<int32_t> present;
  int64_t word = -1;
  Lanes bits;
  for (int k = 0; k < L; ++k) bits[k] = MaskLane<A>{1} << k;
  const auto flush = [&] {
    std::sort(present.begin(), present.end());
    for (size_t x = 0; x < present.size(); ++x) {
      int64_t* row = pairs + static_cast<int64_t>(present[x]) * count;
      for (size_t y = x; y < present.size(); ++y) {
        row[present[y]] += __builtin_popcountll(words[present[x]] & words[present[y]]);
      }
    }
    for (const int32_t s : present) words[s] = 0;
    present.clear();
  };
  scan_task<kBytes>(
      balls, pixels, task, scratch,
      [&](const LazyTile<A, T>& tile, int s, int64_t i, const V& squared, const Lanes& lanes) {
        if (i / kWord != word) {
          flush();
          word = i / kWord;
        }
        const auto found =
            static_cast<uint64_t>(sum_lanes(members(balls, tile, s, i, squared, lanes) & bits));
        if (found && !words[s]) present.push_back(s);
        words[s] |= (found & ((uint64_t{1} << L) - 1)) << (i % kWord);
      },
      [&](int64_t) {
        flush();
        word = -1;
      });
}

// Labels: 1 + the most similar of the seeds in whose ball a pixel lies, the first of equals.
template <int kBytes, class A, class T>
INSTEMBED_INLINE void assign_of(const Balls<A>& balls, const Pixels<T>& pixels, int64_t task,
                                A* scratch, int64_t* labels, int64_t* counts) {
  using V = typename Scanner<A, kBytes>::V;
  using Lanes = typename Scanner<A, kBytes>::Mask;
  const int dims = balls.seeds.dims();
  const A error = static_cast<A>(1 + 4 * mean_shift::distance_error<A>(dims));
  const A tiny = static_cast<A>(sizeof(A) == 4 ? 1e-35 : 1e-299);
  MaskLane<A> owner[kMaxTile] = {};
  A nearest[kMaxTile] = {};
  scan_task<kBytes>(
      balls, pixels, task, scratch,
      [&](const LazyTile<A, T>& tile, int s, int64_t i, const V& squared, const Lanes& lanes) {
        const Lanes inside = members(balls, tile, s, i, squared, lanes);
        const Lanes before = load<Lanes>(owner + i);
        const V best = load<V>(nearest + i);
        const Lanes owned = before > 0;
        Lanes wins = inside & (~owned | (squared < best));
        const Lanes close =
            inside & owned & (squared <= best * error + tiny) & (best <= squared * error + tiny);
        if (any_lane(close)) {
          for (size_t k = 0; k < sizeof(V) / sizeof(A); ++k) {
            if (!close[k]) continue;
            const auto other = static_cast<int>(before[k]) - 1;
            const double mine = tile.exact_distance(s, i + k);
            const double theirs = tile.exact_distance(other, i + k);
            wins[k] = mine < theirs || (mine == theirs && s < other) ? -1 : 0;
          }
        }
        store(owner + i, (wins & (s + 1)) | (before & ~wins));
        store(nearest + i, wins ? squared : best);
      },
      [&](int64_t t) {
        const int n = pixels.size(t);
        int64_t* to = labels + t * pixels.tile;
        for (int i = 0; i < n; ++i) {
          to[i] = owner[i];
          ++counts[owner[i]];
          owner[i] = 0;
        }
      });
}

#define INSTEMBED_TASKS(A, T)                                                                     \
  INSTEMBED_SIMD_WIDTHS(void count_pairs(const Balls<A>& balls, const Pixels<T>& pixels,          \
                                         int64_t task, A* scratch, int64_t* pairs),               \
                        count_pairs_of<kBytes>(balls, pixels, task, scratch, pairs))              \
  INSTEMBED_SIMD_WIDTHS(void assign(const Balls<A>& balls, const Pixels<T>& pixels, int64_t task, \
                                    A* scratch, int64_t* labels, int64_t* counts),                \
                        assign_of<kBytes>(balls, pixels, task, scratch, labels, counts))
INSTEMBED_TASKS(float, float)
INSTEMBED_TASKS(float, Half)
INSTEMBED_TASKS(float, BFloat16)
INSTEMBED_TASKS(double, double)
#undef INSTEMBED_TASKS

// Runs a counting kernel task by task and adds up what it counts: integers, in any order.
template <class A, class T, class Kernel>
std::vector<int64_t> add_up(const Pixels<T>& pixels, size_t counters, int threads,
                            Kernel&& kernel) {
  std::vector<int64_t> total(counters, 0);
  std::mutex mutex;
  parallel_for(pixels.tasks(), threads, [&](int64_t task) {
    std::vector<VecSlot<A>> scratch(pixels.image.channels * planar_stride(pixels.tile) / kLanes<A> +
                                    1);
    std::vector<int64_t> counts(counters, 0);
    kernel(task, reinterpret_cast<A*>(scratch.data()), counts.data());
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t k = 0; k < counters; ++k) total[k] += counts[k];
  });
  return total;
}

// The seeds of one image that are there, best first.
template <class T>
struct Candidates {
  using A = accumulator_t<T>;

  std::vector<int64_t> places;  // among the S seeds
  std::vector<double> values, squared_radii;
  int dims;

  Balls<A> balls(const std::vector<int64_t>& chosen) const {
    std::vector<double> rows, radii;
    for (const int64_t k : chosen) {
      rows.insert(rows.end(), values.begin() + k * dims, values.begin() + (k + 1) * dims);
      radii.push_back(squared_radii[k]);
    }
    return Balls<A>(std::move(rows), dims, radii);
  }
};

// In order: a candidate is accepted if its mask is large enough and does not share more than
// `overlap` of the smaller of two masks with one that was accepted.
std::vector<int64_t> accept(const std::vector<int64_t>& pairs, int64_t count,
                            const Growth& growth) {
  std::vector<int64_t> accepted;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t size = pairs[k * count + k];
    bool free = size >= growth.min_size;
    for (size_t j = 0; free && j < accepted.size(); ++j) {
      const int64_t other = accepted[j];
      const int64_t smaller = std::min(size, pairs[other * count + other]);
      free = static_cast<double>(pairs[other * count + k]) <=
             growth.overlap * static_cast<double>(smaller);
    }
    if (free) accepted.push_back(k);
  }
  return accepted;
}

template <class T>
int64_t grow_image(const Pixels<T>& pixels, const int64_t* seeds, const double* scores,
                   const double* squared_radii, int64_t count, const Growth& growth,
                   int64_t* labels, int64_t* order, int64_t* counts, int threads) {
  using A = accumulator_t<T>;
  Candidates<T> candidates;
  candidates.dims = static_cast<int>(pixels.image.channels);
  for (int64_t s = 0; s < count; ++s) {
    if (seeds[s] >= 0) candidates.places.push_back(s);
  }
  std::stable_sort(candidates.places.begin(), candidates.places.end(),
                   [&](int64_t a, int64_t b) { return is_better(scores[a], scores[b]); });
  for (const int64_t s : candidates.places) {
    const T* pixel = pixels.image.data + seeds[s] * pixels.image.pixel_stride;
    for (int d = 0; d < candidates.dims; ++d) {
      candidates.values.push_back(
          static_cast<double>(convert<A>(pixel[d * pixels.image.channel_stride])));
    }
    candidates.squared_radii.push_back(squared_radii[s]);
  }
  const auto found = static_cast<int64_t>(candidates.places.size());
  std::vector<int64_t> chosen(found);
  std::iota(chosen.begin(), chosen.end(), 0);
  if (found > 0) {
    const Balls<A> all = candidates.balls(chosen);
    const std::vector<int64_t> pairs =
        add_up<A>(pixels, found * found, threads, [&](int64_t task, A* scratch, int64_t* counters) {
          count_pairs(all, pixels, task, scratch, counters);
        });
    chosen = accept(pairs, found, growth);
  }
  std::vector<int64_t> sizes(1, 0);
  for (bool again = true; again;) {
    if (chosen.empty()) {
      std::fill(labels, labels + pixels.image.pixels, int64_t{0});
      break;
    }
    const Balls<A> balls = candidates.balls(chosen);
    sizes = add_up<A>(pixels, chosen.size() + 1, threads,
                      [&](int64_t task, A* scratch, int64_t* counters) {
                        assign(balls, pixels, task, scratch, labels, counters);
                      });
    // What others took too much of is given up, and its pixels go to those: which only grow.
    std::vector<int64_t> kept;
    for (size_t k = 0; k < chosen.size(); ++k) {
      if (sizes[k + 1] >= growth.min_size) kept.push_back(chosen[k]);
    }
    again = kept.size() < chosen.size();
    chosen = std::move(kept);
  }
  for (size_t k = 0; k < chosen.size(); ++k) {
    order[k] = candidates.places[chosen[k]];
    counts[k] = sizes[k + 1];
  }
  return static_cast<int64_t>(chosen.size());
}

}  // namespace

void grow(const Array& embeddings, const Array* mask, const Array& seeds, const Array& scores,
          const Array& squared_radii, const Growth& growth, const Array& labels, const Array& order,
          const Array& counts, const Array& instances, int threads) {
  const Batch batch = Batch::of_embeddings(embeddings, nullptr);
  const int64_t images = batch.images, pixels = batch.pixels;
  if (mask) {
    expect(mask->dtype == DType::u8 && mask->ndim == 2 && mask->shape[0] == images &&
               mask->shape[1] == pixels,
           "mask: expected bytes in the embeddings' shape without channels");
  }
  expect(seeds.ndim == 2 && seeds.shape[0] == images, "seeds: expected (images, seeds)");
  const int64_t count = seeds.shape[1];
  expect_contiguous(seeds, DType::i64, images * count, "seeds");
  expect_contiguous(scores, DType::f64, images * count, "scores");
  expect_contiguous(squared_radii, DType::f64, images * count, "squared_radii");
  expect_contiguous(labels, DType::i64, images * pixels, "labels");
  expect_contiguous(order, DType::i64, images * count, "order");
  expect_contiguous(counts, DType::i64, images * count, "counts");
  expect_contiguous(instances, DType::i64, images, "instances");
  for (int64_t k = 0; k < images * count; ++k) {
    const int64_t pixel = seeds.as<const int64_t>()[k];
    expect(-1 <= pixel && pixel < pixels, "seeds: expected pixels below " + std::to_string(pixels) +
                                              ", or -1, got " + std::to_string(pixel));
  }
  prefer_huge_pages(labels.data, labels.size() * sizeof(int64_t));
  std::fill_n(order.as<int64_t>(), images * count, int64_t{-1});
  std::fill_n(counts.as<int64_t>(), images * count, int64_t{0});
  const bool side_by_side = images >= threads;
  parallel_for(images, side_by_side ? threads : 1, [&](int64_t b) {
    dispatch_floating(embeddings.dtype, "embeddings", [&](auto zero) {
      using T = decltype(zero);
      const Pixels<T> part{Image<const T>(embeddings, batch, b),
                           mask ? mask->as<const uint8_t>() + b * mask->strides[0] : nullptr,
                           mask ? mask->strides[1] : 0, scan_tile(batch.channels)};
      instances.as<int64_t>()[b] = grow_image(
          part, seeds.as<const int64_t>() + b * count, scores.as<const double>() + b * count,
          squared_radii.as<const double>() + b * count, count, growth,
          labels.as<int64_t>() + b * pixels, order.as<int64_t>() + b * count,
          counts.as<int64_t>() + b * count, side_by_side ? 1 : threads);
    });
  });
}

}  // namespace instembed::seeds

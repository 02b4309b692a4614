// Intersections over unions of the masks of seeds with their instances: one pass over the pixels
// that counts, for every seed and radius, members and members of the seed's instance.
#include <algorithm>
#include <mutex>
#include <numeric>
#include <unordered_map>

#include "common/batch.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "seeds/scan.h"
#include "seeds/seeds.h"

namespace instembed::seeds {
namespace {

constexpr int64_t kTaskPixels = 16384;

// What is counted for a seed and a radius.
struct Count {
  int64_t members = 0, common = 0;
};

// One image: its seeds, its radii from the largest, and the slot of each seed's instance.
template <class A>
struct Task {
  const SeedSet<A>& seeds;
  const std::vector<Radius<A>>& radii;
  const std::vector<int32_t>& slots;
  int64_t instances;
};

// Counts in lanes; members that bounds are not sure of are counted one by one.
template <class A, class T, int kBytes>
struct Counter {
  using V = typename Scanner<A, kBytes>::V;
  using Mask = typename Scanner<A, kBytes>::Mask;
  static constexpr int L = Scanner<A, kBytes>::L;

  const Task<A>& task;
  const A* squared_radii;
  int radii;
  const LazyTile<A, T>& tile;
  const MaskLane<A>* slots;  // of the tile's pixels
  int32_t* last_segment;     // in which a slot was seen
  int32_t& segment;          // counts them
  MaskLane<A>* sums;         // L of members and L of members in common, of each seed and radius
  Count* counts;

  // Which instances the segment has: most have no pixel in it, and nothing in common there.
  INSTEMBED_INLINE void start(int from, int end) {
    ++segment;
    for (int i = from; i < end; ++i) {
      if (slots[i] >= 0) last_segment[slots[i]] = segment;
    }
  }

  INSTEMBED_INLINE void about(int s, int64_t i, const V (&low)[kWide], const V (&high)[kWide],
                              const Mask (&lanes)[kWide], Mask (&open)[kWide]) {
    const int count = radii;
    const A* radius = squared_radii;
    Mask settled[kWide] = {Mask{} - 1, Mask{} - 1};  // NaN is not
    for (int k = 0; k < count; ++k) {
#pragma GCC unroll 2
      for (int w = 0; w < kWide; ++w) {
        settled[w] &= (low[w] > radius[k]) | (high[w] <= radius[k]);
      }
    }
    Mask sure[kWide];
#pragma GCC unroll 2
    for (int w = 0; w < kWide; ++w) {
      open[w] = lanes[w] & ~settled[w];
      sure[w] = lanes[w] & settled[w];
    }
    MaskLane<A>* sum = sums + int64_t{s} * count * 2 * L;
    for (int k = 0; k < count; ++k, sum += 2 * L) {
      const Mask inside = ((high[0] <= radius[k]) & sure[0]) + ((high[1] <= radius[k]) & sure[1]);
      store(sum, load<Mask>(sum) - inside);
    }
    if (last_segment[task.slots[s]] != segment) return;
#pragma GCC unroll 2
    for (int w = 0; w < kWide; ++w) sure[w] &= of_instance(s, i + w * L);
    sum -= (2 * count - 1) * L;
    for (int k = 0; k < count; ++k, sum += 2 * L) {
      const Mask inside = ((high[0] <= radius[k]) & sure[0]) + ((high[1] <= radius[k]) & sure[1]);
      store(sum, load<Mask>(sum) - inside);
    }
  }

  INSTEMBED_INLINE void fine(int s, int64_t i, const V& squared, const Mask& lanes) {
    const Mask same = of_instance(s, i);
    Mask open{};
    for (int k = 0; k < radii; ++k) {
      const Mask inside = (squared <= task.radii[k].inner) & lanes;
      open |= (squared <= task.radii[k].outer) & ~inside;
      MaskLane<A>* sum = sums + (int64_t{s} * radii + k) * 2 * L;
      store(sum, load<Mask>(sum) - inside);
      store(sum + L, load<Mask>(sum + L) - (inside & same));
    }
    open &= lanes;
    if (!any_lane(open)) return;
    for (int lane = 0; lane < L; ++lane) {
      if (!open[lane]) continue;
      const double exact = tile.exact_distance(s, i + lane);
      for (int k = 0; k < radii; ++k) {
        const Radius<A>& radius = task.radii[k];
        if (squared[lane] <= radius.inner || !(exact <= radius.exact)) continue;
        Count& count = counts[static_cast<int64_t>(s) * radii + k];
        count.members += 1;
        count.common += same[lane] ? 1 : 0;
      }
    }
  }

  // By bits: GCC 12 breaks down at comparing 64 bytes of int64.
  INSTEMBED_INLINE Mask of_instance(int s, int64_t i) const {
    using Word = Bits<V>;
    const auto difference = reinterpret_cast<Word>(load<Mask>(slots + i) ^ task.slots[s]);
    return reinterpret_cast<Mask>(~spread_highest<Word>(difference | (Word{} - difference)));
  }
};

template <int kBytes, class A, class T>
INSTEMBED_INLINE void count_tiles_of(const Task<A>& task, const Image<const T>& image,
                                     const RunsView& runs, int64_t first_tile, int64_t begin,
                                     int64_t end, A* scratch, MaskLane<A>* sums, Count* counts) {
  MaskLane<A> slots[kMaxTile] = {}, counted[kMaxTile] = {};  // whole vectors of the last are read
  int32_t unpacked[kMaxTile];
  Scanner<A, kBytes> scanner(task.seeds);
  LazyTile<A, T> tile(task.seeds, image, runs.tile, scratch);
  std::vector<int32_t> last_segment(task.instances, 0);
  int32_t segment = 0;
  std::vector<A> squared_radii;
  for (const Radius<A>& radius : task.radii) squared_radii.push_back(static_cast<A>(radius.exact));
  for (int64_t t = begin; t < end; ++t) {
    const int64_t from = t * runs.tile;
    const auto n = static_cast<int>(std::min<int64_t>(runs.tile, image.pixels - from));
    const TileCode code = runs[first_tile + t];
    if (code.is_runs()) {
      code.for_each_run([&](int start, int length, int32_t slot) {
        std::fill(slots + start, slots + start + length, slot);
      });
    } else {
      code.unpack(n, unpacked);
      std::copy(unpacked, unpacked + n, slots);
    }
    for (int i = 0; i < n; ++i) counted[i] = slots[i] == kIgnored ? 0 : -1;
    tile.start(from, n);
    scanner.scan(
        tile, n, counted,
        Counter<A, T, kBytes>{task, squared_radii.data(), static_cast<int>(squared_radii.size()),
                              tile, slots, last_segment.data(), segment, sums, counts});
  }
  constexpr int L = Scanner<A, kBytes>::L;
  for (int64_t k = 0; k < static_cast<int64_t>(task.seeds.size() * task.radii.size()); ++k) {
    for (int lane = 0; lane < L; ++lane) {
      counts[k].members += sums[2 * k * L + lane];
      counts[k].common += sums[(2 * k + 1) * L + lane];
    }
  }
}

#define INSTEMBED_COUNT_TILES(A, T)                                                            \
  INSTEMBED_SIMD_WIDTHS(                                                                       \
      void count_tiles(const Task<A>& task, const Image<const T>& image, const RunsView& runs, \
                       int64_t first_tile, int64_t begin, int64_t end, A* scratch,             \
                       MaskLane<A>* sums, Count* counts),                                      \
      count_tiles_of<kBytes>(task, image, runs, first_tile, begin, end, scratch, sums, counts))
INSTEMBED_COUNT_TILES(float, float)
INSTEMBED_COUNT_TILES(float, Half)
INSTEMBED_COUNT_TILES(float, BFloat16)
INSTEMBED_COUNT_TILES(double, double)
#undef INSTEMBED_COUNT_TILES

// The label of a pixel, as the runs have it.
int64_t label_at(const Array& labels, int64_t b, int64_t pixel) {
  return dispatch_integer(labels.dtype, "labels", [&](auto zero) {
    using I = decltype(zero);
    return static_cast<int64_t>(
        labels.as<const I>()[b * labels.strides[0] + pixel * labels.strides[1]]);
  });
}

template <class T>
void image_iou(const Array& embeddings, const Batch& batch, const Array& labels, int64_t b,
               const int64_t* seeds, int64_t count, const std::vector<double>& squared_radii,
               const LabelRuns& runs, const TileGrid& grid, int threads, double* iou) {
  using A = accumulator_t<T>;
  const auto dims = static_cast<int>(batch.channels);
  const auto radii = static_cast<int64_t>(squared_radii.size());
  const Image<const T> image(embeddings, batch, b);

  // Seeds of an instance; the others have no intersection with one.
  std::unordered_map<int64_t, int32_t> slot_of;
  for (int32_t slot = 0; slot < runs.instances(b); ++slot) slot_of[runs.ids[b][slot]] = slot;
  std::vector<int64_t> places;
  std::vector<int32_t> slots;
  std::vector<double> values;
  for (int64_t s = 0; s < count; ++s) {
    if (seeds[s] < 0) continue;
    const auto found = slot_of.find(label_at(labels, b, seeds[s]));
    if (found == slot_of.end()) continue;
    places.push_back(s);
    slots.push_back(found->second);
    for (int d = 0; d < dims; ++d) {
      values.push_back(static_cast<double>(
          convert<A>(image.data[seeds[s] * image.pixel_stride + d * image.channel_stride])));
    }
  }
  if (places.empty()) return;
  std::vector<int64_t> order(radii);  // from the largest
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return squared_radii[a] > squared_radii[b]; });
  std::vector<Radius<A>> tests;
  for (const int64_t k : order) tests.emplace_back(squared_radii[k], dims);
  const double largest = squared_radii[order[0]];
  const SeedSet<A> set(std::move(values), dims, std::vector<double>(places.size(), largest));
  const Task<A> task{set, tests, slots, runs.instances(b)};

  std::vector<Count> total(places.size() * radii);
  std::mutex mutex;
  const int64_t tiles = grid.first[b + 1] - grid.first[b];
  const int64_t each = std::max<int64_t>(1, kTaskPixels / grid.tile);
  parallel_for((tiles + each - 1) / each, threads, [&](int64_t k) {
    std::vector<VecSlot<A>> scratch(dims * planar_stride(grid.tile) / kLanes<A> + 1);
    std::vector<VecSlot<MaskLane<A>>> sums(total.size() * 2);
    std::vector<Count> counts(total.size());
    count_tiles(task, image, runs.view(), grid.first[b], k * each, std::min(tiles, (k + 1) * each),
                reinterpret_cast<A*>(scratch.data()), reinterpret_cast<MaskLane<A>*>(sums.data()),
                counts.data());
    const std::lock_guard<std::mutex> lock(mutex);  // integers: in any order
    for (size_t i = 0; i < total.size(); ++i) {
      total[i].members += counts[i].members;
      total[i].common += counts[i].common;
    }
  });
  for (size_t s = 0; s < places.size(); ++s) {
    const int64_t area = runs.counts[b][slots[s]];
    for (int64_t k = 0; k < radii; ++k) {
      const Count& count = total[s * radii + k];
      const int64_t united = count.members + area - count.common;
      iou[places[s] * radii + order[k]] =
          static_cast<double>(count.common) / static_cast<double>(united);
    }
  }
}

}  // namespace

void mask_iou(const Array& embeddings, const Array& labels, const Array& seeds,
              const std::vector<double>& squared_radii, const LabelRules& rules, const Array& iou,
              int threads) {
  const Batch batch = Batch::of_embeddings(embeddings, nullptr);
  const Batch label_batch = Batch::of_labels(labels, nullptr);
  expect(label_batch.images == batch.images && label_batch.pixels == batch.pixels,
         "labels: expected the embeddings' shape without channels");
  expect(seeds.ndim == 2 && seeds.shape[0] == batch.images, "seeds: expected (images, seeds)");
  expect_contiguous(seeds, DType::i64, seeds.size(), "seeds");
  const int64_t count = seeds.shape[1];
  const auto radii = static_cast<int64_t>(squared_radii.size());
  expect(iou.dtype == DType::f32 || iou.dtype == DType::f64, "iou: expected float32 or float64");
  expect_contiguous(iou, iou.dtype, batch.images * count * radii, "iou");
  for (int64_t k = 0; k < seeds.size(); ++k) {
    const int64_t pixel = seeds.as<const int64_t>()[k];
    expect(-1 <= pixel && pixel < batch.pixels, "seeds: expected pixels below " +
                                                    std::to_string(batch.pixels) + ", or -1, got " +
                                                    std::to_string(pixel));
  }
  const TileGrid grid(batch, scan_tile(batch.channels));
  const LabelRuns runs(labels, label_batch, grid, rules, threads, {});
  std::vector<double> values(iou.size());
  for (int64_t b = 0; b < batch.images; ++b) {
    dispatch_floating(embeddings.dtype, "embeddings", [&](auto zero) {
      image_iou<decltype(zero)>(embeddings, batch, labels, b, seeds.as<const int64_t>() + b * count,
                                count, squared_radii, runs, grid, threads,
                                values.data() + b * count * radii);
    });
  }
  for (size_t k = 0; k < values.size(); ++k) {
    if (iou.dtype == DType::f32) {
      iou.as<float>()[k] = static_cast<float>(values[k]);
    } else {
      iou.as<double>()[k] = values[k];
    }
  }
}

}  // namespace instembed::seeds

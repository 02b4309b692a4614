// No pixel is better than its heatmap: tiles are looked at from the highest on, and no further than
// to the first that is lower than what everybody has found. A tile is read once for all people.
#include "group_keypoints/refine.h"

#include <algorithm>
#include <limits>

#include "common/simd.h"
#include "group_keypoints/tags.h"

namespace instembed::group_keypoints {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();
constexpr int64_t kTilePixels = kTileRows * kTileColumns;
using V = Vec<double>;

// Half to even, for values from 0 to 2^30: adding 2^52 leaves a double no fraction.
INSTEMBED_INLINE V rounded(V v) {
  const V shift = splat(4503599627370496.0);
  return (v + shift) - shift;
}

// heat[i] - round(|tags[i] - tag|) of a tile's pixels, and the largest of them.
template <bool one>
INSTEMBED_INLINE double rate_body(const double* heat, const double* tags, const double* tag,
                                  int64_t dims, double* rates) {
  const V far = splat(kFar);
  V most = splat(kNothing);
  for (int64_t i = 0; i < kTilePixels; i += kLanes<double>) {
    V distance;
    if constexpr (one) {  // the root of a square, without taking either
      const V difference = load<V>(tags + i) - tag[0];
      distance = difference > -difference ? difference : -difference;
    } else {
      V squares{};
      for (int64_t d = 0; d < dims; ++d) {
        const V difference = load<V>(tags + d * kTilePixels + i) - tag[d];
        squares += difference * difference;
      }
      distance = sqrt_lanes(squares);
    }
    distance = distance < far ? distance : far;
    const V rate = load<V>(heat + i) - rounded(distance);
    store(rates + i, rate);
    most = rate > most ? rate : most;
  }
  double best = most[0];
  for (int lane = 1; lane < kLanes<double>; ++lane) best = std::max(best, most[lane]);
  return best;
}

INSTEMBED_SIMD double rate(const double* heat, const double* tags, const double* tag, int64_t dims,
                           double* rates) {
  return dims == 1 ? rate_body<true>(heat, tags, tag, dims, rates)
                   : rate_body<false>(heat, tags, tag, dims, rates);
}

// Takes pixels that are not finite, or have a tag that is not, out of the running.
INSTEMBED_SIMD void drop_unusable(double* heat, double* tags, int64_t dims) {
  const V nothing = splat(kNothing);
  for (int64_t i = 0; i < kTilePixels; i += kLanes<double>) {
    V value = load<V>(heat + i);
    value = value - value == V{} ? value : nothing;
    for (int64_t d = 0; d < dims; ++d) {
      const V tag = load<V>(tags + d * kTilePixels + i);
      value = tag - tag == V{} ? value : nothing;
      store(tags + d * kTilePixels + i, tag - tag == V{} ? tag : V{});
    }
    store(heat + i, value);
  }
}

// A tile of a heatmap and of its tags; -inf in the heatmap beyond the map's edges.
struct Tile {
  int64_t dims;
  std::vector<double> heat, tags;

  explicit Tile(int64_t dims) : dims(dims), heat(kTilePixels), tags(dims * kTilePixels) {}

  void load_from(const Maps& heatmaps, const Maps& maps, int64_t b, int64_t k,
                 const Window& window) {
    if (window.rows < kTileRows || window.columns < kTileColumns) {
      std::fill(heat.begin(), heat.end(), kNothing);
      std::fill(tags.begin(), tags.end(), 0.0);
    }
    heatmaps.copy(b, k, window, heat.data(), kTileColumns);
    for (int64_t d = 0; d < dims; ++d) {
      maps.copy(b, k * dims + d, window, tags.data() + d * kTilePixels, kTileColumns);
    }
    drop_unusable(heat.data(), tags.data(), dims);
  }
};

// A tile of the map, waiting.
struct Waiting {
  double highest;
  int64_t tile;
  bool operator<(const Waiting& other) const {
    return highest != other.highest ? highest < other.highest : tile > other.tile;
  }
};

struct Search {
  Person* person;
  double best = kNothing;
  int64_t pixel = -1;
  double score = 0;
};

}  // namespace

void find_missing(const Maps& heatmaps, const Maps& tags, int64_t b, int64_t k,
                  const std::vector<double>& highest, std::vector<Person>* people) {
  std::vector<Search> searches;
  for (Person& person : *people) {
    if (person.joints[k].pixel < 0) searches.push_back({&person});
  }
  if (searches.empty()) return;

  const int64_t dims = tags.channels() / heatmaps.channels();
  const int64_t height = heatmaps.height(), width = heatmaps.width();
  const int64_t across = (width + kTileColumns - 1) / kTileColumns;
  std::vector<Waiting> queue;
  for (size_t t = 0; t < highest.size(); ++t) {
    if (highest[t] > kNothing) queue.push_back({highest[t], static_cast<int64_t>(t)});
  }
  std::make_heap(queue.begin(), queue.end());

  Tile tile(dims);
  std::vector<double> rates(kTilePixels);
  double least = kNothing;  // of what people have found
  while (!queue.empty() && queue.front().highest >= least) {
    const Waiting next = queue.front();
    std::pop_heap(queue.begin(), queue.end());
    queue.pop_back();
    const int64_t y = next.tile / across * kTileRows, x = next.tile % across * kTileColumns;
    const Window window{y, x, std::min(kTileRows, height - y), std::min(kTileColumns, width - x)};
    tile.load_from(heatmaps, tags, b, k, window);
    least = std::numeric_limits<double>::infinity();
    for (Search& search : searches) {
      if (next.highest >= search.best) {
        const double best =
            rate(tile.heat.data(), tile.tags.data(), search.person->tag.data(), dims, rates.data());
        if (best >= search.best && best > kNothing) {
          const int64_t i = std::find(rates.begin(), rates.end(), best) - rates.begin();
          const int64_t pixel = (y + i / kTileColumns) * width + x + i % kTileColumns;
          if (best > search.best || pixel < search.pixel) {
            search.best = best;
            search.pixel = pixel;
            search.score = tile.heat[i];
          }
        }
      }
      least = std::min(least, search.best);
    }
  }
  for (const Search& search : searches) {
    if (!(search.score > 0)) continue;
    search.person->joints[k] = {search.score, search.pixel};
    search.person->visibility[k] = 1;
  }
}

}  // namespace instembed::group_keypoints

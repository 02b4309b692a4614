// No pixel is better than its heatmap: tiles are looked at from the highest on, and no further than
// to the first that is lower than what everybody has found. A tile is read once for all people.
#include "group_keypoints/refine.h"

#include <algorithm>
#include <limits>

#include "common/simd_widths.h"
#include "group_keypoints/tags.h"

namespace instembed::group_keypoints {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();
constexpr int64_t kTilePixels = kTileRows * kTileColumns;

// A tile of a heatmap and of its tags, as they are, NaN beyond the map's edges.
struct Tile {
  std::vector<double> heat, tags;

  explicit Tile(int64_t dims) : heat(kTilePixels), tags(dims * kTilePixels) {}
};

// |tags - tag| of some pixels; NaN where a tag is not finite.
template <class V, bool one>
INSTEMBED_INLINE V distances(const double* from, const double* tag, int64_t dims) {
  if constexpr (one) {  // the root of a square, without taking either
    const V tags = load<V>(from), difference = tags - tag[0];
    return (difference < 0 ? -difference : difference) + (tags - tags);
  } else {
    V squares{};
    for (int64_t d = 0; d < dims; ++d) {
      const V tags = load<V>(from + d * kTilePixels), difference = tags - tag[d];
      squares += difference * difference + (tags - tags);
    }
    return sqrt_lanes(squares);
  }
}

// The least distance in a tile. Comparisons are such that NaN is never taken.
template <class V, bool one>
INSTEMBED_INLINE double nearest_body(const Tile& tile, const double* tag, int64_t dims) {
  constexpr int L = kLanesOf<V>;
  V least = splat_as<V>(std::numeric_limits<double>::infinity()), other = least;
  for (int64_t i = 0; i < kTilePixels; i += 2 * L) {  // two chains of comparisons
    const V here = distances<V, one>(tile.tags.data() + i, tag, dims);
    const V next = distances<V, one>(tile.tags.data() + i + L, tag, dims);
    least = here < least ? here : least;
    other = next < other ? next : other;
  }
  least = other < least ? other : least;
  double nearest = least[0];
  for (int lane = 1; lane < L; ++lane) nearest = std::min(nearest, least[lane]);
  return nearest;
}

// heat - round(|tags - tag|) of a tile's pixels, and the largest of them.
template <class V, bool one>
INSTEMBED_INLINE double rate_body(const Tile& tile, const double* tag, int64_t dims,
                                  double* rates) {
  const V far = splat_as<V>(kFar);
  V most = splat_as<V>(kNothing);
  for (int64_t i = 0; i < kTilePixels; i += kLanesOf<V>) {
    V distance = distances<V, one>(tile.tags.data() + i, tag, dims);
    distance = distance > far ? far : distance;
    const V heat = load<V>(tile.heat.data() + i);
    const V rate = (heat - rounded(distance)) + (heat - heat);
    store(rates + i, rate);
    most = rate > most ? rate : most;
  }
  double best = most[0];
  for (int lane = 1; lane < kLanesOf<V>; ++lane) best = std::max(best, most[lane]);
  return best;
}

INSTEMBED_SIMD_WIDTHS(double nearest(const Tile& tile, const double* tag, int64_t dims),
                      using V = Register<double, kBytes>;
                      return dims == 1 ? nearest_body<V, true>(tile, tag, 1)
                                       : nearest_body<V, false>(tile, tag, dims))
INSTEMBED_SIMD_WIDTHS(double rate(const Tile& tile, const double* tag, int64_t dims, double* rates),
                      using V = Register<double, kBytes>;
                      return dims == 1 ? rate_body<V, true>(tile, tag, 1, rates)
                                       : rate_body<V, false>(tile, tag, dims, rates))

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
  searches.reserve(people->size());
  for (Person& person : *people) {
    if (person.joints[k].pixel < 0) searches.push_back({&person});
  }
  if (searches.empty()) return;

  const int64_t dims = tags.channels() / heatmaps.channels();
  const int64_t height = heatmaps.height(), width = heatmaps.width();
  const int64_t across = (width + kTileColumns - 1) / kTileColumns;
  std::vector<Waiting> queue;
  queue.reserve(highest.size());
  for (size_t t = 0; t < highest.size(); ++t) {
    if (highest[t] > kNothing) queue.push_back({highest[t], static_cast<int64_t>(t)});
  }
  std::make_heap(queue.begin(), queue.end());

  // Rounding takes no more than a half off a distance. The rest is for rounding errors.
  constexpr double kSlack = 0.75;
  Tile tile(dims);
  std::vector<double> rates(kTilePixels);
  double least = kNothing;  // of what people have found
  while (!queue.empty() && queue.front().highest >= least) {
    const Waiting next = queue.front();
    std::pop_heap(queue.begin(), queue.end());
    queue.pop_back();
    const int64_t y = next.tile / across * kTileRows, x = next.tile % across * kTileColumns;
    const Window window{y, x, std::min(kTileRows, height - y), std::min(kTileColumns, width - x)};
    if (window.rows < kTileRows || window.columns < kTileColumns) {
      std::fill(tile.tags.begin(), tile.tags.end(), std::numeric_limits<double>::quiet_NaN());
    }
    for (int64_t d = 0; d < dims; ++d) {
      tags.copy(b, k * dims + d, window, tile.tags.data() + d * kTilePixels, kTileColumns);
    }
    // Mostly the tags show that nobody's joint is here, and the heatmap stays unread.
    bool loaded = false;
    least = std::numeric_limits<double>::infinity();
    for (Search& search : searches) {
      const double* tag = search.person->tag.data();
      if (next.highest >= search.best &&
          std::min(nearest(tile, tag, dims), kFar) - kSlack <= next.highest - search.best) {
        if (!loaded) heatmaps.copy(b, k, window, tile.heat.data(), kTileColumns);
        loaded = true;
        const double best = rate(tile, tag, dims, rates.data());
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

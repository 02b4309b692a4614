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

// A tile of the heatmap and of its tags; -inf in the heatmap beyond its edges, and where it or a
// tag is not finite.
struct Tile {
  std::vector<double> heat, tags;

  explicit Tile(int64_t dims) : heat(kTilePixels), tags(dims * kTilePixels) {}

  void load_from(const Maps& heatmaps, const Maps& maps, int64_t b, int64_t k,
                 const Window& window) {
    const auto dims = static_cast<int64_t>(tags.size()) / kTilePixels;
    if (window.rows < kTileRows || window.columns < kTileColumns) {
      std::fill(heat.begin(), heat.end(), kNothing);
      std::fill(tags.begin(), tags.end(), 0.0);
    }
    heatmaps.copy(b, k, window, heat.data(), kTileColumns);
    for (int64_t i = 0; i < kTilePixels; ++i) {
      heat[i] = heat[i] - heat[i] == 0 ? heat[i] : kNothing;
    }
    for (int64_t d = 0; d < dims; ++d) {
      double* channel = tags.data() + d * kTilePixels;
      maps.copy(b, k * dims + d, window, channel, kTileColumns);
      for (int64_t i = 0; i < kTilePixels; ++i) {
        heat[i] = channel[i] - channel[i] == 0 ? heat[i] : kNothing;
        channel[i] = channel[i] - channel[i] == 0 ? channel[i] : 0.0;
      }
    }
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
  std::vector<int64_t> queue(highest.size());
  for (size_t t = 0; t < queue.size(); ++t) queue[t] = static_cast<int64_t>(t);
  const auto later = [&](int64_t s, int64_t t) {
    return highest[s] != highest[t] ? highest[s] < highest[t] : s > t;
  };
  std::make_heap(queue.begin(), queue.end(), later);

  Tile tile(dims);
  std::vector<double> rates(kTilePixels);
  double least = kNothing;  // of what people have found
  while (!queue.empty() && highest[queue.front()] >= least && highest[queue.front()] > kNothing) {
    const int64_t t = queue.front();
    std::pop_heap(queue.begin(), queue.end(), later);
    queue.pop_back();
    const int64_t y = t / across * kTileRows, x = t % across * kTileColumns;
    const Window window{y, x, std::min(kTileRows, height - y), std::min(kTileColumns, width - x)};
    tile.load_from(heatmaps, tags, b, k, window);
    least = std::numeric_limits<double>::infinity();
    for (Search& search : searches) {
      if (highest[t] >= search.best) {
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
    if (search.score > 0) search.person->joints[k] = {search.score, search.pixel};
  }
}

}  // namespace instembed::group_keypoints

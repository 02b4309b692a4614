#include "group_keypoints/peaks.h"

#include <algorithm>
#include <limits>

#include "common/simd.h"

namespace instembed::group_keypoints {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

// A map with `margin` columns of -inf on the left, at least a tile more of them on the right, and
// -inf for what is not finite.
template <class A>
struct Plane {
  int64_t height, width, margin, stride;
  std::vector<A> data;

  Plane(const Maps& maps, int64_t b, int64_t k, int64_t margin)
      : height(maps.height()),
        width(maps.width()),
        margin(margin),
        stride(width + 2 * margin + kTileColumns),
        data(height * stride, static_cast<A>(kNothing)) {
    maps.copy(b, k, {0, 0, height, width}, data.data() + margin, stride);
  }
  A* row(int64_t y) { return data.data() + y * stride + margin; }
  const A* row(int64_t y) const { return data.data() + y * stride + margin; }
};

template <class A>
using TileVec = vector_t<A, kTileColumns>;

// Writes -inf over what is not finite, and how high each tile is.
template <class A>
INSTEMBED_INLINE void survey_body(Plane<A>* plane, double* highest) {
  using V = TileVec<A>;
  const V nothing = static_cast<A>(kNothing) - V{};
  for (int64_t top = 0; top < plane->height; top += kTileRows) {
    const int64_t bottom = std::min(top + kTileRows, plane->height);
    for (int64_t x = 0; x < plane->width; x += kTileColumns) {
      V most = nothing;
      for (int64_t y = top; y < bottom; ++y) {
        V v = load<V>(plane->row(y) + x);
        v = v - v == V{} ? v : nothing;
        store(plane->row(y) + x, v);
        most = v > most ? v : most;
      }
      A best = most[0];
      for (int lane = 1; lane < kTileColumns; ++lane) best = std::max<A>(best, most[lane]);
      *highest++ = best;
    }
  }
}

INSTEMBED_SIMD void survey(Plane<float>* plane, double* highest) { survey_body(plane, highest); }
INSTEMBED_SIMD void survey(Plane<double>* plane, double* highest) { survey_body(plane, highest); }

// A peak is higher than all before it in its window, and as high as all after it. A vector of
// pixels is compared with the same vector shifted to each place of the window, until no lane can be
// a peak: mostly that is before the first.
template <class A>
INSTEMBED_INLINE void find_body(const Plane<A>& plane, const double* highest, A threshold,
                                int64_t rows, int64_t columns, std::vector<Peak>* peaks) {
  using V = TileVec<A>;
  using Mask = vector_t<MaskLane<A>, kTileColumns>;
  const V floor = threshold - V{};
  for (int64_t top = 0; top < plane.height; top += kTileRows) {
    const int64_t bottom = std::min(top + kTileRows, plane.height);
    for (int64_t x = 0; x < plane.width; x += kTileColumns) {
      if (!(*highest++ > threshold)) continue;
      for (int64_t y = top; y < bottom; ++y) {
        const A* at = plane.row(y) + x;
        const V v = load<V>(at);
        Mask peak = v > floor;
        for (int64_t step = 0; step <= 2 * rows && any_lane(peak); ++step) {
          const int64_t dy = step % 2 ? (step + 1) / 2 : -step / 2;  // the nearest rows first
          if (y + dy < 0 || y + dy >= plane.height) continue;
          const A* other = at + dy * plane.stride;
          const int64_t first_after = dy < 0 ? columns + 1 : (dy > 0 ? -columns : 0);
          for (int64_t dx = -columns; dx < first_after; ++dx) peak &= v > load<V>(other + dx);
          for (int64_t dx = first_after; dx <= columns; ++dx) peak &= v >= load<V>(other + dx);
        }
        if (!any_lane(peak)) continue;
        for (int lane = 0; lane < kTileColumns; ++lane) {
          if (peak[lane]) peaks->push_back({v[lane], y * plane.width + x + lane});
        }
      }
    }
  }
}

INSTEMBED_SIMD void find(const Plane<float>& plane, const double* highest, float threshold,
                         int64_t rows, int64_t columns, std::vector<Peak>* peaks) {
  find_body(plane, highest, threshold, rows, columns, peaks);
}
INSTEMBED_SIMD void find(const Plane<double>& plane, const double* highest, double threshold,
                         int64_t rows, int64_t columns, std::vector<Peak>* peaks) {
  find_body(plane, highest, threshold, rows, columns, peaks);
}

// The largest A that is not above the threshold: no A lies between the two.
template <class A>
A rounded_down(double threshold) {
  if (threshold >= static_cast<double>(std::numeric_limits<A>::max())) {
    return std::numeric_limits<A>::max();
  }
  const A nearest = static_cast<A>(threshold);
  return nearest > threshold ? std::nextafter(nearest, static_cast<A>(kNothing)) : nearest;
}

template <class A>
Candidates scan(const Maps& heatmaps, int64_t b, int64_t k, const Options& options) {
  // A window that reaches over the whole map sees no more by being larger.
  const int64_t reach = options.nms / 2;
  const int64_t rows = std::min(reach, std::max<int64_t>(heatmaps.height() - 1, 0));
  const int64_t columns = std::min(reach, std::max<int64_t>(heatmaps.width() - 1, 0));
  Plane<A> plane(heatmaps, b, k, columns);
  const int64_t down = (plane.height + kTileRows - 1) / kTileRows;
  const int64_t across = (plane.width + kTileColumns - 1) / kTileColumns;
  Candidates result;
  result.highest.resize(down * across);
  survey(&plane, result.highest.data());
  find(plane, result.highest.data(), rounded_down<A>(options.peak_threshold), rows, columns,
       &result.peaks);
  return result;
}

}  // namespace

Candidates find_candidates(const Maps& heatmaps, const Maps& tags, int64_t b, int64_t k,
                           const Options& options) {
  Candidates result = heatmaps.array.dtype == DType::f64 ? scan<double>(heatmaps, b, k, options)
                                                         : scan<float>(heatmaps, b, k, options);
  std::vector<Peak>& peaks = result.peaks;
  std::sort(peaks.begin(), peaks.end(), [](const Peak& p, const Peak& q) {
    return p.score != q.score ? p.score > q.score : p.pixel < q.pixel;
  });
  // Those whose tags are finite stay, as many as there is room for.
  const int64_t dims = tags.channels() / heatmaps.channels();
  size_t kept = 0;
  for (size_t i = 0; i < peaks.size() && kept < static_cast<size_t>(options.max_people); ++i) {
    bool finite = true;
    result.tags.resize((kept + 1) * dims);
    for (int64_t d = 0; d < dims; ++d) {
      const double tag = tags.at(b, k * dims + d, peaks[i].pixel);
      finite = finite && std::isfinite(tag);
      result.tags[kept * dims + d] = tag;
    }
    if (finite) peaks[kept++] = peaks[i];
  }
  peaks.resize(kept);
  result.tags.resize(kept * dims);
  return result;
}

}  // namespace instembed::group_keypoints

#include "group_keypoints/peaks.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "common/simd_widths.h"

namespace instembed::group_keypoints {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

// A map with `margin` columns of -inf on the left, at least a tile more of them on the right, and
// -inf for what is not finite.
template <class A>
struct Plane {
  int64_t height, width, margin, stride;
  std::unique_ptr<A[]> data;

  Plane(int64_t height, int64_t width, int64_t margin)
      : height(height),
        width(width),
        margin(margin),
        stride(width + 2 * margin + kTileColumns),
        data(new A[height * stride]) {}
  A* row(int64_t y) { return data.get() + y * stride + margin; }
  const A* row(int64_t y) const { return data.get() + y * stride + margin; }
};

// Rows [top, bottom) of the plane, one tile high, have been read: adds what is around them, and
// says how high each tile is.
template <int kBytes, class A>
INSTEMBED_INLINE void survey_body(Plane<A>* plane, int64_t top, int64_t bottom, double* highest) {
  using V = Register<A, kBytes>;
  const V nothing = splat_as<V>(static_cast<A>(kNothing));
  for (int64_t y = top; y < bottom; ++y) {
    A* row = plane->row(y);
    for (int64_t x = 1; x <= plane->margin; ++x) row[-x] = static_cast<A>(kNothing);
    for (int64_t x = 0; x < plane->margin + kTileColumns; ++x) {
      row[plane->width + x] = static_cast<A>(kNothing);
    }
  }
  for (int64_t x = 0; x < plane->width; x += kTileColumns) {
    V most = nothing;
    for (int64_t y = top; y < bottom; ++y) {
      for (A* at = plane->row(y) + x; at < plane->row(y) + x + kTileColumns; at += kLanesOf<V>) {
        V v = load<V>(at);
        v = v - v == V{} ? v : nothing;
        store(at, v);
        most = v > most ? v : most;
      }
    }
    A best = most[0];
    for (int lane = 1; lane < kLanesOf<V>; ++lane) best = std::max<A>(best, most[lane]);
    *highest++ = best;
  }
}

INSTEMBED_SIMD_WIDTHS(void survey(Plane<float>* plane, int64_t top, int64_t bottom,
                                  double* highest),
                      survey_body<kBytes>(plane, top, bottom, highest))
INSTEMBED_SIMD_WIDTHS(void survey(Plane<double>* plane, int64_t top, int64_t bottom,
                                  double* highest),
                      survey_body<kBytes>(plane, top, bottom, highest))

// A peak is higher than all before it in its window, and as high as all after it. A vector of
// pixels is compared with the same vector shifted to each place of the window, until no lane can be
// a peak: mostly that is before the first.
template <class V, class A>
INSTEMBED_INLINE void find_in_vector(const Plane<A>& plane, int64_t y, int64_t x, A threshold,
                                     int64_t rows, int64_t columns, std::vector<Peak>* peaks) {
  const A* at = plane.row(y) + x;
  const V v = load<V>(at);
  auto peak = v > splat_as<V>(threshold);
  for (int64_t step = 0; step <= 2 * rows && any_lane(peak); ++step) {
    const int64_t dy = step % 2 ? (step + 1) / 2 : -step / 2;  // the nearest rows first
    if (y + dy < 0 || y + dy >= plane.height) continue;
    const A* other = at + dy * plane.stride;
    const int64_t first_after = dy < 0 ? columns + 1 : (dy > 0 ? -columns : 0);
    for (int64_t dx = -columns; dx < first_after; ++dx) peak &= v > load<V>(other + dx);
    for (int64_t dx = first_after; dx <= columns; ++dx) peak &= v >= load<V>(other + dx);
  }
  if (!any_lane(peak)) return;
  for (int lane = 0; lane < kLanesOf<V>; ++lane) {
    if (peak[lane]) peaks->push_back({v[lane], y * plane.width + x + lane});
  }
}

template <int kBytes, class A>
INSTEMBED_INLINE void find_body(const Plane<A>& plane, const double* highest, A threshold,
                                int64_t rows, int64_t columns, std::vector<Peak>* peaks) {
  using V = Register<A, kBytes>;
  for (int64_t top = 0; top < plane.height; top += kTileRows) {
    const int64_t bottom = std::min(top + kTileRows, plane.height);
    for (int64_t left = 0; left < plane.width; left += kTileColumns) {
      if (!(*highest++ > threshold)) continue;
      for (int64_t y = top; y < bottom; ++y) {
        for (int64_t x = left; x < left + kTileColumns; x += kLanesOf<V>) {
          find_in_vector<V>(plane, y, x, threshold, rows, columns, peaks);
        }
      }
    }
  }
}

INSTEMBED_SIMD_WIDTHS(void find(const Plane<float>& plane, const double* highest, float threshold,
                                int64_t rows, int64_t columns, std::vector<Peak>* peaks),
                      find_body<kBytes>(plane, highest, threshold, rows, columns, peaks))
INSTEMBED_SIMD_WIDTHS(void find(const Plane<double>& plane, const double* highest, double threshold,
                                int64_t rows, int64_t columns, std::vector<Peak>* peaks),
                      find_body<kBytes>(plane, highest, threshold, rows, columns, peaks))

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
  Plane<A> plane(heatmaps.height(), heatmaps.width(), columns);
  const int64_t down = (plane.height + kTileRows - 1) / kTileRows;
  const int64_t across = (plane.width + kTileColumns - 1) / kTileColumns;
  Candidates result;
  result.highest.resize(down * across);
  result.peaks.reserve(64);
  for (int64_t t = 0; t < down; ++t) {
    const int64_t top = t * kTileRows, bottom = std::min(top + kTileRows, plane.height);
    heatmaps.copy(b, k, {top, 0, bottom - top, plane.width}, plane.row(top), plane.stride);
    survey(&plane, top, bottom, result.highest.data() + t * across);
  }
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
  result.tags.resize((std::min<size_t>(peaks.size(), options.max_people) + 1) * dims);
  for (size_t i = 0; i < peaks.size() && kept < static_cast<size_t>(options.max_people); ++i) {
    bool finite = true;
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

#include "mean_shift/blocks.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "mean_shift/formula.h"
#include "mean_shift/tree.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace instembed::mean_shift {

void ClassMap::read(int64_t from, int64_t n, int64_t* classes) const {
  if (mask == nullptr) {
    std::fill(classes, classes + n, int64_t{1});
    return;
  }
  dispatch_integer(mask->dtype, "mask", [&](auto zero) {
    using T = decltype(zero);
    const T* source = mask->as<const T>() + first + from * stride;
    for (int64_t i = 0; i < n; ++i) classes[i] = static_cast<int64_t>(source[i * stride]);
  });
}

namespace {

// Pixels a task. Blocks never cross from one task into the next.
constexpr int64_t kChunk = 8192;

// A block is a run of points within this many bandwidths of its first point. Points of a trained instance all lie
// within a third of a bandwidth of their centre, so within two thirds of each other.
constexpr double kCoherence = 2.0 / 3.0;

// Below this many points a block, on average, the order of the points is of no use.
constexpr double kUsefulRun = 6;

template <class T>
struct Source {
  const T* data;
  int64_t channel_stride, pixel_stride, pixels;
  int dims;
};

// Blocks as they are found, before they are sorted by class.
template <class S>
struct Found {
  std::vector<Block<S>> blocks;
  std::vector<int64_t> classes;
  std::vector<S> centers;  // blocks x dims
  std::vector<S> radius;
  std::vector<double> sums;  // blocks x dims

  void resize_last(int dims) {
    centers.resize(blocks.size() * dims);
    radius.resize(blocks.size());
    sums.resize(blocks.size() * dims);
  }
};

// How many of the n points follow the first within the limit. 0 if the first is not finite.
template <class S>
INSTEMBED_INLINE int coherent_points(const S* x, int64_t stride, int n, int dims, S limit2) {
  using V = Vec<S>;
  constexpr int L = kLanes<S>;
  int i = 0;
  for (; i + L <= n; i += L) {
    V a{};
    for (int d = 0; d < dims; ++d) {
      const V v = load<V>(x + d * stride + i) - x[d * stride];
      a += v * v;
    }
    const auto good = a <= limit2;
    if (!any_lane(~good)) continue;
    for (int k = 0; k < L; ++k) {
      if (!good[k]) return i + k;
    }
  }
  for (; i < n; ++i) {
    S a = 0;
    for (int d = 0; d < dims; ++d) {
      const S v = x[d * stride + i] - x[d * stride];
      a += v * v;
    }
    if (!(a <= limit2)) return i;
  }
  return n;
}

// Sum, centre and radius of the points of a block.
template <class S>
INSTEMBED_INLINE void summarize(const Block<S>& block, int dims, S* center, S* radius,
                                double* sum) {
  if (block.size == 1) {
    for (int d = 0; d < dims; ++d) {
      center[d] = block.x[d * block.stride];
      sum[d] = static_cast<double>(center[d]);
    }
    *radius = 0;
    return;
  }
  constexpr int L = kLanes<double>;
  using Narrow = vector_t<S, L>;
  const int whole = block.size / L * L;
  for (int d = 0; d < dims; ++d) {
    const S* x = block.x + d * block.stride;
    Vec<double> a{};
    for (int i = 0; i < whole; i += L) {
      const auto v = load<Narrow>(x + i);
      a += __builtin_convertvector(v, Vec<double>);
    }
    double total = sum_lanes(a);
    for (int i = whole; i < block.size; ++i) total += static_cast<double>(x[i]);
    sum[d] = total;
    center[d] = static_cast<S>(total / block.size);
  }
  using V = Vec<S>;
  V largest{};
  int i = 0;
  for (; i + kLanes<S> <= block.size; i += kLanes<S>) {
    V a{};
    for (int d = 0; d < dims; ++d) {
      const V v = load<V>(block.x + d * block.stride + i) - center[d];
      a += v * v;
    }
    largest = a > largest ? a : largest;
  }
  S most = 0;
  for (int k = 0; k < kLanes<S>; ++k) most = std::max(most, static_cast<S>(largest[k]));
  for (; i < block.size; ++i) {
    S a = 0;
    for (int d = 0; d < dims; ++d) {
      const S v = block.x[d * block.stride + i] - center[d];
      a += v * v;
    }
    most = std::max(most, a);
  }
  *radius = std::sqrt(most) * static_cast<S>(1 + distance_error<S>(dims));
}

// Cuts n consecutive points into blocks. Points of class 0 belong to none.
template <class S>
INSTEMBED_INLINE void find_blocks(const S* x, int64_t stride, const int64_t* classes, int64_t n,
                                  int64_t position, int dims, S limit2, Found<S>* found) {
  int64_t i = 0;
  while (i < n) {
    const int64_t c = classes[i];
    if (c == 0) {
      ++i;
      continue;
    }
    int64_t same = i + 1;
    while (same < n && same - i < kMaxBlock && classes[same] == c) ++same;
    const int size = coherent_points(x + i, stride, static_cast<int>(same - i), dims, limit2);
    if (size > 0) {
      found->blocks.push_back({x + i, stride, position + i, size});
      found->classes.push_back(c);
      const size_t k = found->blocks.size() - 1;
      found->resize_last(dims);
      summarize(found->blocks[k], dims, &found->centers[k * dims], &found->radius[k],
                &found->sums[k * dims]);
    }
    i += std::max(size, 1);
  }
}

INSTEMBED_SIMD void cut(const float* x, int64_t stride, const int64_t* classes, int64_t n,
                        int64_t position, int dims, double limit2, Found<float>* found) {
  find_blocks(x, stride, classes, n, position, dims, static_cast<float>(limit2), found);
}
INSTEMBED_SIMD void cut(const double* x, int64_t stride, const int64_t* classes, int64_t n,
                        int64_t position, int dims, double limit2, Found<double>* found) {
  find_blocks(x, stride, classes, n, position, dims, limit2, found);
}

INSTEMBED_SIMD void summarize_block(const Block<float>& block, int dims, float* center,
                                    float* radius, double* sum) {
  summarize(block, dims, center, radius, sum);
}
INSTEMBED_SIMD void summarize_block(const Block<double>& block, int dims, double* center,
                                    double* radius, double* sum) {
  summarize(block, dims, center, radius, sum);
}

// Copies the foreground of [from, from + n) to `to`, planar, and closes the gaps in `classes`.
template <class T, class S>
int64_t gather_planar(const Source<T>& source, int64_t from, int64_t n, int64_t* classes, S* to,
                      int64_t* pixels) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (classes[i] == 0) continue;
    pixels[kept] = from + i;
    classes[kept] = classes[i];
    ++kept;
  }
  if (source.channel_stride == 1) {
    for (int64_t k = 0; k < kept; ++k) {
      const T* row = source.data + pixels[k] * source.pixel_stride;
      for (int d = 0; d < source.dims; ++d) to[d * kept + k] = static_cast<S>(row[d]);
    }
    return kept;
  }
  for (int d = 0; d < source.dims; ++d) {
    const T* row = source.data + d * source.channel_stride;
    for (int64_t k = 0; k < kept; ++k) {
      to[d * kept + k] = static_cast<S>(row[pixels[k] * source.pixel_stride]);
    }
  }
  return kept;
}

// Whether neighbours resemble each other: the average run in a few dozen places.
template <class T>
bool coherent(const Source<T>& source, const ClassMap& classes, double limit2) {
  constexpr int kPlaces = 64, kPoints = 32;
  int64_t runs = 0, points = 0;
  std::vector<int64_t> seen(kChunk);
  std::vector<double> first(source.dims);
  for (int place = 0; place < kPlaces; ++place) {
    const int64_t from = source.pixels * place / kPlaces;
    const int64_t n = std::min(source.pixels * (place + 1) / kPlaces - from, int64_t{1024});
    classes.read(from, n, seen.data());
    int found = 0;
    int64_t run_class = 0;
    for (int64_t i = 0; i < n && found < kPoints; ++i) {
      if (seen[i] == 0) {
        run_class = 0;
        continue;
      }
      const T* x = source.data + (from + i) * source.pixel_stride;
      double squared = 0;
      for (int d = 0; d < source.dims; ++d) {
        const double v = static_cast<double>(x[d * source.channel_stride]);
        squared += (v - first[d]) * (v - first[d]);
      }
      if (found == 0 || seen[i] != run_class || !(squared <= limit2)) {
        ++runs;
        for (int d = 0; d < source.dims; ++d) {
          first[d] = static_cast<double>(x[d * source.channel_stride]);
        }
      }
      run_class = seen[i];
      ++found;
    }
    points += found;
  }
  return static_cast<double>(points) >= kUsefulRun * static_cast<double>(runs);
}

// Sorts blocks by class, otherwise in the order of the tasks that found them.
template <class S>
std::vector<BlockSet<S>> sort_by_class(const std::vector<Found<S>>& parts, int dims,
                                       const int64_t* order) {
  std::vector<int64_t> classes;
  for (const Found<S>& part : parts) {
    for (const int64_t c : part.classes) {
      if (classes.empty() || classes.back() != c) classes.push_back(c);
    }
    if (classes.size() > 4096) {
      std::sort(classes.begin(), classes.end());
      classes.erase(std::unique(classes.begin(), classes.end()), classes.end());
    }
  }
  std::sort(classes.begin(), classes.end());
  classes.erase(std::unique(classes.begin(), classes.end()), classes.end());
  auto index_of = [&](int64_t c) {
    return std::lower_bound(classes.begin(), classes.end(), c) - classes.begin();
  };
  std::vector<BlockSet<S>> sets(classes.size());
  std::vector<int64_t> sizes(classes.size(), 0);
  for (const Found<S>& part : parts) {
    if (classes.size() == 1) {
      sizes[0] += static_cast<int64_t>(part.blocks.size());
    } else {
      for (const int64_t c : part.classes) ++sizes[index_of(c)];
    }
  }
  for (size_t s = 0; s < sets.size(); ++s) {
    sets[s].dims = dims;
    sets[s].label_class = classes[s];
    sets[s].order = order;
    sets[s].blocks.reserve(sizes[s]);
    sets[s].balls.allocate(sizes[s], dims);
    sets[s].sums = Buffer<double>(sizes[s] * dims);
  }
  for (const Found<S>& part : parts) {
    for (size_t k = 0; k < part.blocks.size(); ++k) {
      BlockSet<S>& set = sets[classes.size() == 1 ? 0 : index_of(part.classes[k])];
      const int64_t b = set.size();
      set.blocks.push_back(part.blocks[k]);
      set.points += part.blocks[k].size;
      set.balls.radius[b] = part.radius[k];
      for (int d = 0; d < dims; ++d) {
        set.balls.centers[d * set.balls.row + b] = part.centers[k * dims + d];
        set.sums[b * dims + d] = part.sums[k * dims + d];
      }
    }
  }
  return sets;
}

template <class T, class S>
Cloud<S> build_runs(const Source<T>& source, const ClassMap& classes, double limit2,
                    int64_t* labels, int threads) {
  const bool in_place = std::is_same_v<T, S> && source.pixel_stride == 1;
  const int64_t chunks = (source.pixels + kChunk - 1) / kChunk;
  Cloud<S> cloud;
  if (!in_place) {
    cloud.storage = Buffer<S>(source.pixels * source.dims);
    cloud.orders.emplace_back(source.pixels);
  }
  std::vector<Found<S>> parts(chunks);
  parallel_for(chunks, threads, [&](int64_t chunk) {
    const int64_t from = chunk * kChunk;
    const int64_t n = std::min(kChunk, source.pixels - from);
    std::vector<int64_t> seen(n);
    classes.read(from, n, seen.data());
    if (labels) std::fill(labels + from, labels + from + n, int64_t{0});
    if constexpr (std::is_same_v<T, S>) {
      if (in_place) {
        cut(source.data + from, source.channel_stride, seen.data(), n, from, source.dims, limit2,
            &parts[chunk]);
        return;
      }
    }
    S* to = cloud.storage.get() + from * source.dims;
    const int64_t kept =
        gather_planar(source, from, n, seen.data(), to, cloud.orders[0].get() + from);
    cut(to, kept, seen.data(), kept, from, source.dims, limit2, &parts[chunk]);
  });
  cloud.sets = sort_by_class(parts, source.dims, in_place ? nullptr : cloud.orders[0].get());
  return cloud;
}

template <class S>
bool finite_row(const S* row, int dims) {
  S zero = 0;
  for (int d = 0; d < dims; ++d) zero += row[d] * 0;
  return zero == 0;
}

// The pixels of each class, ascending, from the lists of the chunks.
struct ClassPixels {
  int64_t label_class;
  std::vector<int64_t> pixels;
};

std::vector<ClassPixels> pixels_by_class(const std::vector<std::vector<int64_t>>& pixels,
                                         const std::vector<std::vector<int64_t>>& classes) {
  std::vector<int64_t> distinct;
  for (const auto& part : classes) {
    for (const int64_t c : part) {
      if (distinct.empty() || distinct.back() != c) distinct.push_back(c);
    }
  }
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  std::vector<ClassPixels> result(distinct.size());
  for (size_t s = 0; s < distinct.size(); ++s) result[s].label_class = distinct[s];
  for (size_t k = 0; k < pixels.size(); ++k) {
    for (size_t i = 0; i < pixels[k].size(); ++i) {
      size_t s = 0;
      if (distinct.size() > 1) {
        s = std::lower_bound(distinct.begin(), distinct.end(), classes[k][i]) - distinct.begin();
      }
      result[s].pixels.push_back(pixels[k][i]);
    }
  }
  return result;
}

// A set of blocks from the leaves of a tree.
template <class S>
BlockSet<S> blocks_of_leaves(const Rows<S>& rows, const Leaves& leaves, int64_t* order,
                             Buffer<S>* tiles, int threads) {
  BlockSet<S> set;
  set.dims = rows.dims;
  set.in_order = false;
  set.order = order;
  set.points = leaves.offsets.back();
  *tiles = Buffer<S>(set.points * rows.dims);
  for (size_t leaf = 0; leaf + 1 < leaves.offsets.size(); ++leaf) {
    const int64_t from = leaves.offsets[leaf], n = leaves.offsets[leaf + 1] - from;
    const int64_t most = leaves.most[leaf];
    const int64_t parts = (n + most - 1) / most;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = from + n * part / parts, last = from + n * (part + 1) / parts;
      set.blocks.push_back({tiles->get() + first * rows.dims, last - first, first,
                            static_cast<int32_t>(last - first)});
    }
  }
  set.balls.allocate(set.size(), rows.dims);
  set.sums = Buffer<double>(set.size() * rows.dims);
  constexpr int64_t kGroup = 64;
  parallel_for((set.size() + kGroup - 1) / kGroup, threads, [&](int64_t group) {
    std::vector<S> center(rows.dims);
    for (int64_t b = group * kGroup; b < std::min(set.size(), (group + 1) * kGroup); ++b) {
      const Block<S>& block = set.blocks[b];
      S* to = tiles->get() + block.position * rows.dims;
      for (int32_t i = 0; i < block.size; ++i) {
        const S* row = rows.data + order[block.position + i] * rows.stride;
        for (int d = 0; d < rows.dims; ++d) to[d * block.stride + i] = row[d];
      }
      summarize_block(block, rows.dims, center.data(), &set.balls.radius[b],
                      set.sums.get() + b * rows.dims);
      for (int d = 0; d < rows.dims; ++d) set.balls.centers[d * set.balls.row + b] = center[d];
    }
  });
  return set;
}

template <class T, class S>
Cloud<S> build_tree(const Source<T>& source, const ClassMap& classes, double bandwidth,
                    int64_t* labels, int threads) {
  const bool in_place = std::is_same_v<T, S> && source.channel_stride == 1;
  const int64_t chunks = (source.pixels + kChunk - 1) / kChunk;
  Cloud<S> cloud;
  Rows<S> rows{nullptr, source.dims, source.dims};
  if (in_place) {
    rows.data = reinterpret_cast<const S*>(source.data);
    rows.stride = source.pixel_stride;
  } else {
    cloud.storage = Buffer<S>(source.pixels * source.dims);
    rows.data = cloud.storage.get();
  }
  std::vector<std::vector<int64_t>> pixels(chunks), seen(chunks);
  parallel_for(chunks, threads, [&](int64_t chunk) {
    const int64_t from = chunk * kChunk;
    const int64_t n = std::min(kChunk, source.pixels - from);
    seen[chunk].resize(n);
    pixels[chunk].resize(n);
    classes.read(from, n, seen[chunk].data());
    if (labels) std::fill(labels + from, labels + from + n, int64_t{0});
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (seen[chunk][i] == 0) continue;
      const S* row = rows.data + (from + i) * rows.stride;
      if (!in_place) {
        S* to = cloud.storage.get() + (from + i) * source.dims;
        const T* x = source.data + (from + i) * source.pixel_stride;
        for (int d = 0; d < source.dims; ++d) to[d] = static_cast<S>(x[d * source.channel_stride]);
      }
      if (!finite_row(row, source.dims)) continue;
      pixels[chunk][kept] = from + i;
      seen[chunk][kept] = seen[chunk][i];
      ++kept;
    }
    pixels[chunk].resize(kept);
    seen[chunk].resize(kept);
  });
  for (ClassPixels& one : pixels_by_class(pixels, seen)) {
    cloud.orders.emplace_back(static_cast<int64_t>(one.pixels.size()));
    cloud.tiles.emplace_back();
    const Leaves leaves = sort_into_leaves(rows, one.pixels, bandwidth, cloud.orders.back().get(),
                                           threads);
    cloud.sets.push_back(blocks_of_leaves(rows, leaves, cloud.orders.back().get(),
                                          &cloud.tiles.back(), threads));
    cloud.sets.back().label_class = one.label_class;
  }
  return cloud;
}

}  // namespace

template <class S>
Cloud<S> build_cloud(const Array& embeddings, const Batch& batch, int64_t b,
                     const ClassMap& classes, double bandwidth, int64_t* labels, int threads) {
  return dispatch_floating(embeddings.dtype, "embeddings", [&](auto zero) -> Cloud<S> {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, double> && std::is_same_v<S, float>) {
      throw std::logic_error("double points need double blocks");
    } else {
      const Source<T> source{embeddings.as<const T>() + batch.first(b), batch.channel_stride,
                             batch.pixel_stride, batch.count(b),
                             static_cast<int>(batch.channels)};
      if (source.pixels == 0) return {};
      const double limit = kCoherence * bandwidth;
      if (coherent(source, classes, limit * limit)) {
        return build_runs<T, S>(source, classes, limit * limit, labels, threads);
      }
      return build_tree<T, S>(source, classes, bandwidth, labels, threads);
    }
  });
}

template Cloud<float> build_cloud(const Array&, const Batch&, int64_t, const ClassMap&, double,
                                  int64_t*, int);
template Cloud<double> build_cloud(const Array&, const Batch&, int64_t, const ClassMap&, double,
                                   int64_t*, int);

}  // namespace instembed::mean_shift

#include "mean_shift/blocks.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#include "common/dtype.h"
#include "common/label_rows.h"
#include "common/parallel.h"
#include "common/simd_widths.h"
#include "mean_shift/formula.h"
#include "mean_shift/scan.h"
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

void append(const ClassRun& run, std::vector<ClassRun>* runs) {
  if (!runs->empty() && runs->back().end == run.begin &&
      runs->back().label_class == run.label_class) {
    runs->back().end = run.end;
  } else {
    runs->push_back(run);
  }
}

}  // namespace

void ClassMap::find_runs(int64_t from, int64_t n, std::vector<ClassRun>* runs) const {
  if (mask == nullptr) return runs->push_back({0, n, 1});
  dispatch_integer(mask->dtype, "mask", [&](auto zero) {
    using T = decltype(zero);
    LineScanner<T>().scan(mask->as<const T>() + first + from * stride, stride, n,
                          [&](int64_t begin, int64_t end, int64_t label_class) {
                            if (label_class != 0) append({begin, end, label_class}, runs);
                          });
  });
}

namespace {

// Pixels a task. Blocks never cross from one task into the next.
constexpr int64_t kChunk = 8192;

// A block is a run of points within this many bandwidths of its first point. Points of a trained
// instance all lie within a third of a bandwidth of their centre, so within two thirds of each
// other.
constexpr double kCoherence = 2.0 / 3.0;

// Below this many points a block, on average, the order of the points is of no use.
constexpr double kUsefulRun = 6;

// Runs of at most so many points are stray. So many stray points are worth a tree of their own.
constexpr int32_t kStray = 3;
constexpr int64_t kManyStray = 1024;

// In a leaf of a tree, so many points within kCoherence of one make a block; the others are mixed.
constexpr int64_t kCoreSize = 16;
constexpr int kCores = 8;
constexpr int64_t kMixedBlock = 64;

// Points a leaf, about. Stray points come from between the clusters: small leaves keep their balls
// small.
constexpr int64_t kLeaf = 64;
constexpr int64_t kStrayLeaf = 16;

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
  std::vector<Block<S>> stray;
  std::vector<int64_t> stray_classes;
  std::vector<S> stray_rows;  // their points, copied while they are in the cache

  __attribute__((noinline)) size_t add(const Block<S>& block, int64_t label_class, int dims) {
    blocks.push_back(block);
    classes.push_back(label_class);
    centers.resize(blocks.size() * dims);
    radius.resize(blocks.size());
    sums.resize(blocks.size() * dims);
    return blocks.size() - 1;
  }

  // Kept out of the loop over all pixels, where it is rare.
  __attribute__((noinline)) void add_stray(const Block<S>& block, int64_t label_class, int dims) {
    stray.push_back(block);
    stray_classes.push_back(label_class);
    stray_rows.resize(stray_rows.size() + block.size * dims);
    S* to = stray_rows.data() + stray_rows.size() - block.size * dims;
    for (int32_t i = 0; i < block.size; ++i) {
      for (int d = 0; d < dims; ++d) *to++ = block.x[d * block.stride + i];
    }
  }
};

// squares[k] += the squared distances of a vector of points from (origin(0), origin(1), ...).
template <class V, int count, class S, class Origin>
INSTEMBED_INLINE void add_squares(const S* x, int64_t stride, int dims, Origin&& origin,
                                  V (&squares)[count]) {
  constexpr int L = sizeof(V) / sizeof(S);
  for (int d = 0; d < dims; ++d) {
#pragma GCC unroll 4
    for (int k = 0; k < count; ++k) {
      const V v = load<V>(x + d * stride + k * L) - origin(d);
      squares[k] += v * v;
    }
  }
}

// How many of the n points follow the first within the limit. 0 if the first is not finite.
template <int kBytes, class S>
INSTEMBED_INLINE int coherent_points(const S* x, int64_t stride, int n, int dims, S limit2) {
  constexpr int L = kBytes / static_cast<int>(sizeof(S));
  using V = vector_t<S, L>;
  int i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    V a[4] = {};
    add_squares(x + i, stride, dims, [&](int d) { return x[d * stride]; }, a);
    if (any_lane(~((a[0] <= limit2) & (a[1] <= limit2) & (a[2] <= limit2) & (a[3] <= limit2)))) {
      break;
    }
  }
  for (; i + L <= n; i += L) {
    V a[1] = {};
    add_squares(x + i, stride, dims, [&](int d) { return x[d * stride]; }, a);
    const auto good = a[0] <= limit2;
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

template <int kBytes, class S>
INSTEMBED_INLINE void summarize_body(const Block<S>& block, int dims, S* center, S* radius,
                                     double* sum) {
  if (block.size == 1) {
    for (int d = 0; d < dims; ++d) {
      center[d] = block.x[d * block.stride];
      sum[d] = static_cast<double>(center[d]);
    }
    *radius = 0;
    return;
  }
  using Sum = RegisterSum<kBytes>;
  const int whole = block.size / kLanes<double> * kLanes<double>;
  bool finite = true;
  for (int d = 0; d < dims; ++d) {
    const S* x = block.x + d * block.stride;
    Sum a;
    for (int i = 0; i < whole; i += kLanes<double>) {
      a.add([&](int k) __attribute__((always_inline)) {
        return load<vector_t<S, Sum::lanes>>(x + i + k);
      });
    }
    double total = a.total();
    for (int i = whole; i < block.size; ++i) total += static_cast<double>(x[i]);
    sum[d] = total;
    center[d] = static_cast<S>(total / block.size);
    finite = finite && total - total == 0;
  }
  if (!finite) {  // doubles overflow in the sum: a ball of everything, so that none is taken whole
    for (int d = 0; d < dims; ++d) center[d] = block.x[d * block.stride];
    *radius = std::numeric_limits<S>::infinity();
    return;
  }
  constexpr int L = kBytes / static_cast<int>(sizeof(S));
  using V = vector_t<S, L>;
  V largest{};
  int i = 0;
  const auto look_at = [&](auto& a) __attribute__((always_inline)) {
    add_squares(block.x + i, block.stride, dims, [&](int d) { return center[d]; }, a);
    for (const V& squared : a) largest = squared > largest ? squared : largest;
  };
  for (; i + 4 * L <= block.size; i += 4 * L) {
    V a[4] = {};
    look_at(a);
  }
  for (; i + L <= block.size; i += L) {
    V a[1] = {};
    look_at(a);
  }
  S most = 0;
  for (int k = 0; k < L; ++k) most = std::max(most, static_cast<S>(largest[k]));
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

// Runs are too short for the hardware to see the streams of all channels in time.
template <class S>
INSTEMBED_INLINE void prefetch(const S* x, int64_t stride, int64_t n, int dims) {
  for (int d = 0; d < dims; ++d) {
    for (int64_t k = 0; k < std::min<int64_t>(n, kMaxBlock); k += kLanes<S>) {
      __builtin_prefetch(x + d * stride + k);
    }
  }
}

// Cuts runs of one class into blocks. Points that are not finite belong to none: their labels
// become 0.
template <int kBytes, class S>
INSTEMBED_INLINE void find_blocks(const S* x, int64_t stride, const std::vector<ClassRun>& runs,
                                  int64_t first, const int64_t* pixels, int dims, S limit2,
                                  int64_t* labels, Found<S>* found) {
  for (size_t k = 0; k < runs.size(); ++k) {
    const auto [begin, end, label_class] = runs[k];
    if (k == 0) prefetch(x + begin, stride, end - begin, dims);
    if (k + 1 < runs.size()) {
      prefetch(x + runs[k + 1].begin, stride, runs[k + 1].end - runs[k + 1].begin, dims);
    }
    for (int64_t i = begin; i < end;) {
      const auto most = static_cast<int>(std::min<int64_t>(end - i, kMaxBlock));
      const int size = coherent_points<kBytes>(x + i, stride, most, dims, limit2);
      const int64_t* own = pixels ? pixels + i : nullptr;
      const Block<S> block{x + i, stride, own ? own[0] : first + i, own, size};
      if (size == 0) {
        labels[block.first] = 0;
      } else if (size <= kStray) {
        found->add_stray(block, label_class, dims);
      } else {
        const size_t index = found->add(block, label_class, dims);
        summarize_body<kBytes>(block, dims, &found->centers[index * dims], &found->radius[index],
                               &found->sums[index * dims]);
      }
      i += std::max(size, 1);
    }
  }
}

#define INSTEMBED_CUTS(S)                                                                         \
  INSTEMBED_SIMD_WIDTHS(                                                                          \
      void cut(const S* x, int64_t stride, const std::vector<ClassRun>& runs, int64_t first,      \
               const int64_t* pixels, int dims, double limit2, int64_t* labels, Found<S>* found), \
      find_blocks<kBytes>(x, stride, runs, first, pixels, dims, static_cast<S>(limit2), labels,   \
                          found))                                                                 \
  INSTEMBED_SIMD_WIDTHS(                                                                          \
      void summarize_block(const Block<S>& block, int dims, S* center, S* radius, double* sum),   \
      summarize_body<kBytes>(block, dims, center, radius, sum))
INSTEMBED_CUTS(float)
INSTEMBED_CUTS(double)
#undef INSTEMBED_CUTS

// Copies the runs of the pixels from `from` on to `to`, planar, and closes the gaps between them.
template <class T, class S>
int64_t gather_planar(const Source<T>& source, int64_t from, std::vector<ClassRun>* runs, S* to,
                      int64_t* pixels) {
  int64_t kept = 0;
  std::vector<ClassRun> closed;
  for (const ClassRun& run : *runs) {
    const int64_t begin = kept;
    for (int64_t i = run.begin; i < run.end; ++i) pixels[kept++] = from + i;
    append({begin, kept, run.label_class}, &closed);
  }
  *runs = std::move(closed);
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
std::vector<BlockSet<S>> sort_by_class(const std::vector<Found<S>>& parts, int dims) {
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

// core[i] is the core of point i of a leaf: 0, 1, ... the result - 1, or the result for points of
// no core.
template <class S>
int find_cores(const std::vector<S>& planar, int64_t n, int dims, S limit2, std::vector<S>* squared,
               std::vector<S>* origin, std::vector<int32_t>* core) {
  constexpr int32_t kUndecided = -1, kMixed = -2;
  core->assign(n, kUndecided);
  int cores = 0, failures = 0;
  int64_t leader = 0, undecided = n;
  while (cores < kCores && failures < 2 && undecided >= kCoreSize) {
    while ((*core)[leader] != kUndecided) ++leader;
    for (int d = 0; d < dims; ++d) (*origin)[d] = planar[d * n + leader];
    squared_distances(planar.data(), n, n, dims, origin->data(), squared->data());
    int64_t near = 0;
    for (int64_t i = leader; i < n; ++i) {
      near += (*core)[i] == kUndecided && (*squared)[i] <= limit2 ? 1 : 0;
    }
    if (near < kCoreSize) {
      (*core)[leader] = kMixed;
      --undecided;
      ++failures;
      continue;
    }
    for (int64_t i = leader; i < n; ++i) {
      if ((*core)[i] == kUndecided && (*squared)[i] <= limit2) (*core)[i] = cores;
    }
    undecided -= near;
    failures = 0;
    ++cores;
  }
  for (int64_t i = 0; i < n; ++i) {
    if ((*core)[i] < 0) (*core)[i] = cores;
  }
  return cores;
}

// Cuts the points of each leaf into blocks: cores of points near one of them, and what is left.
// `ids` are rows, leaf by leaf; `pixel_of` gives the pixel of a row, null where that is its number.
// One part for some leaves.
template <class S>
std::vector<Found<S>> cut_leaves(const Rows<S>& rows, const Leaves& leaves, const int64_t* ids,
                                 const int64_t* pixel_of, int64_t label_class, double limit2,
                                 Cloud<S>* cloud, int threads) {
  const int dims = rows.dims;
  const int64_t total = leaves.offsets.back(), count = leaves.size();
  cloud->points.emplace_back(total * dims);
  cloud->pixels.emplace_back(total);
  S* const tiles = cloud->points.back().get();
  int64_t* const pixels = cloud->pixels.back().get();
  constexpr int64_t kGroup = 32;
  std::vector<Found<S>> parts((count + kGroup - 1) / kGroup);
  parallel_for(static_cast<int64_t>(parts.size()), threads, [&](int64_t part) {
    std::vector<S> planar, squared, origin(dims);
    std::vector<int32_t> core;
    std::vector<int64_t> members;
    for (int64_t leaf = part * kGroup; leaf < std::min(count, (part + 1) * kGroup); ++leaf) {
      const int64_t from = leaves.offsets[leaf], n = leaves.offsets[leaf + 1] - from;
      if (n == 0) continue;
      planar.resize(n * dims);
      squared.resize(n);
      for (int64_t i = 0; i < n; ++i) {
        const S* row = rows.data + ids[from + i] * rows.stride;
        for (int d = 0; d < dims; ++d) planar[d * n + i] = row[d];
      }
      const int cores =
          find_cores(planar, n, dims, static_cast<S>(limit2), &squared, &origin, &core);
      int64_t at = from;
      for (int k = 0; k <= cores; ++k) {  // the last is what is left
        members.clear();
        for (int64_t i = 0; i < n; ++i) {
          if (core[i] == k) members.push_back(i);
        }
        const auto size = static_cast<int64_t>(members.size());
        const int64_t most = k < cores ? kMaxBlock : kMixedBlock;
        const int64_t blocks = (size + most - 1) / most;
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t begin = size * b / blocks, end = size * (b + 1) / blocks;
          S* to = tiles + at * dims;
          for (int64_t i = begin; i < end; ++i) {
            const int64_t id = ids[from + members[i]];
            pixels[at + i - begin] = pixel_of ? pixel_of[id] : id;
            for (int d = 0; d < dims; ++d) {
              to[d * (end - begin) + i - begin] = planar[d * n + members[i]];
            }
          }
          const Block<S> block{to, end - begin, pixels[at], pixels + at,
                               static_cast<int32_t>(end - begin)};
          Found<S>& found = parts[part];
          const size_t index = found.add(block, label_class, dims);
          summarize_block(block, dims, &found.centers[index * dims], &found.radius[index],
                          &found.sums[index * dims]);
          at += end - begin;
        }
      }
    }
  });
  return parts;
}

// What becomes of stray points: few stay blocks of their own, many are sorted into leaves of nearby
// points.
template <class S>
void settle_stray(std::vector<Found<S>>* parts, int dims, double bandwidth, double limit2,
                  Cloud<S>* cloud, int threads) {
  struct Stray {
    int64_t points = 0;
    std::vector<S> rows;
    std::vector<int64_t> pixels;
  };
  std::map<int64_t, Stray> by_class;
  // f(part, first, last, points before, points, stray) for the stretches of one class.
  auto for_each = [&](auto&& f) {
    for (Found<S>& part : *parts) {
      int64_t before = 0;
      for (size_t k = 0, last = 0; k < part.stray.size(); k = last) {
        int64_t points = 0;
        while (last < part.stray.size() && part.stray_classes[last] == part.stray_classes[k]) {
          points += part.stray[last++].size;
        }
        f(part, k, last, before, points, by_class[part.stray_classes[k]]);
        before += points;
      }
    }
  };
  for_each([](const Found<S>&, size_t, size_t, int64_t, int64_t points, Stray& stray) {
    stray.points += points;
  });
  for (auto& [label_class, stray] : by_class) {
    if (stray.points < kManyStray) continue;
    stray.rows.reserve(stray.points * dims);
    stray.pixels.reserve(stray.points);
  }
  for_each(
      [&](Found<S>& part, size_t first, size_t last, int64_t before, int64_t points, Stray& stray) {
        if (stray.points >= kManyStray) {
          const S* rows = part.stray_rows.data() + before * dims;
          stray.rows.insert(stray.rows.end(), rows, rows + points * dims);
          for (size_t k = first; k < last; ++k) {
            const Block<S>& block = part.stray[k];
            for (int32_t i = 0; i < block.size; ++i) stray.pixels.push_back(block.pixel(i));
          }
          return;
        }
        for (size_t k = first; k < last; ++k) {
          const Block<S>& block = part.stray[k];
          const size_t index = part.add(block, part.stray_classes[k], dims);
          summarize_block(block, dims, &part.centers[index * dims], &part.radius[index],
                          &part.sums[index * dims]);
        }
      });
  for (const auto& [label_class, stray] : by_class) {
    if (stray.pixels.empty()) continue;
    const Rows<S> rows{stray.rows.data(), dims, dims};
    std::vector<int64_t> ids(stray.pixels.size());
    std::iota(ids.begin(), ids.end(), int64_t{0});
    Buffer<int64_t> order(static_cast<int64_t>(ids.size()));
    const Leaves leaves = sort_into_leaves(rows, ids, bandwidth, kStrayLeaf, order.get(), threads);
    for (Found<S>& part : cut_leaves(rows, leaves, order.get(), stray.pixels.data(), label_class,
                                     limit2, cloud, threads)) {
      parts->push_back(std::move(part));
    }
  }
}

template <class T, class S>
Cloud<S> build_runs(const Source<T>& source, const ClassMap& classes, double bandwidth,
                    double limit2, int64_t* labels, int threads) {
  const bool in_place = std::is_same_v<T, S> && source.pixel_stride == 1;
  const int64_t chunks = (source.pixels + kChunk - 1) / kChunk;
  Cloud<S> cloud;
  if (!in_place) {
    cloud.points.emplace_back(source.pixels * source.dims);
    cloud.pixels.emplace_back(source.pixels);
  }
  std::vector<Found<S>> parts(chunks);
  parallel_for(chunks, threads, [&](int64_t chunk) {
    const int64_t from = chunk * kChunk;
    const int64_t n = std::min(kChunk, source.pixels - from);
    std::vector<ClassRun> runs;
    int64_t background = from;
    classes.find_runs(from, n, &runs);
    for (const ClassRun& run : runs) {
      std::fill(labels + background, labels + from + run.begin, int64_t{0});
      background = from + run.end;
    }
    std::fill(labels + background, labels + from + n, int64_t{0});
    if constexpr (std::is_same_v<T, S>) {
      if (in_place) {
        cut(source.data + from, source.channel_stride, runs, from, nullptr, source.dims, limit2,
            labels, &parts[chunk]);
        return;
      }
    }
    S* to = cloud.points[0].get() + from * source.dims;
    int64_t* pixels = cloud.pixels[0].get() + from;
    const int64_t kept = gather_planar(source, from, &runs, to, pixels);
    cut(to, kept, runs, 0, pixels, source.dims, limit2, labels, &parts[chunk]);
  });
  settle_stray(&parts, source.dims, bandwidth, limit2, &cloud, threads);
  cloud.sets = sort_by_class(parts, source.dims);
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

template <class T, class S>
Cloud<S> build_tree(const Source<T>& source, const ClassMap& classes, double bandwidth,
                    double limit2, int64_t* labels, int threads) {
  const bool in_place = std::is_same_v<T, S> && source.channel_stride == 1;
  const int64_t chunks = (source.pixels + kChunk - 1) / kChunk;
  Cloud<S> cloud;
  Buffer<S> converted;
  Rows<S> rows{nullptr, source.dims, source.dims};
  if (in_place) {
    rows.data = reinterpret_cast<const S*>(source.data);
    rows.stride = source.pixel_stride;
  } else {
    converted = Buffer<S>(source.pixels * source.dims);
    rows.data = converted.get();
  }
  std::vector<std::vector<int64_t>> pixels(chunks), seen(chunks);
  parallel_for(chunks, threads, [&](int64_t chunk) {
    const int64_t from = chunk * kChunk;
    const int64_t n = std::min(kChunk, source.pixels - from);
    seen[chunk].resize(n);
    pixels[chunk].resize(n);
    classes.read(from, n, seen[chunk].data());
    std::fill(labels + from, labels + from + n, int64_t{0});
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (seen[chunk][i] == 0) continue;
      const S* row = rows.data + (from + i) * rows.stride;
      if (!in_place) {
        S* to = converted.get() + (from + i) * source.dims;
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
  std::vector<Found<S>> parts;
  for (const ClassPixels& one : pixels_by_class(pixels, seen)) {
    Buffer<int64_t> order(static_cast<int64_t>(one.pixels.size()));
    const Leaves leaves =
        sort_into_leaves(rows, one.pixels, bandwidth, kLeaf, order.get(), threads);
    for (Found<S>& part :
         cut_leaves(rows, leaves, order.get(), nullptr, one.label_class, limit2, &cloud, threads)) {
      parts.push_back(std::move(part));
    }
  }
  cloud.sets = sort_by_class(parts, source.dims);
  return cloud;
}

}  // namespace

void summarize(const Block<float>& block, int dims, float* center, float* radius, double* sum) {
  summarize_block(block, dims, center, radius, sum);
}
void summarize(const Block<double>& block, int dims, double* center, double* radius, double* sum) {
  summarize_block(block, dims, center, radius, sum);
}

template <class S>
Cloud<S> build_cloud(const Array& embeddings, const Batch& batch, int64_t b,
                     const ClassMap& classes, double bandwidth, int64_t* labels, int threads) {
  return dispatch_floating(embeddings.dtype, "embeddings", [&](auto zero) -> Cloud<S> {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, double> && std::is_same_v<S, float>) {
      throw std::logic_error("double points need double blocks");
    } else {
      const Source<T> source{embeddings.as<const T>() + batch.first(b), batch.channel_stride,
                             batch.pixel_stride, batch.count(b), static_cast<int>(batch.channels)};
      if (source.pixels == 0) return {};
      const double limit = kCoherence * bandwidth;
      if (coherent(source, classes, limit * limit)) {
        return build_runs<T, S>(source, classes, bandwidth, limit * limit, labels, threads);
      }
      return build_tree<T, S>(source, classes, bandwidth, limit * limit, labels, threads);
    }
  });
}

template Cloud<float> build_cloud(const Array&, const Batch&, int64_t, const ClassMap&, double,
                                  int64_t*, int);
template Cloud<double> build_cloud(const Array&, const Batch&, int64_t, const ClassMap&, double,
                                   int64_t*, int);

}  // namespace instembed::mean_shift

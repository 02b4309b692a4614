#include "mean_shift/tree.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "common/parallel.h"
#include "common/simd_widths.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace instembed::mean_shift {

namespace {

constexpr int64_t kSample = 16384;  // points to grow the tree on, at most
constexpr int kMaxDepth = 32;
constexpr int64_t kRouteChunk = 4096;

// A node sends a point to children[x[channel] > threshold]; a leaf sends it to itself.
template <class S>
struct Tree {
  std::vector<int32_t> channel, child, leaf;
  std::vector<S> threshold;
  int32_t leaves = 0;
  int depth = 0;

  int32_t add() {
    const auto node = static_cast<int32_t>(child.size());
    channel.push_back(0);
    child.push_back(node);
    leaf.push_back(-1);
    threshold.push_back(std::numeric_limits<S>::infinity());
    return node;
  }
};

// Rows of the sample are padded with zeros to whole vectors.
constexpr int64_t kRowLanes = kLanes<double>;
int64_t padded_row(int dims) { return (dims + kRowLanes - 1) / kRowLanes * kRowLanes; }

// Mean and variance of each channel of n rows, about the first: against cancellation far from zero.
template <int kBytes, class S>
INSTEMBED_INLINE void moments_of(const S* data, int64_t row, const int64_t* index, int64_t n,
                                 double* mean, double* variance) {
  constexpr int L = kBytes / 8;
  using V = vector_t<double, L>;
  using Narrow = vector_t<S, L>;
  for (int64_t d = 0; d < row; d += L) {
    const V origin = __builtin_convertvector(load<Narrow>(data + index[0] * row + d), V);
    V sum{}, square{};
    for (int64_t i = 0; i < n; ++i) {
      const V v = __builtin_convertvector(load<Narrow>(data + index[i] * row + d), V) - origin;
      sum += v;
      square += v * v;
    }
    sum /= static_cast<double>(n);
    store(variance + d, V(square / static_cast<double>(n) - sum * sum));
    store(mean + d, V(sum + origin));
  }
}

#define INSTEMBED_MOMENTS(S)                                                                      \
  INSTEMBED_SIMD_WIDTHS(void moments(const S* data, int64_t row, const int64_t* index, int64_t n, \
                                     double* mean, double* variance),                             \
                        moments_of<kBytes>(data, row, index, n, mean, variance))
INSTEMBED_MOMENTS(float)
INSTEMBED_MOMENTS(double)
#undef INSTEMBED_MOMENTS

template <class S>
class Grower {
 public:
  Grower(const Rows<S>& rows, const std::vector<int64_t>& ids, double bandwidth, int64_t leaf)
      : dims_(rows.dims), row_(padded_row(rows.dims)), tight_(bandwidth / 3) {
    const auto n = static_cast<int64_t>(ids.size());
    const int64_t sample = std::min(n, std::max<int64_t>(2048, std::min(kSample, 4 * n / leaf)));
    leaf_ = std::max<int64_t>(2, leaf * sample / n);
    data_.resize(sample * row_);
    for (int64_t i = 0; i < sample; ++i) {
      const S* row = rows.data + ids[n * i / sample] * rows.stride;
      std::copy(row, row + dims_, data_.begin() + i * row_);
    }
    index_.resize(sample);
    std::iota(index_.begin(), index_.end(), 0);
    mean_.resize(row_);
    square_.resize(row_);
    tree_.add();
    grow(0, 0, sample, 0);
  }

  Tree<S> take() { return std::move(tree_); }

 private:
  void make_leaf(int32_t node) { tree_.leaf[node] = tree_.leaves++; }

  // Splits at the mean of the channel that varies most: between clusters rather than through them.
  void grow(int32_t node, int64_t begin, int64_t end, int depth) {
    tree_.depth = std::max(tree_.depth, depth);
    if (end - begin < 2) return make_leaf(node);
    moments(data_.data(), row_, index_.data() + begin, end - begin, mean_.data(), square_.data());
    double variance = 0;
    for (int d = 0; d < dims_; ++d) variance += square_[d];
    const bool tight = variance <= tight_ * tight_;
    if (tight || end - begin <= leaf_ || depth == kMaxDepth || !std::isfinite(variance)) {
      return make_leaf(node);
    }
    const auto channel = static_cast<int32_t>(
        std::max_element(square_.begin(), square_.begin() + dims_) - square_.begin());
    const auto threshold = static_cast<S>(mean_[channel]);
    const auto middle =
        std::partition(index_.begin() + begin, index_.begin() + end,
                       [&](int64_t i) { return !(data_[i * row_ + channel] > threshold); }) -
        index_.begin();
    if (middle == begin || middle == end) return make_leaf(node);
    const int32_t low = tree_.add();
    tree_.add();
    tree_.channel[node] = channel;
    tree_.threshold[node] = threshold;
    tree_.child[node] = low;
    grow(low, begin, middle, depth + 1);
    grow(low + 1, middle, end, depth + 1);
  }

  int dims_;
  int64_t row_;  // from one point of data_ to the next
  double tight_;
  int64_t leaf_;
  std::vector<S> data_;
  std::vector<int64_t> index_;
  std::vector<double> mean_, square_;
  Tree<S> tree_;
};

// Sixteen points descend side by side: their loads do not wait for each other.
template <class S>
void route(const Tree<S>& tree, const Rows<S>& rows, const int64_t* ids, int64_t n,
           int32_t* leaves) {
  constexpr int kWidth = 16;
  for (int64_t from = 0; from < n; from += kWidth) {
    const int width = static_cast<int>(std::min<int64_t>(kWidth, n - from));
    int32_t node[kWidth] = {};
    const S* row[kWidth];
    for (int k = 0; k < width; ++k) row[k] = rows.data + ids[from + k] * rows.stride;
    for (int level = 0; level < tree.depth; ++level) {
      int32_t moved = 0;
      for (int k = 0; k < width; ++k) {
        const int32_t at = node[k];
        const int32_t next =
            tree.child[at] + (row[k][tree.channel[at]] > tree.threshold[at] ? 1 : 0);
        moved |= next ^ at;
        node[k] = next;
      }
      if (moved == 0) break;
    }
    for (int k = 0; k < width; ++k) leaves[from + k] = tree.leaf[node[k]];
  }
}

}  // namespace

template <class S>
Leaves sort_into_leaves(const Rows<S>& rows, const std::vector<int64_t>& ids, double bandwidth,
                        int64_t leaf_points, int64_t* order, int threads) {
  const auto n = static_cast<int64_t>(ids.size());
  const Tree<S> tree = Grower<S>(rows, ids, bandwidth, leaf_points).take();
  const auto leaves = static_cast<int64_t>(tree.leaves);
  std::vector<int32_t> leaf(n);
  parallel_for((n + kRouteChunk - 1) / kRouteChunk, threads, [&](int64_t chunk) {
    const int64_t from = chunk * kRouteChunk;
    route(tree, rows, ids.data() + from, std::min(kRouteChunk, n - from), leaf.data() + from);
  });
  // A counting sort in parallel: few parts, since each counts all leaves.
  const int64_t parts = std::clamp<int64_t>(n / 16384, 1, 16);
  std::vector<int64_t> starts(parts * leaves, 0);
  auto part_begin = [&](int64_t part) { return n * part / parts; };
  parallel_for(parts, threads, [&](int64_t part) {
    int64_t* counts = starts.data() + part * leaves;
    for (int64_t i = part_begin(part); i < part_begin(part + 1); ++i) ++counts[leaf[i]];
  });
  Leaves result;
  result.offsets.assign(leaves + 1, 0);
  int64_t total = 0;
  for (int64_t l = 0; l < leaves; ++l) {
    result.offsets[l] = total;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t count = starts[part * leaves + l];
      starts[part * leaves + l] = total;
      total += count;
    }
  }
  result.offsets[leaves] = total;
  parallel_for(parts, threads, [&](int64_t part) {
    int64_t* to = starts.data() + part * leaves;
    for (int64_t i = part_begin(part); i < part_begin(part + 1); ++i) order[to[leaf[i]]++] = ids[i];
  });
  return result;
}

template Leaves sort_into_leaves(const Rows<float>&, const std::vector<int64_t>&, double, int64_t,
                                 int64_t*, int);
template Leaves sort_into_leaves(const Rows<double>&, const std::vector<int64_t>&, double, int64_t,
                                 int64_t*, int);

}  // namespace instembed::mean_shift

// Label statistics on the CPU: each chunk of rows is cut into runs and adds them up in slots of its
// own; the chunks of an image are then merged by id.
#include <algorithm>
#include <numeric>

#include "common/dtype.h"
#include "common/id_map.h"
#include "common/label_rows.h"
#include "common/parallel.h"
#include "label_statistics/label_statistics.h"

namespace instembed::label_statistics {
namespace {

constexpr int64_t kChunk = 1 << 15;  // pixels

// Pixels [start, end) of row (z, y).
struct Run {
  int64_t start, end, y, z;

  Extent extent() const {
    const int64_t n = end - start;
    const auto row = static_cast<int32_t>(y), plane = static_cast<int32_t>(z);
    return {n,
            {(start + end - 1) * n / 2, y * n, z * n},
            {static_cast<int32_t>(start), row, plane},
            {static_cast<int32_t>(end - 1), row, plane}};
  }
};

void merge(Extent* total, const Extent& other) {
  total->area += other.area;
  for (int axis = 0; axis < 3; ++axis) {
    total->sum[axis] += other.sum[axis];
    total->low[axis] = std::min(total->low[axis], other.low[axis]);
    total->high[axis] = std::max(total->high[axis], other.high[axis]);
  }
}

// Not by way of run.extent(): the compiler would put that together in memory and stall on reading
// it back.
void merge(Extent* total, const Run& run) {
  const int64_t n = run.end - run.start;
  total->area += n;
  total->sum[0] += (run.start + run.end - 1) * n / 2;
  total->sum[1] += run.y * n;
  total->sum[2] += run.z * n;
  const auto row = static_cast<int32_t>(run.y), plane = static_cast<int32_t>(run.z);
  // Runs come in ascending order of planes, and of rows in a plane: most of this is never taken.
  if (run.start < total->low[0]) total->low[0] = static_cast<int32_t>(run.start);
  if (run.end > total->high[0]) total->high[0] = static_cast<int32_t>(run.end - 1);
  if (row < total->low[1]) total->low[1] = row;
  if (row > total->high[1]) total->high[1] = row;
  total->high[2] = plane;
}

// Instances in order of first appearance.
class Table {
 public:
  void add(int64_t id, const Run& run) {
    const int32_t at = slot(id);
    if (at == static_cast<int32_t>(extents_.size())) {
      extents_.push_back(run.extent());
    } else {
      merge(&extents_[at], run);
    }
  }

  void add(const Table& other) {
    for (int32_t k = 0; k < other.map_.size(); ++k) {
      const int32_t at = slot(other.map_.ids()[k]);
      if (at == static_cast<int32_t>(extents_.size())) {
        extents_.push_back(other.extents_[k]);
      } else {
        merge(&extents_[at], other.extents_[k]);
      }
    }
  }

  Instances sorted() const {
    const std::vector<int64_t>& ids = map_.ids();
    std::vector<int32_t> order(ids.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return ids[a] < ids[b]; });
    Instances result;
    result.ids.reserve(order.size());
    result.extents.reserve(order.size());
    for (const int32_t slot : order) {
      result.ids.push_back(ids[slot]);
      result.extents.push_back(extents_[slot]);
    }
    return result;
  }

 private:
  // Ids are often 1..K: these need no hash, whose collisions a processor cannot foresee.
  static constexpr uint64_t kSmall = 2048;

  int32_t slot(int64_t id) {
    if (static_cast<uint64_t>(id) < kSmall) {
      if (small_.empty()) small_.assign(kSmall, -1);
      int32_t& known = small_[id];
      if (known < 0) known = map_.slot(id);
      return known;
    }
    if (id != last_id_ || last_slot_ < 0) {
      last_id_ = id;
      last_slot_ = map_.slot(id);
    }
    return last_slot_;
  }

  IdMap map_;
  std::vector<int32_t> small_;
  std::vector<Extent> extents_;
  int64_t last_id_ = 0;
  int32_t last_slot_ = -1;
};

// Pixels [from, to) of an image, counted row after row.
template <class L>
void scan(const L* image, const LabelGrid& grid, int64_t from, int64_t to, const LabelRules& rules,
          Table* table) {
  LineScanner<L> scanner;
  for (int64_t i = from; i < to;) {
    const int64_t row = i / grid.width, x = i % grid.width;
    const int64_t n = std::min(grid.width - x, to - i);
    const int64_t y = row % grid.height, z = row / grid.height;
    const L* line = image + z * grid.z_stride + y * grid.y_stride + x * grid.x_stride;
    scanner.scan(line, grid.x_stride, n, [&](int64_t start, int64_t end, int64_t id) {
      if (rules.background == id || rules.ignore_index == id) return;
      table->add(id, Run{x + start, x + end, y, z});
    });
    i += n;
  }
}

}  // namespace

Result measure(const Array& labels, const LabelRules& rules, int threads) {
  const LabelGrid grid(labels);
  const int64_t chunks = (grid.pixels() + kChunk - 1) / kChunk;  // an image
  std::vector<Table> tables(grid.images * chunks);
  dispatch_integer(labels.dtype, "labels", [&](auto type) {
    using L = decltype(type);
    parallel_for(grid.images * chunks, threads, [&](int64_t k) {
      const L* image = labels.as<const L>() + k / chunks * grid.image_stride;
      const int64_t from = k % chunks * kChunk;
      scan(image, grid, from, std::min(from + kChunk, grid.pixels()), rules, &tables[k]);
    });
  });

  Result result;
  result.axes = labels.ndim - 1;
  result.images.resize(grid.images);
  parallel_for(grid.images, threads, [&](int64_t b) {
    if (chunks == 0) return;
    Table& whole = tables[b * chunks];
    for (int64_t k = 1; k < chunks; ++k) whole.add(tables[b * chunks + k]);
    result.images[b] = whole.sorted();
  });
  return result;
}

int64_t Result::largest() const {
  int64_t most = 0;
  for (const Instances& image : images) most = std::max(most, image.size());
  return most;
}

void Result::copy(const Array& ids, const Array& boxes, const Array& areas, const Array& centroids,
                  const Array& instances) const {
  const auto n = static_cast<int64_t>(images.size());
  expect(ids.ndim == 2 && ids.shape[0] == n && ids.shape[1] >= largest(),
         "ids: expected (images, capacity) with capacity for every instance");
  const int64_t capacity = ids.shape[1];
  expect_contiguous(ids, DType::i64, n * capacity, "ids");
  expect_contiguous(boxes, DType::f32, n * capacity * 2 * axes, "boxes");
  expect_contiguous(areas, DType::i64, n * capacity, "areas");
  expect_contiguous(centroids, DType::f32, n * capacity * axes, "centroids");
  expect_contiguous(instances, DType::i64, n, "instances");
  std::fill_n(ids.as<int64_t>(), ids.size(), 0);
  std::fill_n(boxes.as<float>(), boxes.size(), 0.0f);
  std::fill_n(areas.as<int64_t>(), areas.size(), 0);
  std::fill_n(centroids.as<float>(), centroids.size(), 0.0f);
  for (int64_t b = 0; b < n; ++b) {
    instances.as<int64_t>()[b] = images[b].size();
    for (int64_t k = 0; k < images[b].size(); ++k) {
      const int64_t row = b * capacity + k;
      const Extent& extent = images[b].extents[k];
      ids.as<int64_t>()[row] = images[b].ids[k];
      areas.as<int64_t>()[row] = extent.area;
      for (int axis = 0; axis < axes; ++axis) {
        float* box = boxes.as<float>() + row * 2 * axes;
        box[axis] = static_cast<float>(extent.low[axis]);
        box[axes + axis] = static_cast<float>(int64_t{extent.high[axis]} + 1);
        centroids.as<float>()[row * axes + axis] = static_cast<float>(
            static_cast<double>(extent.sum[axis]) / static_cast<double>(extent.area));
      }
    }
  }
}

}  // namespace instembed::label_statistics

// Masks from label maps on the CPU: one scan of the map writes the runs of all instances.
#include <algorithm>
#include <cstring>

#include "common/dtype.h"
#include "common/id_map.h"
#include "common/label_rows.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "detections/detections.h"

namespace instembed::detections {
namespace {

// The row of an id in the list that it was made from; ids that are not in the list get rows beyond
// it.
class RowOfId {
 public:
  explicit RowOfId(const Array& ids) {
    expect(ids.ndim == 1, "ids: expected a vector");
    expect_contiguous(ids, DType::i64, ids.shape[0], "ids");
    for (int64_t k = 0; k < ids.shape[0]; ++k) {
      expect(map_.slot(ids.as<const int64_t>()[k]) == k, "ids: expected distinct values");
    }
    count_ = map_.size();
  }

  // -1 for no instance. Not const: an id is looked up once where it runs on, and unknown ids are
  // remembered.
  int32_t operator()(int64_t id) {
    if (id != last_id_ || last_row_ < -1) {
      last_id_ = id;
      const int32_t slot = map_.slot(id);
      last_row_ = slot < count_ ? slot : -1;
    }
    return last_row_;
  }

  int32_t count() const { return count_; }

 private:
  IdMap map_;
  int32_t count_ = 0;
  int64_t last_id_ = 0;
  int32_t last_row_ = -2;
};

// An (H, W) array as a batch of one.
LabelGrid grid_of(const Array& labels) {
  expect(labels.ndim == 2, "labels: expected (height, width)");
  Array batch = labels;
  batch.ndim = 3;
  batch.shape = {1, labels.shape[0], labels.shape[1]};
  batch.strides = {0, labels.strides[0], labels.strides[1]};
  return LabelGrid(batch);
}

// COCO's run lengths of one mask, in column-major order: zeros, ones, zeros, ...
class RunLengths {
 public:
  // Pixels [from, to) are ones; calls come in ascending order.
  void add(int64_t from, int64_t to) {
    if (from == end_ && !lengths_.empty()) {
      lengths_.back() += to - from;  // goes on from the foot of the last column
    } else {
      lengths_.push_back(from - end_);
      lengths_.push_back(to - from);
    }
    end_ = to;
  }

  void finish(int64_t pixels) {
    if (end_ < pixels) lengths_.push_back(pixels - end_);
  }

  // From the fourth length on, the difference to the last length of the same kind is written. Each
  // number takes as many digits of five bits as it needs, lowest first, as the characters from '0'
  // on; 32 marks that more digits follow, and the sign of the last one is the sign of the number.
  std::string text() const {
    std::string text;
    text.reserve(2 * lengths_.size());
    for (size_t k = 0; k < lengths_.size(); ++k) {
      int64_t rest = k > 2 ? lengths_[k] - lengths_[k - 2] : lengths_[k];
      for (bool more = true; more;) {
        const int64_t digit = rest & 31;
        rest >>= 5;
        more = rest != (digit & 16 ? -1 : 0);
        text.push_back(static_cast<char>('0' + digit + (more ? 32 : 0)));
      }
    }
    return text;
  }

 private:
  std::vector<int64_t> lengths_;
  int64_t end_ = 0;
};

struct ColumnRun {
  int64_t from, to;
  int32_t row;
};

constexpr int64_t kColumns = 16;  // whose pixels are brought together before they are scanned
constexpr int64_t kStripPixels = 1 << 16;  // a task

// The runs of instances in columns [first, last), down each column in turn.
template <class L>
std::vector<ColumnRun> scan_columns(const L* labels, const LabelGrid& grid, int64_t first,
                                    int64_t last, RowOfId row_of) {
  const int64_t height = grid.height;
  const int64_t line =
      height + 64 / static_cast<int64_t>(sizeof(L));  // columns in different cache sets
  std::vector<L> strip(kColumns * line);
  std::vector<ColumnRun> runs;
  LineScanner<L> scanner;
  for (int64_t x = first; x < last; x += kColumns) {
    const int64_t columns = std::min(kColumns, last - x);
    for (int64_t y = 0; y < height; ++y) {
      const L* from = labels + y * grid.y_stride + x * grid.x_stride;
      for (int64_t c = 0; c < columns; ++c) strip[c * line + y] = from[c * grid.x_stride];
    }
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t top = (x + c) * height;
      scanner.scan(strip.data() + c * line, 1, height, [&](int64_t start, int64_t end, int64_t id) {
        const int32_t row = row_of(id);
        if (row >= 0) runs.push_back({top + start, top + end, row});
      });
    }
  }
  return runs;
}

}  // namespace

void fill_masks(const Array& labels, const Array& ids, const Array& masks, int threads) {
  const LabelGrid grid = grid_of(labels);
  const RowOfId rows(ids);
  const int64_t pixels = grid.pixels();
  expect_contiguous(masks, DType::u8, rows.count() * pixels, "masks");
  if (pixels == 0) return;
  prefer_huge_pages(masks.data, masks.size());
  const int64_t lines = std::max<int64_t>(1, kStripPixels / grid.width);  // a task
  dispatch_integer(labels.dtype, "labels", [&](auto type) {
    using L = decltype(type);
    parallel_for((grid.height + lines - 1) / lines, threads, [&](int64_t task) {
      RowOfId row_of = rows;
      LineScanner<L> scanner;
      const int64_t first = task * lines, last = std::min(grid.height, first + lines);
      for (int32_t k = 0; k < rows.count(); ++k) {
        std::memset(masks.as<uint8_t>() + k * pixels + first * grid.width, 0,
                    (last - first) * grid.width);
      }
      for (int64_t y = first; y < last; ++y) {
        uint8_t* target = masks.as<uint8_t>() + y * grid.width;
        const L* line = labels.as<const L>() + y * grid.y_stride;
        scanner.scan(line, grid.x_stride, grid.width, [&](int64_t start, int64_t end, int64_t id) {
          const int32_t row = row_of(id);
          if (row >= 0) std::memset(target + row * pixels + start, 1, end - start);
        });
      }
    });
  });
}

std::vector<std::string> encode_masks(const Array& labels, const Array& ids, int threads) {
  const LabelGrid grid = grid_of(labels);
  const RowOfId rows(ids);
  if (grid.pixels() == 0) return std::vector<std::string>(rows.count());
  int64_t columns = std::max<int64_t>(1, kStripPixels / grid.height);  // a task
  columns = (columns + kColumns - 1) / kColumns * kColumns;
  std::vector<std::vector<ColumnRun>> runs((grid.width + columns - 1) / columns);
  dispatch_integer(labels.dtype, "labels", [&](auto type) {
    using L = decltype(type);
    parallel_for(static_cast<int64_t>(runs.size()), threads, [&](int64_t task) {
      const int64_t first = task * columns;
      runs[task] = scan_columns(labels.as<const L>(), grid, first,
                                std::min(grid.width, first + columns), rows);
    });
  });

  std::vector<RunLengths> lengths(rows.count());
  for (const std::vector<ColumnRun>& part : runs) {
    for (const ColumnRun& run : part) lengths[run.row].add(run.from, run.to);
  }
  std::vector<std::string> texts;
  texts.reserve(lengths.size());
  for (RunLengths& mask : lengths) {
    mask.finish(grid.pixels());
    texts.push_back(mask.text());
  }
  return texts;
}

}  // namespace instembed::detections

// The K pixels of an instance with the smallest random keys are a uniform sample without
// replacement, whatever the order in which pixels are looked at.
//
// As an instance's size is known from its runs, so is about how small its K smallest keys are: only
// pixels below that limit are kept as candidates. Should they be too few, which happens once in
// thousands of instances, they are collected again without a limit.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/parallel.h"
#include "sample_pixels/formula.h"
#include "sample_pixels/sample_pixels.h"

namespace instembed::sample_pixels {
namespace {

constexpr int kTile = 1024;
constexpr int64_t kTilesPerTask = 32;
constexpr uint64_t kEveryKey = UINT64_MAX;

struct Candidate {
  uint64_t key;
  int64_t pixel;
  int32_t slot;

  bool operator<(const Candidate& other) const {
    return key != other.key ? key < other.key : pixel < other.pixel;
  }
};

// The key that about `samples` and a few more of `pixels` pixels do not exceed.
uint64_t first_limit(int64_t samples, int64_t pixels) {
  const auto wanted = static_cast<double>(samples);
  const double share = (wanted + 4 * std::sqrt(wanted) + 4) / static_cast<double>(pixels);
  return share < 1 ? static_cast<uint64_t>(share * 0x1p64) : kEveryKey;
}

struct Task {
  int64_t image, first_tile, last_tile;
  std::vector<Candidate> candidates;
};

// Limits by slot; slots that are done have limit 0.
void collect(const RunsView& runs, const TileGrid& grid, int64_t pixels, uint64_t word,
             const std::vector<uint64_t>& limits, Task* task) {
  task->candidates.clear();
  const auto visit = [&](int64_t pixel, int32_t slot, uint64_t limit) {
    const uint64_t k = key(word, pixel);
    if (k <= limit) task->candidates.push_back({k, pixel, slot});
  };
  for (int64_t t = task->first_tile; t < task->last_tile; ++t) {
    const TileCode code = runs[grid.first[task->image] + t];
    const int64_t from = t * kTile;
    if (code.is_runs()) {
      code.for_each_run([&](int start, int length, int32_t slot) {
        const uint64_t limit = slot < 0 ? 0 : limits[slot];
        if (limit == 0) return;
        for (int64_t i = from + start; i < from + start + length; ++i) visit(i, slot, limit);
      });
      continue;
    }
    int32_t slots[kMaxTile];
    const int n = static_cast<int>(std::min<int64_t>(kTile, pixels - from));
    code.unpack(n, slots);
    for (int i = 0; i < n; ++i) {
      if (slots[i] >= 0 && limits[slots[i]] > 0) visit(from + i, slots[i], limits[slots[i]]);
    }
  }
}

// The rows of an instance in the outputs.
struct Row {
  int64_t* indices;
  uint8_t* valid;
  int64_t samples;

  void fill(Candidate* begin, Candidate* end, int64_t first) const {
    if (end - begin > samples) {
      std::nth_element(begin, begin + samples, end);
      end = begin + samples;
    }
    std::sort(begin, end, [](const Candidate& a, const Candidate& b) { return a.pixel < b.pixel; });
    for (int64_t k = 0; begin != end; ++begin, ++k) {
      indices[k] = first + begin->pixel;
      valid[k] = 1;
    }
  }
};

}  // namespace

Instances::Instances(const Array& labels, const Array* offsets, const LabelRules& rules,
                     int threads)
    : grid_(Batch::of_labels(labels, offsets), kTile),
      runs_(labels, Batch::of_labels(labels, offsets), grid_, rules, threads, {}) {
  const Batch batch = Batch::of_labels(labels, offsets);
  for (int64_t b = 0; b < batch.images; ++b) {
    const std::vector<int64_t>& ids = runs_.ids[b];
    std::vector<int32_t> order(ids.size()), rows(ids.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int32_t i, int32_t j) { return ids[i] < ids[j]; });
    for (size_t row = 0; row < order.size(); ++row) rows[order[row]] = static_cast<int32_t>(row);
    images_.push_back({batch.offsets ? batch.offsets[b] : 0, batch.count(b), std::move(rows)});
  }
}

int64_t Instances::largest() const {
  int64_t largest = 0;
  for (const Image& image : images_) {
    largest = std::max<int64_t>(largest, static_cast<int64_t>(image.rows.size()));
  }
  return largest;
}

void Instances::sample(const Array& words, const Array& indices, const Array& valid,
                       int threads) const {
  const auto images = static_cast<int64_t>(images_.size());
  expect(indices.ndim == 3 && indices.shape[0] == images && indices.shape[1] >= largest(),
         "indices: expected (images, instances, samples)");
  const int64_t capacity = indices.shape[1], samples = indices.shape[2];
  expect_contiguous(words, DType::i64, images, "words");
  expect_contiguous(indices, DType::i64, images * capacity * samples, "indices");
  expect_contiguous(valid, DType::u8, indices.size(), "valid");
  std::fill_n(indices.as<int64_t>(), indices.size(), -1);
  std::fill_n(valid.as<uint8_t>(), valid.size(), uint8_t{0});
  if (samples == 0) return;

  std::vector<std::vector<uint64_t>> limits(images);
  std::vector<Task> tasks;
  std::vector<int64_t> first_task(images + 1, 0);
  for (int64_t b = 0; b < images; ++b) {
    for (const int64_t count : runs_.counts[b]) limits[b].push_back(first_limit(samples, count));
    const int64_t tiles = limits[b].empty() ? 0 : grid_.first[b + 1] - grid_.first[b];
    for (int64_t t = 0; t < tiles; t += kTilesPerTask) {
      tasks.push_back({b, t, std::min(tiles, t + kTilesPerTask), {}});
    }
    first_task[b + 1] = static_cast<int64_t>(tasks.size());
  }

  for (bool again = true; again;) {
    parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t k) {
      const int64_t b = tasks[k].image;
      collect(runs_.view(), grid_, images_[b].pixels, words.as<const uint64_t>()[b], limits[b],
              &tasks[k]);
    });
    std::vector<uint8_t> lacking(images, 0);
    parallel_for(images, threads, [&](int64_t b) {
      std::vector<Candidate> candidates;
      for (int64_t k = first_task[b]; k < first_task[b + 1]; ++k) {
        candidates.insert(candidates.end(), tasks[k].candidates.begin(), tasks[k].candidates.end());
      }
      std::stable_sort(candidates.begin(), candidates.end(),
                       [](const Candidate& x, const Candidate& y) { return x.slot < y.slot; });
      Candidate* at = candidates.data();
      Candidate* const last = at + candidates.size();
      for (size_t slot = 0; slot < limits[b].size(); ++slot) {
        Candidate* const begin = at;
        while (at != last && at->slot == static_cast<int32_t>(slot)) ++at;
        if (limits[b][slot] == 0) continue;  // done
        if (at - begin < std::min(samples, runs_.counts[b][slot])) {
          limits[b][slot] = kEveryKey;
          lacking[b] = 1;
          continue;
        }
        const int64_t row = (b * capacity + images_[b].rows[slot]) * samples;
        Row{indices.as<int64_t>() + row, valid.as<uint8_t>() + row, samples}.fill(begin, at,
                                                                                  images_[b].first);
        limits[b][slot] = 0;
      }
    });
    again = std::any_of(lacking.begin(), lacking.end(), [](uint8_t any) { return any != 0; });
  }
}

}  // namespace instembed::sample_pixels

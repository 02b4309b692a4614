// The discriminative loss on the CPU.
//
// Forward reads the embeddings twice: once for the instances' means, once for the distances to
// them. The second pass also gathers the sums that the gradient through the means needs, so that
// backward reads the embeddings once and writes the gradient once. The labels are read once, into
// runs (common/label_runs.h).
//
// Bands of tiles are the tasks. Each band has partial sums of its own, in double, added up in band
// order.
#include <algorithm>
#include <memory>
#include <vector>

#include "common/dtype.h"
#include "common/label_runs.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/tiles.h"
#include "discriminative/discriminative.h"
#include "discriminative/pixel_kernels.h"
#include "discriminative/run_kernels.h"

namespace instembed::discriminative {
namespace {

#define INSTEMBED_TILE_COPIES(T)                                                                   \
  INSTEMBED_SIMD PlanarTile<accumulator_t<T>> planar_tile(                                         \
      const Image<const T>& image, int64_t from, int64_t n, accumulator_t<T>* scratch,             \
      int64_t stride) {                                                                            \
    return load_planar<accumulator_t<T>>(image, from, n, scratch, stride);                         \
  }                                                                                                \
  INSTEMBED_SIMD void pixel_tile(const Image<const T>& image, int64_t from, int64_t n,             \
                                 accumulator_t<T>* scratch) {                                      \
    load_pixels(image, from, n, scratch);                                                          \
  }                                                                                                \
  INSTEMBED_SIMD void write_planar(const Image<T>& image, int64_t from, int64_t n,                 \
                                   const accumulator_t<T>* scratch, int64_t stride, bool stream) { \
    store_planar(image, from, n, scratch, stride, stream);                                         \
  }                                                                                                \
  INSTEMBED_SIMD void write_pixels(const Image<T>& image, int64_t from, int64_t n,                 \
                                   const accumulator_t<T>* scratch) {                              \
    store_pixels(image, from, n, scratch);                                                         \
  }

INSTEMBED_TILE_COPIES(Half)
INSTEMBED_TILE_COPIES(BFloat16)
INSTEMBED_TILE_COPIES(float)
INSTEMBED_TILE_COPIES(double)

// ---------------------------------------------------------------------------------------------------------
// Passes over the batch.

// Tiles [first, last) of an image: a task.
struct Band {
  int64_t image, first, last;
};

// Bands of every image: enough in all for the threads of a large machine, few enough that their
// partial sums stay a small part of the embeddings. The data decides, not the number of threads.
std::vector<Band> cut_into_bands(const Batch& batch, const TileGrid& grid,
                                 const LabelRuns* labels) {
  constexpr int64_t kMinTiles = 8, kBands = 64, kPixelsPerPartial = 128;
  std::vector<Band> bands;
  for (int64_t b = 0; b < batch.images; ++b) {
    const int64_t tiles = grid.first[b + 1] - grid.first[b];
    int64_t count = std::min((kBands + batch.images - 1) / batch.images, tiles / kMinTiles);
    if (labels) {
      count = std::min(count, batch.count(b) / (kPixelsPerPartial * (labels->instances(b) + 1)));
    }
    count = std::max<int64_t>(1, count);
    for (int64_t k = 0; k < count; ++k) {
      bands.push_back({b, tiles * k / count, tiles * (k + 1) / count});
    }
  }
  return bands;
}

// Memory that is had when first asked for, and not initialised: most tiles need one form of scratch
// only.
template <class E>
class Lazy {
 public:
  explicit Lazy(int64_t size) : size_(size) {}
  E* data() {
    if (!data_) data_.reset(new E[size_]);
    return data_.get();
  }

 private:
  int64_t size_;
  std::unique_ptr<E[]> data_;
};

// Room for one tile in every form, and for the vectors of a pixel.
template <class A>
struct Scratch {
  int64_t stride;
  Lazy<A> planar, planar_out, pixels, hinges, slopes;
  Lazy<int32_t> slots;
  Lazy<VecSlot<A>> spare;

  Scratch(int64_t channels, int tile)
      : stride(planar_stride(tile)),
        planar(channels * stride),
        planar_out(channels * stride),
        pixels(padded_channels(channels) * tile),
        hinges(tile + kLanes<A>),
        slopes(tile + kLanes<A>),
        slots(tile),
        spare(2 * channels) {}
};

// f(start, length) for each stretch of background in a tile.
template <class F>
void for_each_background(const TileCode& code, int pixels, F&& f) {
  if (code.is_runs()) {
    code.for_each_run([&](int start, int length, int32_t slot) {
      if (slot == kBackground) f(start, length);
    });
    return;
  }
  std::vector<int32_t> slots(pixels);
  code.unpack(pixels, slots.data());
  for (int i = 0; i < pixels; ++i) {
    if (slots[i] == kBackground) f(i, 1);
  }
}

// What the forward pass knows of all instances, image after image; rows are padded.
template <class A>
struct Instances {
  std::vector<int64_t> first;
  std::vector<int64_t> counts;
  std::vector<A> means;
  // d term / d mean, for the variance, distance and background terms; empty if no gradient is
  // wanted.
  std::vector<A> grads[3];
  int64_t padded = 0;

  int64_t total() const { return first.back(); }
  int64_t size(int64_t b) const { return first[b + 1] - first[b]; }
};

// An image's means with the row of zeros that the kernels expect.
template <class A>
std::vector<A> table_of(const A* rows, int64_t count, int64_t padded) {
  std::vector<A> table((count + 1) * padded, A(0));
  std::copy(rows, rows + count * padded, table.begin());
  return table;
}

template <class A>
A sign(A value) {
  return value > 0 ? A(1) : (value < 0 ? A(-1) : A(0));
}

// |mean|, and its derivative by the mean in `grad`.
template <class A>
double norm_of(const A* mean, int64_t channels, int norm, double* grad) {
  double sum = 0;
  for (int64_t d = 0; d < channels; ++d) {
    sum +=
        norm == 2 ? static_cast<double>(mean[d]) * mean[d] : std::abs(static_cast<double>(mean[d]));
  }
  const double length = norm == 2 ? std::sqrt(sum) : sum;
  for (int64_t d = 0; d < channels; ++d) {
    grad[d] = norm == 1 ? sign<double>(mean[d]) : (length == 0 ? 0.0 : mean[d] / length);
  }
  return length;
}

// What an instance's sum of hinge^2 counts in the variance term.
template <class A>
std::vector<double> variance_weights(const Options& options, const Instances<A>& instances,
                                     int64_t b) {
  const int64_t* counts = instances.counts.data() + instances.first[b];
  std::vector<double> weights(instances.size(b));
  int64_t pixels = 0;
  for (size_t c = 0; c < weights.size(); ++c) pixels += counts[c];
  for (size_t c = 0; c < weights.size(); ++c) {
    weights[c] = 1 / (options.pooled_variance ? static_cast<double>(pixels)
                                              : static_cast<double>(weights.size()) * counts[c]);
  }
  return weights;
}

template <class T>
class ForwardPass {
 public:
  using A = accumulator_t<T>;

  ForwardPass(const Array& embeddings, const Batch& batch, const TileGrid& grid,
              const LabelRuns& labels, const Options& options, bool gradients)
      : embeddings_(embeddings),
        batch_(batch),
        grid_(grid),
        labels_(labels),
        runs_(labels.view()),
        options_(options),
        gradients_(gradients),
        padded_(padded_channels(batch.channels)),
        bands_(cut_into_bands(batch, grid, &labels)) {}

  // terms: (B, 4).
  Instances<A> run(A* terms) {
    Instances<A> result;
    result.padded = padded_;
    result.first.push_back(0);
    for (int64_t b = 0; b < batch_.images; ++b) {
      result.first.push_back(result.first.back() + labels_.instances(b));
      result.counts.insert(result.counts.end(), labels_.counts[b].begin(), labels_.counts[b].end());
    }
    std::fill(terms, terms + batch_.images * kTerms, A(0));
    result.means.assign(result.total() * padded_, A(0));
    if (gradients_) {
      for (auto& grad : result.grads) grad.assign(result.total() * padded_, A(0));
    }
    // Both passes over some images follow each other, so that the second finds them in the caches.
    for (size_t from = 0, to; from < bands_.size(); from = to) {
      to = end_of_images(from);
      find_means(from, to, result);
      find_variance(from, to, result, terms);
    }
    find_distances(result, terms);
    for (int64_t b = 0; b < batch_.images; ++b) {
      find_regularization(b, result, terms[b * kTerms + 2]);
    }
    return result;
  }

 private:
  Tables<A> tables(int64_t b, const A* means) const {
    return {batch_.channels, padded_, labels_.instances(b), means};
  }

  int tile_size(int64_t b, int64_t t) const {
    return static_cast<int>(std::min<int64_t>(grid_.tile, batch_.count(b) - t * grid_.tile));
  }

  // The end of the whole images that start with band `from` and keep all threads busy.
  size_t end_of_images(size_t from) const {
    const size_t enough = from + 2 * static_cast<size_t>(options_.threads);
    size_t to = from + 1;
    while (to < bands_.size() && (to < enough || bands_[to].image == bands_[to - 1].image)) ++to;
    return to;
  }

  // sums[k]: what `pass(band, partial)` adds up over the bands of the k-th image from band `from`
  // on, each band into `size(image)` zeros of its own, in band order.
  template <class Size, class BandPass>
  std::vector<std::vector<double>> over_bands(size_t from, size_t to, Size&& size,
                                              BandPass&& pass) {
    std::vector<std::vector<double>> partials(to - from);
    parallel_for(static_cast<int64_t>(to - from), options_.threads, [&](int64_t k) {
      const Band& band = bands_[from + k];
      partials[k].assign(size(band.image), 0.0);
      pass(band, partials[k].data());
    });
    std::vector<std::vector<double>> sums;
    for (size_t k = 0; k < partials.size(); ++k) {
      if (k == 0 || bands_[from + k].image != bands_[from + k - 1].image) {
        sums.push_back(std::move(partials[k]));
        continue;
      }
      for (size_t j = 0; j < partials[k].size(); ++j) sums.back()[j] += partials[k][j];
    }
    return sums;
  }

  void find_means(size_t from, size_t to, Instances<A>& result) {
    const auto sums = over_bands(
        from, to, [&](int64_t b) { return (labels_.instances(b) + 1) * padded_; },
        [&](const Band& band, double* sums) {
          const Image<const T> image(embeddings_, batch_, band.image);
          const Tables<A> tables = this->tables(band.image, nullptr);
          Scratch<A> scratch(batch_.channels, grid_.tile);
          for (int64_t t = band.first; t < band.last; ++t) {
            const TileCode code = runs_[grid_.first[band.image] + t];
            const int64_t from = t * grid_.tile;
            const int pixels = tile_size(band.image, t);
            if (!code.is_runs()) {
              pixel_tile(image, from, pixels, scratch.pixels.data());
              code.unpack_rows(pixels, tables.instances, scratch.slots.data());
              sum_pixels(scratch.pixels.data(), scratch.slots.data(), pixels, tables, sums);
            } else if (code.any_instance()) {
              const auto tile =
                  planar_tile(image, from, pixels, scratch.planar.data(), scratch.stride);
              sum_runs(tile, code, tables, sums, scratch.spare.data());
            }
          }
        });
    for_each_image(from, sums, [&](int64_t b, const std::vector<double>& total) {
      for (int64_t c = 0; c < labels_.instances(b); ++c) {
        A* mean = result.means.data() + (result.first[b] + c) * padded_;
        for (int64_t d = 0; d < batch_.channels; ++d) {
          mean[d] = static_cast<A>(total[c * padded_ + d] / labels_.counts[b][c]);
        }
      }
    });
  }

  // The variance and background terms: whatever compares pixels with means.
  void find_variance(size_t from, size_t to, Instances<A>& result, A* terms) {
    // A band's partial sums: hinge^2 and pulls an instance, then the background's hinge^2, pixels
    // and pushes.
    const auto rows = [&](int64_t b) { return labels_.instances(b) + int64_t{1}; };
    const auto table = [&](int64_t b) { return gradients_ ? rows(b) * padded_ : 0; };
    const auto size = [&](int64_t b) {
      return rows(b) + table(b) + (options_.background_push ? 2 + table(b) : 0);
    };
    const auto sums = over_bands(from, to, size, [&](const Band& band, double* partial) {
      const int64_t b = band.image;
      const Image<const T> image(embeddings_, batch_, b);
      const auto means =
          table_of(result.means.data() + result.first[b] * padded_, result.size(b), padded_);
      const Tables<A> tables = this->tables(b, means.data());
      const Spread<A> spread{partial, gradients_ ? partial + rows(b) : nullptr};
      double* background = partial + rows(b) + table(b);
      const Push<A> push{static_cast<A>(options_.delta_dist),
                         background,
                         gradients_ ? background + 2 : nullptr,
                         nullptr,
                         0,
                         0,
                         0};
      const auto delta = static_cast<A>(options_.delta_var);
      Scratch<A> scratch(batch_.channels, grid_.tile);
      for (int64_t t = band.first; t < band.last; ++t) {
        const TileCode code = runs_[grid_.first[b] + t];
        const int64_t from = t * grid_.tile;
        const int pixels = tile_size(b, t);
        if (!code.is_runs()) {
          pixel_tile(image, from, pixels, scratch.pixels.data());
          code.unpack_rows(pixels, tables.instances, scratch.slots.data());
          spread_pixels(options_.norm, scratch.pixels.data(), scratch.slots.data(), pixels, delta,
                        tables, spread, scratch.hinges.data(), scratch.slopes.data());
        } else if (code.any_instance()) {
          const auto tile = planar_tile(image, from, pixels, scratch.planar.data(), scratch.stride);
          spread_runs(options_.norm, tile, code, delta, tables, spread, scratch.spare.data());
        }
        if (options_.background_push && tables.instances > 0) {
          const auto tile = planar_tile(image, from, pixels, scratch.planar.data(), scratch.stride);
          for_each_background(code, pixels, [&](int start, int length) {
            background[1] += length;
            push_background(options_.norm, tile, start, length, tables, push, scratch.spare.data());
          });
        }
      }
    });
    for_each_image(from, sums, [&](int64_t b, const std::vector<double>& total) {
      const int64_t count = result.size(b);
      if (count == 0) return;
      const std::vector<double> weights = variance_weights(options_, result, b);
      double variance = 0;
      for (int64_t c = 0; c < count; ++c) {
        variance += weights[c] * total[c];
        for (int64_t d = 0; gradients_ && d < batch_.channels; ++d) {
          result.grads[0][(result.first[b] + c) * padded_ + d] =
              static_cast<A>(-2 * weights[c] * total[rows(b) + c * padded_ + d]);
        }
      }
      terms[b * kTerms] = static_cast<A>(variance);
      const double* background = total.data() + rows(b) + table(b);
      if (!options_.background_push || background[1] == 0) return;
      const double weight = 1 / (background[1] * static_cast<double>(count));
      terms[b * kTerms + 3] = static_cast<A>(weight * background[0]);
      for (int64_t j = 0; gradients_ && j < count * padded_; ++j) {
        result.grads[2][result.first[b] * padded_ + j] =
            static_cast<A>(2 * weight * background[2 + j]);
      }
    });
  }

  // Blocks of an image's means, against all its means, are the tasks.
  void find_distances(Instances<A>& result, A* terms) {
    constexpr int64_t kRows = 64;
    struct Task {
      int64_t image, from, to;
    };
    std::vector<Task> tasks;
    std::vector<std::vector<A>> planar(batch_.images);
    const auto stride = [&](int64_t b) { return result.size(b) + kLanes<A>; };
    for (int64_t b = 0; b < batch_.images; ++b) {
      const int64_t count = result.size(b);
      if (count < 2) continue;
      const A* rows = result.means.data() + result.first[b] * padded_;
      planar[b].assign(batch_.channels * stride(b), A(0));
      for (int64_t c = 0; c < count; ++c) {
        for (int64_t d = 0; d < batch_.channels; ++d) {
          planar[b][d * stride(b) + c] = rows[c * padded_ + d];
        }
      }
      for (int64_t from = 0; from < count; from += kRows) {
        tasks.push_back({b, from, std::min(count, from + kRows)});
      }
    }
    const auto pairs = [&](int64_t b) {
      return static_cast<double>(result.size(b)) * static_cast<double>(result.size(b) - 1);
    };
    std::vector<double> totals(tasks.size(), 0.0);
    parallel_for(static_cast<int64_t>(tasks.size()), options_.threads, [&](int64_t k) {
      const auto [b, from, to] = tasks[k];
      std::vector<double> grads(gradients_ ? (to - from) * padded_ : 0, 0.0);
      std::vector<VecSlot<A>> spare(2 * batch_.channels);
      repel(options_.norm, result.means.data() + result.first[b] * padded_, from, to,
            planar[b].data(), stride(b), tables(b, nullptr),
            static_cast<A>(2 * options_.delta_dist), &totals[k],
            gradients_ ? grads.data() : nullptr, spare.data());
      // A pair counts in both orders, so a mean's gradient is twice that of its row.
      for (size_t j = 0; j < grads.size(); ++j) {
        result.grads[1][(result.first[b] + from) * padded_ + j] =
            static_cast<A>(4 * grads[j] / pairs(b));
      }
    });
    std::vector<double> total(batch_.images, 0.0);
    for (size_t k = 0; k < tasks.size(); ++k) total[tasks[k].image] += totals[k];
    for (int64_t b = 0; b < batch_.images; ++b) {
      if (result.size(b) >= 2) terms[b * kTerms + 1] = static_cast<A>(total[b] / pairs(b));
    }
  }

  void find_regularization(int64_t b, const Instances<A>& result, A& term) {
    const int64_t count = result.size(b);
    if (count == 0) return;
    double total = 0;
    std::vector<double> unused(batch_.channels);
    for (int64_t c = 0; c < count; ++c) {
      total += norm_of(result.means.data() + (result.first[b] + c) * padded_, batch_.channels,
                       options_.norm, unused.data());
    }
    term = static_cast<A>(total / count);
  }

  // f(image, sum) for the sums that start with band `from`.
  template <class F>
  void for_each_image(size_t from, const std::vector<std::vector<double>>& sums, F&& f) {
    for (size_t k = 0; k < sums.size(); ++k)
      f(bands_[from].image + static_cast<int64_t>(k), sums[k]);
  }

 private:
  const Array& embeddings_;
  const Batch& batch_;
  const TileGrid& grid_;
  const LabelRuns& labels_;
  const RunsView runs_;
  const Options& options_;
  const bool gradients_;
  const int64_t padded_;
  const std::vector<Band> bands_;
};

// grad = d (sum of grad_terms * terms) / d embeddings, where `result` and `runs` are the forward
// pass's.
template <class T>
void backward_pass(const Array& embeddings, const Batch& batch, const TileGrid& grid,
                   const Options& options, const Instances<accumulator_t<T>>& instances,
                   const RunsView& runs, const accumulator_t<T>* grad_terms, const Array& grad,
                   const Batch& grad_batch) {
  using A = accumulator_t<T>;
  const int64_t channels = batch.channels, padded = instances.padded;

  // Per image: means, and what each instance's pixels have in common.
  struct ImageTables {
    std::vector<A> means, through_mean, scale;
    A push_scale = 0;
  };
  std::vector<ImageTables> all(batch.images);
  parallel_for(batch.images, options.threads, [&](int64_t b) {
    ImageTables& image = all[b];
    const int64_t count = instances.size(b), first = instances.first[b];
    const A* g = grad_terms + b * kTerms;
    const std::vector<double> weights = variance_weights(options, instances, b);
    image.means = table_of(instances.means.data() + first * padded, count, padded);
    image.through_mean.assign((count + 1) * padded, A(0));
    image.scale.assign(count + 1, A(0));
    std::vector<double> norm_grad(channels);
    int64_t labelled = 0;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t row = (first + c) * padded;
      image.scale[c] = static_cast<A>(2 * weights[c] * g[0]);
      norm_of(instances.means.data() + row, channels, options.norm, norm_grad.data());
      for (int64_t d = 0; d < channels; ++d) {
        const double by_mean = static_cast<double>(g[0]) * instances.grads[0][row + d] +
                               static_cast<double>(g[1]) * instances.grads[1][row + d] +
                               g[2] * norm_grad[d] / count +
                               static_cast<double>(g[3]) * instances.grads[2][row + d];
        image.through_mean[c * padded + d] = static_cast<A>(by_mean / instances.counts[first + c]);
      }
      labelled += instances.counts[first + c];
    }
    if (options.background_push && count > 0) {
      int64_t background = 0;
      for (int64_t t = grid.first[b]; t < grid.first[b + 1]; ++t) {
        const int64_t from = (t - grid.first[b]) * grid.tile;
        for_each_background(runs[t],
                            static_cast<int>(std::min<int64_t>(grid.tile, batch.count(b) - from)),
                            [&](int, int length) { background += length; });
      }
      if (background > 0) {
        image.push_scale = static_cast<A>(2 * static_cast<double>(g[3]) /
                                          (static_cast<double>(background) * count));
      }
    }
  });

  const auto bands = cut_into_bands(batch, grid, nullptr);
  const bool stream = outgrows_caches(grad.size() * sizeof(T));
  parallel_for(static_cast<int64_t>(bands.size()), options.threads, [&](int64_t k) {
    const Band& band = bands[k];
    const int64_t b = band.image;
    const Image<const T> image(embeddings, batch, b);
    const Image<T> target(grad, grad_batch, b);
    const Tables<A> tables{channels, padded, static_cast<int32_t>(instances.size(b)),
                           all[b].means.data()};
    const GradientTables<A> gradient{all[b].scale.data(), all[b].through_mean.data()};
    const auto delta = static_cast<A>(options.delta_var);
    Scratch<A> scratch(channels, grid.tile);
    for (int64_t t = band.first; t < band.last; ++t) {
      const TileCode code = runs[grid.first[b] + t];
      const int64_t from = t * grid.tile;
      const int pixels = static_cast<int>(std::min<int64_t>(grid.tile, image.pixels - from));
      const bool push = options.background_push && tables.instances > 0;
      PlanarTile<A> tile{};
      if (push || code.is_runs()) {
        tile = planar_tile(image, from, pixels, scratch.planar.data(), scratch.stride);
      }
      const auto push_into = [&](A* out, int64_t channel_stride, int64_t pixel_stride) {
        if (!push) return;
        const Push<A> rule{static_cast<A>(options.delta_dist),
                           nullptr,
                           nullptr,
                           out,
                           all[b].push_scale,
                           channel_stride,
                           pixel_stride};
        for_each_background(code, pixels, [&](int start, int length) {
          push_background(options.norm, tile, start, length, tables, rule, scratch.spare.data());
        });
      };
      if (!code.is_runs()) {
        pixel_tile(image, from, pixels, scratch.pixels.data());
        code.unpack_rows(pixels, tables.instances, scratch.slots.data());
        gradient_pixels(options.norm, scratch.pixels.data(), scratch.slots.data(), pixels, delta,
                        tables, gradient, scratch.hinges.data(), scratch.slopes.data());
        push_into(scratch.pixels.data(), 1, padded);
        write_pixels(target, from, pixels, scratch.pixels.data());
        continue;
      }
      A* out = scratch.planar_out.data();
      gradient_runs(options.norm, tile, code, delta, tables, gradient, out, scratch.stride,
                    scratch.spare.data());
      push_into(out, scratch.stride, 1);
      write_planar(target, from, pixels, out, scratch.stride, stream);
    }
    if (stream) end_stream();
  });
}

template <class A>
bool save(const Instances<A>& instances, const LabelRuns& labels, int64_t channels,
          const State& state) {
  const int64_t total = instances.total();
  const int64_t capacity = state.counts.size();
  const bool fits = total <= capacity && labels.in_room();
  auto* first = state.first.as<int64_t>();
  auto* counts = state.counts.as<int64_t>();
  auto* vectors = state.vectors.as<A>();
  auto* runs = state.runs.as<uint32_t>();
  // All of the state is written, so that equal calls leave equal bits.
  std::fill(counts, counts + capacity, 0);
  std::fill(vectors, vectors + kTerms * capacity * channels, A(0));
  if (!fits) {
    std::fill(first, first + state.first.size(), -1);
    std::fill(runs, runs + state.runs.size(), 0u);
    return false;
  }
  std::copy(instances.first.begin(), instances.first.end(), first);
  std::copy(instances.counts.begin(), instances.counts.end(), counts);
  const std::vector<A>* tables[] = {&instances.means, &instances.grads[0], &instances.grads[1],
                                    &instances.grads[2]};
  for (int k = 0; k < kTerms; ++k) {
    for (int64_t c = 0; c < total; ++c) {
      std::copy_n(tables[k]->data() + c * instances.padded, channels,
                  vectors + (k * capacity + c) * channels);
    }
  }
  std::fill(runs + labels.size(), runs + state.runs.size(), 0u);
  return true;
}

template <class A>
Instances<A> restore(const State& state, int64_t images, int64_t channels) {
  const int64_t capacity = state.counts.size();
  const auto* first = state.first.as<const int64_t>();
  const auto* counts = state.counts.as<const int64_t>();
  const auto* vectors = state.vectors.as<const A>();
  Instances<A> instances;
  instances.padded = padded_channels(channels);
  instances.first.assign(first, first + images + 1);
  instances.counts.assign(counts, counts + instances.total());
  std::vector<A>* tables[] = {&instances.means, &instances.grads[0], &instances.grads[1],
                              &instances.grads[2]};
  for (int k = 0; k < kTerms; ++k) {
    tables[k]->assign(instances.total() * instances.padded, A(0));
    for (int64_t c = 0; c < instances.total(); ++c) {
      std::copy_n(vectors + (k * capacity + c) * channels, channels,
                  tables[k]->data() + c * instances.padded);
    }
  }
  return instances;
}

DType accumulation_type(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

void check(const Array& embeddings, const Batch& batch, const Array& labels, const Options& options,
           const Array& terms) {
  expect(options.norm == 1 || options.norm == 2, "norm: expected 1 or 2");
  expect(labels.ndim == 2 && labels.shape[0] == embeddings.shape[0] &&
             labels.shape[1] == embeddings.shape[2],
         "labels: expected one for each pixel of embeddings");
  expect_contiguous(terms, accumulation_type(embeddings.dtype), batch.images * kTerms, "terms");
}

void check(const State& state, const Batch& batch, DType dtype) {
  expect_contiguous(state.first, DType::i64, batch.images + 1, "first");
  expect_contiguous(state.counts, DType::i64, state.counts.size(), "counts");
  expect_contiguous(state.vectors, accumulation_type(dtype),
                    kTerms * state.counts.size() * batch.channels, "vectors");
  expect_contiguous(state.runs, DType::i32, state.runs.size(), "runs");
}

}  // namespace

void forward(const Array& embeddings, const Array& labels, const Array* offsets,
             const Options& options, const Array& terms, const State* state) {
  const Batch batch = Batch::of_embeddings(embeddings, offsets);
  const Batch label_batch = Batch::of_labels(labels, offsets);
  check(embeddings, batch, labels, options, terms);
  if (state) check(*state, batch, embeddings.dtype);
  const TileGrid grid(batch, tile_pixels(batch.channels));
  const LabelRuns::Room room =
      state ? LabelRuns::Room{state->runs.as<uint32_t>(), state->runs.size()} : LabelRuns::Room{};
  const LabelRuns runs(labels, label_batch, grid, options.rules, options.threads, room);
  dispatch_floating(embeddings.dtype, "embeddings", [&](auto type) {
    using T = decltype(type);
    using A = accumulator_t<T>;
    ForwardPass<T> pass(embeddings, batch, grid, runs, options, state != nullptr);
    const Instances<A> instances = pass.run(terms.as<A>());
    if (state) save(instances, runs, batch.channels, *state);
  });
}

void backward(const Array& embeddings, const Array& labels, const Array* offsets,
              const Options& options, const Array& grad_terms, const State& state,
              const Array& grad) {
  const Batch batch = Batch::of_embeddings(embeddings, offsets);
  const Batch label_batch = Batch::of_labels(labels, offsets);
  const Batch grad_batch = Batch::of_embeddings(grad, offsets);
  check(embeddings, batch, labels, options, grad_terms);
  check(state, batch, embeddings.dtype);
  expect(grad.dtype == embeddings.dtype && grad.shape == embeddings.shape,
         "grad: expected the shape and type of embeddings");
  const TileGrid grid(batch, tile_pixels(batch.channels));
  dispatch_floating(embeddings.dtype, "embeddings", [&](auto type) {
    using T = decltype(type);
    using A = accumulator_t<T>;
    prefer_huge_pages(grad.data, grad.size() * sizeof(T));
    if (state.first.as<const int64_t>()[0] >= 0) {
      const RunsView runs{state.runs.as<const uint32_t>(), grid.tiles(), grid.tile};
      backward_pass<T>(embeddings, batch, grid, options,
                       restore<A>(state, batch.images, batch.channels), runs,
                       grad_terms.as<const A>(), grad, grad_batch);
      return;
    }
    // More instances or shorter runs than the state has room for: found again rather than kept.
    const LabelRuns labels_again(labels, label_batch, grid, options.rules, options.threads, {});
    std::vector<A> terms(batch.images * kTerms);
    const Instances<A> instances =
        ForwardPass<T>(embeddings, batch, grid, labels_again, options, true).run(terms.data());
    backward_pass<T>(embeddings, batch, grid, options, instances, labels_again.view(),
                     grad_terms.as<const A>(), grad, grad_batch);
  });
}

}  // namespace instembed::discriminative

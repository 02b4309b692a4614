// The discriminative loss on CUDA.
//
// For N pixels of D channels of T bytes, M of them of instances, labels of L bytes and slots of S =
// 2 bytes (4 above 8192 instances an image), the bytes that must move are
//   forward   N (L + S)             labels to slots, once
//           + M T D + 2 N S         means
//           + M T D + N S           distances to the means; where an image fits the L2, from there
//   backward  M T D + N T D + N S   the embeddings once, the gradient once
// At (8, 16, 512, 1024), float32, int64 labels, N T D = 268 MB: with all pixels of instances 336 MB
// forward, 604 MB where nothing stays in the L2, and 545 MB backward: 0.27 to 0.35 ms for both at
// 3.3 TB/s. Flops: about 12 a channel and pixel for both, 0.8 GFLOP, 0.02 ms of an H100's 60
// TFLOP/s. Memory is the limit: what counts is how many loads are under way, 16 KB a multiprocessor
// at least.
//
// Images that fit the L2 are taken in groups that do: means of a group, then distances, the other
// way round, so that what was read last is read first. A group costs four launches, some 10 us,
// which at 33 MB an image is about what it saves. Reasoned, not measured: the kernels have never
// run on a GPU.
//
// Two sets of kernels do the passes. Those of narrow.cuh are for up to 32 channels (16 in float64),
// of any layout; they have up to 64 KB of loads under way. Those of this file are for more
// channels, and for the backward pass of background push. There a tile of pixels lies in shared
// memory.
//
// Sums are deterministic without atomics on floats, at three levels of fixed order. A thread sums
// 32 consecutive pixels of one channel run by run and leaves each run's sum at the run's first
// pixel in shared memory. Then a thread owns a channel of every 2^k-th slot and adds those sums in
// order to a table of the block, in shared memory where it fits. Blocks own consecutive tiles;
// their tables are added in order, in double. So a uniform tile costs next to nothing at the second
// level, and random labels, whose runs are single pixels, cost a scan over the tile's slots.
//
// No kernel's work depends on what the host knows of the labels: blocks find out how many instances
// there are and share the work accordingly. Grids have one dimension: y and z end at 65535.
#pragma once

#include <algorithm>
#include <cmath>

#include "discriminative/cuda.h"
#include "discriminative/narrow.cuh"

namespace instembed::discriminative {
namespace {

using namespace cuda;

template <class A>
constexpr int kTableElements = 8192 / sizeof(A);  // of a block's table in shared memory
constexpr int64_t kTablesAPart = 256;             // instances for which every block has a table

// ---------------------------------------------------------------------------------------------------------
// Sums over the pixels of each instance. A table's row has a sum a channel, and one more column.

// Leaves the sums of the runs of every 32 pixels at the runs' first pixels. The last row of the
// tile is that of the extra column.
template <class A, class Value>
__device__ __forceinline__ void sum_runs(SharedPtr<A> tile, SharedPtr<int32_t> slots,
                                         const TileShape& shape, Value&& value) {
  const int columns = shape.channels + 1;
  const int items = shape.pixels / kPiece * columns;
  for (int item = static_cast<int>(threadIdx.x); item < items; item += kThreads) {
    const int column = item % columns, first = item / columns * kPiece;
    const SharedPtr<A> row = tile + column * shape.row;
    int32_t slot = slots[first];
    int head = first;
    A sum = 0;
    for (int p = first; p < first + kPiece; ++p) {
      const int32_t here = slots[p];
      if (here != slot) {
        row[head] = sum;
        slot = here;
        head = p;
        sum = 0;
      }
      if (here >= 0) sum += value(column, p, here);
    }
    row[head] = sum;
  }
}

// A bit for the first pixel of each run of an instance, a word for every 32 pixels.
__device__ __forceinline__ void find_heads(SharedPtr<int32_t> slots, const TileShape& shape,
                                           SharedPtr<uint32_t> heads) {
  for (int p = static_cast<int>(threadIdx.x); p < shape.pixels; p += kThreads) {
    const int lane = p % kWarp;
    const int32_t slot = slots[p];
    const int32_t before = __shfl_up_sync(kAllLanes, slot, 1);
    const unsigned bits = __ballot_sync(kAllLanes, slot >= 0 && (lane == 0 || slot != before));
    if (lane == 0) heads[p / kWarp] = bits;
  }
}

template <class A>
__device__ __forceinline__ A distance_to(int norm, SharedPtr<A> tile, int row, int p, const A* mean,
                                         int channels) {
  A sum = 0;
  if (norm == 1) {
    for (int d = 0; d < channels; ++d) {
      sum = add_to_norm<1>(sum, static_cast<A>(tile[d * row + p] - mean[d]));
    }
    return finish_norm<1>(sum);
  }
  for (int d = 0; d < channels; ++d) {
    sum = add_to_norm<2>(sum, static_cast<A>(tile[d * row + p] - mean[d]));
  }
  return finish_norm<2>(sum);
}

template <class T, Pass pass>
__global__ void __launch_bounds__(kThreads, 2)
    sums_kernel(const T* embeddings, Strides strides, Images images, TileShape shape,
                const int32_t* slot_of_place, int32_t places, Codes codes,
                Instances<accumulator_t<T>> instances, Rule rule, accumulator_t<T>* partials,
                int64_t rows, int64_t first_image, int64_t blocks) {
  using A = accumulator_t<T>;
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t image = first_image + blockIdx.x / blocks;
  const int32_t count = instances.of(image);
  if (pass == Pass::spread && count == 0) return;
  const int columns = shape.channels + 1;
  const Share share =
      share_of(images, image, blockIdx.x % blocks, parts_of(blocks, rows, count), shape);
  if (share.part >= share.parts) return;

  DynamicShared shared;
  const auto tile = shared.take<A>(columns * shape.row);
  const auto factors = shared.take<A>(shape.pixels);
  const auto slots = shared.take<int32_t>(shape.pixels);
  const auto heads = shared.take<uint32_t>(shape.pixels / kPiece);
  const auto near_table = shared.take<A>(kTableElements<A>);

  const bool fits = int64_t{count} * columns <= kTableElements<A>;
  A* far_table = partials + ((image - first_image) * rows + share.part * count) *
                                static_cast<int64_t>(columns);
  for (int64_t k = tid; k < int64_t{count} * columns; k += kThreads) {
    if (fits) {
      near_table[k] = A(0);
    } else {
      far_table[k] = A(0);
    }
  }

  const int64_t start = images.start(image), pixels = images.count(image);
  const T* first = embeddings + strides.at(images, image);
  const bool given_up = instances.found[image] < 0;
  const A* means = instances.means + image * instances.capacity * shape.channels;
  const auto delta = static_cast<A>(rule.delta_var);

  for (int64_t k = share.first; k < share.last; ++k) {
    // What the means pass has read last is likely still in the L2: the spread pass goes back.
    const int64_t t = pass == Pass::means ? k : share.first + share.last - 1 - k;
    const int64_t from = t * shape.pixels;
    const int n = static_cast<int>(pixels - from < shape.pixels ? pixels - from : shape.pixels);
    __syncthreads();  // the tile before has been added
    for (int p = tid; p < shape.pixels; p += kThreads) {
      int32_t slot = kIgnored;
      if (p < n) {
        slot = codes[start + from + p];
        if (pass == Pass::means && slot >= 0) {
          slot = given_up ? kIgnored : slot_of_place[image * places + slot];
          codes.set(start + from + p, slot);
        }
      }
      slots[p] = slot;
    }
    if (count == 0) continue;
    load_tile(first + from * strides.pixel, strides, n, shape, tile);
    __syncthreads();

    if constexpr (pass == Pass::means) {
      find_heads(slots, shape, heads);
      sum_runs<A>(tile, slots, shape, [&](int column, int p, int32_t) {
        return column < shape.channels ? static_cast<A>(tile[column * shape.row + p]) : A(1);
      });
    } else {
      bool any = false;
      for (int p = tid; p < shape.pixels; p += kThreads) {
        const int32_t slot = slots[p];
        A factor = 0, square = 0;
        if (slot >= 0) {
          const A distance = distance_to(rule.norm, tile, shape.row, p,
                                         means + int64_t{slot} * shape.channels, shape.channels);
          const A hinge = positive_part(static_cast<A>(distance - delta));
          factor = slope_by(rule.norm, hinge, distance);
          square = hinge * hinge;
          any = any || square != 0;
        }
        factors[p] = factor;
        tile[shape.channels * shape.row + p] = square;
      }
      if (!__syncthreads_or(any)) continue;
      find_heads(slots, shape, heads);
      sum_runs<A>(tile, slots, shape, [&](int column, int p, int32_t slot) -> A {
        const A x = tile[column * shape.row + p];
        if (column == shape.channels) return x;
        const A factor = factors[p];
        if (factor == 0) return A(0);
        return factor *
               direction_by(rule.norm,
                            static_cast<A>(x - means[int64_t{slot} * shape.channels + column]));
      });
    }
    __syncthreads();
    if (fits) {
      add_sums<A>(tile, slots, heads, shape, near_table);
    } else {
      add_sums<A>(tile, slots, heads, shape, far_table);
    }
  }
  if (!fits) return;
  __syncthreads();
  for (int k = tid; k < count * columns; k += kThreads) far_table[k] = near_table[k];
}

// Adds up the tables of all blocks of an image: a block of threads takes instances one by one, its
// threads parts, and a tree in shared memory the rest.
template <class A, Pass pass>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const A* partials, int64_t rows, Instances<A> instances, int64_t first_image,
                  int64_t blocks_that_summed, int blocks, double* push_squares, A* push_grads) {
  constexpr int kBatch = 12;
  INSTEMBED_SHARED(double, sums, kThreads);
  INSTEMBED_SHARED(double, pixels, 1);
  const int64_t image = first_image + blockIdx.x / blocks;
  const int32_t count = instances.of(image);
  const int channels = instances.channels, columns = channels + 1;
  const int64_t parts = parts_of(blocks_that_summed, rows, count);
  int width = 1;
  while (width < columns && width < kThreads) width *= 2;
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid % width, line = tid / width, lines = kThreads / width;
  const A* tables = partials + (image - first_image) * rows * columns;
  for (int32_t slot = static_cast<int32_t>(blockIdx.x % blocks); slot < count; slot += blocks) {
    const int64_t row = image * instances.capacity + slot;
    // From the last column: a mean needs the count.
    for (int first = (columns - 1) / width * width; first >= 0; first -= width) {
      const int column = first + lane;
      double sum = 0;
      if (column < columns) {
        for (int64_t part = line; part < parts; part += kBatch * lines) {
          A batch[kBatch];  // many loads at a time: each takes as long as all
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            const int64_t at = part + j * lines;
            batch[j] = at < parts ? tables[(at * count + slot) * columns + column] : A(0);
          }
#pragma unroll
          for (int j = 0; j < kBatch; ++j) sum += static_cast<double>(batch[j]);
        }
      }
      __syncthreads();  // what was there has been read
      sums[tid] = sum;
      for (int half = lines / 2; half > 0; half /= 2) {
        __syncthreads();
        if (line < half) sums[tid] += static_cast<double>(sums[tid + half * width]);
      }
      __syncthreads();
      if (line == 0 && column == channels) {
        pixels[0] = sums[tid];
        if (push_squares) {
          push_squares[row] = sums[tid];
        } else if (pass == Pass::means) {
          instances.counts[row] = static_cast<int64_t>(static_cast<double>(sums[tid]));
        } else {
          instances.squares[row] = sums[tid];
        }
      }
      __syncthreads();
      if (line == 0 && column < channels) {
        const double total = sums[tid];
        if (push_grads) {
          push_grads[row * channels + column] = static_cast<A>(total);
        } else if (pass == Pass::means) {
          instances.means[row * channels + column] =
              static_cast<A>(total / static_cast<double>(pixels[0]));
        } else {
          instances.variance_grads[row * channels + column] = static_cast<A>(total);
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------
// Pairs of means: a warp an instance, whose lanes take the others.

template <class A>
__global__ void __launch_bounds__(kThreads)
    pairs_kernel(Instances<A> instances, Rule rule, int blocks) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t image = blockIdx.x / blocks;
  const int32_t count = instances.of(image);
  const int channels = instances.channels;
  const int warps = blocks * (kThreads / kWarp);
  const A* means = instances.means + image * instances.capacity * channels;
  for (int32_t a = static_cast<int32_t>(blockIdx.x % blocks) * (kThreads / kWarp) +
                   static_cast<int32_t>(threadIdx.x) / kWarp;
       a < count; a += warps) {
    const int64_t row = image * instances.capacity + a;
    A* grad = instances.distance_grads + row * channels;
    for (int d = lane; d < channels; d += kWarp) grad[d] = 0;
    const A* mean = means + int64_t{a} * channels;
    double squares = 0;
    for (int32_t from = 0; from < count; from += kWarp) {
      const int32_t b = from + lane;
      double factor = 0;
      if (b < count && b != a) {
        const A* other = means + int64_t{b} * channels;
        double sum = 0;
#pragma unroll 4
        for (int d = 0; d < channels; ++d) {
          sum = add_to_norm_by(rule.norm, sum,
                               static_cast<double>(mean[d]) - static_cast<double>(other[d]));
        }
        const double distance = finish_norm_by(rule.norm, sum);
        const double hinge = positive_part(2 * rule.delta_dist - distance);
        squares += hinge * hinge;
        factor = slope_by(rule.norm, hinge, distance) * -4 / (double(count) * (count - 1));
      }
      const unsigned near_ones = __ballot_sync(kAllLanes, factor != 0);
      for (int first = 0; first < channels && near_ones != 0; first += kWarp) {
        const int d = first + lane;
        double sum = 0;
        for (unsigned rest = near_ones; rest != 0; rest &= rest - 1) {
          const int source = __ffs(static_cast<int>(rest)) - 1;
          const double step = __shfl_sync(kAllLanes, factor, source);
          if (d >= channels) continue;
          const A* other = means + int64_t{from + source} * channels;
          sum += step * direction_by(rule.norm,
                                     static_cast<double>(mean[d]) - static_cast<double>(other[d]));
        }
        if (d < channels) grad[d] += static_cast<A>(sum);
      }
    }
    squares = warp_sum(squares);
    if (lane == 0) instances.gaps[row] = squares;
  }
}

// ---------------------------------------------------------------------------------------------------------
// Background push: every background pixel against every instance.

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    push_kernel(const T* embeddings, Strides strides, Images images, TileShape shape, Codes codes,
                Instances<accumulator_t<T>> instances, Rule rule, accumulator_t<T>* partials,
                int64_t rows, int64_t first_image, int64_t blocks) {
  using A = accumulator_t<T>;
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t image = first_image + blockIdx.x / blocks;
  const int32_t count = instances.of(image);
  if (count == 0) return;
  const int columns = shape.channels + 1, pieces = shape.pixels / kPiece;
  const Share share =
      share_of(images, image, blockIdx.x % blocks, parts_of(blocks, rows, count), shape);
  if (share.part >= share.parts) return;

  DynamicShared shared;
  const auto tile = shared.take<A>(shape.channels * shape.row);
  const auto factors = shared.take<A>(shape.pixels);
  const auto squares = shared.take<A>(shape.pixels);
  const auto slots = shared.take<int32_t>(shape.pixels);
  const auto sums = shared.take<A>(pieces * columns);

  A* table = partials +
             ((image - first_image) * rows + share.part * count) * static_cast<int64_t>(columns);
  for (int64_t k = tid; k < int64_t{count} * columns; k += kThreads) table[k] = A(0);
  const int64_t start = images.start(image), pixels = images.count(image);
  const T* first = embeddings + strides.at(images, image);
  const A* means = instances.means + image * instances.capacity * shape.channels;
  const auto delta = static_cast<A>(rule.delta_dist);
  for (int64_t t = share.first; t < share.last; ++t) {
    const int64_t from = t * shape.pixels;
    const int n = static_cast<int>(pixels - from < shape.pixels ? pixels - from : shape.pixels);
    __syncthreads();
    bool behind = false;
    for (int p = tid; p < shape.pixels; p += kThreads) {
      const int32_t slot = p < n ? codes[start + from + p] : kIgnored;
      slots[p] = slot;
      behind = behind || slot == kBackground;
    }
    if (!__syncthreads_or(behind)) continue;
    load_tile(first + from * strides.pixel, strides, n, shape, tile);
    for (int32_t c = 0; c < count; ++c) {
      const A* mean = means + int64_t{c} * shape.channels;
      __syncthreads();  // the tile is there, and what the instance before needed has been read
      bool any = false;
      for (int p = tid; p < shape.pixels; p += kThreads) {
        A factor = 0, square = 0;
        if (slots[p] == kBackground) {
          const A distance = distance_to(rule.norm, tile, shape.row, p, mean, shape.channels);
          const A hinge = positive_part(static_cast<A>(delta - distance));
          factor = slope_by(rule.norm, hinge, distance);
          square = hinge * hinge;
          any = any || square != 0;
        }
        factors[p] = factor;
        squares[p] = square;
      }
      if (!__syncthreads_or(any)) continue;
      for (int item = tid; item < pieces * columns; item += kThreads) {
        const int column = item % columns, piece = item / columns;
        A sum = 0;
        for (int p = piece * kPiece; p < (piece + 1) * kPiece; ++p) {
          if (column == shape.channels) {
            sum += squares[p];
            continue;
          }
          const A factor = factors[p];
          if (factor == 0) continue;
          sum += factor * direction_by(rule.norm,
                                       static_cast<A>(tile[column * shape.row + p] - mean[column]));
        }
        sums[item] = sum;
      }
      __syncthreads();
      for (int column = tid; column < columns; column += kThreads) {
        A sum = 0;
        for (int piece = 0; piece < pieces; ++piece) sum += sums[piece * columns + column];
        table[int64_t{c} * columns + column] += sum;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------
// Terms

// The weight of the sum of hinge^2 of an instance of n pixels in the variance, `total` in all.
__device__ __forceinline__ double variance_weight(const Rule& rule, int32_t count, int64_t n,
                                                  int64_t total) {
  return rule.pooled_variance ? 1.0 / static_cast<double>(total)
                              : 1.0 / (static_cast<double>(n) * count);
}

// The sum over the block's threads, the same in each of them.
__device__ __forceinline__ double block_sum(double value) {
  INSTEMBED_SHARED(double, sums, kThreads);
  __syncthreads();
  sums[threadIdx.x] = value;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += static_cast<double>(sums[threadIdx.x + half]);
  }
  __syncthreads();
  return sums[0];
}

template <class A>
__global__ void __launch_bounds__(kThreads, 2)
    terms_kernel(Instances<A> instances, Rule rule, const int64_t* invalid, A* terms) {
  const int64_t image = blockIdx.x;
  const int32_t count = instances.of(image);
  const int64_t first = image * instances.capacity;
  const int channels = instances.channels;
  double pixels = 0;
  for (int32_t c = static_cast<int32_t>(threadIdx.x); c < count; c += kThreads) {
    pixels += static_cast<double>(instances.counts[first + c]);
  }
  pixels = block_sum(pixels);
  double variance = 0, distance = 0, size = 0, push = 0;
  for (int32_t c = static_cast<int32_t>(threadIdx.x); c < count; c += kThreads) {
    const int64_t row = first + c;
    variance += instances.squares[row] *
                variance_weight(rule, count, instances.counts[row], static_cast<int64_t>(pixels));
    distance += instances.gaps[row];
    if (instances.push_grads) push += instances.pushes[row];
    double norm_sum = 0;
    for (int d = 0; d < channels; ++d) {
      norm_sum = add_to_norm_by(rule.norm, norm_sum,
                                static_cast<double>(instances.means[row * channels + d]));
    }
    size += finish_norm_by(rule.norm, norm_sum);
  }
  variance = block_sum(variance);
  distance = block_sum(distance);
  size = block_sum(size);
  push = block_sum(push);
  if (threadIdx.x != 0) return;
  const double n = count;
  const auto behind = static_cast<double>(instances.background[image]);
  double values[kTerms] = {variance, count > 1 ? distance / (n * (n - 1)) : 0.0,
                           count > 0 ? size / n : 0.0,
                           count > 0 && behind > 0 ? push / (n * behind) : 0.0};
  const bool bad = instances.found[image] < 0 || *invalid != 0;
#pragma unroll
  for (int k = 0; k < kTerms; ++k) {
    terms[image * kTerms + k] = bad ? static_cast<A>(NAN) : static_cast<A>(values[k]);
  }
}

// ---------------------------------------------------------------------------------------------------------
// Backward

// What all pixels of an instance have in common: scale is d loss / d (hinge^2 / 2), and
// through_mean what each receives through the mean.
template <class A>
__global__ void __launch_bounds__(kThreads)
    gradient_tables_kernel(Instances<A> instances, Rule rule, const A* grad_terms, A* scales,
                           A* through_means, int blocks) {
  const int64_t image = blockIdx.x / blocks;
  const int32_t count = instances.of(image);
  const int64_t first = image * instances.capacity;
  const int channels = instances.channels, lane = static_cast<int>(threadIdx.x) % kWarp;
  double pixels = 0;
  if (rule.pooled_variance) {
    for (int32_t c = static_cast<int32_t>(threadIdx.x); c < count; c += kThreads) {
      pixels += static_cast<double>(instances.counts[first + c]);
    }
    pixels = block_sum(pixels);
  }
  const double g[kTerms] = {static_cast<double>(grad_terms[image * kTerms]),
                            static_cast<double>(grad_terms[image * kTerms + 1]),
                            static_cast<double>(grad_terms[image * kTerms + 2]),
                            static_cast<double>(grad_terms[image * kTerms + 3])};
  const auto behind = static_cast<double>(instances.background[image]);
  const int warps = blocks * (kThreads / kWarp);
  for (int32_t c = static_cast<int32_t>(blockIdx.x % blocks) * (kThreads / kWarp) +
                   static_cast<int32_t>(threadIdx.x) / kWarp;
       c < count; c += warps) {
    const int64_t row = first + c;
    const A* mean = instances.means + row * channels;
    double sum = 0;
    for (int d = lane; d < channels; d += kWarp) {
      sum = add_to_norm_by(rule.norm, sum, static_cast<double>(mean[d]));
    }
    const double size = finish_norm_by(rule.norm, warp_sum(sum));
    const auto n = static_cast<double>(instances.counts[row]);
    const double scale =
        2 * g[0] *
        variance_weight(rule, count, instances.counts[row], static_cast<int64_t>(pixels));
    if (lane == 0) scales[row] = static_cast<A>(scale);
    for (int d = lane; d < channels; d += kWarp) {
      const int64_t at = row * channels + d;
      double total = -scale * static_cast<double>(instances.variance_grads[at]);
      total += g[1] * static_cast<double>(instances.distance_grads[at]);
      // d |mean| / d mean: the formula's slope for a hinge of the distance itself, over it.
      const double way = direction_by(rule.norm, static_cast<double>(mean[d]));
      if (size != 0) total += g[2] * (rule.norm == 2 ? way / size : way) / count;
      if (instances.push_grads && behind > 0) {
        total += 2 * g[3] * static_cast<double>(instances.push_grads[at]) / (behind * count);
      }
      through_means[at] = static_cast<A>(total / n);
    }
  }
}

template <class T, bool push>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_kernel(const T* embeddings, Strides strides, Images images, TileShape shape,
                    Codes codes, Instances<accumulator_t<T>> instances, Rule rule,
                    const accumulator_t<T>* scales, const accumulator_t<T>* through_means,
                    const accumulator_t<T>* grad_terms, T* grad, Strides grad_strides,
                    int64_t blocks) {
  using A = accumulator_t<T>;
  const int tid = static_cast<int>(threadIdx.x);
  if (images.offsets && *images.invalid) {
    return fill_with_nan(images, shape.channels, grad, grad_strides);
  }
  const Share share = share_of(images, blockIdx.x / blocks, blockIdx.x % blocks, blocks, shape);
  const int64_t image = share.image;

  DynamicShared shared;
  const auto tile = shared.take<A>(shape.channels * shape.row);
  const auto factors = shared.take<A>(shape.pixels);
  const auto slots = shared.take<int32_t>(shape.pixels);
  const auto pushed = shared.take<A>(push ? shape.channels * shape.row : 0);

  const int32_t count = instances.of(image);
  const bool given_up = instances.found[image] < 0;
  const int64_t start = images.start(image), pixels = images.count(image);
  const T* first = embeddings + strides.at(images, image);
  T* target = grad + grad_strides.at(images, image);
  const A* means = instances.means + image * instances.capacity * shape.channels;
  const A* common = through_means + image * instances.capacity * shape.channels;
  const A* scale = scales + image * instances.capacity;
  const auto delta = static_cast<A>(rule.delta_var), reach = static_cast<A>(rule.delta_dist);
  A push_scale = 0;
  if (push && count > 0 && instances.background[image] > 0) {
    push_scale = static_cast<A>(-2 * static_cast<double>(grad_terms[image * kTerms + 3]) /
                                (static_cast<double>(instances.background[image]) * count));
  }
  for (int64_t t = share.first; t < share.last; ++t) {
    const int64_t from = t * shape.pixels;
    const int n = static_cast<int>(pixels - from < shape.pixels ? pixels - from : shape.pixels);
    __syncthreads();  // the tile before has been written
    for (int p = tid; p < shape.pixels; p += kThreads) {
      slots[p] = p < n ? codes[start + from + p] : kIgnored;
    }
    load_tile(first + from * strides.pixel, strides, n, shape, tile);
    __syncthreads();
    for (int p = tid; p < shape.pixels; p += kThreads) {
      const int32_t slot = slots[p];
      A factor = 0;
      if (slot >= 0) {
        const A distance = distance_to(rule.norm, tile, shape.row, p,
                                       means + int64_t{slot} * shape.channels, shape.channels);
        factor = slope_by(rule.norm, positive_part(static_cast<A>(distance - delta)), distance) *
                 scale[slot];
      }
      factors[p] = factor;
      if constexpr (push) {
        for (int d = 0; d < shape.channels; ++d) pushed[d * shape.row + p] = A(0);
        if (slot != kBackground || push_scale == 0) continue;
        for (int32_t c = 0; c < count; ++c) {
          const A* mean = means + int64_t{c} * shape.channels;
          const A distance = distance_to(rule.norm, tile, shape.row, p, mean, shape.channels);
          const A pull =
              slope_by(rule.norm, positive_part(static_cast<A>(reach - distance)), distance) *
              push_scale;
          if (pull == 0) continue;
          for (int d = 0; d < shape.channels; ++d) {
            pushed[d * shape.row + p] +=
                pull * direction_by(rule.norm, static_cast<A>(tile[d * shape.row + p] - mean[d]));
          }
        }
      }
    }
    __syncthreads();
    store_tile(target + from * grad_strides.pixel, grad_strides, n, shape, [&](int d, int p) -> A {
      if (given_up) return static_cast<A>(NAN);
      const int32_t slot = slots[p];
      if (slot < 0) {
        if constexpr (push) return pushed[d * shape.row + p];
        return A(0);
      }
      const int64_t at = int64_t{slot} * shape.channels + d;
      A value = common[at];
      const A factor = factors[p];
      if (factor != 0) {
        value +=
            factor * direction_by(rule.norm, static_cast<A>(tile[d * shape.row + p] - means[at]));
      }
      return value;
    });
  }
}

// ---------------------------------------------------------------------------------------------------------
// The host's side

// Blocks that share an image, where a launch is for `count` images: all of them run at once, and go
// over their tiles together. Sets of points may be of any sizes: more blocks, so that a large one
// does not wait for a few.
template <class A>
int64_t blocks_an_image(const Images& images, int64_t count, int channels,
                        const DeviceInfo& device) {
  int64_t blocks = 2, pixels = TileShape::of<A>(channels).pixels;  // blocks a multiprocessor
  dispatch_channels<A>(channels, [&](auto most) {
    blocks = kResident<A, decltype(most)::value>;
    pixels = kThreads;
  });
  const int64_t largest = images.offsets ? images.total : images.pixels;
  const int64_t tiles = (largest + pixels - 1) / pixels;
  return std::clamp<int64_t>(device.processors * blocks * (images.offsets ? 4 : 1) / count, 1,
                             std::max<int64_t>(tiles, 1));
}

// Whether the kernels of narrow.cuh serve.
template <class A>
bool is_narrow(int channels, const DeviceInfo& device) {
  bool fits = false;
  dispatch_channels<A>(channels, [&](auto most) {
    fits = narrow_bytes<A, decltype(most)::value>() <= device.shared;
  });
  return fits;
}

template <class A>
struct ForwardPlan {
  LabelSlots slots;
  double *squares = nullptr, *gaps = nullptr, *pushes = nullptr;
  A* partials = nullptr;
  int64_t rows = 0;    // of tables an image
  int64_t group = 1;   // images that a launch is for
  int64_t blocks = 1;  // an image
  int64_t bytes = 0;

  // `item`: bytes of an embedding's element.
  ForwardPlan(void* base, const Images& images, const TileShape& shape, int64_t item,
              int64_t capacity, bool push, const DeviceInfo& device) {
    const int64_t count = images.images > 0 ? images.images : 1;
    const int64_t average = (images.total + count - 1) / count;
    const int64_t image_bytes = std::max<int64_t>(images.pixels * shape.channels * item, 1);
    group = images.offsets || image_bytes > device.cache
                ? count
                : std::clamp<int64_t>(device.cache * 6 / 10 / image_bytes, 1, count);
    blocks = blocks_an_image<A>(images, group, shape.channels, device);
    rows = std::max(capacity, std::min(blocks * kTablesAPart, average / 4));
    Workspace workspace(base);
    slots.take(&workspace, count, capacity);
    squares = workspace.take<double>(count * capacity);
    gaps = workspace.take<double>(count * capacity);
    pushes = workspace.take<double>(push ? count * capacity : 0);
    partials = workspace.take<A>(group * rows * (shape.channels + 1));
    bytes = workspace.used();
  }
};

template <class A>
struct BackwardPlan {
  A *scales = nullptr, *through_means = nullptr;
  int64_t bytes = 0;

  BackwardPlan(void* base, const Images& images, int64_t channels, int64_t capacity) {
    Workspace workspace(base);
    scales = workspace.take<A>(images.images * capacity);
    through_means = workspace.take<A>(images.images * capacity * channels);
    bytes = workspace.used();
  }
};

Strides strides_of(const Array& embeddings) {
  return {embeddings.strides[0], embeddings.strides[1], embeddings.strides[2]};
}

DType accumulation_type(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

int64_t capacity_of(const CudaState& state, const Images& images) {
  return images.images > 0 ? state.counts.size() / images.images : 1;
}

void check(const Array& embeddings, const Images& images, const Options& options,
           const Array& terms, const CudaState& state) {
  const int64_t capacity = capacity_of(state, images), channels = embeddings.shape[1];
  const DType type = accumulation_type(embeddings.dtype);
  expect(options.norm == 1 || options.norm == 2, "norm: expected 1 or 2");
  expect_contiguous(terms, type, images.images * kTerms, "terms");
  expect_contiguous(state.images, DType::i64, 2 * images.images + 1, "images");
  expect(capacity >= 1, "counts: expected a capacity of at least 1");
  expect_contiguous(state.counts, DType::i64, images.images * capacity, "counts");
  expect_contiguous(state.vectors, type,
                    (options.background_push ? 4 : 3) * images.images * capacity * channels,
                    "vectors");
  expect_contiguous(state.slots, DType::i32, (images.total * cuda_slot_bytes(capacity) + 3) / 4,
                    "slots");
}

template <class A>
Instances<A> instances_of_state(const CudaState& state, const Images& images, int channels,
                                bool push) {
  const int64_t capacity = capacity_of(state, images);
  const int64_t table = images.images * capacity * channels;
  A* vectors = state.vectors.as<A>();
  auto* found = state.images.as<int64_t>();
  return {found,
          found + images.images,
          state.counts.as<int64_t>(),
          vectors,
          vectors + table,
          vectors + 2 * table,
          push ? vectors + 3 * table : nullptr,
          nullptr,
          nullptr,
          nullptr,
          capacity,
          channels};
}

int64_t checked_shared(int64_t bytes, const DeviceInfo& device, int64_t channels) {
  if (bytes > device.shared) {
    throw std::invalid_argument("embeddings: " + std::to_string(channels) +
                                " channels are too many for this device: " + std::to_string(bytes) +
                                " bytes of shared memory of " + std::to_string(device.shared));
  }
  return bytes;
}

}  // namespace

int64_t cuda_slot_bytes(int64_t capacity) { return slot_bytes(capacity); }

int64_t cuda_workspace(const Array& embeddings, const Array* offsets, const Options& options,
                       int64_t capacity, bool backward) {
  expect(embeddings.ndim == 3, "embeddings: expected (images, channels, pixels)");
  const Images images = Images::of(embeddings, offsets, nullptr);
  int64_t bytes = 0;
  dispatch_floating(embeddings.dtype, "embeddings", [&](auto type) {
    using A = accumulator_t<decltype(type)>;
    const TileShape shape = TileShape::of<A>(embeddings.shape[1]);
    bytes = backward ? BackwardPlan<A>(nullptr, images, shape.channels, capacity).bytes
                     : ForwardPlan<A>(nullptr, images, shape, sizeof(type), capacity,
                                      options.background_push, device_info())
                           .bytes;
  });
  return bytes;
}

void forward_cuda(const Array& embeddings, const Array& labels, const Array* offsets,
                  const Options& options, const Array& terms, const CudaState& state,
                  const Array& workspace, int64_t stream) {
  expect(embeddings.ndim == 3, "embeddings: expected (images, channels, pixels)");
  expect(labels.ndim == 2 && labels.shape[0] == embeddings.shape[0] &&
             labels.shape[1] == embeddings.shape[2],
         "labels: expected one for each pixel of embeddings");
  Images images = Images::of(embeddings, offsets, nullptr);
  check(embeddings, images, options, terms, state);
  const DeviceInfo device = device_info();
  const Stream queue = as_stream(stream);
  if (images.images == 0) return fill_bytes(state.images.data, 0, 8, queue);
  const int64_t capacity = capacity_of(state, images);
  auto* found = state.images.as<int64_t>();
  int64_t* invalid = found + 2 * images.images;
  images.invalid = invalid;
  const bool push = options.background_push;
  const Rule rule{options.delta_var, options.delta_dist, options.pooled_variance, options.norm};

  dispatch_floating(embeddings.dtype, "embeddings", [&](auto element) {
    using T = decltype(element);
    using A = accumulator_t<T>;
    const TileShape shape = TileShape::of<A>(embeddings.shape[1]);
    const ForwardPlan<A> plan(workspace.data, images, shape, sizeof(T), capacity, push, device);
    expect(workspace.size() >= plan.bytes, "workspace: too small");
    Instances<A> instances = instances_of_state<A>(state, images, shape.channels, push);
    instances.squares = plan.squares;
    instances.gaps = plan.gaps;
    instances.pushes = plan.pushes;
    const int64_t sums_bytes = checked_shared(
        padded_bytes<A>((shape.channels + 1) * shape.row) + padded_bytes<A>(shape.pixels) +
            padded_bytes<int32_t>(shape.pixels) + padded_bytes<uint32_t>(shape.pixels / kPiece) +
            padded_bytes<A>(kTableElements<A>),
        device, embeddings.shape[1]);

    check_offsets(images, invalid, queue);
    fill_bytes(state.counts.data, 0, state.counts.size() * 8, queue);
    // Rows of no instance are never read, but an op's outputs are the same each time.
    fill_bytes(state.vectors.data, 0, state.vectors.size() * sizeof(A), queue);
    if (cuda_slot_bytes(capacity) == 2 && images.total % 2 == 1) {
      fill_bytes(state.slots.as<int32_t>() + images.total / 2, 0, 4, queue);
    }
    const Codes codes{state.slots.data, cuda_slot_bytes(capacity) == 4};
    find_slots(plan.slots, labels, images, options.rules, codes, found, found + images.images,
               nullptr, queue);

    const auto reducers =
        static_cast<int>(std::clamp<int64_t>(device.processors * 8 / plan.group, 1, capacity));
    for (int64_t first = 0; first < images.images; first += plan.group) {
      const int64_t n = std::min(plan.group, images.images - first);
      const auto sums = [&](auto kernel, const char* name, const TileShape& tiles, int64_t bytes) {
        launch(kernel, name, n * plan.blocks, kThreads, bytes, queue, embeddings.as<const T>(),
               strides_of(embeddings), images, tiles, plan.slots.of_place,
               plan.slots.tables.places(), codes, instances, rule, plan.partials, plan.rows, first,
               plan.blocks);
      };
      const auto reduce = [&](auto kernel, const char* name, double* squares, A* grads) {
        launch(kernel, name, n * reducers, kThreads, 0, queue, plan.partials, plan.rows, instances,
               first, plan.blocks, reducers, squares, grads);
      };
      if (is_narrow<A>(shape.channels, device)) {
        dispatch_channels<A>(shape.channels, [&](auto most) {
          constexpr int D = decltype(most)::value;
          const TileShape pieces = narrow_shape(shape.channels);
          const int64_t bytes = narrow_bytes<A, D>();
          sums(narrow_sums_kernel<T, D, Pass::means>, "narrow_means", pieces, bytes);
          reduce(reduce_kernel<A, Pass::means>, "reduce_means", nullptr, nullptr);
          sums(narrow_sums_kernel<T, D, Pass::spread>, "narrow_spread", pieces, bytes);
        });
      } else {
        sums(sums_kernel<T, Pass::means>, "means", shape, sums_bytes);
        reduce(reduce_kernel<A, Pass::means>, "reduce_means", nullptr, nullptr);
        sums(sums_kernel<T, Pass::spread>, "spread", shape, sums_bytes);
      }
      reduce(reduce_kernel<A, Pass::spread>, "reduce_spread", nullptr, nullptr);
      if (!push) continue;
      const int64_t push_bytes = padded_bytes<A>(shape.channels * shape.row) +
                                 2 * padded_bytes<A>(shape.pixels) +
                                 padded_bytes<int32_t>(shape.pixels) +
                                 padded_bytes<A>(shape.pixels / kPiece * (shape.channels + 1));
      launch(push_kernel<T>, "push", n * plan.blocks, kThreads,
             checked_shared(push_bytes, device, shape.channels), queue, embeddings.as<const T>(),
             strides_of(embeddings), images, shape, codes, instances, rule, plan.partials,
             plan.rows, first, plan.blocks);
      reduce(reduce_kernel<A, Pass::spread>, "reduce_push", plan.pushes, instances.push_grads);
    }
    const auto pairers = static_cast<int>(
        std::clamp<int64_t>(device.processors * 8 / images.images, 1, (capacity + 7) / 8));
    launch(pairs_kernel<A>, "pairs", images.images * pairers, kThreads, 0, queue, instances, rule,
           pairers);
    launch(terms_kernel<A>, "terms", images.images, kThreads, 0, queue, instances, rule, invalid,
           terms.as<A>());
  });
}

void backward_cuda(const Array& embeddings, const Array* offsets, const Options& options,
                   const Array& grad_terms, const CudaState& state, const Array& grad,
                   const Array& workspace, int64_t stream) {
  expect(embeddings.ndim == 3, "embeddings: expected (images, channels, pixels)");
  Images images = Images::of(embeddings, offsets, nullptr);
  check(embeddings, images, options, grad_terms, state);
  expect(grad.dtype == embeddings.dtype && grad.shape == embeddings.shape,
         "grad: expected the shape and type of embeddings");
  if (images.images == 0) return;
  const DeviceInfo device = device_info();
  const Stream queue = as_stream(stream);
  const int64_t capacity = capacity_of(state, images);
  images.invalid = state.images.as<const int64_t>() + 2 * images.images;
  const bool push = options.background_push;
  const Rule rule{options.delta_var, options.delta_dist, options.pooled_variance, options.norm};

  dispatch_floating(embeddings.dtype, "embeddings", [&](auto element) {
    using T = decltype(element);
    using A = accumulator_t<T>;
    const TileShape shape = TileShape::of<A>(embeddings.shape[1], push ? 2 : 1);
    const BackwardPlan<A> plan(workspace.data, images, shape.channels, capacity);
    expect(workspace.size() >= plan.bytes, "workspace: too small");
    const Instances<A> instances = instances_of_state<A>(state, images, shape.channels, push);
    const int64_t bytes =
        checked_shared(padded_bytes<A>(shape.channels * shape.row) * (push ? 2 : 1) +
                           padded_bytes<A>(shape.pixels) + padded_bytes<int32_t>(shape.pixels),
                       device, embeddings.shape[1]);
    const int64_t blocks = blocks_an_image<A>(images, images.images, shape.channels, device);
    const auto tablers = static_cast<int>(
        std::clamp<int64_t>(device.processors * 4 / images.images, 1, (capacity + 7) / 8));
    launch(gradient_tables_kernel<A>, "gradient_tables", images.images * tablers, kThreads, 0,
           queue, instances, rule, grad_terms.as<const A>(), plan.scales, plan.through_means,
           tablers);
    const Codes codes{state.slots.data, cuda_slot_bytes(capacity) == 4};
    const auto gradient = [&](auto kernel) {
      launch(kernel, "gradient", images.images * blocks, kThreads, bytes, queue,
             embeddings.as<const T>(), strides_of(embeddings), images, shape, codes, instances,
             rule, plan.scales, plan.through_means, grad_terms.as<const A>(), grad.as<T>(),
             strides_of(grad), blocks);
    };
    if (!push && is_narrow<A>(shape.channels, device)) {
      dispatch_channels<A>(shape.channels, [&](auto most) {
        launch(narrow_gradient_kernel<T, decltype(most)::value>, "narrow_gradient",
               images.images * blocks, kThreads, 0, queue, embeddings.as<const T>(),
               strides_of(embeddings), images, narrow_shape(shape.channels), codes, instances, rule,
               plan.scales, plan.through_means, grad.as<T>(), strides_of(grad), blocks);
      });
    } else if (push) {
      gradient(gradient_kernel<T, true>);
    } else {
      gradient(gradient_kernel<T, false>);
    }
  });
}

}  // namespace instembed::discriminative

// Products of tiles, by a block of 256 threads: a tile's points with those of another, and what
// pairs weigh with the points of the other.
//
// A thread has 4 x 4 of the 64 x 64 pairs, side by side. Channels, and later columns, come through
// shared memory a few at a time, and from there 16 bytes at a time: of floats, 16 multiply-adds
// need two loads, which keep the shared memory busy for three cycles a warp (of 16 threads, one of
// their rows and 256 bytes of columns), 12 of the 16 that a multiprocessor needs for the
// multiply-adds of four warps. 64 x 64 x D multiply-adds of floats read 128 x D x 4 bytes from the
// L2, which is 8 a byte, whatever D: about what an H100 has for each byte that its L2 gives. What
// is staged is waited for, by nothing but the other block of the multiprocessor: half of the 67
// TFLOP/s is a fair hope.
#pragma once

#include "sphere/cloud.cuh"

namespace instembed::sphere::device {

constexpr int kSide = 16;             // threads across a pair of tiles, and down
constexpr int kEach = kTile / kSide;  // rows, and columns, of a thread, side by side
constexpr int kPitch =
    kTile + 4;  // of a matrix in shared memory, whose rows are read 16 bytes at a time

template <class A>
constexpr int kDepth = 64 / sizeof(A);  // channels, or columns, that are staged at a time
template <class A>
constexpr int kUnroll = sizeof(A) == 4 ? 4 : 2;  // of them, as far as registers go
template <class A>
constexpr int kStage = 2 * kDepth<A> * kTile;
template <class A>
constexpr int kVector = 16 / sizeof(A);  // what one load from shared memory brings

// The first row, column and channel of a thread: it has kEach, kEach and `each`.
__device__ __forceinline__ int row_of_thread() {
  return static_cast<int>(threadIdx.x) / kSide * kEach;
}
__device__ __forceinline__ int column_of_thread() {
  return static_cast<int>(threadIdx.x) % kSide * kEach;
}
__device__ __forceinline__ int channel_of_thread(int each) {
  return static_cast<int>(threadIdx.x) % kSide * each;
}

// A sum of many terms; in float, what rounding takes from it is kept beside it (Kahan 1965).
template <class A>
struct Total {
  A sum = 0, lost = 0;

  __device__ void add(A term) {
    const A next = term - lost, after = sum + next;
    lost = (after - sum) - next;
    sum = after;
  }
};
template <>
struct Total<double> {
  double sum = 0;

  __device__ void add(double term) { sum += term; }
};

// dots[k][l] += x . y of the tiles' points row + k and column + l. Barriers are first
// and in between.
template <class A>
__device__ __forceinline__ void add_dots(const A* rows, const A* columns, int channels,
                                         SharedPtr<A> stage, A (&dots)[kEach][kEach]) {
  const int row = row_of_thread(), column = column_of_thread();
  const SharedPtr<A> staged_columns = stage + kDepth<A> * kTile;
  for (int first = 0; first < channels; first += kDepth<A>) {
    const int depth = channels - first < kDepth<A> ? channels - first : kDepth<A>;
    __syncthreads();  // what was staged before has been read
    for (int k = static_cast<int>(threadIdx.x); k < depth * kTile; k += kThreads) {
      stage[k] = rows[first * kTile + k];
      staged_columns[k] = columns[first * kTile + k];
    }
    __syncthreads();
#pragma unroll(kUnroll<A>)
    for (int d = 0; d < depth; ++d) {
      A x[kEach], y[kEach];
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        x[k] = stage[d * kTile + row + k];
        y[k] = staged_columns[d * kTile + column + k];
      }
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
#pragma unroll
        for (int l = 0; l < kEach; ++l) dots[k][l] += x[k] * y[l];
      }
    }
  }
}

// Puts a thread's share of 64 x 64 numbers into shared memory.
template <class A>
__device__ __forceinline__ void put(const A (&values)[kEach][kEach], SharedPtr<A> matrix) {
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
#pragma unroll
    for (int l = 0; l < kEach; ++l) {
      matrix[(row_of_thread() + k) * kPitch + column_of_thread() + l] = values[k][l];
    }
  }
}

// sums[k][u] += the matrix's row + k times the thread's channel u of the points of a tile, of which
// `columns` is the first channel and `channels` are left. Barriers are first and in
// between.
template <class A, int U>
__device__ __forceinline__ void add_products(SharedPtr<A> matrix, const A* columns, int channels,
                                             SharedPtr<A> stage, A (&sums)[kEach][U]) {
  constexpr int kChannels = U * kSide, kRow = kChannels + 4;
  const int row = row_of_thread(), channel = channel_of_thread(U);
  for (int first = 0; first < kTile; first += kDepth<A>) {
    __syncthreads();  // the matrix is there, what was staged before has been read
    for (int k = static_cast<int>(threadIdx.x); k < kChannels * kDepth<A>; k += kThreads) {
      const int d = k / kDepth<A>, c = k % kDepth<A>;
      stage[c * kRow + d] = d < channels ? columns[d * kTile + first + c] : A(0);
    }
    __syncthreads();
#pragma unroll(1)
    for (int c = 0; c < kDepth<A>; c += kVector<A>) {
      A value[kEach][kVector<A>];
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
#pragma unroll
        for (int j = 0; j < kVector<A>; ++j)
          value[k][j] = matrix[(row + k) * kPitch + first + c + j];
      }
#pragma unroll
      for (int j = 0; j < kVector<A>; ++j) {
        A y[U];
#pragma unroll
        for (int u = 0; u < U; ++u) y[u] = stage[(c + j) * kRow + channel + u];
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
#pragma unroll
          for (int u = 0; u < U; ++u) sums[k][u] += value[k][j] * y[u];
        }
      }
    }
  }
}

// What a block sums for the rows of its tile, over all tiles of the image in their order: U kSide
// channels of vectors, and a number.
template <class A, int U>
struct RowSums {
  Total<A> vectors[kEach][U];
  Total<A> numbers[kEach];

  __device__ void add_vectors(const A (&terms)[kEach][U]) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
#pragma unroll
      for (int u = 0; u < U; ++u) vectors[k][u].add(terms[k][u]);
    }
  }

  // The vectors' channels from `first` on.
  __device__ void write_vectors(const Slots& slots, int64_t tile, int first, A* to) const {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int d = first + channel_of_thread(U) + u;
      if (d >= slots.channels) continue;
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        to[slots.at(tile * kTile + row_of_thread() + k, d)] = vectors[k][u].sum;
      }
    }
  }
  // The numbers, summed over the threads of a row.
  __device__ void write_numbers(int64_t tile, A* to) const {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      A sum = numbers[k].sum;
#pragma unroll
      for (int other = kSide / 2; other > 0; other /= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, other);
      }
      if (threadIdx.x % kSide == 0) to[tile * kTile + row_of_thread() + k] = sum;
    }
  }
};

// f(U) for the U that a kernel is to have: U kSide channels a block, as far as there are so many
// and registers hold them.
template <class A, class F>
void with_channels(int64_t channels, F&& f) {
  if constexpr (sizeof(A) == 4) {
    if (channels > 2 * kSide) return f(std::integral_constant<int, 4>());
    if (channels > kSide) return f(std::integral_constant<int, 2>());
  }
  f(std::integral_constant<int, 1>());
}

}  // namespace instembed::sphere::device

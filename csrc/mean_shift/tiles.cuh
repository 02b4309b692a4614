// Tiles of 32 consecutive pixels, each with the box around its points and their sum: what the
// blocks of the CPU kernel (blocks.h) are here.
//
// A warp takes a chunk of 32 tiles: lane k compares the box of tile k with a ball, which settles
// most tiles. Those that the sphere cuts are looked into, two at a time, lane i at pixel i of the
// embeddings themselves, whatever their layout: nothing is copied.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/cuda.h"
#include "common/dtype.h"
#include "common/images.cuh"
#include "common/numbers.cuh"
#include "mean_shift/formula.h"

namespace instembed::mean_shift::device {

using namespace cuda;

constexpr int kThreads = 384;  // 512 would leave each 128 registers, which are a few too few
constexpr int kWarps = kThreads / kWarp;
constexpr int kTile = kWarp;   // pixels
constexpr int kChunk = kWarp;  // tiles
constexpr int kGroup = 8;      // channels that are loaded, and reduced, at a time

// Tests of points are in S: float for 16- and 32-bit embeddings, and then in double near the
// border.
template <class S>
struct Tiles {                        // of all images
  S *low = nullptr, *high = nullptr;  // (channels, row): the box of the active points
  double* sums = nullptr;             // (channels, row): of the active points
  uint32_t* active = nullptr;         // points that nobody owns, of the tile's lowest class
  uint32_t* later = nullptr;          // of its other classes; null without a class map
  int64_t* classes = nullptr;         // of the active points; null without a class map
  int64_t row = 0;                    // tiles of all images, at most

  void take(Workspace* workspace, const Images& images, int64_t channels, bool classified) {
    row = images.offsets ? images.total / kTile + images.images + 1
                         : images.images * ((images.pixels + kTile - 1) / kTile);
    low = workspace->take<S>(channels * row);
    high = workspace->take<S>(channels * row);
    sums = workspace->take<double>(channels * row);
    active = workspace->take<uint32_t>(row);
    later = workspace->take<uint32_t>(classified ? row : 0);
    classes = workspace->take<int64_t>(classified ? row : 0);
    if (!classified) {
      later = nullptr;
      classes = nullptr;
    }
  }
};

template <class T>
struct Input {
  const T* embeddings;
  Strides strides;
  const void* mask;  // null: all pixels are of class 1
  DType mask_type;
  Strides mask_strides;
  Images images;
  int channels;
};

// One image and its tiles. Pointers and strides stay in the kernel's parameters, which cost no
// registers.
template <class T, class S>
struct Cloud {
  const Input<T>& input;
  const Tiles<S>& all;
  int64_t base, mask_base;  // of pixel 0
  int64_t first;            // tile
  int64_t start, pixels;    // start: of its pixels in the batch
  int channels;

  __device__ Cloud(const Input<T>& input, const Tiles<S>& all, int64_t image)
      : input(input),
        all(all),
        base(input.strides.at(input.images, image)),
        mask_base(input.mask_strides.at(input.images, image)),
        pixels(input.images.count(image)),
        channels(input.channels) {
    start = pixels > 0 ? input.images.start(image) : 0;
    first = input.images.offsets ? start / kTile + image : image * tiles();
  }

  __device__ int64_t tiles() const { return (pixels + kTile - 1) / kTile; }
  __device__ const T* point(int64_t i) const {
    return input.embeddings + base + i * input.strides.pixel;
  }
  __device__ int64_t channel() const { return input.strides.channel; }
  __device__ int64_t class_of(int64_t i) const {
    return input.mask
               ? load_id(input.mask, input.mask_type, mask_base + i * input.mask_strides.pixel)
               : 1;
  }

  // Not 0 where the class is not, in the fewest steps: what is loaded is not looked at.
  __device__ uint64_t class_bits(int64_t i) const {
    if (!input.mask) return 1;
    i = mask_base + i * input.mask_strides.pixel;
    switch (input.mask_type) {
      case DType::i8:
      case DType::u8:
        return static_cast<const uint8_t*>(input.mask)[i];
      case DType::i16:
      case DType::u16:
        return static_cast<const uint16_t*>(input.mask)[i];
      case DType::i32:
      case DType::u32:
        return static_cast<const uint32_t*>(input.mask)[i];
      default:
        return static_cast<const uint64_t*>(input.mask)[i];
    }
  }

  __device__ bool classified() const { return all.classes != nullptr; }
  __device__ uint32_t& active(int64_t tile) const { return all.active[first + tile]; }
  __device__ uint32_t& later(int64_t tile) const { return all.later[first + tile]; }
  __device__ int64_t& label_class(int64_t tile) const { return all.classes[first + tile]; }
  __device__ S& low(int d, int64_t tile) const { return all.low[d * all.row + first + tile]; }
  __device__ S& high(int d, int64_t tile) const { return all.high[d * all.row + first + tile]; }
  __device__ double& sum(int d, int64_t tile) const { return all.sums[d * all.row + first + tile]; }
};

__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_of_thread() { return static_cast<int>(threadIdx.x) / kWarp; }

struct Sum {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a + b;
  }
};
struct Least {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return b < a ? b : a;
  }
};
struct Most {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return b > a ? b : a;
  }
};

// All lanes get the same result.
template <class A, class Op>
__device__ __forceinline__ A reduce_warp(A value, Op op) {
#pragma unroll
  for (int other = kWarp / 2; other > 0; other /= 2) {
    value = op(value, __shfl_xor_sync(kAllLanes, value, other));
  }
  return value;
}

// Reduces kGroup values a lane, value(k), over the warp: lane 4 k gets the result of value k. Half
// of the values go to half of the lanes at each step, so that it takes 9 shuffles and not 40.
template <class A, class Value, class Op>
__device__ __forceinline__ A reduce_group(Value&& value, Op op) {
  const int lane = lane_of_thread();
  A values[kGroup / 2];
  const bool upper = (lane & 2 * kGroup) != 0;
#pragma unroll
  for (int k = 0; k < kGroup / 2; ++k) {
    const A first = value(k), second = value(k + kGroup / 2);
    values[k] =
        op(upper ? second : first, __shfl_xor_sync(kAllLanes, upper ? first : second, 2 * kGroup));
  }
#pragma unroll
  for (int half = kGroup / 4; half > 0; half /= 2) {
    const int other = 4 * half;
    const bool above = (lane & other) != 0;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const A given = above ? values[k] : values[k + half];
      const A kept = above ? values[k + half] : values[k];
      values[k] = op(kept, __shfl_xor_sync(kAllLanes, given, other));
    }
  }
  const A all = op(values[0], __shfl_xor_sync(kAllLanes, values[0], 2));
  return op(all, __shfl_xor_sync(kAllLanes, all, 1));
}

// visit(d) for channels first, first + step, ...: not unrolled, which costs registers.
template <class Visit>
__device__ __forceinline__ void for_channels(int channels, int first, int step, Visit&& visit) {
#pragma unroll 1
  for (int d = first; d < channels; d += step) visit(d);
}

// What is left of a tile, as a lane knows it.
struct Left {
  uint32_t active = 0;
  int64_t label_class = 0;
};

// Describes a tile whose active points and points of other classes are given, by a warp. Where
// none is active, the lowest of the other classes is next.
template <class T, class S>
__device__ __forceinline__ Left describe(const Cloud<T, S>& cloud, int64_t tile, uint32_t active,
                                         uint32_t later, int64_t label_class) {
  const int lane = lane_of_thread();
  const int64_t i = tile * kTile + lane;
  if (active == 0 && later != 0) {
    const bool candidate = later >> lane & 1;
    const int64_t own = candidate ? cloud.class_of(i) : INT64_MAX;
    label_class = reduce_warp(own, Least{});
    active = __ballot_sync(kAllLanes, candidate && own == label_class);
    later &= ~active;
  }
  if (lane == 0) {
    cloud.active(tile) = active;
    if (cloud.classified()) {
      cloud.later(tile) = later;
      cloud.label_class(tile) = label_class;
    }
  }
  if (active == 0) return {active, label_class};
  const bool mine = active >> lane & 1;
  const T* point = cloud.point(i);
  for (int from = 0; from < cloud.channels; from += kGroup) {
    S x[kGroup];
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const bool there = mine && from + k < cloud.channels;
      x[k] = there ? static_cast<S>(point[(from + k) * cloud.channel()]) : S(0);
    }
    const S least =
        reduce_group<S>([&](int k) { return mine ? x[k] : static_cast<S>(INFINITY); }, Least{});
    const S most =
        reduce_group<S>([&](int k) { return mine ? x[k] : -static_cast<S>(INFINITY); }, Most{});
    const double total =
        reduce_group<double>([&](int k) { return static_cast<double>(x[k]); }, Sum{});
    const int d = from + lane / 4;
    if (lane % 4 == 0 && d < cloud.channels) {
      cloud.low(d, tile) = least;
      cloud.high(d, tile) = most;
      cloud.sum(d, tile) = total;
    }
  }
  return {active, label_class};
}

// What decides whether a pixel is foreground, as it comes from memory.
template <class T>
struct Pixel {
  static constexpr int kAhead = kGroup / (sizeof(T) > 4 ? 2 : 1);  // channels
  uint64_t class_bits;
  T x[kAhead];
};

// The lane's pixel of a tile, or the image's last.
template <class T, class S>
__device__ __forceinline__ Pixel<T> read_pixel(const Cloud<T, S>& cloud, int64_t tile) {
  const int64_t own = tile * kTile + lane_of_thread();
  const int64_t i = own < cloud.pixels ? own : cloud.pixels - 1;
  const T* point = cloud.point(i);
  Pixel<T> pixel;
#pragma unroll
  for (int d = 0; d < Pixel<T>::kAhead; ++d) {
    pixel.x[d] = d < cloud.channels ? point[d * cloud.channel()] : T{};
  }
  pixel.class_bits = cloud.class_bits(i);
  return pixel;
}

// Finds the foreground of a tile whose pixels have been read, points that are not finite aside, and
// describes it.
template <class T, class S>
__device__ __forceinline__ Left find_points(const Cloud<T, S>& cloud, int64_t tile,
                                            const Pixel<T>& pixel) {
  const auto finite = [](S x) { return x - x == S(0); };
  const int64_t i = tile * kTile + lane_of_thread();
  bool there = i < cloud.pixels && pixel.class_bits != 0;
#pragma unroll
  for (int d = 0; d < Pixel<T>::kAhead; ++d) there = finite(static_cast<S>(pixel.x[d])) && there;
  if (there) {
    const T* point = cloud.point(i);
#pragma unroll 8
    for (int d = Pixel<T>::kAhead; d < cloud.channels; ++d) {
      there = finite(static_cast<S>(point[d * cloud.channel()])) && there;
    }
  }
  const uint32_t points = __ballot_sync(kAllLanes, there);
  // Without a class map there is one class, and the points are active as they are.
  return cloud.classified() ? describe(cloud, tile, 0u, points, int64_t{0})
                            : describe(cloud, tile, points, 0u, int64_t{1});
}

template <class S>
__device__ __forceinline__ Certain<S> certain_of(int channels, double bandwidth, double error2) {
  Certain<S> certain = Certain<S>::of(channels, bandwidth, error2);
  if constexpr (sizeof(S) == sizeof(float)) {
    if (!fits_float(bandwidth)) {  // no test in float is certain
      certain.inner2 = S(-1);
      certain.outer2 = static_cast<S>(INFINITY);
    }
  }
  return certain;
}

// |x - center| <= bandwidth. `center` and `rounded` (to S) are shared by those who ask.
template <class S>
struct DeviceBall {
  SharedPtr<double> center;
  SharedPtr<S> rounded;
  Certain<S> certain;
  double bandwidth2 = 0;

  // Once `center` and `rounded` are there. False if the centre is not finite, so has no members.
  __device__ bool prepare(double bandwidth, int channels) {
    bandwidth2 = bandwidth * bandwidth;
    double error2 = 0;
    bool finite = true;
    for (int d = 0; d < channels; ++d) {
      const double c = center[d];
      finite = finite && c - c == 0;
      const double e = c - static_cast<double>(rounded[d]);
      error2 += e * e;
    }
    set_certain(bandwidth, channels, error2);
    return finite;
  }

  __device__ void set_certain(double bandwidth, int channels, double error2) {
    certain = certain_of<S>(channels, bandwidth, error2);
  }
};

// A ball about a point of the cloud itself, which is looked up where it lies.
template <class T, class S>
struct PointBall {
  struct Center {
    const T* point;
    int64_t stride;
    __device__ S operator[](int d) const { return static_cast<S>(point[d * stride]); }
  };
  Center center, rounded;
  Certain<S> certain;
  double bandwidth2;

  __device__ PointBall(const Cloud<T, S>& cloud, int64_t i, double bandwidth)
      : center{cloud.point(i), cloud.channel()},
        rounded(center),
        certain(certain_of<S>(cloud.channels, bandwidth, 0.0)),
        bandwidth2(bandwidth * bandwidth) {}
};

enum class Side { outside, inside, cut };

// The box of a tile against the balls about all points of the box from low(d) to high(d). The
// nearest and the farthest points of both are tested as points: rounding can only agree.
template <class T, class S, class Low, class High>
__device__ __forceinline__ Side side_of(const Cloud<T, S>& cloud, int64_t tile, const Low& low,
                                        const High& high, const Certain<S>& certain) {
  S near2 = 0, far2 = 0;
#pragma unroll 4
  for (int d = 0; d < cloud.channels; ++d) {
    const S above = cloud.low(d, tile) - high(d);
    const S below = low(d) - cloud.high(d, tile);
    const S near = above > below ? above : below;  // the box begins there, if it is positive
    const S far = above < below ? above : below;   // minus where it ends
    near2 += near > 0 ? near * near : S(0);
    far2 += far * far;
  }
  if (near2 > certain.outer2) return Side::outside;
  return far2 <= certain.inner2 ? Side::inside : Side::cut;
}

template <class T, class S, class Ball>
__device__ __forceinline__ Side side_of(const Cloud<T, S>& cloud, int64_t tile, const Ball& ball) {
  const auto center = [&](int d) -> S { return ball.rounded[d]; };
  return side_of(cloud, tile, center, center, ball.certain);
}

// Whether a point is in a ball, whose squared distance to the rounded centre is known in S.
template <class T, class S, class Ball>
__device__ __forceinline__ bool is_member(const Cloud<T, S>& cloud, int64_t i, const Ball& ball,
                                          S squared) {
  if (squared <= ball.certain.inner2) return true;
  if (!(squared <= ball.certain.outer2)) return false;
  return squared_distance<1>(cloud.point(i), cloud.channel(), ball.center, cloud.channels) <=
         ball.bandwidth2;  // rarely
}

// A chunk, as the lane sees it whose tile is `tile`.
struct Members {
  uint32_t active = 0;  // of the tile, if it is of the class that is asked for
  uint32_t inside = 0;  // those in the ball
  bool whole = false;   // the ball has all of them, and the tile's sum is theirs
  bool cut = false;     // the box does not tell
  int64_t label_class = 0;
};

// What side(tile) tells of the 32 tiles from `first` on, by a warp.
template <class T, class S, class SideOf>
__device__ __forceinline__ Members compare_boxes(const Cloud<T, S>& cloud, int64_t first,
                                                 int64_t label_class, const SideOf& side_of_tile) {
  const int64_t tile = first + lane_of_thread();
  Members members;
  if (tile >= cloud.tiles()) return members;
  members.active = cloud.active(tile);
  members.label_class = cloud.classified() ? cloud.label_class(tile) : 1;
  if (members.active != 0 && members.label_class == label_class) {
    const Side side = side_of_tile(tile);
    members.whole = side == Side::inside;
    members.inside = members.whole ? members.active : 0;
    members.cut = side == Side::cut;
  }
  return members;
}

// visit(tile of the chunk, its active points, the lane's pixel, its squared distance from the
// rounded centre) for each tile whose box does not tell, by a warp. Two tiles are on their way from
// memory at a time. Lanes without an active point have another's.
template <class T, class S, class Ball, class Visit>
__device__ __forceinline__ void for_cut_tiles(const Cloud<T, S>& cloud, int64_t first,
                                              const Members& members, const Ball& ball,
                                              Visit&& visit) {
  const int lane = lane_of_thread();
  uint32_t bits = __ballot_sync(kAllLanes, members.cut);
  while (bits) {
    int tiles[2];
    uint32_t active[2];
    int64_t pixels[2];
    const T* points[2];
    S squared[2]{};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      tiles[k] = bits ? __ffs(static_cast<int>(bits)) - 1 : tiles[0];
      active[k] = bits ? __shfl_sync(kAllLanes, members.active, tiles[k]) : active[0];
      bits &= bits - 1;
      const int own = active[k] >> lane & 1 ? lane : __ffs(static_cast<int>(active[k])) - 1;
      pixels[k] = (first + tiles[k]) * kTile + own;
      points[k] = cloud.point(pixels[k]);
    }
#pragma unroll 4
    for (int d = 0; d < cloud.channels; ++d) {
      const S center = ball.rounded[d];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const S difference = static_cast<S>(points[k][d * cloud.channel()]) - center;
        squared[k] += difference * difference;
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (k == 0 || tiles[k] != tiles[0]) visit(tiles[k], active[k], pixels[k], squared[k]);
    }
  }
}

// What a ball has of tiles whose boxes do not tell.
template <class T, class S, class Ball>
__device__ __forceinline__ void look_into(const Cloud<T, S>& cloud, int64_t first, const Ball& ball,
                                          Members* members) {
  const auto visit = [&](int tile, uint32_t active, int64_t i, S squared) {
    const uint32_t inside = __ballot_sync(kAllLanes, is_member(cloud, i, ball, squared));
    if (lane_of_thread() == tile) members->inside = active & inside;
  };
  for_cut_tiles(cloud, first, *members, ball, visit);
}

// The active points of a class in a ball, in those of the 32 tiles from `first` on that are
// `among`, by a warp.
template <class T, class S>
__device__ __forceinline__ Members find_members(const Cloud<T, S>& cloud, int64_t first,
                                                int64_t label_class, const DeviceBall<S>& ball,
                                                uint32_t among = kAllLanes) {
  const int lane = lane_of_thread();
  Members members = compare_boxes(cloud, first, label_class, [&](int64_t tile) {
    return among >> lane & 1 ? side_of(cloud, tile, ball) : Side::outside;
  });
  look_into(cloud, first, ball, &members);
  return members;
}

// What is left of the tile that a lane has in the chunk from `first` on.
template <class T, class S>
__device__ __forceinline__ Left left_of(const Cloud<T, S>& cloud, int64_t first) {
  const int64_t tile = first + lane_of_thread();
  if (tile >= cloud.tiles()) return {};
  return {cloud.active(tile), cloud.classified() ? cloud.label_class(tile) : 1};
}

// Which active points of a chunk are in a ball, among those that each lane asks about in its tile,
// by a warp.
template <class T, class S, class Ball>
__device__ __forceinline__ Members members_among(const Cloud<T, S>& cloud, int64_t first,
                                                 uint32_t asked, const Ball& ball) {
  Members members;
  members.active = asked;
  if (asked != 0) {
    const Side side = side_of(cloud, first + lane_of_thread(), ball);
    members.whole = side == Side::inside;
    members.inside = members.whole ? asked : 0;
    members.cut = side == Side::cut;
  }
  look_into(cloud, first, ball, &members);
  return members;
}

// Adds the members of a chunk, of all that are active, channel d to sum[d], by a warp that alone
// has that sum. The members of a tile are added like its points were (describe()), then tiles: the
// bits depend on who is a member, not on how that was found, nor on who else is still active.
template <class T, class S, class Sums>
__device__ __forceinline__ void add_members(const Cloud<T, S>& cloud, int64_t first,
                                            const Members& members, Sums sum) {
  const int lane = lane_of_thread();
  const uint32_t whole = __ballot_sync(kAllLanes, members.whole);
  const uint32_t partly = __ballot_sync(kAllLanes, members.inside != 0 && !members.whole);
  for (int from = 0; from < cloud.channels; from += kGroup) {
    const int left = cloud.channels - from, d = from + lane / 4;
    double values[kWarp / 4];  // of channel d: of every fourth tile, from tile lane % 4 on
#pragma unroll
    for (int k = 0; k < kWarp / 4; ++k) {
      const int tile = 4 * k + lane % 4;
      values[k] = (whole >> tile & 1) && lane / 4 < left ? cloud.sum(d, first + tile) : 0.0;
    }
    for (uint32_t bits = partly; bits; bits &= bits - 1) {
      const int tile = __ffs(static_cast<int>(bits)) - 1;
      const bool mine = __shfl_sync(kAllLanes, members.inside, tile) >> lane & 1;
      const T* x = cloud.point((first + tile) * kTile + lane) + from * cloud.channel();
      const double total = reduce_group<double>(
          [&](int k) {
            return mine && k < left ? static_cast<double>(x[k * cloud.channel()]) : 0.0;
          },
          Sum{});
#pragma unroll
      for (int k = 0; k < kWarp / 4; ++k) {
        if (tile == 4 * k + lane % 4) values[k] = total;
      }
    }
    double total = 0;
#pragma unroll
    for (int k = 0; k < kWarp / 4; ++k) total += values[k];
    total += __shfl_xor_sync(kAllLanes, total, 2);
    total += __shfl_xor_sync(kAllLanes, total, 1);
    if (lane % 4 == 0 && lane / 4 < left) sum[d] += total;
  }
}

}  // namespace instembed::mean_shift::device

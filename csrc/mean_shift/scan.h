// Scans over blocks: which points lie in a ball, and their sum.
#pragma once

#include <cstdint>
#include <vector>

#include "mean_shift/blocks.h"
#include "mean_shift/formula.h"

namespace instembed::mean_shift {

// The ball |x - center| <= h.
template <class S>
struct Ball : Certain<S> {
  std::vector<double> center;
  std::vector<S> rounded;
  double bandwidth = 0, bandwidth2 = 0;
  S grow = 1;  // 1 + the relative error of a distance
  bool finite = true;

  Ball(int dims, double h) : center(dims), rounded(dims), bandwidth(h), bandwidth2(h * h) {}
  int dims() const { return static_cast<int>(center.size()); }
  void move_to(const double* c);
  // How far the ball can go before it reaches a point that now is `distance` away, computed in S.
  double gap(S distance) const {
    const double beyond = static_cast<double>(distance) - static_cast<double>(this->outer);
    return beyond / static_cast<double>(grow) - 1e-9 * bandwidth;
  }
};

// The members of a ball: their number, their sum, and a 64-bit sum of one random key a member, by
// which equal sets are recognised whatever order they were found in.
struct Moments {
  std::vector<double> sum;
  int64_t count = 0;
  uint64_t key = 0;

  explicit Moments(int dims) : sum(dims) {}
  void clear() {
    std::fill(sum.begin(), sum.end(), 0.0);
    count = 0;
    key = 0;
  }
};

// Which blocks a scan looks at: all of a set, or the ones near a point.
template <class S>
struct Front {
  Balls<S> balls;
  std::vector<int32_t> ids;  // into the set's blocks
};

// What has been taken already: the owner of each block, or of each of its points. 0 is nobody.
struct Ownership {
  std::vector<int32_t> owner;   // of a block, where its points have one owner
  std::vector<int64_t> slot;    // into `points`, -1 where they have one
  std::vector<int32_t> points;  // owner by point, of blocks that are shared

  explicit Ownership(int64_t blocks) : owner(blocks, 0), slot(blocks, -1) {}
  const int32_t* of_points(int64_t block) const {
    return slot[block] < 0 ? nullptr : points.data() + slot[block];
  }
};

// out[i] = squared distance of centre i, planar, from c, in S.
void squared_distances(const float* x, int64_t row, int64_t n, int dims, const float* c,
                       float* out);
void squared_distances(const double* x, int64_t row, int64_t n, int dims, const double* c,
                       double* out);

// The ball whose centre is nearest to c, the first of equals, or -1 where there is none. `squared`
// gets all squared distances.
int64_t nearest_ball(const Balls<float>& balls, int dims, const float* c, float* squared);
int64_t nearest_ball(const Balls<double>& balls, int dims, const double* c, double* squared);

// Squared distances of the points of a block, in double whatever S.
void exact_distances(const Block<float>& block, int dims, const double* c, double* out);
void exact_distances(const Block<double>& block, int dims, const double* c, double* out);

// mask[i] = -1 for points of the block in the ball, else 0. Returns how many.
int block_members(const Block<float>& block, const Ball<float>& ball, int32_t* mask);
int block_members(const Block<double>& block, const Ball<double>& ball, int64_t* mask);

template <class S>
using mask_t = std::conditional_t<sizeof(S) == 4, int32_t, int64_t>;

struct Scan {
  // For balls that move: entry i holds no member before the ball has travelled clear[i] in all.
  double* clear = nullptr;
  double travelled = 0;
  bool keys = false;
  const uint64_t* block_keys = nullptr;
};

// Adds the blocks of a front that lie wholly in the ball, and writes the entries that must be
// looked into to `straddling`, which has room for all. Returns how many.
int64_t add_whole(const BlockSet<float>& set, const Front<float>& front, const Ball<float>& ball,
                  const Scan& scan, Moments* to, int32_t* straddling);
int64_t add_whole(const BlockSet<double>& set, const Front<double>& front, const Ball<double>& ball,
                  const Scan& scan, Moments* to, int32_t* straddling);

// Adds the members in n such entries.
void add_straddling(const BlockSet<float>& set, const Front<float>& front, const int32_t* entries,
                    int64_t n, const Ball<float>& ball, const Scan& scan, Moments* to);
void add_straddling(const BlockSet<double>& set, const Front<double>& front, const int32_t* entries,
                    int64_t n, const Ball<double>& ball, const Scan& scan, Moments* to);

// Both. `straddling` is the caller's room.
template <class S>
void add_members(const BlockSet<S>& set, const Front<S>& front, const Ball<S>& ball,
                 const Scan& scan, std::vector<int32_t>* straddling, Moments* to);

// Appends the entries in [begin, end) whose balls come within `slack` of the ball.
void find_near(const Balls<float>& balls, int64_t begin, int64_t end, const Ball<float>& ball,
               double slack, std::vector<int32_t>* found);
void find_near(const Balls<double>& balls, int64_t begin, int64_t end, const Ball<double>& ball,
               double slack, std::vector<int32_t>* found);

// A front of the given entries of `balls`; `ids` is null where entry i is block i.
template <class S>
void make_front(const Balls<S>& balls, const int32_t* ids, int dims,
                const std::vector<int32_t>& entries, Front<S>* front);

// A random key for a point (the finaliser of splitmix64).
inline uint64_t point_key(int64_t pixel) {
  uint64_t z = (static_cast<uint64_t>(pixel) + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

}  // namespace instembed::mean_shift

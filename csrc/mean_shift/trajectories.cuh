// Mean shift from every point of an image: where each trajectory has got to, which the steps of
// seeding="all" share.
#pragma once

#include "mean_shift/group.cuh"

namespace instembed::mean_shift::device {

struct Modes {                // where the trajectory of each pixel of all images ended
  double* means = nullptr;    // (pixels, channels)
  int32_t* counts = nullptr;  // members; 0: none; negative once a better mode suppresses it
  int32_t* order = nullptr;   // pixels whose modes are kept, best first, image by image
  int32_t* sizes = nullptr;   // points that those get
  uint32_t* open = nullptr;   // (tiles of all images): points that the certificate has not met
  // (2, tiles of all images): members of the ball that the certificate looks at, and did before,
  // which other blocks may still read.
  uint32_t* found = nullptr;

  void take(Workspace* workspace, const Images& images, int64_t channels, int64_t tiles) {
    means = workspace->take<double>(images.total * channels);
    counts = workspace->take<int32_t>(images.total);
    order = workspace->take<int32_t>(images.total);
    sizes = workspace->take<int32_t>(images.total);
    open = workspace->take<uint32_t>(tiles);
    found = workspace->take<uint32_t>(2 * tiles);
  }
};

template <class T, class S>
struct Trajectories {
  struct Shared {
    SharedPtr<double> sums, centers;  // (kWarps, channels)
    SharedPtr<S> rounded;             // (kWarps, channels)
    // Not a parameter: in float64 there are no registers left for what follows from it.
    SharedPtr<double> bandwidth;
    SharedPtr<int64_t> label_class;  // that is grouped
  };

  const Cloud<T, S>& cloud;
  const Rules& rules;
  const Modes& modes;
  Shared shared;
  Group& group;

  __device__ double* mean(int64_t i) const {
    return modes.means + (cloud.start + i) * cloud.channels;
  }
  __device__ int32_t& count(int64_t i) const { return modes.counts[cloud.start + i]; }
  __device__ double bandwidth() const { return shared.bandwidth[0]; }
  __device__ int64_t label_class() const { return shared.label_class[0]; }
  // Whether a pixel is of the class that is grouped.
  __device__ bool takes_part(int64_t i) const {
    const int64_t tile = i / kTile;
    return (cloud.active(tile) >> (i % kTile) & 1) &&
           (!cloud.classified() || cloud.label_class(tile) == label_class());
  }
  // Whether a trajectory whose shift has this square stays.
  __device__ bool stays(double moved2) const { return sqrt(moved2) <= rules.tol * bandwidth(); }
};

}  // namespace instembed::mean_shift::device

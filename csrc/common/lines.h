// Memory in whole cache lines.
#pragma once

#include <cstdint>
#include <vector>

#include "common/simd.h"

namespace instembed {

// Elements in whole cache lines, zero at first.
template <class A>
class Lines {
 public:
  explicit Lines(int64_t elements = 0) : lines_((elements + kLanes<A> - 1) / kLanes<A>) {}
  A* data() { return reinterpret_cast<A*>(lines_.data()); }
  const A* data() const { return reinterpret_cast<const A*>(lines_.data()); }

 private:
  std::vector<VecSlot<A>> lines_;
};

}  // namespace instembed

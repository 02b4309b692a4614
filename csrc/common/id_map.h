// Arbitrary 64-bit ids to consecutive slots, in order of first appearance.
#pragma once

#include <cstdint>
#include <vector>

namespace instembed {

class IdMap {
 public:
  // The slot of `id`, a new one if the id was not seen before.
  int32_t slot(int64_t id) {
    uint64_t at = place(id);
    while (slots_[at] >= 0) {
      if (ids_[slots_[at]] == id) return slots_[at];
      at = next(at);
    }
    const auto added = static_cast<int32_t>(ids_.size());
    slots_[at] = added;
    ids_.push_back(id);
    if (2 * ids_.size() > slots_.size()) grow();
    return added;
  }

  // ids()[slot] is the id that got `slot`.
  const std::vector<int64_t>& ids() const { return ids_; }
  int32_t size() const { return static_cast<int32_t>(ids_.size()); }

 private:
  // The product's high bits: the consecutive ids of most label maps fall far apart and rarely
  // collide, and so do multiples of a power of two (packed colours, class * 1000).
  uint64_t place(int64_t id) const {
    return (static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15u) >> shift_;
  }
  uint64_t next(uint64_t at) const { return (at + 1) & (slots_.size() - 1); }

  void grow() {
    slots_.assign(2 * slots_.size(), -1);
    --shift_;
    for (int32_t slot = 0; slot < size(); ++slot) {
      uint64_t at = place(ids_[slot]);
      while (slots_[at] >= 0) at = next(at);
      slots_[at] = slot;
    }
  }

  std::vector<int64_t> ids_;
  std::vector<int32_t> slots_ = std::vector<int32_t>(64, -1);
  int shift_ = 58;  // 64 less the number of bits of an index into slots_
};

}  // namespace instembed

// Arbitrary 64-bit ids to consecutive slots, in order of first appearance.
#pragma once

#include <cstdint>
#include <vector>

namespace instembed {

class IdMap {
 public:
  // The slot of `id`, a new one if the id was not seen before.
  int32_t slot(int64_t id) {
    uint64_t at = hash(id) & mask_;
    while (slots_[at] >= 0) {
      if (ids_[slots_[at]] == id) return slots_[at];
      at = (at + 1) & mask_;
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
  // Ids are often multiples of a power of two (packed colours, class * 1000): all bits must reach
  // the low ones.
  static uint64_t hash(int64_t id) {
    uint64_t h = static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15u;
    return h ^ (h >> 32);
  }

  void grow() {
    slots_.assign(2 * slots_.size(), -1);
    mask_ = slots_.size() - 1;
    for (int32_t slot = 0; slot < size(); ++slot) {
      uint64_t at = hash(ids_[slot]) & mask_;
      while (slots_[at] >= 0) at = (at + 1) & mask_;
      slots_[at] = slot;
    }
  }

  std::vector<int64_t> ids_;
  std::vector<int32_t> slots_ = std::vector<int32_t>(64, -1);
  uint64_t mask_ = 63;
};

}  // namespace instembed

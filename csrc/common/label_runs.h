// A label map cut into runs of one id: read once, then every pass over the pixels knows where an
// instance starts and stops, so that inner loops are contiguous and have a constant mean.
//
// Ids become slots: 0, 1, ... per image, in order of first appearance. Tiles of a fixed number of
// pixels are encoded on their own, as runs where runs are long, as one slot a pixel where they are
// short (random labels).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "common/array.h"
#include "common/batch.h"

namespace instembed {

// Slots of pixels that belong to no instance.
constexpr int32_t kBackground = -1;
constexpr int32_t kIgnored = -2;

struct LabelRules {
  std::optional<int64_t> background;    // the id of what is no instance
  std::optional<int64_t> ignore_index;  // the id of what takes no part at all
};

constexpr int kMaxTile = 1024;

// Offsets of the tiles of all images, image after image.
struct TileGrid {
  int tile = 0;                // pixels, at most kMaxTile
  std::vector<int64_t> first;  // first[b] is image b's first tile; images + 1 elements

  TileGrid() = default;
  TileGrid(const Batch& batch, int tile);
  int64_t tiles() const { return first.back(); }
};

// A tile's code. Runs: (length - 1) << 22 | slot. Dense: a slot a pixel, of 16 bits where that is
// enough.
struct TileCode {
  const uint32_t* words = nullptr;
  int64_t count = 0;
  int tile = 0;

  bool is_runs() const { return count <= tile / 4; }

  // f(start, length, slot) for each run, in order; start counts from the tile's first pixel.
  template <class F>
  void for_each_run(F&& f) const {
    int start = 0;
    for (int64_t k = 0; k < count; ++k) {
      const int length = static_cast<int>(words[k] >> 22) + 1;
      // The two highest codes are kIgnored and kBackground: sign extension of the slot restores
      // them.
      const uint32_t code = words[k] & 0x3fffffu;
      f(start, length,
        code >= 0x3ffffeu ? static_cast<int32_t>(code | 0xffc00000u) : static_cast<int32_t>(code));
      start += length;
    }
  }

  // Whether a tile of runs has a pixel of an instance.
  bool any_instance() const;

  // slots[i] of the tile's first n pixels, for a dense tile.
  void unpack(int n, int32_t* slots) const;

  // The same as rows of a table, `none` for pixels of no instance.
  void unpack_rows(int n, int32_t none, int32_t* rows) const;
};

// The code of every tile of a batch in one block: offsets of the tiles, then their words.
struct RunsView {
  const uint32_t* block = nullptr;
  int64_t tiles = 0;
  int tile = 0;

  TileCode operator[](int64_t index) const {
    return {block + tiles + 1 + block[index], static_cast<int64_t>(block[index + 1]) - block[index],
            tile};
  }
};

class LabelRuns {
 public:
  // Where the caller wants the code, if it fits.
  struct Room {
    uint32_t* words = nullptr;
    int64_t size = 0;
  };

  // Reads the labels once.
  LabelRuns(const Array& labels, const Batch& batch, const TileGrid& grid, const LabelRules& rules,
            int threads, const Room& room);

  int32_t instances(int64_t image) const { return static_cast<int32_t>(counts[image].size()); }
  RunsView view() const { return {block_, tiles_, tile_}; }
  int64_t size() const { return size_; }  // words of the code
  bool in_room() const { return fits_; }

  std::vector<std::vector<int64_t>> counts;  // [image][slot]: pixels
  std::vector<std::vector<int64_t>> ids;     // [image][slot]

 private:
  int64_t tiles_;
  int tile_;
  int64_t size_ = 0;
  bool fits_ = false;
  uint32_t* block_ = nullptr;  // see RunsView
  std::unique_ptr<uint32_t[]> own_;
};

}  // namespace instembed

#include "common/label_runs.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "common/dtype.h"
#include "common/id_map.h"
#include "common/label_rows.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace instembed {
namespace {

// Few enough that a chunk's own slots fit 16 bits.
constexpr int64_t kPixelsPerChunk = 1 << 15;
constexpr int32_t kMaxRunSlots =
    0x3ffffe;  // what a run's 22 bits can hold, less the two special codes
constexpr int32_t kMaxShortSlots = 0xfffe;  // likewise for 16 bits

// What one task finds in its part of an image: codes with slots of its own, to be renumbered for
// the image.
struct Chunk {
  int64_t image, first_tile, tiles;
  uint32_t* dense;              // room for half a word a pixel, where dense tiles have a place each
  std::vector<int32_t> counts;  // [slot]: pixels
  std::vector<int32_t> renumber;  // [slot]: the image's slot, in the memory of the counts
  std::vector<uint32_t> runs;     // the words of the other tiles
  std::vector<int32_t> words_per_tile;
};

// The number of words that a tile's code takes; it also says which code it is (TileCode::is_runs).
int64_t code_size(int64_t runs, int tile, int32_t instances) {
  if (runs <= tile / 4 && instances < kMaxRunSlots) return runs;
  return instances < kMaxShortSlots ? tile / 2 : tile;
}

struct Run {
  int32_t length, slot;
};

uint32_t run_word(int32_t length, int32_t slot) {
  return static_cast<uint32_t>(length - 1) << 22 | (static_cast<uint32_t>(slot) & 0x3fffffu);
}

// Slot i of a dense code, of 16 bits if `S` has them. A special code sign extends to its slot.
template <class S>
INSTEMBED_INLINE int32_t dense_slot(const uint32_t* words, int64_t i) {
  S code;
  std::memcpy(&code, reinterpret_cast<const char*>(words) + i * sizeof(S), sizeof(S));
  constexpr S kFirstSpecial = static_cast<S>(kIgnored);
  return code >= kFirstSpecial ? static_cast<std::make_signed_t<S>>(code)
                               : static_cast<int32_t>(code);
}

template <class S>
void set_dense_slot(uint32_t* words, int64_t i, int32_t slot) {
  const auto code = static_cast<S>(slot);
  std::memcpy(reinterpret_cast<char*>(words) + i * sizeof(S), &code, sizeof(S));
}

// f(type of the code's elements), for a dense code of `size` words.
template <class F>
void with_dense_type(int64_t size, int tile, F&& f) {
  if (size == tile) {
    f(uint32_t{});
  } else {
    f(uint16_t{});
  }
}

template <class L>
void scan(Chunk& chunk, IdMap& map, const L* labels, int64_t stride, int64_t pixels, int tile,
          const LabelRules& rules) {
  LineScanner<L> scanner;
  std::vector<Run> runs(tile);
  int64_t last_id = 0;
  int32_t last_slot = -3;  // no id yet
  const auto slot_of = [&](int64_t id) {
    if (rules.ignore_index == id) return kIgnored;
    if (rules.background == id) return kBackground;
    const int32_t slot = map.slot(id);
    if (slot == static_cast<int32_t>(chunk.counts.size())) chunk.counts.push_back(0);
    return slot;
  };
  for (int64_t t = chunk.first_tile; t < chunk.first_tile + chunk.tiles; ++t) {
    const int64_t from = t * tile;
    int count = 0;
    scanner.scan(labels + from * stride, stride, std::min<int64_t>(tile, pixels - from),
                 [&](int64_t start, int64_t end, int64_t id) {
                   if (id != last_id || last_slot == -3) {
                     last_id = id;
                     last_slot = slot_of(id);
                   }
                   if (last_slot >= 0) chunk.counts[last_slot] += static_cast<int32_t>(end - start);
                   runs[count++] = {static_cast<int32_t>(end - start), last_slot};
                 });
    const int64_t size = code_size(count, tile, 0);
    if (size <= tile / 4) {
      for (int k = 0; k < count; ++k) {
        chunk.runs.push_back(run_word(runs[k].length, runs[k].slot));
      }
    } else {
      uint32_t* words = chunk.dense + (t - chunk.first_tile) * (tile / 2);
      for (int64_t k = 0, i = 0; k < count; ++k) {
        const int64_t end = i + runs[k].length;
        for (; i < end; ++i) set_dense_slot<uint16_t>(words, i, runs[k].slot);
      }
    }
    chunk.words_per_tile.push_back(static_cast<int32_t>(size));
  }
}

// The code of a tile of n pixels, with the image's slots in place of the chunk's.
void recode(const TileCode& code, int n, const std::vector<int32_t>& renumber, int64_t size,
            uint32_t* words) {
  const auto slot_of = [&](int32_t slot) { return slot < 0 ? slot : renumber[slot]; };
  if (size <= code.tile / 4) {
    int64_t k = 0;
    code.for_each_run(
        [&](int, int length, int32_t slot) { words[k++] = run_word(length, slot_of(slot)); });
    return;
  }
  std::fill(words, words + size, 0u);
  with_dense_type(size, code.tile, [&](auto type) {
    using S = decltype(type);
    if (code.is_runs()) {
      code.for_each_run([&](int start, int length, int32_t slot) {
        for (int i = start; i < start + length; ++i) set_dense_slot<S>(words, i, slot_of(slot));
      });
      return;
    }
    for (int i = 0; i < n; ++i) {
      set_dense_slot<S>(words, i, slot_of(dense_slot<uint16_t>(code.words, i)));
    }
  });
}

template <class S>
INSTEMBED_INLINE void unpack_body(const uint32_t* words, int n, int32_t lowest, int32_t none,
                                  int32_t* slots) {
  for (int i = 0; i < n; ++i) {
    const int32_t slot = dense_slot<S>(words, i);
    slots[i] = slot < lowest ? none : slot;
  }
}

// Slots of a dense code, `none` for those below `lowest`.
INSTEMBED_SIMD void unpack_dense(const uint32_t* words, bool wide, int n, int32_t lowest,
                                 int32_t none, int32_t* slots) {
  if (wide) {
    unpack_body<uint32_t>(words, n, lowest, none, slots);
  } else {
    unpack_body<uint16_t>(words, n, lowest, none, slots);
  }
}

}  // namespace

TileGrid::TileGrid(const Batch& batch, int tile) : tile(tile), first(batch.images + 1, 0) {
  for (int64_t b = 0; b < batch.images; ++b) {
    first[b + 1] = first[b] + (batch.count(b) + tile - 1) / tile;
  }
}

void TileCode::unpack(int n, int32_t* slots) const {
  unpack_dense(words, count == tile, n, kIgnored, 0, slots);
}

bool TileCode::any_instance() const {
  bool any = false;
  for_each_run([&](int, int, int32_t slot) { any = any || slot >= 0; });
  return any;
}

void TileCode::unpack_rows(int n, int32_t none, int32_t* rows) const {
  unpack_dense(words, count == tile, n, 0, none, rows);
}

LabelRuns::LabelRuns(const Array& labels, const Batch& batch, const TileGrid& grid,
                     const LabelRules& rules, int threads, const Room& room)
    : counts(batch.images), ids(batch.images), tiles_(grid.tiles()), tile_(grid.tile) {
  const int64_t dense_size = tile_ / 2;
  const Pages dense(tiles_ * dense_size * sizeof(uint32_t));
  std::vector<Chunk> chunks;
  for (int64_t b = 0; b < batch.images; ++b) {
    const int64_t tiles = grid.first[b + 1] - grid.first[b];
    const int64_t per_chunk = kPixelsPerChunk / grid.tile;
    for (int64_t t = 0; t < tiles; t += per_chunk) {
      Chunk chunk;
      chunk.image = b;
      chunk.first_tile = t;
      chunk.tiles = std::min(per_chunk, tiles - t);
      chunk.dense = dense.as<uint32_t>() + (grid.first[b] + t) * dense_size;
      chunks.push_back(std::move(chunk));
    }
  }

  // Some chunks at a time, so that few have maps of ids of their own.
  std::vector<IdMap> maps(batch.images);
  const int64_t wave = 4 * std::max(threads, 1);
  for (int64_t from = 0, to; from < static_cast<int64_t>(chunks.size()); from = to) {
    to = std::min(from + wave, static_cast<int64_t>(chunks.size()));
    std::vector<IdMap> chunk_maps(to - from);
    dispatch_integer(labels.dtype, "labels", [&](auto type) {
      using L = decltype(type);
      parallel_for(to - from, threads, [&](int64_t k) {
        Chunk& chunk = chunks[from + k];
        scan(chunk, chunk_maps[k], labels.as<const L>() + batch.first(chunk.image),
             batch.pixel_stride, batch.count(chunk.image), tile_, rules);
      });
    });
    for (int64_t k = from; k < to; ++k) {
      const int64_t b = chunks[k].image;
      chunks[k].renumber = std::move(chunks[k].counts);
      for (int32_t local = 0; local < chunk_maps[k - from].size(); ++local) {
        const int32_t slot = maps[b].slot(chunk_maps[k - from].ids()[local]);
        if (slot == static_cast<int32_t>(counts[b].size())) counts[b].push_back(0);
        counts[b][slot] += chunks[k].renumber[local];
        chunks[k].renumber[local] = slot;
      }
    }
  }
  for (int64_t b = 0; b < batch.images; ++b) ids[b] = maps[b].ids();

  std::vector<int64_t> offsets(tiles_ + 1, 0);
  for (const Chunk& chunk : chunks) {
    for (int64_t t = 0; t < chunk.tiles; ++t) {
      const int64_t index = grid.first[chunk.image] + chunk.first_tile + t;
      offsets[index + 1] =
          offsets[index] + code_size(chunk.words_per_tile[t], tile_, instances(chunk.image));
    }
  }
  if (offsets.back() > UINT32_MAX) throw std::length_error("labels: more than 2^32 pixels a batch");
  size_ = tiles_ + 1 + offsets.back();
  fits_ = size_ <= room.size;
  if (!fits_) own_.reset(new uint32_t[size_]);
  block_ = fits_ ? room.words : own_.get();
  std::copy(offsets.begin(), offsets.end(), block_);
  parallel_for(static_cast<int64_t>(chunks.size()), threads, [&](int64_t k) {
    Chunk& chunk = chunks[k];
    const uint32_t* runs = chunk.runs.data();
    for (int64_t t = 0; t < chunk.tiles; ++t) {
      const int64_t index = grid.first[chunk.image] + chunk.first_tile + t;
      const int64_t from = (chunk.first_tile + t) * tile_;
      const auto pixels =
          static_cast<int>(std::min<int64_t>(tile_, batch.count(chunk.image) - from));
      TileCode code{runs, chunk.words_per_tile[t], tile_};
      if (code.is_runs()) {
        runs += code.count;
      } else {
        code.words = chunk.dense + t * dense_size;
      }
      recode(code, pixels, chunk.renumber, offsets[index + 1] - offsets[index],
             block_ + tiles_ + 1 + offsets[index]);
    }
    chunk.runs = {};
  });
}

}  // namespace instembed

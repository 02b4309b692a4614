#include "common/label_runs.h"

#include <algorithm>
#include <stdexcept>

#include "common/dtype.h"
#include "common/id_map.h"
#include "common/label_rows.h"
#include "common/parallel.h"

namespace instembed {
namespace {

// Short enough that a chunk's own slots fit 16 bits.
constexpr int64_t kTilesPerChunk = 16;
constexpr int32_t kMaxRunSlots =
    0x3ffffe;  // what a run's 22 bits can hold, less the two special codes
constexpr int32_t kMaxShortSlots = 0xfffe;  // likewise for 16 bits

// What one task finds in its part of an image: codes with slots of its own, to be renumbered for
// the image.
struct Chunk {
  int64_t image, first_tile, tiles;
  IdMap map;
  std::vector<int64_t> counts;
  std::vector<uint32_t> words;
  std::vector<int32_t> words_per_tile;
  std::vector<int32_t> renumber;
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

// Writes a dense code of `size` words, slot after slot, over zeros.
class DenseWriter {
 public:
  DenseWriter(uint32_t* words, int64_t size, int tile) : words_(words), wide_(size == tile) {}
  void add(int32_t slot, int length = 1) {
    const auto code = static_cast<uint32_t>(slot);
    for (const int end = at_ + length; at_ < end; ++at_) {
      if (wide_) {
        words_[at_] = code;
      } else {
        words_[at_ / 2] |= (code & 0xffffu) << (16 * (at_ & 1));
      }
    }
  }

 private:
  uint32_t* words_;
  bool wide_;
  int at_ = 0;
};

template <class L>
void scan(Chunk& chunk, const L* labels, int64_t stride, int64_t pixels, int tile,
          const LabelRules& rules) {
  LineScanner<L> scanner;
  std::vector<Run> runs(tile);
  int64_t last_id = 0;
  int32_t last_slot = -3;  // no id yet
  const auto slot_of = [&](int64_t id) {
    if (rules.ignore_index == id) return kIgnored;
    if (rules.background == id) return kBackground;
    const int32_t slot = chunk.map.slot(id);
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
                   if (last_slot >= 0) chunk.counts[last_slot] += end - start;
                   runs[count++] = {static_cast<int32_t>(end - start), last_slot};
                 });
    const size_t before = chunk.words.size();
    const int64_t size = code_size(count, tile, 0);
    chunk.words.resize(before + size, 0);
    uint32_t* words = chunk.words.data() + before;
    if (size <= tile / 4) {
      for (int k = 0; k < count; ++k) words[k] = run_word(runs[k].length, runs[k].slot);
    } else {
      DenseWriter dense(words, size, tile);
      for (int k = 0; k < count; ++k) dense.add(runs[k].slot, runs[k].length);
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
  DenseWriter dense(words, size, code.tile);
  if (code.is_runs()) {
    code.for_each_run([&](int, int length, int32_t slot) { dense.add(slot_of(slot), length); });
    return;
  }
  int32_t slots[kMaxTile];
  code.unpack(n, slots);
  for (int i = 0; i < n; ++i) dense.add(slot_of(slots[i]));
}

}  // namespace

TileGrid::TileGrid(const Batch& batch, int tile) : tile(tile), first(batch.images + 1, 0) {
  for (int64_t b = 0; b < batch.images; ++b) {
    first[b + 1] = first[b] + (batch.count(b) + tile - 1) / tile;
  }
}

void TileCode::unpack(int n, int32_t* slots) const {
  if (count == tile) {
    for (int i = 0; i < n; ++i) slots[i] = static_cast<int32_t>(words[i]);
    return;
  }
  for (int i = 0; i < n; ++i) {
    const auto code = static_cast<uint16_t>(words[i / 2] >> (16 * (i & 1)));
    slots[i] = code >= 0xfffeu ? static_cast<int16_t>(code) : code;
  }
}

bool TileCode::any_instance() const {
  bool any = false;
  for_each_run([&](int, int, int32_t slot) { any = any || slot >= 0; });
  return any;
}

void TileCode::unpack_rows(int n, int32_t none, int32_t* rows) const {
  unpack(n, rows);
  for (int i = 0; i < n; ++i) rows[i] = rows[i] < 0 ? none : rows[i];
}

LabelRuns::LabelRuns(const Array& labels, const Batch& batch, const TileGrid& grid,
                     const LabelRules& rules, int threads, const Room& room)
    : counts(batch.images), ids(batch.images), tiles_(grid.tiles()), tile_(grid.tile) {
  std::vector<Chunk> chunks;
  std::vector<int64_t> first_chunk(batch.images + 1, 0);
  for (int64_t b = 0; b < batch.images; ++b) {
    const int64_t tiles = grid.first[b + 1] - grid.first[b];
    for (int64_t t = 0; t < tiles; t += kTilesPerChunk) {
      Chunk chunk;
      chunk.image = b;
      chunk.first_tile = t;
      chunk.tiles = std::min(kTilesPerChunk, tiles - t);
      chunks.push_back(std::move(chunk));
    }
    first_chunk[b + 1] = static_cast<int64_t>(chunks.size());
  }

  dispatch_integer(labels.dtype, "labels", [&](auto type) {
    using L = decltype(type);
    parallel_for(static_cast<int64_t>(chunks.size()), threads, [&](int64_t k) {
      Chunk& chunk = chunks[k];
      scan(chunk, labels.as<const L>() + batch.first(chunk.image), batch.pixel_stride,
           batch.count(chunk.image), tile_, rules);
    });
  });

  parallel_for(batch.images, threads, [&](int64_t b) {
    IdMap map;
    for (int64_t k = first_chunk[b]; k < first_chunk[b + 1]; ++k) {
      Chunk& chunk = chunks[k];
      chunk.renumber.reserve(chunk.map.ids().size());
      for (size_t local = 0; local < chunk.map.ids().size(); ++local) {
        const int32_t slot = map.slot(chunk.map.ids()[local]);
        if (slot == static_cast<int32_t>(counts[b].size())) counts[b].push_back(0);
        counts[b][slot] += chunk.counts[local];
        chunk.renumber.push_back(slot);
      }
    }
    ids[b] = map.ids();
  });

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
    const uint32_t* words = chunk.words.data();
    for (int64_t t = 0; t < chunk.tiles; ++t) {
      const int64_t index = grid.first[chunk.image] + chunk.first_tile + t;
      const int64_t from = (chunk.first_tile + t) * tile_;
      const auto pixels =
          static_cast<int>(std::min<int64_t>(tile_, batch.count(chunk.image) - from));
      recode({words, chunk.words_per_tile[t], tile_}, pixels, chunk.renumber,
             offsets[index + 1] - offsets[index], block_ + tiles_ + 1 + offsets[index]);
      words += chunk.words_per_tile[t];
    }
    chunk.words = {};
  });
}

}  // namespace instembed

#include "common/label_runs.h"

#include <algorithm>
#include <type_traits>

#include "common/dtype.h"
#include "common/id_map.h"
#include "common/parallel.h"

namespace instembed {
namespace {

constexpr int64_t kTilesPerChunk = 16;
constexpr int32_t kMaxRunSlots =
    0x3ffffe;  // what a run's 22 bits can hold, less the two special codes
constexpr int32_t kMaxShortSlots = 0xfffe;  // likewise for 16 bits

struct Run {
  int32_t length;
  int32_t slot;
};

// What one task finds in its part of an image: runs in slots of its own, to be renumbered for the
// image.
struct Chunk {
  int64_t image, first_tile, tiles;
  IdMap map;
  std::vector<int64_t> counts;
  std::vector<Run> runs;
  std::vector<int32_t> runs_per_tile;
  std::vector<int32_t> renumber;
};

template <class L>
struct Row {
  const L* data;
  int64_t stride;
  // Two's complement bits stand for an id of any type, so that 2^63 and more are ids like others.
  int64_t operator[](int64_t i) const { return static_cast<int64_t>(data[i * stride]); }
};

// One past the last pixel of the run that starts at `from`.
template <class L>
int64_t run_end(const Row<L>& row, int64_t from, int64_t end) {
  const L id = row.data[from * row.stride];
  int64_t i = from + 1;
  if (row.stride == 1) {
    constexpr int kBlock = 16;
    const L* p = row.data;
    while (i + kBlock <= end) {
      std::make_unsigned_t<L> difference = 0;
      for (int k = 0; k < kBlock; ++k)
        difference |= static_cast<std::make_unsigned_t<L>>(p[i + k] ^ id);
      if (difference) break;
      i += kBlock;
    }
  }
  while (i < end && row.data[i * row.stride] == id) ++i;
  return i;
}

template <class L>
void scan(Chunk& chunk, const Row<L>& row, int64_t pixels, int tile, const LabelRules& rules) {
  int64_t last_id = 0;
  int32_t last_slot = -3;  // no id yet
  chunk.runs.reserve(chunk.tiles * tile / 4);
  for (int64_t t = chunk.first_tile; t < chunk.first_tile + chunk.tiles; ++t) {
    const int64_t end = std::min(pixels, (t + 1) * tile);
    const size_t before = chunk.runs.size();
    for (int64_t i = t * tile; i < end;) {
      const int64_t next = run_end(row, i, end);
      const int64_t id = row[i];
      if (id != last_id || last_slot == -3) {
        last_id = id;
        if (rules.ignore_index == id) {
          last_slot = kIgnored;
        } else if (rules.background == id) {
          last_slot = kBackground;
        } else {
          last_slot = chunk.map.slot(id);
          if (last_slot == static_cast<int32_t>(chunk.counts.size())) chunk.counts.push_back(0);
        }
      }
      if (last_slot >= 0) chunk.counts[last_slot] += next - i;
      chunk.runs.push_back({static_cast<int32_t>(next - i), last_slot});
      i = next;
    }
    chunk.runs_per_tile.push_back(static_cast<int32_t>(chunk.runs.size() - before));
  }
}

// The number of words that a tile's code takes; it also says which code it is (TileCode::is_runs).
int64_t code_size(int64_t runs, int tile, int32_t instances) {
  if (runs <= tile / 4 && instances < kMaxRunSlots) return runs;
  return instances < kMaxShortSlots ? tile / 2 : tile;
}

void encode(const Run* runs, int64_t count, const std::vector<int32_t>& renumber, int tile,
            int64_t size, uint32_t* words) {
  const auto slot_of = [&](const Run& run) {
    return static_cast<uint32_t>(run.slot < 0 ? run.slot : renumber[run.slot]);
  };
  if (size <= tile / 4) {
    for (int64_t k = 0; k < count; ++k) {
      words[k] = static_cast<uint32_t>(runs[k].length - 1) << 22 | (slot_of(runs[k]) & 0x3fffffu);
    }
    return;
  }
  int at = 0;
  for (int64_t k = 0; k < count; ++k) {
    const uint32_t slot = slot_of(runs[k]);
    for (int j = 0; j < runs[k].length; ++j, ++at) {
      if (size == tile) {
        words[at] = slot;
      } else {
        const int shift = 16 * (at & 1);
        words[at / 2] = (words[at / 2] & ~(0xffffu << shift)) | (slot & 0xffffu) << shift;
      }
    }
  }
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

LabelRuns::LabelRuns(const Array& labels, const Batch& batch, const TileGrid& grid,
                     const LabelRules& rules, int threads)
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
      const Row<L> row{labels.as<const L>() + batch.first(chunk.image), batch.pixel_stride};
      scan(chunk, row, batch.count(chunk.image), tile_, rules);
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
          offsets[index] + code_size(chunk.runs_per_tile[t], tile_, instances(chunk.image));
    }
  }
  if (offsets.back() > UINT32_MAX) throw std::length_error("labels: more than 2^32 pixels a batch");
  block.resize(tiles_ + 1 + offsets.back());
  std::copy(offsets.begin(), offsets.end(), block.begin());
  parallel_for(static_cast<int64_t>(chunks.size()), threads, [&](int64_t k) {
    const Chunk& chunk = chunks[k];
    const Run* runs = chunk.runs.data();
    for (int64_t t = 0; t < chunk.tiles; ++t) {
      const int64_t index = grid.first[chunk.image] + chunk.first_tile + t;
      encode(runs, chunk.runs_per_tile[t], chunk.renumber, tile_,
             offsets[index + 1] - offsets[index], block.data() + tiles_ + 1 + offsets[index]);
      runs += chunk.runs_per_tile[t];
    }
  });
}

}  // namespace instembed

// Tiles of a content pattern, planned chunk by chunk: each chunk of consecutive tiles of one (batch item, head) into tables of
// its own.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "row_masks.h"
#include "tile_clauses.h"

namespace farlight {

using Bits = std::array<int32_t, kRows * kBitsWords>;

// The tables of consecutive tiles of one variant. Masks are numbered within the chunk.
struct ChunkTables {
  std::vector<int64_t> run_count;  // per tile
  std::vector<int32_t> lo, hi, mask;
  std::vector<int32_t> point_count, point_keys;  // per row, and for all rows
  std::vector<uint32_t> row_masks;               // kRowSet masks
  std::vector<Bits> bit_masks;                   // kBits masks, numbered behind them
  ContentCounts counts;
};

// A run of the keys that one tile sees, before the runs are sorted by their masks.
struct Run {
  int32_t lo, hi;
  uint32_t rows;
};

class ChunkPlanner {
 public:
  ChunkPlanner(const ContentPattern& pattern, int64_t gather, int64_t batch_item, int64_t head, ChunkTables& to)
      : pattern_(pattern), gather_(gather), to_(to), masks_(pattern.n_k), clauses_(pattern, batch_item, head, masks_) {
    bit_mask_numbers_.fill(-1);
  }

  void plan_tile(int64_t first_row) {
    count_ = static_cast<int>(std::min<int64_t>(kRows, pattern_.n_q - first_row));
    all_ = count_ == kRows ? kEveryRow : (1u << count_) - 1;
    clauses_.unite(first_row);
    cut();
  }

 private:
  // Cuts the row masks of the tile into runs and gathered keys.
  void cut() {
    runs_.clear();
    edges_.clear();
    for (auto& keys : points_) keys.clear();
    masks_.drain([&](int64_t first, const uint32_t* masks, int keys, bool equal) {
      int pairs = equal ? keys * std::popcount(masks[0]) : 0;
      uint32_t any = equal ? masks[0] : 0, differ = 0;
      for (int i = 0; i < keys && !equal; ++i) {
        pairs += std::popcount(masks[i]);
        any |= masks[i];
        differ |= masks[i] ^ masks[0];
      }
      if (!any) return;
      to_.counts.pairs += pairs;
      const int half_rows = kRows / 2 * (((any & 0xffffu) != 0) + ((any >> 16) != 0));
      if (pairs * gather_ < half_rows * keys) return gather(first, masks, keys);
      to_.counts.visited += static_cast<int64_t>(keys) * count_;
      const auto lo = static_cast<int32_t>(first), hi = static_cast<int32_t>(first + keys);
      if (differ) return add_edge(lo, hi, masks);
      if (!runs_.empty() && runs_.back().hi == lo && runs_.back().rows == masks[0]) runs_.back().hi = hi;
      else runs_.push_back({lo, hi, masks[0]});
    });
    write();
  }

  // Keys that few rows see are gathered row by row.
  void gather(int64_t first, const uint32_t* masks, int keys) {
    for (int i = 0; i < keys; ++i)
      for (uint32_t rows = masks[i]; rows; rows &= rows - 1) {
        points_[std::countr_zero(rows)].push_back(static_cast<int32_t>(first + i));
        ++to_.counts.visited;
      }
  }

  // A run whose keys are seen by different rows: the rows of each key.
  struct Edge {
    int32_t lo, hi;
    std::array<uint32_t, kBitsKeys> rows;
  };

  void add_edge(int32_t lo, int32_t hi, const uint32_t* masks) {
    if (edges_.empty() || edges_.back().hi != lo || hi - edges_.back().lo > kBitsKeys) edges_.push_back({lo, lo, {}});
    Edge& edge = edges_.back();
    std::copy(masks, masks + (hi - lo), edge.rows.begin() + (lo - edge.lo));
    edge.hi = hi;
  }

  // A bit for each (row, key): the rows of the keys, transposed.
  static Bits bits_of(const Edge& edge) {
    Bits bits{};
    for (int word = 0; word * 32 < edge.hi - edge.lo; ++word) {
      uint32_t square[32];
      std::copy_n(edge.rows.begin() + word * 32, 32, square);
      transpose(square);
      for (int row = 0; row < kRows; ++row) bits[row * kBitsWords + word] = static_cast<int32_t>(square[row]);
    }
    return bits;
  }

  // Bit r of word k becomes bit k of word r, by swaps of ever smaller squares (Warren, Hacker's Delight, 7-3).
  static void transpose(uint32_t (&square)[32]) {
    uint32_t mask = 0x0000ffffu;
    for (int side = 16; side; side >>= 1, mask ^= mask << side)
      for (int k = 0; k < 32; k = (k + side + 1) & ~side) {
        const uint32_t differ = ((square[k] >> side) ^ square[k + side]) & mask;
        square[k] ^= differ << side;
        square[k + side] ^= differ;
      }
  }

  // Writes the tile's runs, those that the same halves of the rows see together: kernels skip the half of the rows that sees
  // nothing of a key block.
  void write() {
    // 0: every row; 1, 2, 3: the first half of the rows, the second, both.
    const auto halves = [&](uint32_t rows) { return rows == all_ ? 0 : ((rows & 0xffffu) != 0) + 2 * ((rows >> 16) != 0); };
    for (int seen_by = 0; seen_by < 4; ++seen_by)
      for (const Run& run : runs_)
        if (halves(run.rows) == seen_by) push(run.lo, run.hi, seen_by ? number_of(run.rows) : -1);
    for (const Edge& edge : edges_) push(edge.lo, edge.hi, number_of(bits_of(edge)));
    to_.run_count.push_back(static_cast<int64_t>(runs_.size() + edges_.size()));
    for (int row = 0; row < count_; ++row) {
      to_.point_count.push_back(static_cast<int32_t>(points_[row].size()));
      to_.point_keys.insert(to_.point_keys.end(), points_[row].begin(), points_[row].end());
    }
  }

  void push(int32_t lo, int32_t hi, int32_t mask) {
    to_.lo.push_back(lo);
    to_.hi.push_back(hi);
    to_.mask.push_back(mask);
  }

  // Mask numbers of the chunk: 2 m for the m-th row mask, 2 m + 1 for the m-th bit mask.
  // Direct-mapped tables from mask to number. A mask of the same hash replaces the entry; if the old mask recurs, it is
  // stored again under a second number.
  int32_t number_of(uint32_t rows) {
    Numbered& entry = mask_numbers_[(rows * 0x9e3779b1u) >> (32 - kNumberedBits)];
    if (entry.rows != rows || entry.number < 0) {
      entry = {rows, static_cast<int32_t>(to_.row_masks.size())};
      to_.row_masks.push_back(rows);
    }
    return 2 * entry.number;
  }
  int32_t number_of(const Bits& bits) {
    uint64_t hash = 0;
    for (const int32_t word : bits) hash = (hash ^ static_cast<uint32_t>(word)) * 0x9e3779b97f4a7c15u;
    int32_t& number = bit_mask_numbers_[hash >> (64 - kBitNumbersBits)];
    if (number < 0 || to_.bit_masks[number] != bits) {
      number = static_cast<int32_t>(to_.bit_masks.size());
      to_.bit_masks.push_back(bits);
    }
    return 2 * number + 1;
  }

  const ContentPattern& pattern_;
  const int64_t gather_;
  ChunkTables& to_;
  RowMasks masks_;
  TileClauses<RowMasks> clauses_;
  int count_ = 0;
  uint32_t all_ = 0;  // the rows of the tile
  std::vector<Run> runs_;
  std::vector<Edge> edges_;
  std::array<std::vector<int32_t>, kRows> points_;
  struct Numbered {
    uint32_t rows = 0;
    int32_t number = -1;
  };
  static constexpr int kNumberedBits = 10, kBitNumbersBits = 6;
  std::array<Numbered, size_t{1} << kNumberedBits> mask_numbers_;
  std::array<int32_t, size_t{1} << kBitNumbersBits> bit_mask_numbers_;
};

// Where each chunk's entries go in the concatenated tables.
struct Offsets {
  int64_t runs = 0, points = 0, masks = 0, words = 0;
};

// Copies a chunk's tables behind those of the chunks before it.
inline void append(const ChunkTables& chunk, Masks& masks, Layer& layer, Offsets& at) {
  const auto first_bits = static_cast<int32_t>(at.masks + chunk.row_masks.size());
  for (size_t r = 0; r < chunk.lo.size(); ++r) {
    const int32_t m = chunk.mask[r];
    layer.mask.push_back(m < 0 ? -1 : m % 2 ? first_bits + m / 2 : static_cast<int32_t>(at.masks) + m / 2);
  }
  layer.lo.insert(layer.lo.end(), chunk.lo.begin(), chunk.lo.end());
  layer.hi.insert(layer.hi.end(), chunk.hi.begin(), chunk.hi.end());
  for (const int64_t count : chunk.run_count) layer.indptr.push_back(at.runs += count);
  layer.point_keys.insert(layer.point_keys.end(), chunk.point_keys.begin(), chunk.point_keys.end());
  for (const int32_t count : chunk.point_count) layer.point_indptr.push_back(at.points += count);
  const auto add_mask = [&](int32_t kind, size_t words) {
    masks.kind.push_back(kind);
    masks.start.push_back(static_cast<int32_t>(at.words));
    masks.core_lo.push_back(0);
    masks.core_hi.push_back(-(1 << 30));  // an empty core
    at.words += static_cast<int64_t>(words);
    ++at.masks;
  };
  for (const uint32_t rows : chunk.row_masks) {
    add_mask(kRowSet, 1);
    masks.data.push_back(static_cast<int32_t>(rows));
  }
  for (const Bits& bits : chunk.bit_masks) {
    add_mask(kBits, bits.size());
    masks.data.insert(masks.data.end(), bits.begin(), bits.end());
  }
  if (at.words > (int64_t{1} << 30)) throw MalformedPlan("masks: more than 2^30 words");
}

}  // namespace farlight

// The clauses of a content pattern over one tile of rows, united in row masks.
#pragma once

#include <algorithm>
#include <string>

#include "plan_content.h"
#include "row_masks.h"

namespace farlight {

constexpr uint32_t kEveryRow = 0xffffffffu;

// The links of one (batch item, head), tile by tile. Masks: what they are added to, such as RowMasks.
template <class Masks>
class TileClauses {
 public:
  TileClauses(const ContentPattern& pattern, int64_t batch_item, int64_t head, Masks& masks)
      : pattern_(pattern), batch_item_(batch_item), head_(head), masks_(masks) {}

  // Adds the links of the rows [first_row, first_row + rows) to the masks, at most kRows: bit s is row first_row + s.
  void unite(int64_t first_row, int rows = kRows) {
    first_row_ = first_row;
    count_ = static_cast<int>(std::min<int64_t>(rows, pattern_.n_q - first_row));
    all_ = count_ == kRows ? kEveryRow : (1u << count_) - 1;
    for (const Clause& clause : pattern_.clauses) {
      if (clause.head >= 0 && clause.head != head_) continue;
      const uint8_t* keep =
          clause.key_mask ? clause.key_mask + (clause.mask_batch > 1 ? batch_item_ : 0) * pattern_.n_k : nullptr;
      if (clause.kind == ClauseKind::kBlocks) add_blocks(clause, keep);
      else if (clause.kind == ClauseKind::kBand) add_band(clause, keep);
      else if (clause.kind == ClauseKind::kKeys) add_keys(clause, keep);
      else add_full_rows(clause, keep);
    }
  }

 private:
  int64_t position(int row) const { return pattern_.q_offset + first_row_ + row; }

  // Rows [first, last) see [lo, hi), where causal only up to their position.
  void add_rows(int first, int last, int64_t lo, int64_t hi, bool causal, const uint8_t* keep) {
    const uint32_t rows = row_range(first, last);
    if (!causal || hi <= position(first) + 1) return masks_.add(lo, hi, rows, keep);
    masks_.add(lo, std::min(hi, position(first) + 1), rows, keep);
    // The triangle: one more key for each further row.
    if (last - first > 1)
      masks_.add_each(std::max(lo, position(first) + 1), std::min(hi, position(last)), keep,
                      [&](int64_t key) { return row_range(static_cast<int>(key - position(0)), last); });
    // Rows beyond position hi - 1 see every key: covered by the range of the row at position hi - 1.
  }

  static uint32_t row_range(int first, int last) {
    const uint32_t below = last == kRows ? kEveryRow : (1u << last) - 1;
    return below & ~((1u << first) - 1);
  }

  void add_blocks(const Clause& clause, const uint8_t* keep) {
    if (clause.index_bytes == 2) add_blocks_of<int16_t>(clause, keep);
    else if (clause.index_bytes == 4) add_blocks_of<int32_t>(clause, keep);
    else add_blocks_of<int64_t>(clause, keep);
  }

  template <class Index>
  void add_blocks_of(const Clause& clause, const uint8_t* keep) {
    const int64_t blocks = (pattern_.n_k + clause.block - 1) / clause.block;
    const int64_t variant =
        (clause.batch > 1 ? batch_item_ : 0) * clause.heads + (clause.heads > 1 ? head_ : 0);
    for (int first = 0; first < count_;) {
      const int64_t place = position(first) - clause.base;
      if (place < 0) {
        first = static_cast<int>(std::min<int64_t>(count_, first - place));
        continue;
      }
      const int64_t list = place / clause.query_block;
      if (list >= clause.lists) return;
      const int last = static_cast<int>(std::min<int64_t>(count_, first + clause.query_block - place % clause.query_block));
      const Index* index = static_cast<const Index*>(clause.indices) + (variant * clause.lists + list) * clause.width;
      for (int64_t x = 0; x < clause.width;) {
        const int64_t lo = index[x++];
        if (lo == -1) continue;
        if (lo < -1 || lo >= blocks) throw MalformedPlan(std::to_string(lo));
        int64_t hi = lo + 1;  // neighbouring blocks are one range
        while (x < clause.width && index[x] == hi && hi < blocks) ++hi, ++x;
        add_rows(first, last, lo * clause.block, hi * clause.block, clause.causal, keep);
      }
      first = last;
    }
  }

  void add_band(const Clause& clause, const uint8_t* keep) {
    const int64_t right = clause.causal ? std::min<int64_t>(clause.right, 0) : clause.right;
    const int64_t first = position(0), last = position(count_ - 1);
    // Keys that every row sees, then those left and right of them, each seen by consecutive rows.
    const int64_t lo = first - clause.left, hi = last + right + 1, core_lo = last - clause.left, core_hi = first + right + 1;
    const auto rows_of = [&](int64_t key) {
      const int64_t from = std::max<int64_t>(0, key - right - first), to = std::min<int64_t>(count_ - 1, key + clause.left - first);
      return from > to ? 0u : row_range(static_cast<int>(from), static_cast<int>(to) + 1);
    };
    if (core_lo >= core_hi) return masks_.add_each(lo, hi, keep, rows_of);
    masks_.add(core_lo, core_hi, all_, keep);
    if (count_ == 1) return;
    masks_.add_each(lo, core_lo, keep, rows_of);
    masks_.add_each(core_hi, hi, keep, rows_of);
  }

  void add_keys(const Clause& clause, const uint8_t* keep) {
    const auto* range = static_cast<const int64_t*>(clause.indices);
    for (int64_t x = 0; x < clause.lists; ++x, range += 2) add_rows(0, count_, range[0], range[1], clause.causal, keep);
  }

  void add_full_rows(const Clause& clause, const uint8_t* keep) {
    const auto* range = static_cast<const int64_t*>(clause.indices);
    for (int64_t x = 0; x < clause.lists; ++x, range += 2) {
      const int64_t first = std::max(range[0], position(0)) - position(0);
      const int64_t last = std::min(range[1], position(count_ - 1) + 1) - position(0);
      if (first < last) add_rows(static_cast<int>(first), static_cast<int>(last), 0, pattern_.n_k, clause.causal, keep);
    }
  }

  const ContentPattern& pattern_;
  const int64_t batch_item_, head_;
  Masks& masks_;
  int64_t first_row_ = 0;
  int count_ = 0;
  uint32_t all_ = 0;  // the rows of the tile
};

}  // namespace farlight

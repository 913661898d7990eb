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
    for (int row = first + 1; row < last && position(row) < hi; ++row)
      if (position(row) >= lo) masks_.add(position(row), position(row) + 1, row_range(row, last), keep);
    // Rows beyond position hi - 1 see every key: covered by the range of the row at position hi - 1.
  }

  static uint32_t row_range(int first, int last) {
    const uint32_t below = last == kRows ? kEveryRow : (1u << last) - 1;
    return below & ~((1u << first) - 1);
  }

  void add_blocks(const Clause& clause, const uint8_t* keep) {
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
      const int64_t* index = clause.indices + (variant * clause.lists + list) * clause.width;
      for (int64_t x = 0; x < clause.width; ++x) {
        if (index[x] == -1) continue;
        if (index[x] < -1 || index[x] >= blocks) throw MalformedPlan(std::to_string(index[x]));
        add_rows(first, last, index[x] * clause.block, (index[x] + 1) * clause.block, clause.causal, keep);
      }
      first = last;
    }
  }

  void add_band(const Clause& clause, const uint8_t* keep) {
    const int64_t right = clause.causal ? std::min<int64_t>(clause.right, 0) : clause.right;
    const int64_t first = position(0), last = position(count_ - 1);
    // Keys that every row sees, then the rows' own keys left and right of them.
    const int64_t core_lo = last - clause.left, core_hi = first + right + 1;
    if (core_lo < core_hi) masks_.add(core_lo, core_hi, all_, keep);
    for (int row = 0; row < count_; ++row) {
      const int64_t lo = position(row) - clause.left, hi = position(row) + right + 1;
      if (core_lo >= core_hi) {
        masks_.add(lo, hi, 1u << row, keep);
        continue;
      }
      masks_.add(lo, core_lo, 1u << row, keep);
      masks_.add(core_hi, hi, 1u << row, keep);
    }
  }

  void add_keys(const Clause& clause, const uint8_t* keep) {
    for (int64_t x = 0; x < clause.lists; ++x)
      add_rows(0, count_, clause.indices[2 * x], clause.indices[2 * x + 1], clause.causal, keep);
  }

  void add_full_rows(const Clause& clause, const uint8_t* keep) {
    for (int64_t x = 0; x < clause.lists; ++x) {
      const int64_t first = std::max(clause.indices[2 * x], position(0)) - position(0);
      const int64_t last = std::min(clause.indices[2 * x + 1], position(count_ - 1) + 1) - position(0);
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

// Split-K: the parts of a long tile are computed on their own, stored as partial results and merged by the thread that finished
// last, in the order of the parts (deterministic).
#pragma once

#include <cstring>

#include "key_chunks.h"

namespace farlight::FARLIGHT_NS {

// The partial results of the tile of one work item: two statistics and result_dim values per row and part.
class SplitK {
 public:
  SplitK(const Call& call, const WorkItem& item)
      : call_(call),
        item_(item),
        piece_(call.plan->pieces[item.piece]) {}

  // Whether the item is one part of several.
  bool is_part() const { return piece_.slot[item_.entry] >= 0; }
  // Stores a row of the item's part: its statistics and its values.
  void store(int64_t row, float first, float second, const float* values) const {
    float* const at = partial(item_.entry, row);
    at[0] = first;
    at[1] = second;
    std::memcpy(at + 2, values, call_.result_dim * sizeof(float));
  }
  // Calls merge_row(row of the tensors, number of parts, part -> partial result) for every row of the tile.
  template <class MergeRow>
  void merge(MergeRow merge_row) const {
    const int64_t first = item_.entry - piece_.part[item_.entry];
    for (int first_row = 0; first_row < piece_.count[item_.entry]; first_row += kRows) {
      const RowBlock row_block(*call_.plan, item_, first_row);
      for (int s = 0; s < row_block.count; ++s)
        merge_row(row_block.row[s], piece_.parts[item_.entry],
                  [&](int part) -> const float* { return partial(first + part, first_row + s); });
    }
  }

 private:
  float* partial(int64_t entry, int64_t row) const {
    const int64_t slot =
        call_.partial_base[item_.piece] + (item_.batch * call_.heads + item_.head) * piece_.slots + piece_.slot[entry];
    return call_.partial + (slot * call_.plan->tile + row) * (call_.result_dim + 2);
  }

  const Call& call_;
  const WorkItem& item_;
  const PieceView& piece_;
};

}  // namespace farlight::FARLIGHT_NS

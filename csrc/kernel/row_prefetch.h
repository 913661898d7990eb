// Software prefetch of query-side rows: Q, dO and out of the thread's next row block, and the result rows that this one writes
// at its end.
#pragma once

#include "gathered_prefetch.h"

namespace farlight::FARLIGHT_NS {

// Names a row block before it is loaded: rows [first_row, first_row + kRows) of an item's tile. item null: none.
struct RowBlockId {
  const WorkItem* item;
  int first_row;

  // The row block after this one: of the same item, or the first of `next_item`.
  RowBlockId next(const PlanView& plan, const WorkItem* next_item) const {
    const bool same_item = first_row + kRows < plan.pieces[item->piece].count[item->entry];
    return {same_item ? item : next_item, same_item ? first_row + kRows : 0};
  }
};

// Queue of row ranges, prefetched a few lines at a time: a burst would delay the loads that are needed now.
class RowPrefetcher {
 public:
  RowPrefetcher(const PlanView& plan, int64_t lines) : plan_(plan) { lines_.count = lines; }

  // Adds a row block's rows of a tensor whose elements have `width` bytes.
  void add(const RowBlockId& block, const TensorView& tensor, int64_t width) {
    if (!block.item) return;
    const PieceView& piece = plan_.pieces[block.item->piece];
    const int32_t first = piece.start[block.item->entry] + block.first_row;
    const int32_t count = min(piece.count[block.item->entry] - block.first_row, kRows);
    if (count <= 0) return;
    const int64_t begin = block.item->batch * tensor.batch + block.item->head * tensor.head;
    ranges_[count_++] = {static_cast<const char*>(tensor.data) + begin * width, tensor.row * width, piece.rows, first,
                         first + count};
  }

  // The next rows, or null when the queue is empty.
  FARLIGHT_INLINE const PrefetchLines* lines() { return current_ == count_ ? nullptr : fill(); }

  // AMX: prefetches `rows` rows at once.
  void issue_some(int rows) {
    for (; rows > 0 && current_ < count_; --rows) {
      const char* row = next();
      for (int64_t line = 0; line < lines_.count; ++line) FARLIGHT_PREFETCH_L2(row + line * 64);
    }
  }

 private:
  static constexpr int kMaxRanges = 3;
  // Rows [position, end) of a tensor, through the row table if there is one.
  struct RowRange {
    const char* base;
    int64_t stride;
    const int32_t* rows;
    int32_t position, end;
  };

  // The next kRanges rows; the last one is repeated at the end of the queue.
  FARLIGHT_NOINLINE const PrefetchLines* fill() {
    const char* row = nullptr;
    for (int i = 0; i < PrefetchLines::kRanges; ++i) {
      if (current_ < count_) row = next();
      lines_.start[i] = row;
    }
    return &lines_;
  }

  // The next row of the queue.
  const char* next() {
    RowRange& range = ranges_[current_];
    const int64_t row = range.rows ? range.rows[range.position] : range.position;
    if (++range.position == range.end) ++current_;
    return range.base + row * range.stride;
  }

  const PlanView& plan_;
  RowRange ranges_[kMaxRanges];
  int current_ = 0, count_ = 0;
  PrefetchLines lines_;
};

}  // namespace farlight::FARLIGHT_NS

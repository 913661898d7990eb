// Rows of tensors that a thread will need soon: those that its next tile reads first, and those that this one writes at its end.
#pragma once

#include "gathered_prefetch.h"

namespace farlight::FARLIGHT_NS {

// The rows of one turn: `first_row` and those after it, at most kRows, of an item. Null: none.
struct RowBlockId {
  const WorkItem* item;
  int first_row;

  // The turn after this one, if the item has another or there is a `next` one.
  RowBlockId next(const PlanView& plan, const WorkItem* next_item) const {
    const bool same_item = first_row + kRows < plan.pieces[item->piece].count[item->entry];
    return {same_item ? item : next_item, same_item ? first_row + kRows : 0};
  }
};

// Asks for them bit by bit: what is asked for all at once stands in the way of what is needed now.
class RowPrefetcher {
 public:
  RowPrefetcher(const PlanView& plan, int64_t lines) : plan_(plan) { lines_.count = lines; }

  // A turn's rows of a tensor whose numbers have `width` bytes.
  void add(const RowBlockId& current, const TensorView& tensor, int64_t width) {
    if (!current.item) return;
    const PieceView& piece = plan_.pieces[current.item->piece];
    const int32_t first = piece.start[current.item->entry] + current.first_row;
    const int32_t count = min(piece.count[current.item->entry] - current.first_row, kRows);
    if (count <= 0) return;
    const int64_t begin = current.item->batch * tensor.batch + current.item->head * tensor.head;
    ranges_[count_++] = {static_cast<const char*>(tensor.data) + begin * width, tensor.row * width, piece.rows, first, first + count};
  }

  // Some of the rows; null where there are none left.
  FARLIGHT_INLINE const PrefetchLines* lines() { return current_ == count_ ? nullptr : fill(); }

  // Where products are made of tiles: so many rows at once.
  void issue_some(int rows) {
    for (; rows > 0 && current_ < count_; --rows) {
      const char* row = next();
      for (int64_t line = 0; line < lines_.count; ++line) FARLIGHT_PREFETCH_L2(row + line * 64);
    }
  }

 private:
  static constexpr int kMaxRanges = 3;
  struct RowRange {
    const char* base;
    int64_t stride;
    const int32_t* rows;
    int32_t position, end;
  };

  FARLIGHT_NOINLINE const PrefetchLines* fill() {
    const char* row = nullptr;
    for (int i = 0; i < PrefetchLines::kRanges; ++i) {
      if (current_ < count_) row = next();
      lines_.start[i] = row;
    }
    return &lines_;
  }

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

// Rows of tensors that a thread will need soon: those that its next tile reads first, and those that this one writes at its end.
#pragma once

#include "points_ahead.h"

namespace farlight::FARLIGHT_NS {

// The rows of one turn: `first_row` and those after it, at most kRows, of an item. Null: none.
struct Turn {
  const Item* item;
  int first_row;

  // The turn after this one, if the item has another or there is a `next` one.
  Turn after(const PlanView& plan, const Item* next) const {
    const bool more = first_row + kRows < plan.pieces[item->piece].count[item->entry];
    return {more ? item : next, more ? first_row + kRows : 0};
  }
};

// Asks for them bit by bit: what is asked for all at once stands in the way of what is needed now.
class RowsAhead {
 public:
  RowsAhead(const PlanView& plan, int64_t lines) : plan_(plan) { lines_.many = lines; }

  // A turn's rows of a tensor whose numbers have `width` bytes.
  void add(const Turn& turn, const Rows& tensor, int64_t width) {
    if (!turn.item) return;
    const PieceView& piece = plan_.pieces[turn.item->piece];
    const int32_t first = piece.start[turn.item->entry] + turn.first_row;
    const int32_t count = least(piece.count[turn.item->entry] - turn.first_row, kRows);
    if (count <= 0) return;
    const int64_t begin = turn.item->batch * tensor.batch + turn.item->head * tensor.head;
    parts_[count_++] = {static_cast<const char*>(tensor.data) + begin * width, tensor.row * width, piece.rows, first, first + count};
  }

  // Some of the rows; null where there are none left.
  FARLIGHT_INLINE const Lines* lines() { return at_ == count_ ? nullptr : fill(); }

  // Where products are made of tiles: so many rows at once.
  void some(int rows) {
    for (; rows > 0 && at_ < count_; --rows) {
      const char* row = next();
      for (int64_t line = 0; line < lines_.many; ++line) FARLIGHT_PREFETCH_L2(row + line * 64);
    }
  }

 private:
  static constexpr int kParts = 3;
  struct Part {
    const char* base;
    int64_t stride;
    const int32_t* rows;
    int32_t place, end;
  };

  FARLIGHT_APART const Lines* fill() {
    const char* row = nullptr;
    for (int i = 0; i < Lines::kStretches; ++i) {
      if (at_ < count_) row = next();
      lines_.first[i] = row;
    }
    return &lines_;
  }

  const char* next() {
    Part& part = parts_[at_];
    const int64_t row = part.rows ? part.rows[part.place] : part.place;
    if (++part.place == part.end) ++at_;
    return part.base + row * part.stride;
  }

  const PlanView& plan_;
  Part parts_[kParts];
  int at_ = 0, count_ = 0;
  Lines lines_;
};

}  // namespace farlight::FARLIGHT_NS

// The rows of Q that the thread's next tile will read first: asked for between the chunks of this one.
#pragma once

#include "modes.h"

namespace farlight::FARLIGHT_NS {

template <class T>
class RowsAhead {
 public:
  // `next` is null where there is no further tile.
  RowsAhead(const Call& call, const Item* next) : dim_(call.dim), queries_(call.q, next ? next->batch : 0, next ? next->head : 0) {
    if (!next) return;
    const PieceView& piece = call.plan->pieces[next->piece];
    rows_ = piece.rows;
    place_ = piece.start[next->entry];
    end_ = place_ + least(piece.count[next->entry], kRows);
  }

  // A few of them: a tile has several chunks, and what is asked for all at once stands in the way of what is needed now.
  void some() {
    for (int n = 0; n < kSome && place_ < end_; ++n, ++place_) ask_for(queries_.row(rows_ ? rows_[place_] : place_), dim_);
  }

 private:
  static constexpr int kSome = kRows / 4;

  int64_t dim_;
  Source<T> queries_;
  const int32_t* rows_ = nullptr;
  int32_t place_ = 0, end_ = 0;
};

}  // namespace farlight::FARLIGHT_NS

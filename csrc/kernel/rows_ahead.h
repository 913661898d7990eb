// The rows of Q, and of what goes with it, that the thread's next tile will read first: asked for between the chunks of this one.
#pragma once

#include "modes.h"

namespace farlight::FARLIGHT_NS {

template <class T, int Tensors>
class RowsAhead {
 public:
  // `next` is null where there is no further tile.
  RowsAhead(const Call& call, const Item* next, const Rows* const (&tensors)[Tensors]) : dim_(call.dim) {
    if (!next) return;
    const PieceView& piece = call.plan->pieces[next->piece];
    rows_ = piece.rows;
    place_ = piece.start[next->entry];
    end_ = place_ + least(piece.count[next->entry], kRows);
    for (int i = 0; i < Tensors; ++i) {
      const Source<T> source(*tensors[i], next->batch, next->head);
      base_[i] = source.base;
      stride_[i] = source.stride;
    }
  }

  // A few of them: a tile has several chunks, and what is asked for all at once stands in the way of what is needed now.
  void some() {
    for (int n = 0; n < kSome && place_ < end_; ++n, ++place_) {
      const int64_t row = rows_ ? rows_[place_] : place_;
      for (int i = 0; i < Tensors; ++i) ask_for(base_[i] + row * stride_[i], dim_);
    }
  }

 private:
  static constexpr int kSome = kRows / 4;

  int64_t dim_;
  const int32_t* rows_ = nullptr;
  int32_t place_ = 0, end_ = 0;
  const T* base_[Tensors] = {};
  int64_t stride_[Tensors] = {};
};

}  // namespace farlight::FARLIGHT_NS

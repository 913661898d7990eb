// The rows of K and V that a tile's points will read.
#pragma once

#include "modes.h"

namespace farlight::FARLIGHT_NS {

constexpr int kAsked = 16;  // points whose rows are asked for with each chunk

// Asks for the rows of a tile's points early, a few at a time: they lie anywhere, and all at once they would hold up what is
// wanted now.
template <class T>
class PointsAhead {
 public:
  PointsAhead(const Tile& tile, const Source<T>& keys, const Source<T>& values, int64_t dim)
      : tile_(tile), keys_(keys), values_(values), dim_(dim) {
    advance();
  }

  // The rows of `count` points at once.
  void ask(int64_t count) {
    for (; count > 0 && at_; --count) {
      ask_for(keys_.row(at_->point_keys[x_]), dim_);
      ask_for(values_.row(at_->point_keys[x_]), dim_);
      next();
    }
  }

  bool wanted() const { return at_ != nullptr; }
  // `count` lines of K and as many of V.
  FARLIGHT_APART void ask_lines(int count) {
    for (; count > 0 && at_; --count) {
      const int64_t key = at_->point_keys[x_];
      FARLIGHT_PREFETCH_L2(reinterpret_cast<const char*>(keys_.row(key)) + byte_);
      FARLIGHT_PREFETCH_L2(reinterpret_cast<const char*>(values_.row(key)) + byte_);
      if ((byte_ += 64) < dim_ * static_cast<int64_t>(sizeof(T))) continue;
      byte_ = 0;
      next();
    }
  }

 private:
  static constexpr int64_t kMost = 16 * kRows;  // more would be gone again before they are used

  void next() {
    if (++x_ == last_) advance();
  }

  // To the next layer that has points.
  void advance() {
    while (layer_ < tile_.piece->layer_count) {
      at_ = &tile_.piece->layers[layer_++];
      if (!tile_.has_points(*at_)) continue;
      int64_t ignored;
      tile_.points(*at_, 0, x_, ignored);
      tile_.points(*at_, tile_.count - 1, ignored, last_);
      if (x_ < last_ && last_ - x_ <= kMost) return;
    }
    at_ = nullptr;
  }

  const Tile& tile_;
  const Source<T>&keys_, &values_;
  int64_t dim_;
  const LayerView* at_ = nullptr;
  int layer_ = 0;
  int64_t x_ = 0, last_ = 0, byte_ = 0;
};

}  // namespace farlight::FARLIGHT_NS

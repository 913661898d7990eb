// What a tile's points will read and add to, asked for early: it lies anywhere in memory, which answers late.
#pragma once

#include "kernel_traits.h"

namespace farlight::FARLIGHT_NS {

// Stretches of memory to be asked for, a line at a time, between the products of a block of keys, where that costs nothing.
struct PrefetchLines {
  static constexpr int kRanges = 2 * kM;
  const char* start[kRanges];
  int64_t count;  // whole lines of a stretch: those of a row of K

  template <class T>
  static int64_t lines_per_row(int64_t dim) {
    return dim * static_cast<int64_t>(sizeof(T)) / 64;
  }
  FARLIGHT_INLINE void set_pair(int pair, const void* x, const void* y) {
    start[2 * pair] = static_cast<const char*>(x);
    start[2 * pair + 1] = static_cast<const char*>(y);
  }
};

// The points of a tile, layer by layer.
class GatherQueue {
 public:
  explicit GatherQueue(const RowBlock& row_block) : row_block_(row_block) { advance(); }

  bool empty() const { return !layer_view_; }
  int32_t front() const { return layer_view_->point_keys[position_]; }
  void pop() {
    if (++position_ == last_) advance();
  }
  // At most so many that lie together.
  int take(int max_keys, const int32_t*& keys) {
    keys = layer_view_->point_keys + position_;
    const int n = static_cast<int>(min<int64_t>(max_keys, last_ - position_));
    if ((position_ += n) == last_) advance();
    return n;
  }

 private:
  static constexpr int64_t kMaxPairs = 16 * kRows;  // more would be gone again before they are used

  // To the next layer that has points.
  void advance() {
    while (layer_ < row_block_.piece->layer_count) {
      layer_view_ = &row_block_.piece->layers[layer_++];
      if (!row_block_.has_gathered(*layer_view_)) continue;
      int64_t ignored;
      row_block_.gathered_range(*layer_view_, 0, position_, ignored);
      row_block_.gathered_range(*layer_view_, row_block_.count - 1, ignored, last_);
      if (position_ < last_ && last_ - position_ <= kMaxPairs) return;
    }
    layer_view_ = nullptr;
  }

  const RowBlock& row_block_;
  const LayerView* layer_view_ = nullptr;
  int layer_ = 0;
  int64_t position_ = 0, last_ = 0;
};

// The rows of K and V.
template <class T>
class GatherPrefetcher {
 public:
  GatherPrefetcher(const RowBlock& row_block, const HeadRows<T>& keys, const HeadRows<T>& values, int64_t dim)
      : queue_(row_block), keys_(keys), values_(values), dim_(dim) {}

  bool pending() const { return !queue_.empty(); }
  // Those of the next points.
  FARLIGHT_NOINLINE void fill(PrefetchLines& lines) {
    const int32_t* key;
    const int n = queue_.take(kM, key);
    for (int i = 0; i < kM; ++i) lines.set_pair(i, keys_.row(key[min(i, n - 1)]), values_.row(key[min(i, n - 1)]));
  }
  // `count` lines of K and as many of V.
  FARLIGHT_NOINLINE void issue_lines(int count) {
    for (; count > 0 && pending(); --count) {
      const int64_t key = queue_.front();
      FARLIGHT_PREFETCH_L2(reinterpret_cast<const char*>(keys_.row(key)) + byte_);
      FARLIGHT_PREFETCH_L2(reinterpret_cast<const char*>(values_.row(key)) + byte_);
      if ((byte_ += 64) < dim_ * static_cast<int64_t>(sizeof(T))) continue;
      byte_ = 0;
      queue_.pop();
    }
  }

 private:
  GatherQueue queue_;
  const HeadRows<T>&keys_, &values_;
  int64_t dim_, byte_ = 0;
};

// The rows of dk and dv, which may be two stretches long.
class DkDvPrefetcher {
 public:
  DkDvPrefetcher(const RowBlock& row_block, const DkDvBlocks& sums, int64_t lines_of_key, int64_t dim)
      : queue_(row_block), sums_(sums), ranges_per_row_(PrefetchLines::lines_per_row<float>(dim) > lines_of_key ? 2 : 1) {
    lines_.count = lines_of_key;
  }

  // Those of the next points; null where there are none.
  FARLIGHT_INLINE const PrefetchLines* lines() { return queue_.empty() ? nullptr : fill(); }

 private:
  FARLIGHT_NOINLINE const PrefetchLines* fill() {
    const int32_t* key;
    const int n = queue_.take(kM / ranges_per_row_, key);
    for (int i = 0; i < kM; ++i) {
      const int32_t at = key[min(i / ranges_per_row_, n - 1)];
      const int64_t from = at % kBlock * sums_.stride + i % ranges_per_row_ * lines_.count * 16;
      lines_.set_pair(i, sums_.dk[at / kBlock] + from, sums_.dv[at / kBlock] + from);
    }
    return &lines_;
  }

  GatherQueue queue_;
  const DkDvBlocks& sums_;
  int ranges_per_row_;
  PrefetchLines lines_;
};

}  // namespace farlight::FARLIGHT_NS

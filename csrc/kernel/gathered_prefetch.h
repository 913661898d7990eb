// Software prefetch for gathered keys: their K and V rows (forward and backward) and their dk and dv accumulators (backward).
// Gathered keys are scattered over memory, so without prefetch every one is a cache miss.
#pragma once

#include "kernel_traits.h"

namespace farlight::FARLIGHT_NS {

// Cache lines to prefetch during the product of one key block, as ranges of consecutive lines; one line per step of the
// product.
struct PrefetchLines {
  static constexpr int kRanges = 2 * kM;
  const char* start[kRanges];
  int64_t count;  // whole lines per range, those of the narrower row of K and V

  // Whole cache lines of a row of `dim` elements.
  template <class T>
  static int64_t lines_per_row(int64_t dim) {
    return dim * static_cast<int64_t>(sizeof(T)) / 64;
  }
  // Sets ranges 2 * pair and 2 * pair + 1.
  FARLIGHT_INLINE void set_pair(int pair, const void* x, const void* y) {
    start[2 * pair] = static_cast<const char*>(x);
    start[2 * pair + 1] = static_cast<const char*>(y);
  }
};

// The gathered keys of a row block, layer by layer, as a queue.
class GatherQueue {
 public:
  explicit GatherQueue(const RowBlock& row_block) : row_block_(row_block) { advance(); }

  bool empty() const { return !layer_view_; }
  int32_t front() const { return layer_view_->point_keys[position_]; }
  void pop() {
    if (++position_ == last_) advance();
  }
  // Takes up to max_keys consecutive keys; returns how many.
  int take(int max_keys, const int32_t*& keys) {
    keys = layer_view_->point_keys + position_;
    const int n = static_cast<int>(min<int64_t>(max_keys, last_ - position_));
    if ((position_ += n) == last_) advance();
    return n;
  }

 private:
  static constexpr int64_t kMaxPairs = 16 * kRows;  // layers with more are skipped: the rows would be evicted before use

  // Advances to the next layer with gathered keys.
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

// Prefetches K and V rows of gathered keys.
template <class T>
class GatherPrefetcher {
 public:
  GatherPrefetcher(const RowBlock& row_block, const HeadRows<T>& keys, const HeadRows<T>& values, int64_t dim)
      : queue_(row_block),
        keys_(keys),
        values_(values),
        dim_(dim) {}

  bool pending() const { return !queue_.empty(); }
  // Fills `lines` with the rows of the next keys.
  FARLIGHT_NOINLINE void fill(PrefetchLines& lines) {
    const int32_t* key;
    const int n = queue_.take(kM, key);
    for (int i = 0; i < kM; ++i) lines.set_pair(i, keys_.row(key[min(i, n - 1)]), values_.row(key[min(i, n - 1)]));
  }
  // AMX: prefetches `count` lines of K and as many of V.
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

// Prefetches dk and dv accumulator rows of gathered keys. A float32 accumulator row of a bfloat16 tensor takes two ranges.
class DkDvPrefetcher {
 public:
  DkDvPrefetcher(const RowBlock& row_block, const DkDvBlocks& sums, int64_t lines_of_key, int64_t dim)
      : queue_(row_block),
        sums_(sums),
        ranges_per_row_(PrefetchLines::lines_per_row<float>(dim) > lines_of_key ? 2 : 1) {
    lines_.count = lines_of_key;
  }

  // The rows of the next keys, or null when there are none.
  FARLIGHT_INLINE const PrefetchLines* lines() { return queue_.empty() ? nullptr : fill(); }

 private:
  FARLIGHT_NOINLINE const PrefetchLines* fill() {
    const int32_t* key;
    const int n = queue_.take(kM / ranges_per_row_, key);
    for (int i = 0; i < kM; ++i) {
      const int32_t at = key[min(i / ranges_per_row_, n - 1)];
      const int64_t key_in_block = at % kBlock, column = i % ranges_per_row_ * lines_.count * 16;
      lines_.set_pair(i, sums_.dk[at / kBlock] + key_in_block * sums_.dk_stride + column,
                      sums_.dv[at / kBlock] + key_in_block * sums_.dv_stride + column);
    }
    return &lines_;
  }

  GatherQueue queue_;
  const DkDvBlocks& sums_;
  int ranges_per_row_;
  PrefetchLines lines_;
};

}  // namespace farlight::FARLIGHT_NS

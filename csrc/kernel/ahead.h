// The rows of K and V that the next chunk will read, asked for while this one is scored: memory answers late, and machines do
// not foresee a walk down the columns of V.
#pragma once

#include "columns.h"
#include "operands.h"
#include "points_ahead.h"

namespace farlight::FARLIGHT_NS {

// The rows of one block, to be asked for a line at a time between the products of another, where that costs nothing.
struct Lines {
  static constexpr int kRowsAsked = 16;
  static_assert(2 * kM <= kRowsAsked);
  const char* row[kRowsAsked];  // of K and V in turn; where a block has fewer, the first ones again
  int shift;                    // a row has 2^shift lines
  int64_t step;                 // bytes between two of them

  FARLIGHT_INLINE void ask(int64_t line) const {
    FARLIGHT_PREFETCH(row[line >> shift] + (line & ((int64_t{1} << shift) - 1)) * step);
  }
};

template <class Mode>
class Ahead {
 public:
  // `next` is null where there is no further chunk.
  Ahead(const Chunk* next, const Operand<Mode>& keys, const Operand<Mode>& values, const ColumnsOf<Mode>& columns,
        PointsAhead<typename Mode::T>& points, int64_t dim)
      : next_(next), keys_(keys), values_(values), columns_(columns), points_(points), dim_(dim) {
    if constexpr (!in_tiles<Mode>) points.ask(kAsked);
#if defined(FARLIGHT_ISA_AMX)
    else if (next_) want(0);
#endif
  }

  // What to ask for while `words` products of a block are added up, one line with each; null where there is nothing, or where
  // it does not come out even and is asked for at once.
  const Lines* lines(int block, int64_t words) {
    if (!next_ || block >= next_->blocks) return nullptr;
    if (words < Lines::kRowsAsked || (words & (words - 1)) != 0) {
      ask(block * kM, kM);
      return nullptr;
    }
    for (lines_.shift = 0; (int64_t{Lines::kRowsAsked} << lines_.shift) < words; ++lines_.shift) {
    }
    lines_.step = dim_ * static_cast<int64_t>(sizeof(typename Mode::T)) >> lines_.shift;
    for (int i = 0; i < kM; ++i) {
      const int32_t key = next_->key[block * kM + i];
      lines_.row[2 * i] = reinterpret_cast<const char*>(keys_.source().row(key));
      lines_.row[2 * i + 1] = reinterpret_cast<const char*>(values_.source().row(key));
    }
    for (int i = 2 * kM; i < Lines::kRowsAsked; ++i) lines_.row[i] = lines_.row[i - 2 * kM];
    return &lines_;
  }

#if defined(FARLIGHT_ISA_AMX)
  // Where products are made of tiles, to be called between them: some lines of the keys that are not kept, and of the
  // tile's points.
  FARLIGHT_INLINE void some() {
    if (wanted_) ask_some();
    else if (points_.wanted()) points_.ask_lines(parts_of<Mode> == 1 ? 4 : 2);
  }
#endif

 private:
#if defined(FARLIGHT_ISA_AMX)
  // From `first` on, the first group of the next chunk that is not kept.
  void want(int first) {
    while (first < next_->n && columns_.keeps(*next_, first)) first += kDeep;
    key_ = first;
    wanted_ = first < next_->n;
  }
  FARLIGHT_APART void ask_some() {
    for (int i = 0; i < kSome; ++i) {
      const int32_t key = next_->key[key_];
      FARLIGHT_PREFETCH_L2(reinterpret_cast<const char*>(keys_.source().row(key)) + line_);
      FARLIGHT_PREFETCH_L2(reinterpret_cast<const char*>(values_.source().row(key)) + line_);
      if ((line_ += 64) < dim_ * static_cast<int64_t>(sizeof(typename Mode::T))) continue;
      line_ = 0;
      if (++key_ % kDeep == 0) want(key_);
      if (key_ >= next_->n) wanted_ = false;
      if (!wanted_) return;
    }
  }
#endif

  static constexpr int kSome = 4;  // lines of K, and as many of V

  void ask(int first, int count) const {
    for (int i = first; i < first + count; ++i) {
      ask_for(keys_.source().row(next_->key[i]), dim_);
      ask_for(values_.source().row(next_->key[i]), dim_);
    }
  }

  const Chunk* next_;
  const Operand<Mode>&keys_, &values_;
  const ColumnsOf<Mode>& columns_;
  PointsAhead<typename Mode::T>& points_;
  int64_t dim_;
  Lines lines_;
  bool wanted_ = false;
  int key_ = 0;
  int64_t line_ = 0;
};

}  // namespace farlight::FARLIGHT_NS

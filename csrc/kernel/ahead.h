// The rows of K and V that the next chunk will read, or the tile's points, asked for while this chunk is scored: memory answers
// late, and machines do not foresee a walk down the columns of V.
#pragma once

#include "columns.h"
#include "operands.h"
#include "points_ahead.h"

namespace farlight::FARLIGHT_NS {

// The blocks of keys that a thread saw last, which are still in its cache: asking costs as much as loading, and neighbouring tiles
// see mostly the same keys. A hint: what it remembers of an earlier call is wrong.
class Recent {
 public:
  // Whether the block whose first row of K lies there was seen; it is from now on.
  FARLIGHT_INLINE bool saw(const void* row, int32_t key) {
    const void*& place = first_[static_cast<uint32_t>(key) / kM % kBlocks];
    const bool here = place == row;
    place = row;
    return here;
  }

 private:
  // Half a second cache full of them, of 64 floats. A prime, so that blocks at any equal distance have places of their own.
  static constexpr uint32_t kBlocks = 127;
  const void* first_[kBlocks];
};

template <class Mode>
class Ahead {
 public:
  // `next` is null where there is no further chunk.
  Ahead(const Chunk* next, const Operand<Mode>& keys, const Operand<Mode>& values, const ColumnsOf<Mode>& columns,
        PointsAhead<typename Mode::T>& points, Recent* recent, int64_t dim)
      : next_(next), keys_(keys), values_(values), columns_(columns), points_(points), recent_(recent), dim_(dim) {
    lines_.many = Lines::of_row<typename Mode::T>(dim);
#if defined(FARLIGHT_ISA_AMX)
    if constexpr (in_tiles<Mode>) {
      if (next_) want(0);
    }
#endif
  }

  // What to ask for while a block of this chunk is scored: the rows of the next chunk's, or else some of the tile's points.
  // Null where there is nothing.
  FARLIGHT_INLINE const Lines* lines(int block) {
    if (next_ && block < next_->blocks) {
      const int32_t* key = next_->key + block * kM;
      if (!recent_->saw(keys_.source().row(*key), *key)) {
        for (int i = 0; i < kM; ++i) lines_.set(i, keys_.source().row(key[i]), values_.source().row(key[i]));
        return &lines_;
      }
    }
    if (!points_.wanted()) return nullptr;
    points_.fill(lines_);
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

  const Chunk* next_;
  const Operand<Mode>&keys_, &values_;
  const ColumnsOf<Mode>& columns_;
  PointsAhead<typename Mode::T>& points_;
  Recent* recent_;
  int64_t dim_;
  Lines lines_;
  bool wanted_ = false;
  int key_ = 0;
  int64_t line_ = 0;
};

}  // namespace farlight::FARLIGHT_NS

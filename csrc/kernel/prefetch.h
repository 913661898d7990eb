// The rows of K and V that the next chunk will read, or the tile's points, asked for while this chunk is scored: memory answers
// late, and machines do not foresee a walk down the columns of V.
#pragma once

#include "packed_cache.h"
#include "operands.h"
#include "gathered_prefetch.h"

namespace farlight::FARLIGHT_NS {

// The blocks of keys that a thread saw last, which are still in its cache: asking costs as much as loading, and neighbouring tiles
// see mostly the same keys. A hint: what it remembers of an earlier call is wrong.
class RecentBlocks {
 public:
  // Whether the block whose first row of K lies there was seen; it is from now on.
  FARLIGHT_INLINE bool contains_and_update(const void* row, int32_t key) {
    const void*& entry = rows_[static_cast<uint32_t>(key) / kM % kEntries];
    const bool hit = entry == row;
    entry = row;
    return hit;
  }

 private:
  // Half a second cache full of them, of 64 floats. A prime, so that blocks at any equal distance have places of their own.
  static constexpr uint32_t kEntries = 127;
  const void* rows_[kEntries];
};

template <class Traits>
class KeyPrefetcher {
 public:
  // `next` is null where there is no further chunk.
  KeyPrefetcher(const Chunk* next, const Operand<Traits>& keys, const Operand<Traits>& values, const PackedCacheOf<Traits>& columns,
        GatherPrefetcher<typename Traits::T>& gather_prefetcher, RecentBlocks* recent, int64_t dim)
      : next_(next), keys_(keys), values_(values), packed_(columns), gather_prefetcher_(gather_prefetcher), recent_(recent), dim_(dim) {
    lines_.count = PrefetchLines::lines_per_row<typename Traits::T>(dim);
#if defined(FARLIGHT_ISA_AMX)
    if constexpr (uses_amx<Traits>) {
      if (next_) seek_uncached(0);
    }
#endif
  }

  // What to ask for while a block of this chunk is scored: the rows of the next chunk's, or else some of the tile's points.
  // Null where there is nothing.
  FARLIGHT_INLINE const PrefetchLines* lines(int block) {
    if (next_ && block < next_->blocks) {
      const int32_t* key = next_->key + block * kM;
      if (!recent_->contains_and_update(keys_.source().row(*key), *key)) {
        for (int i = 0; i < kM; ++i) lines_.set_pair(i, keys_.source().row(key[i]), values_.source().row(key[i]));
        return &lines_;
      }
    }
    if (!gather_prefetcher_.pending()) return nullptr;
    gather_prefetcher_.fill(lines_);
    return &lines_;
  }

#if defined(FARLIGHT_ISA_AMX)
  // Where products are made of tiles, to be called between them: some lines of the keys that are not kept, and of the
  // tile's points.
  FARLIGHT_INLINE void issue_some() {
    if (pending_) issue();
    else if (gather_prefetcher_.pending()) gather_prefetcher_.issue_lines(num_parts<Traits> == 1 ? 4 : 2);
  }
#endif

 private:
#if defined(FARLIGHT_ISA_AMX)
  // From `first` on, the first group of the next chunk that is not kept.
  void seek_uncached(int first) {
    while (first < next_->n && packed_.contains(*next_, first)) first += kDepth;
    key_ = first;
    pending_ = first < next_->n;
  }
  FARLIGHT_NOINLINE void issue() {
    for (int i = 0; i < kLinesPerCall; ++i) {
      const int32_t key = next_->key[key_];
      FARLIGHT_PREFETCH_L2(reinterpret_cast<const char*>(keys_.source().row(key)) + line_);
      FARLIGHT_PREFETCH_L2(reinterpret_cast<const char*>(values_.source().row(key)) + line_);
      if ((line_ += 64) < dim_ * static_cast<int64_t>(sizeof(typename Traits::T))) continue;
      line_ = 0;
      if (++key_ % kDepth == 0) seek_uncached(key_);
      if (key_ >= next_->n) pending_ = false;
      if (!pending_) return;
    }
  }
#endif

  static constexpr int kLinesPerCall = 4;  // lines of K, and as many of V

  const Chunk* next_;
  const Operand<Traits>&keys_, &values_;
  const PackedCacheOf<Traits>& packed_;
  GatherPrefetcher<typename Traits::T>& gather_prefetcher_;
  RecentBlocks* recent_;
  int64_t dim_;
  PrefetchLines lines_;
  bool pending_ = false;
  int key_ = 0;
  int64_t line_ = 0;
};

}  // namespace farlight::FARLIGHT_NS

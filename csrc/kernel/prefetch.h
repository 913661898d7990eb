// Software prefetch of the next chunk's K and V rows while the present chunk is scored.
//
// The hardware prefetchers do not follow gathered rows or a walk down the columns of V. The kernels therefore issue one
// prefetch per step of the score product, where load slots are idle; issued in one burst they stall the loads that are needed
// now (a tenth of the time).
#pragma once

#include "gathered_prefetch.h"
#include "operands.h"
#include "packed_cache.h"

namespace farlight::FARLIGHT_NS {

// Direct-mapped table of key blocks that the thread read recently and that are still in L2. A prefetch instruction costs as
// much as a load, and neighbouring tiles read mostly the same keys, so such blocks are skipped. A hint only: stale entries of
// earlier calls are harmless.
class RecentBlocks {
 public:
  // Whether the block whose first K row is at `row` is in the table; enters it.
  FARLIGHT_INLINE bool contains_and_update(const void* row, int32_t key) {
    const void*& entry = rows_[static_cast<uint32_t>(key) / kM % kEntries];
    const bool hit = entry == row;
    entry = row;
    return hit;
  }

 private:
  // 127 blocks of 8 keys of 64 floats are half of L2. A prime, so that blocks at any equal distance map to distinct entries.
  static constexpr uint32_t kEntries = 127;
  const void* rows_[kEntries];
};

// Chooses the cache lines to prefetch during a chunk: the next chunk's rows, else the row block's gathered keys.
template <class Traits>
class KeyPrefetcher {
 public:
  // `next`: the chunk after this one, or null.
  KeyPrefetcher(const Chunk* next, const Operand<Traits>& keys, const Operand<Traits>& values,
                const PackedCacheOf<Traits>& columns, GatherPrefetcher<typename Traits::T>& gather_prefetcher,
                RecentBlocks* recent, int64_t dim)
      : next_(next),
        keys_(keys),
        values_(values),
        packed_(columns),
        gather_prefetcher_(gather_prefetcher),
        recent_(recent),
        dim_(dim) {
    lines_.count = PrefetchLines::lines_per_row<typename Traits::T>(dim);
#if defined(FARLIGHT_ISA_AMX)
    if constexpr (uses_amx<Traits>) {
      if (next_) seek_uncached(0);
    }
#endif
  }

  // The lines to prefetch while block `block` of this chunk is scored, or null.
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
  // AMX: called between tile products; prefetches a few lines of the next chunk's keys that are not in the packed cache, else
  // of gathered keys.
  FARLIGHT_INLINE void issue_some() {
    if (pending_) issue();
    else if (gather_prefetcher_.pending()) gather_prefetcher_.issue_lines(num_parts<Traits> == 1 ? 4 : 2);
  }
#endif

 private:
#if defined(FARLIGHT_ISA_AMX)
  // Moves to the first group of the next chunk, from key `first` on, that is not cached.
  void seek_uncached(int first) {
    while (first < next_->n && packed_.contains(*next_, first)) first += kDepth;
    key_ = first;
    pending_ = first < next_->n;
  }
  // Prefetches the next lines of the present group and moves on.
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

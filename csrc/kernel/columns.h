// K or V of a chunk with keys side by side, as products over keys want it where they are made of tiles: blocks of 32 keys,
// [d][key]. Turning a block costs as much as using it, and neighbouring query tiles see mostly the same keys, so a thread keeps
// the blocks that it turned last, for the length of a call.
#pragma once

#include "operands.h"

namespace farlight::FARLIGHT_NS {

// Where products are made of vectors, nothing is kept.
struct NoColumns {
  template <class T>
  NoColumns(const Source<T>&, int64_t, int64_t) {}
  void reserve(Arena&) {}
};

#if defined(FARLIGHT_ISA_AMX)

constexpr int64_t kKept = 256;  // blocks that a thread keeps, at most

// Which blocks are kept: what must be cleared before a call.
struct KeptNames {
  uint64_t fetches;
  uint64_t head[kKept];  // whose, from 1 on; 0: none
  uint64_t used[kKept];  // in which fetch, last
};

class Columns {
 public:
  Columns(const Source<Half>& source, int64_t dim, int64_t head) : source_(source), dim_(dim), head_(static_cast<uint64_t>(head) + 1) {}

  // The first thing taken from the arena: the names of the blocks that are kept must lie where the caller cleared them.
  void reserve(Arena& arena) {
    const int64_t block = rounded(dim_, 32) * kDeep;
    slots_ = least<int64_t>(kKept, kKeptBytes / (block * static_cast<int64_t>(sizeof(Half))));
    names_ = arena.take<KeptNames>(1);
    keys_ = arena.take<int32_t>(kKept * kDeep);
    kept_ = arena.take<Half>(slots_ * block);
    own_ = arena.take<Half>(kGroups * block);
    pairs_ = arena.take<uint32_t>(kDeep / 2 * rounded(dim_, 32));
    groups = arena.take<const Half*>(kGroups);
  }

  // Whether the block of the chunk's keys from `first` is among those kept.
  bool keeps(const Chunk& c, int first) const { return first + kDeep <= c.n && find(c.key + first) >= 0; }

  // groups[i]: the block of the chunk's keys from 32 i; keys past the chunk's end are zero. The number of blocks.
  int fetch(const Chunk& c) {
    const int64_t size = rounded(dim_, 32) * kDeep;
    const int count = (c.n + kDeep - 1) / kDeep;
    const uint64_t now = ++names_->fetches;
    for (int i = 0; i < count; ++i) {
      const int first = i * kDeep;
      int64_t slot = first + kDeep <= c.n ? find(c.key + first) : -1;
      if (slot < 0) {
        slot = first + kDeep <= c.n ? older(c.key[first]) : -1;
        Half* to = own_ + i * size;
        if (slot >= 0 && names_->used[slot] < now) {
          to = kept_ + slot * size;
          names_->head[slot] = head_;
          std::memcpy(keys_ + slot * kDeep, c.key + first, kDeep * sizeof(int32_t));
        } else {
          slot = -1;
        }
        turn(c, first, to);
        groups[i] = to;
      } else {
        groups[i] = kept_ + slot * size;
      }
      if (slot >= 0) names_->used[slot] = now;
    }
    return count;
  }

  const Half** groups = nullptr;

 private:
  static constexpr int kGroups = kKeys / kDeep;
  static constexpr int64_t kKeptBytes = 512 << 10;  // together: a quarter of the second cache of the machines that have tiles

  // A block has two places. The first depends on its first key: the tiles of a pattern step by 32 rows, and so do the keys that
  // their blocks begin with.
  int64_t place_of(int64_t key) const { return key / kDeep % slots_; }
  int64_t other(int64_t place) const { return (place + slots_ / 2) % slots_; }

  // Where these 32 keys are kept, or -1.
  int64_t find(const int32_t* key) const {
    const int64_t first = place_of(key[0]), second = other(first);
    return is_at(first, key) ? first : is_at(second, key) ? second : -1;
  }
  bool is_at(int64_t slot, const int32_t* key) const {
    const int32_t* kept = keys_ + slot * kDeep;
    return names_->head[slot] == head_ && same(load_i(kept), load_i(key)) && same(load_i(kept + W), load_i(key + W));
  }
  // The place that was used longer ago.
  int64_t older(int64_t key) const {
    const int64_t first = place_of(key), second = other(first);
    return names_->used[second] < names_->used[first] ? second : first;
  }

  void turn(const Chunk& c, int first, Half* to) {
    const int64_t ld = rounded(dim_, 32);
    for (int i = 0; i < kDeep / 2; ++i) {
      const int at = first + 2 * i;
      if (at < c.n)
        interleave_rows(source_.row(c.key[at]), at + 1 < c.n ? source_.row(c.key[at + 1]) : nullptr, dim_, pairs_ + i * ld);
      else std::memset(pairs_ + i * ld, 0, ld * sizeof(uint32_t));
    }
    const char* rows[kDeep / 2];
    for (int i = 0; i < kDeep / 2; ++i) rows[i] = reinterpret_cast<const char*>(pairs_ + i * ld);
    for (int64_t d = 0; d < dim_; d += 8)
      turn_block(rows, kDeep / 2, d * 4, reinterpret_cast<char*>(to + d * kDeep), kDeep * sizeof(Half));
    for (int64_t d = rounded(dim_, 8); d < rounded(dim_, kTile); ++d) std::memset(to + d * kDeep, 0, kDeep * sizeof(Half));
  }

  Source<Half> source_;
  int64_t dim_, slots_ = 0;
  uint64_t head_;
  KeptNames* names_ = nullptr;
  int32_t* keys_ = nullptr;
  Half *kept_ = nullptr, *own_ = nullptr;
  uint32_t* pairs_ = nullptr;
};

#endif

template <bool Tiled>
struct ColumnsFor {
  using type = NoColumns;
};
#if defined(FARLIGHT_ISA_AMX)
template <>
struct ColumnsFor<true> {
  using type = Columns;
};
#endif
template <class Mode>
using ColumnsOf = typename ColumnsFor<in_tiles<Mode>>::type;

}  // namespace farlight::FARLIGHT_NS

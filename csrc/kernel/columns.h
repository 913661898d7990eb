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

class Columns {
 public:
  Columns(const Source<Half>& source, int64_t dim, int64_t head) : source_(source), dim_(dim), head_(head) {}

  // The first thing taken from the arena: the names of the blocks that are kept must lie where the caller cleared them.
  void reserve(Arena& arena) {
    const int64_t block = rounded(dim_, 32) * kDeep;
    slots_ = least<int64_t>(kKept, kKeptBytes / (block * static_cast<int64_t>(sizeof(Half))));
    names_ = arena.take<uint64_t>(kKept);
    kept_ = arena.take<Half>(slots_ * block);
    own_ = arena.take<Half>(kGroups * block);
    pairs_ = arena.take<uint32_t>(kDeep / 2 * rounded(dim_, 32));
    groups = arena.take<const Half*>(kGroups);
  }

  // groups[i]: the block of the chunk's keys from 32 i; keys past the chunk's end are zero. The number of blocks.
  int fetch(const Chunk& c) {
    const int64_t size = rounded(dim_, 32) * kDeep;
    const int count = (c.n + kDeep - 1) / kDeep;
    for (int i = 0; i < count; ++i) {
      const int first = i * kDeep;
      const int64_t key = c.key[first];
      groups[i] = own_ + i * size;
      if (first + kDeep > c.n || !neighbours(c.key + first, kTile) || !neighbours(c.key + first + kTile, kTile) ||
          c.key[first + kTile] != key + kTile) {
        turn(c, first, own_ + i * size);
        continue;
      }
      // Named by its first key, wherever that is: the tiles of a pattern step by 32 rows, and so do the keys they begin with.
      const int64_t slot = (key / kDeep) % slots_;
      const uint64_t name = static_cast<uint64_t>(head_ + 1) << 32 | static_cast<uint64_t>(key);
      Half* at = kept_ + slot * size;
      bool taken = false;
      for (int j = 0; j < i; ++j) taken |= groups[j] == at;
      if (names_[slot] == name) {
        groups[i] = at;
      } else if (taken) {
        turn(c, first, own_ + i * size);
      } else {
        turn(c, first, at);
        names_[slot] = name;
        groups[i] = at;
      }
    }
    return count;
  }

  const Half** groups = nullptr;

 private:
  static constexpr int kGroups = kKeys / kDeep;
  static constexpr int64_t kKeptBytes = 512 << 10;  // together: a quarter of the second cache of the machines that have tiles

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
      for (int i = 0; i < kDeep / 2; i += 8)
        transpose8(rows + i, d * 4, reinterpret_cast<char*>(to + d * kDeep) + i * 4, kDeep * sizeof(Half));
    for (int64_t d = rounded(dim_, 8); d < rounded(dim_, kTile); ++d) std::memset(to + d * kDeep, 0, kDeep * sizeof(Half));
  }

  Source<Half> source_;
  int64_t dim_, head_, slots_ = 0;
  uint64_t* names_ = nullptr;
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

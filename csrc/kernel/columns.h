// K and V of a chunk as products of pairs over keys want them: blocks of 32 keys with neighbours side by side; for products of tiles
// [d][key], and of floats, split into parts, their rows too; for products of vectors [pair of keys][d]. Making a block costs much
// beside using it, and neighbouring query tiles see mostly the same keys, so a thread keeps the blocks that it made last, for the
// length of a call.
#pragma once

#include "modes.h"
#include "rows.h"
#include "tiles.h"

namespace farlight::FARLIGHT_NS {

// Where floats are multiplied where they lie, nothing is kept.
struct NoColumns {
  template <class T>
  NoColumns(const Source<T>&, const Source<T>*, int, int64_t, int64_t) {}
  void reserve(Arena&) {}
  static bool keeps_all(int64_t, int, int64_t) { return true; }
};

#if defined(FARLIGHT_PAIRS)

constexpr int64_t kKept = 256;  // blocks that a thread keeps, at most

// Which blocks are kept: what must be cleared before a call.
struct KeptNames {
  uint64_t fetches;
  uint64_t head[kKept];  // whose, from 1 on; 0: none
  uint64_t used[kKept];  // in which fetch, last
};

template <class Mode>
class Columns {
  using T = typename Mode::T;

 public:
  static constexpr int kParts = parts_of<Mode>;
  static constexpr int kMostRows = 2;  // K and V

  // Keeps the columns of `source`, and the rows of `count` others.
  Columns(const Source<T>& source, const Source<T>* rows, int count, int64_t dim, int64_t head)
      : source_(source), rows_{rows[0], rows[count > 1 ? 1 : 0]}, count_(count), dim_(dim), head_(static_cast<uint64_t>(head) + 1) {}

  // The first thing taken from the arena: the names of the blocks that are kept must lie where the caller cleared them.
  void reserve(Arena& arena) {
    const int64_t block = (1 + count_) * size();
    slots_ = room_for(dim_, count_);
    names_ = arena.take<KeptNames>(1);
    keys_ = arena.take<int32_t>(kKept * kDeep);
    kept_ = arena.take<Half>(slots_ * block);
    own_ = arena.take<Half>(kGroups * block);
    if (in_tiles<Mode>) room_ = arena.take<uint32_t>(kDeep * ld());
    groups = arena.take<const Half*>(kGroups);
    kept_infinite_ = arena.take<bool>(slots_);
  }

  // Whether so many keys are kept at the same time, with their columns and `count` kinds of rows.
  static bool keeps_all(int64_t dim, int count, int64_t keys) { return keys <= room_for(dim, count) * kDeep; }

  // Whether the block of the chunk's keys from `first` is among those kept.
  bool keeps(const Chunk& c, int first) const { return first + kDeep <= c.n && find(c.key + first) >= 0; }

  // groups[i]: the block of the chunk's keys from 32 i; keys past the chunk's end are zero. The number of blocks.
  int fetch(const Chunk& c) {
    const int64_t block = (1 + count_) * size();
    const int number = (c.n + kDeep - 1) / kDeep;
    const uint64_t now = ++names_->fetches;
    for (int i = 0; i < number; ++i) {
      const int first = i * kDeep;
      int64_t slot = first + kDeep <= c.n ? find(c.key + first) : -1;
      if (slot < 0) {
        slot = first + kDeep <= c.n ? older(c.key + first) : -1;
        Half* to = own_ + i * block;
        if (slot >= 0 && names_->used[slot] < now) {
          to = kept_ + slot * block;
          names_->head[slot] = head_;
          std::memcpy(keys_ + slot * kDeep, c.key + first, kDeep * sizeof(int32_t));
        } else {
          slot = -1;
        }
        const bool found = make(c, first, to);
        groups[i] = to;
        infinite_[i] = found;
        if (slot >= 0) kept_infinite_[slot] = found;
      } else {
        groups[i] = kept_ + slot * block;
        infinite_[i] = kept_infinite_[slot];
      }
      if (slot >= 0) names_->used[slot] = now;
    }
    return number;
  }

  // Numbers from one part to the next, of columns and of rows.
  int64_t part() const { return ld() * kDeep; }
  // Whether a number in the rows named first is infinite: its parts say no more than that, and times zero are not a number.
  bool any_infinite(int g) const { return infinite_[g]; }
  // Where products are made of vectors: the words of the chunk's keys 2 i and 2 i + 1, for i < (c.n + 1) / 2.
  void find_pairs(int n, const uint32_t** pairs) const {
    const uint32_t* at = nullptr;
    for (int i = 0; i < (n + 1) / 2; ++i, at += ld()) {
      if (i % (kDeep / 2) == 0) at = reinterpret_cast<const uint32_t*>(groups[i / (kDeep / 2)]);
      pairs[i] = at;
    }
  }
#if defined(FARLIGHT_ISA_AMX)
  // 16 keys of group g of the rows that were named `which`th: tiles lie in one piece, those of 32 keys one after the other.
  Strip strip(int g, int which, int half) const {
    const Half* at = groups[g] + (1 + which) * size() + half * kTile * kDeep;
    return {reinterpret_cast<const char*>(at), kDeep * 2, kDeep * kDeep * 2, part() * 2};
  }
#endif

  const Half** groups = nullptr;

 private:
  static constexpr int kGroups = chunk_of<Mode> / kDeep;
  // Together; the second cache of the machines that have tiles holds 2 MiB, that of others with products of pairs 1 MiB.
  static constexpr int64_t kKeptBytes = (kParts == 1 ? 512 : 768) << 10;

  static constexpr int64_t kFewest = kParts == 1 ? 1 : 20;  // what a window of 512 keys and some named ones need

  static int64_t room_for(int64_t dim, int count) {
    const int64_t bytes = (1 + count) * kParts * rounded(dim, 32) * kDeep * static_cast<int64_t>(sizeof(Half));
    return most<int64_t>(kFewest, least<int64_t>(kKept, kKeptBytes / bytes));
  }

  int64_t ld() const { return rounded(dim_, 32); }
  int64_t size() const { return kParts * part(); }

  // A block has two places. The first depends on its first key and on how far it reaches: the tiles of a pattern step by 32 rows,
  // and the keys that their blocks begin with by 32 times their distance.
  int64_t place_of(const int32_t* key) const {
    const int64_t reach = most<int64_t>(1, (key[kDeep - 1] - key[0]) / (kDeep - 1)) * kDeep;
    return static_cast<uint32_t>(key[0]) / static_cast<uint32_t>(reach) % static_cast<uint32_t>(slots_);  // quicker than of int64_t
  }
  int64_t other(int64_t place) const { return (place + slots_ / 2) % slots_; }

  // Where these 32 keys are kept, or -1.
  int64_t find(const int32_t* key) const {
    const int64_t first = place_of(key), second = other(first);
    return is_at(first, key) ? first : is_at(second, key) ? second : -1;
  }
  bool is_at(int64_t slot, const int32_t* key) const {
    const int32_t* kept = keys_ + slot * kDeep;
    return names_->head[slot] == head_ && same(load_i(kept), load_i(key)) && same(load_i(kept + W), load_i(key + W));
  }
  // The place that was used longer ago.
  int64_t older(const int32_t* key) const {
    const int64_t first = place_of(key), second = other(first);
    return names_->used[second] < names_->used[first] ? second : first;
  }

  // Whether there is an infinite number in the rows named first.
  bool make(const Chunk& c, int first, Half* to) {
    bool found = false;
    if constexpr (!in_tiles<Mode>) {
      interleave(c, first, reinterpret_cast<uint32_t*>(to));
    } else if constexpr (kParts == 1) {
      interleave_and_turn(c, first, to);
    } else {
      const T* rows[kDeep];
      find_rows(c, first, source_, rows);
      turn_and_split(rows, to);
      for (int r = 0; r < count_; ++r) {
        find_rows(c, first, rows_[r], rows);
        const bool here = lay(rows, to + (1 + r) * size());
        found |= r == 0 && here;
      }
    }
    return found;
  }

  // to[pair][d] of bfloat16; keys past the chunk's end are zeros.
  void interleave(const Chunk& c, int first, uint32_t* to) const {
    for (int at = first; at < first + kDeep; at += 2, to += ld())
      interleave_rows(at < c.n ? source_.row(c.key[at]) : nullptr, at + 1 < c.n ? source_.row(c.key[at + 1]) : nullptr, dim_, to, 0);
  }

  // to[d][key] of bfloat16: pairs of keys are interleaved, then turned as words.
  void interleave_and_turn(const Chunk& c, int first, Half* to) {
    interleave(c, first, room_);
    const char* rows[kDeep / 2];
    for (int i = 0; i < kDeep / 2; ++i) rows[i] = reinterpret_cast<const char*>(room_ + i * ld());
    for (int64_t d = 0; d < ld(); d += 8)
      turn_block(rows, kDeep / 2, d * 4, reinterpret_cast<char*>(to + d * kDeep), kDeep * sizeof(Half));
  }

  // Rows of floats where they lie, or copied where they end before a tile does. Keys past the chunk's end are zeros.
  void find_rows(const Chunk& c, int first, const Source<T>& source, const T** rows) {
    T* room = reinterpret_cast<T*>(room_);
    for (int i = 0; i < kDeep; ++i, room += ld()) {
      const bool real = first + i < c.n;
      rows[i] = real ? source.row(c.key[first + i]) : room;
      if (real && dim_ == ld()) continue;
      std::memset(room, 0, ld() * sizeof(T));
      if (real) std::memcpy(room, rows[i], dim_ * sizeof(T));
      rows[i] = room;
    }
  }

  // to[part][d][key]
  void turn_and_split(const T* const* rows, Half* to) const {
    const char* at[kDeep];
    for (int i = 0; i < kDeep; ++i) at[i] = reinterpret_cast<const char*>(rows[i]);
    for (int64_t d = 0; d < ld(); d += 8) {
      alignas(64) float turned[8 * kDeep];
      turn_block(at, kDeep, d * 4, reinterpret_cast<char*>(turned), kDeep * sizeof(float));
      FARLIGHT_UNROLL
      for (int i = 0; i < 8; ++i)
        store_narrowed<kParts>(load(turned + i * kDeep), load(turned + i * kDeep + W), reinterpret_cast<uint32_t*>(to + (d + i) * kDeep), part() / 2);
    }
  }

  // to[part][step][key][d of the step]
  bool lay(const T* const* rows, Half* to) const {
    uint32_t found = 0;
    for (int64_t d = 0; d < ld(); d += kDeep)
      for (int i = 0; i < kDeep; ++i) {
        const F low = load(rows[i] + d), high = load(rows[i] + d + W);
        found |= infinite(low) | infinite(high);
        store_narrowed<kParts>(low, high, reinterpret_cast<uint32_t*>(to + (d + i) * kDeep), part() / 2);
      }
    return found != 0;
  }

  Source<T> source_, rows_[kMostRows];
  int count_;
  int64_t dim_, slots_ = 0;
  uint64_t head_;
  KeptNames* names_ = nullptr;
  int32_t* keys_ = nullptr;
  Half *kept_ = nullptr, *own_ = nullptr;
  uint32_t* room_ = nullptr;
  bool infinite_[kGroups] = {}, *kept_infinite_ = nullptr;
};

#endif

template <class Mode, bool InPairs>
struct ColumnsFor {
  using type = NoColumns;
};
#if defined(FARLIGHT_PAIRS)
template <class Mode>
struct ColumnsFor<Mode, true> {
  using type = Columns<Mode>;
};
#endif
template <class Mode>
using ColumnsOf = typename ColumnsFor<Mode, in_pairs<Mode>>::type;

}  // namespace farlight::FARLIGHT_NS

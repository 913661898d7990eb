// K, V, Q and dO as operands of products.
#pragma once

#include "columns.h"
#include "modes.h"

namespace farlight::FARLIGHT_NS {

#if defined(FARLIGHT_ISA_AMX)
// The distance between neighbours among so many keys (2 to 16), or 0 where it is not one and the same.
FARLIGHT_INLINE int32_t step_of(const int32_t* key, int count) {
  const __m512i places = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const int32_t step = key[1] - key[0];
  const __m512i expected = _mm512_add_epi32(_mm512_set1_epi32(key[0]), _mm512_mullo_epi32(places, _mm512_set1_epi32(step)));
  return (_mm512_cmpneq_epi32_mask(_mm512_loadu_si512(key), expected) & ((1u << count) - 1)) == 0 ? step : 0;
}
#endif

// The K or V rows of a chunk as operands.
template <class Mode>
class Operand {
 public:
  using T = typename Mode::T;
  using Word = typename Mode::Op::Word;

  Operand(const Source<T>& source, int64_t dim, int64_t keys) : source_(source), dim_(dim), keys_(keys), ld_(rounded(dim, 32)) {}

  void reserve(Arena& arena, bool for_rows, bool for_columns) {
    if (in_tiles<Mode>) {
      if (parts_of<Mode> == 1) along_room_ = arena.take<Word>(32 * ld_ / 2);
      return;
    }
    if (in_pairs<Mode>) {
      if (for_rows && dim_ % 2) along_room_ = arena.take<Word>(kKeys * ld_ / 2);
    } else {
      along_room_ = arena.take<Word>(kKeys * ld_);
    }
    along = arena.take<const Word*>(kKeys);
    across = in_pairs<Mode> && for_columns ? arena.take<const Word*>(kKeys / 2) : along;
  }

  // Words along the head dimension: along[key][d].
  void fetch_rows(const Chunk& c, bool compact = false) {
    const int n = c.blocks * kM;
    if constexpr (in_pairs<Mode>) {
      if (dim_ % 2 == 0) {
        for (int i = 0; i < n; ++i) along[i] = reinterpret_cast<const Word*>(source_.row(c.key[i]));
        return;
      }
      for (int i = 0; i < n; ++i) {
        Word* to = along_room_ + i * ld_ / 2;
        to[dim_ / 2] = 0;
        std::memcpy(to, source_.row(c.key[i]), dim_ * sizeof(T));
        along[i] = to;
      }
    } else if constexpr (sizeof(T) == sizeof(Word)) {
      if (!compact || source_.stride <= 2 * dim_) {
        for (int i = 0; i < n; ++i) along[i] = source_.row(c.key[i]);
        return;
      }
      copy(c, n);
    } else {
      copy(c, n);
    }
  }

  // Words along the keys: across[i][d], i over keys or pairs of them, which are kept in `columns`.
  void fetch_columns(const Chunk& c, [[maybe_unused]] ColumnsOf<Mode>& columns) {
    if constexpr (in_pairs<Mode>) {
      columns.fetch(c);
      columns.find_pairs(c.n, across);
    } else {
      fetch_rows(c, true);
    }
  }

#if defined(FARLIGHT_ISA_AMX)
  // Keys first ... first + 15 of the chunk as a strip of tiles: where they lie if that is at equal distances, or copied to the
  // `place`th room (of two).
  Strip strip(const Chunk& c, int first, int place) const {
    const int real = least(c.n - first, kTile);
    const int32_t step = real > 1 && dim_ % kDeep == 0 ? step_of(c.key + first, real) : 0;
    if (step > 0 && (real == kTile || c.key[first] + int64_t{kTile - 1} * step < keys_))
      return {reinterpret_cast<const char*>(source_.row(c.key[first])), source_.stride * step * static_cast<int64_t>(sizeof(T)),
              kDeep * 2, 0};
    Half* room = reinterpret_cast<Half*>(along_room_) + place * kTile * ld_;
    for (int i = 0; i < real; ++i) {
      const T* from = source_.row(c.key[first + i]);
      for (int64_t d = 0; d < ld_; d += kDeep) store_i(reinterpret_cast<uint32_t*>(room + i * ld_ + d), load_halves(from + d, dim_ - d));
    }
    return {reinterpret_cast<const char*>(room), ld_ * static_cast<int64_t>(sizeof(T)), kDeep * 2, 0};
  }
#endif

  const Source<T>& source() const { return source_; }

  const Word** along = nullptr;
  const Word** across = nullptr;

 private:
  void copy(const Chunk& c, int n) {
    if constexpr (!in_pairs<Mode>) {
      for (int i = 0; i < n; ++i) {
        copy_as_float(source_.row(c.key[i]), along_room_ + i * ld_, dim_);
        along[i] = along_room_ + i * ld_;
      }
    }
  }

  Source<T> source_;
  int64_t dim_, keys_, ld_;
  Word* along_room_ = nullptr;
};

// A tile of Q or dO with rows in lanes: turned[d][row] words, or [part][d][row]; rows past the tile's end are zero.
template <class Mode>
class Turned {
 public:
  using T = typename Mode::T;
  using Word = typename Mode::Op::Word;

  explicit Turned(int64_t dim) : dim_(dim), words((dim + Mode::Op::per - 1) / Mode::Op::per) {}

  void reserve(Arena& arena) {
    turned = arena.take<Word>(parts_of<Mode> * part());
    room_ = arena.take<Word>(kRows * rounded(dim_, 16));
    if (parts_of<Mode> > 1) whole = arena.take<float>(kRows * dim_);
  }

  int64_t dim() const { return dim_; }
  // Words from one part to the next.
  int64_t part() const { return rounded(words, 16) * kRows; }

  void fetch(const Source<T>& source, const Tile& tile, float factor) {
    const int64_t ld = rounded(dim_, 16);
    const bool straight = sizeof(T) == sizeof(Word) || (in_pairs<Mode> && dim_ % 2 == 0);
    const char* rows[kRows];
    for (int s = 0; s < kRows; ++s) {
      Word* own = room_ + s * ld;
      rows[s] = reinterpret_cast<const char*>(own);
      if (s >= tile.count) {
        std::memset(own, 0, rounded(dim_, 16) * sizeof(Word));
      } else if (straight) {
        rows[s] = reinterpret_cast<const char*>(source.row(tile.row[s]));
      } else if constexpr (in_pairs<Mode>) {
        own[words - 1] = 0;
        std::memcpy(own, source.row(tile.row[s]), dim_ * sizeof(T));
      } else {
        copy_as_float(source.row(tile.row[s]), own, dim_);
      }
    }
    if constexpr (parts_of<Mode> > 1) {
#if defined(FARLIGHT_PAIRS)
      turn_in(rows, dim_, whole);
      uint32_t found = 0;
      for (int64_t i = 0; i < dim_ * kRows; i += W) {
        const F x = mul(load(whole + i), all(factor));
        found |= infinite(x);
        store(whole + i, x);
      }
      any_infinite = found != 0;
      for (int64_t i = 0; i < words; ++i)
        for (int s = 0; s < kRows; s += W) {
          const float* at = whole + 2 * i * kRows + s;
          store_paired<parts_of<Mode>>(load(at), 2 * i + 1 < dim_ ? load(at + kRows) : all(0.0f), turned + i * kRows + s, part());
        }
#endif
    } else {
      turn_in(rows, words, turned);
      if constexpr (in_pairs<Mode>) {
        for (int64_t i = 0; factor < 0.0f && i < words * kRows; ++i) turned[i] ^= 0x80008000u;
      }
    }
    for (int p = 0; in_tiles<Mode> && p < parts_of<Mode>; ++p)
      std::memset(turned + p * part() + words * kRows, 0, part() * sizeof(Word) - words * kRows * sizeof(Word));
    if constexpr (!in_pairs<Mode>) {
      if (factor != 1.0f) {
        const F f = all(factor);
        for (int64_t i = 0; i < words * kRows; i += W) store(turned + i, mul(load(turned + i), f));
      }
    }
  }

  Word* turned = nullptr;
  float* whole = nullptr;  // of numbers that have parts: themselves, [d][row]
  bool any_infinite = false;

 private:
  int64_t dim_;
  Word* room_ = nullptr;

 public:
  int64_t words;
};

}  // namespace farlight::FARLIGHT_NS

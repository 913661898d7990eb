// Operands of products: the K or V rows of a chunk (Operand) and a row block of Q or dO transposed to lanes (Transposed).
#pragma once

#include "kernel_traits.h"
#include "packed_cache.h"

namespace farlight::FARLIGHT_NS {

#if defined(FARLIGHT_ISA_AMX)
// The common difference of `count` (2 to 16) key indices, or 0 if they are not equidistant.
FARLIGHT_INLINE int32_t common_step(const int32_t* key, int count) {
  const __m512i indices = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const int32_t step = key[1] - key[0];
  const __m512i expected = _mm512_add_epi32(_mm512_set1_epi32(key[0]), _mm512_mullo_epi32(indices, _mm512_set1_epi32(step)));
  return (_mm512_cmpneq_epi32_mask(_mm512_loadu_si512(key), expected) & ((1u << count) - 1)) == 0 ? step : 0;
}
#endif

// The K or V rows of a chunk as left operands, as pointers to rows of words: in place in the tensor where dtype and alignment
// allow it, otherwise widened or padded copies.
template <class Traits>
class Operand {
 public:
  using T = typename Traits::T;
  using Word = typename Traits::Op::Word;

  Operand(const HeadRows<T>& source, int64_t dim, int64_t keys)
      : source_(source),
        dim_(dim),
        keys_(keys),
        ld_(round_up(dim, 32)) {}

  // Allocates copy buffers and pointer tables for the layouts that will be fetched.
  void reserve(Arena& arena, bool for_row_major, bool for_col_major) {
    if (uses_amx<Traits>) {
      if (num_parts<Traits> == 1) copies_ = arena.allocate<Word>(32 * ld_ / 2);
      return;
    }
    if (uses_pairs<Traits>) {
      if (for_row_major && dim_ % 2) copies_ = arena.allocate<Word>(kChunkKeys * ld_ / 2);
    } else {
      copies_ = arena.allocate<Word>(kChunkKeys * ld_);
    }
    row_major = arena.allocate<const Word*>(kChunkKeys);
    col_major = uses_pairs<Traits> && for_col_major ? arena.allocate<const Word*>(kChunkKeys / 2) : row_major;
  }

  // row_major[key][d]: for products over the head dimension. `compact`: copy rows that lie far apart, to save TLB misses where
  // each is read several times.
  void fetch_row_major(const Chunk& c, bool compact = false) {
    const int n = c.blocks * kM;
    if constexpr (uses_pairs<Traits>) {
      if (dim_ % 2 == 0) {
        for (int i = 0; i < n; ++i) row_major[i] = reinterpret_cast<const Word*>(source_.row(c.key[i]));
        return;
      }
      for (int i = 0; i < n; ++i) {
        Word* to = copies_ + i * ld_ / 2;
        to[dim_ / 2] = 0;
        std::memcpy(to, source_.row(c.key[i]), dim_ * sizeof(T));
        row_major[i] = to;
      }
    } else if constexpr (sizeof(T) == sizeof(Word)) {
      if (!compact || source_.stride <= 2 * dim_) {
        for (int i = 0; i < n; ++i) row_major[i] = source_.row(c.key[i]);
        return;
      }
      widen_or_compact(c, n);
    } else {
      widen_or_compact(c, n);
    }
  }

  // col_major[i][d], i over keys or pairs of keys: for products over keys. Pairs come from the packed cache.
  void fetch_col_major(const Chunk& c, [[maybe_unused]] PackedCacheOf<Traits>& packed) {
    if constexpr (uses_pairs<Traits>) {
      packed.fetch(c);
      packed.find_pairs(c.n, col_major);
    } else {
      fetch_row_major(c, true);
    }
  }

#if defined(FARLIGHT_ISA_AMX)
  // Keys [first, first + 16) of the chunk as an AMX panel: in place where they are equidistant, otherwise copied to copy buffer
  // 0 or 1.
  Panel panel(const Chunk& c, int first, int buffer) const {
    const int count = min(c.n - first, kTileDim);
    const int32_t step = count > 1 && dim_ % kDepth == 0 ? common_step(c.key + first, count) : 0;
    if (step > 0 && (count == kTileDim || c.key[first] + int64_t{kTileDim - 1} * step < keys_))
      return {reinterpret_cast<const char*>(source_.row(c.key[first])), source_.stride * step * static_cast<int64_t>(sizeof(T)),
              kDepth * 2, 0};
    Bf16* copy_to = reinterpret_cast<Bf16*>(copies_) + buffer * kTileDim * ld_;
    for (int i = 0; i < count; ++i) {
      const T* from = source_.row(c.key[first + i]);
      for (int64_t d = 0; d < ld_; d += kDepth)
        store_i(reinterpret_cast<uint32_t*>(copy_to + i * ld_ + d), load_bf16(from + d, dim_ - d));
    }
    return {reinterpret_cast<const char*>(copy_to), ld_ * static_cast<int64_t>(sizeof(T)), kDepth * 2, 0};
  }
#endif

  const HeadRows<T>& source() const { return source_; }

  const Word** row_major = nullptr;
  const Word** col_major = nullptr;

 private:
  // Copies the rows as float32 into contiguous memory.
  void widen_or_compact(const Chunk& c, int n) {
    if constexpr (!uses_pairs<Traits>) {
      for (int i = 0; i < n; ++i) {
        copy_as_float(source_.row(c.key[i]), copies_ + i * ld_, dim_);
        row_major[i] = copies_ + i * ld_;
      }
    }
  }

  HeadRows<T> source_;
  int64_t dim_, keys_, ld_;
  Word* copies_ = nullptr;
};

// A row block of Q or dO with query rows in lanes: transposed[d][row] in words, or [part][d][row] for split operands; rows past
// the end of the block are zero.
template <class Traits>
class Transposed {
 public:
  using T = typename Traits::T;
  using Word = typename Traits::Op::Word;

  explicit Transposed(int64_t dim) : dim_(dim), words((dim + Traits::Op::per - 1) / Traits::Op::per) {}

  void reserve(Arena& arena) {
    transposed = arena.allocate<Word>(num_parts<Traits> * part());
    padded_rows_ = arena.allocate<Word>(kRows * round_up(dim_, 16));
    if (num_parts<Traits> > 1) f32 = arena.allocate<float>(kRows * dim_);
  }

  int64_t dim() const { return dim_; }
  // Words between the parts of split operands.
  int64_t part() const { return round_up(words, 16) * kRows; }

  // Loads and transposes the row block, multiplied by `factor` (of bfloat16 only the sign is applied).
  void fetch(const HeadRows<T>& source, const RowBlock& row_block, float factor) {
    const int64_t ld = round_up(dim_, 16);
    const bool in_place = sizeof(T) == sizeof(Word) || (uses_pairs<Traits> && dim_ % 2 == 0);
    const char* rows[kRows];
    for (int s = 0; s < kRows; ++s) {
      Word* row_copy = padded_rows_ + s * ld;
      rows[s] = reinterpret_cast<const char*>(row_copy);
      if (s >= row_block.count) {
        std::memset(row_copy, 0, round_up(dim_, 16) * sizeof(Word));
      } else if (in_place) {
        rows[s] = reinterpret_cast<const char*>(source.row(row_block.row[s]));
      } else if constexpr (uses_pairs<Traits>) {
        row_copy[words - 1] = 0;
        std::memcpy(row_copy, source.row(row_block.row[s]), dim_ * sizeof(T));
      } else {
        copy_as_float(source.row(row_block.row[s]), row_copy, dim_);
      }
    }
    if constexpr (num_parts<Traits> > 1) {
#if defined(FARLIGHT_BF16_PAIRS)
      transpose_to_lanes(rows, dim_, f32);
      uint32_t inf_bits = 0;
      for (int64_t i = 0; i < dim_ * kRows; i += W) {
        const F x = mul(load(f32 + i), broadcast(factor));
        inf_bits |= inf_mask(x);
        store(f32 + i, x);
      }
      has_inf = inf_bits != 0;
      for (int64_t i = 0; i < words; ++i)
        for (int s = 0; s < kRows; s += W) {
          const float* at = f32 + 2 * i * kRows + s;
          store_interleaved<num_parts<Traits>>(load(at), 2 * i + 1 < dim_ ? load(at + kRows) : broadcast(0.0f),
                                               transposed + i * kRows + s, part());
        }
#endif
    } else {
      transpose_to_lanes(rows, words, transposed);
      if constexpr (uses_pairs<Traits>) {
        for (int64_t i = 0; factor < 0.0f && i < words * kRows; ++i) transposed[i] ^= 0x80008000u;
      }
    }
    for (int p = 0; uses_amx<Traits> && p < num_parts<Traits>; ++p)
      std::memset(transposed + p * part() + words * kRows, 0, part() * sizeof(Word) - words * kRows * sizeof(Word));
    if constexpr (!uses_pairs<Traits>) {
      if (factor != 1.0f) {
        const F f = broadcast(factor);
        for (int64_t i = 0; i < words * kRows; i += W) store(transposed + i, mul(load(transposed + i), f));
      }
    }
  }

  Word* transposed = nullptr;
  float* f32 = nullptr;  // split operands only: the unsplit float32, [d][row]
  bool has_inf = false;

 private:
  int64_t dim_;
  Word* padded_rows_ = nullptr;

 public:
  int64_t words;
};

}  // namespace farlight::FARLIGHT_NS

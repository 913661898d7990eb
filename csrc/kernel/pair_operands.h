// Layouts of the operands of products over query rows, in the backward pass: rows of Q and dO; P and dS as bfloat16 pairs.
#pragma once

#include <cstring>

#include "kernel_traits.h"

namespace farlight::FARLIGHT_NS {

// Packs rows as the right operand of products over query rows, `ld` words apart; of pairs, word (i, d) holds rows 2i and
// 2i + 1.
template <class Traits>
inline void pack_rows(const HeadRows<typename Traits::T>& source, const RowBlock& row_block, int64_t dim, int64_t ld,
                      typename Traits::Op::Word* to) {
  if constexpr (uses_pairs<Traits>) {
#if defined(FARLIGHT_BF16_PAIRS)
    const int64_t part = kRows / 2 * ld;
    for (int s = 0; s < row_block.count; s += 2)
      interleave_rows(source.row(row_block.row[s]), s + 1 < row_block.count ? source.row(row_block.row[s + 1]) : nullptr, dim,
                      to + s / 2 * ld, part);
    const int pairs = (row_block.count + 1) / 2;
    for (int p = 0; uses_amx<Traits> && p < num_parts<Traits>; ++p)
      std::memset(to + p * part + pairs * ld, 0, (kRows / 2 - pairs) * ld * sizeof(uint32_t));
#endif
  } else {
    for (int s = 0; s < row_block.count; ++s) {
      copy_as_float(source.row(row_block.row[s]), to + s * ld, dim);
      for (int64_t d = dim; d < ld; ++d) to[s * ld + d] = 0.0f;
    }
  }
}

// Zeroes P and dS of padding keys; `part` words between the parts of split operands.
template <class Traits>
inline void clear_padding(const Chunk& c, uint32_t* weight_rows, uint32_t* ds_rows, int64_t part) {
  const int64_t padding = c.blocks * kM - c.n;
  for (int p = 0; padding && p < num_parts<Traits>; ++p) {
    const int64_t at = p * part + c.n * kRows / 2, bytes = padding * kRows / 2 * static_cast<int64_t>(sizeof(uint32_t));
    std::memset(weight_rows + at, 0, bytes);
    std::memset(ds_rows + at, 0, bytes);
  }
}

// Interleaves dS along keys, as the right operand of dQ^T += K^T dS^T.
template <class Traits>
inline void interleave_ds([[maybe_unused]] const Chunk& c, [[maybe_unused]] const uint32_t* ds_rows,
                          [[maybe_unused]] uint32_t* ds_columns, [[maybe_unused]] int64_t part) {
#if defined(FARLIGHT_BF16_PAIRS)
  const int n = uses_amx<Traits> ? c.blocks * kM : c.n;
  for (int p = 0; p < num_parts<Traits>; ++p) {
    const uint32_t* rows = ds_rows + p * part;
    uint32_t* columns = ds_columns + p * part;
    for (int i = 0; i < n; i += 2) {
      I low, high;
      const I second = i + 1 < n ? load_i(rows + (i + 1) * kRows / 2) : broadcast_i(0);
      interleave(load_i(rows + i * kRows / 2), second, low, high);
      store_i(columns + i / 2 * kRows, low);
      store_i(columns + i / 2 * kRows + W, high);
    }
  }
#endif
}

}  // namespace farlight::FARLIGHT_NS

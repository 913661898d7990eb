// How the numbers of tensors reach the products. Five ways:
//   InPlace  float32 tensors, float products; rows are read where they lie
//   Widened  bfloat16 tensors, float products; rows are widened a chunk at a time
//   Pairs    bfloat16 tensors, products of bfloat16 pairs; what is summed over keys or rows is interleaved, that of keys kept
//   Tiles    the same operands as Pairs where the machine multiplies whole tiles of them (tiles.h)
//   Parts    float32 tensors in place of InPlace there: operands as for Tiles, three times, for the parts of each number
#pragma once

#include "arena.h"
#include "register_blocks.h"
#include "key_chunks.h"
#include "row_ops.h"
#include "amx_tiles.h"

namespace farlight::FARLIGHT_NS {

struct NoTileConfig {
  static constexpr bool tiles = false;
  NoTileConfig() {}  // what must be set up around an item: nothing
};

// The numbers of the tensors, what is multiplied, the degree of exp2, what stands around an item, how many parts a number has.
template <class Element, class ProductOp, int Degree, class Config = NoTileConfig, int NumParts = 1>
struct KernelTraits {
  using T = Element;
  using Op = ProductOp;
  using TileConfig = Config;
  static constexpr bool tiles = Config::tiles;
  static constexpr int degree = Degree, parts = NumParts;
};

using F32 = KernelTraits<float, F32Word, 5>;
using Bf16Widened = KernelTraits<Bf16, F32Word, 3>;
#if defined(FARLIGHT_BF16_PAIRS)
using Bf16Pairs = KernelTraits<Bf16, Bf16PairWord, 3>;
#endif
#if defined(FARLIGHT_ISA_AMX)
using AmxBf16 = KernelTraits<Bf16, Bf16PairWord, 3, AmxTileConfig>;
using AmxF32Split = KernelTraits<float, Bf16PairWord, 5, AmxTileConfig, kParts>;
#endif

template <class Traits>
constexpr bool uses_pairs = Traits::Op::per == 2;
// How many parts a number has in products.
template <class Traits>
constexpr int num_parts = Traits::parts;
// Whether Q is scaled before it is multiplied: what is bfloat16 would be rounded once more.
template <class Traits>
constexpr bool q_prescaled = !uses_pairs<Traits> || num_parts<Traits> > 1;
// Whether products are made of tiles, and then how many keys are taken together.
template <class Traits>
constexpr bool uses_amx = Traits::tiles;
template <class Traits>
constexpr int key_group = uses_amx<Traits> ? 32 : kM;
// Keys in a chunk: many are walked over with less ado; but what tiles are made of has to stay in the first cache.
template <class Traits>
constexpr int chunk_keys = uses_amx<Traits> ? 64 : kChunkKeys;

// The rows of one (batch, head) of a tensor.
template <class T>
struct Source {
  const T* base;
  int64_t stride;
  Source(const TensorView& rows, int64_t b, int64_t h)
      : base(static_cast<const T*>(rows.data) + b * rows.batch + h * rows.head), stride(rows.row) {}
  const T* row(int64_t i) const { return base + i * stride; }
};

#if defined(FARLIGHT_BF16_PAIRS)
// Two vectors as bfloat16: the pairs of neighbouring lanes. Numbers that have parts: each part, `part` words from the one before.
template <int NumParts>
FARLIGHT_INLINE void store_interleaved(F x, F y, uint32_t* to, int64_t part) {
  if constexpr (NumParts == 1) {
    store_i(to, narrow_interleaved(x, y));
  } else {
    I a[kParts], b[kParts];
    split_bf16x3(x, a);
    split_bf16x3(y, b);
    FARLIGHT_UNROLL
    for (int p = 0; p < kParts; ++p) store_i(to + p * part, interleave_upper(a[p], b[p]));
  }
}
// The same, all lanes of x before those of y.
template <int NumParts>
FARLIGHT_INLINE void store_narrow(F x, F y, uint32_t* to, int64_t part) {
  if constexpr (NumParts == 1) {
    store_i(to, narrow(x, y));
  } else {
    I a[kParts], b[kParts];
    split_bf16x3(x, a);
    split_bf16x3(y, b);
    FARLIGHT_UNROLL
    for (int p = 0; p < kParts; ++p) store_i(to + p * part, pack_upper(a[p], b[p]));
  }
}

// to[d] = (x[d], y[d]) for d < dim rounded up to 32; null: zeros. Floats are split into parts, `part` words apart.
FARLIGHT_INLINE void interleave_rows(const Bf16* x, const Bf16* y, int64_t dim, uint32_t* to, int64_t) {
  for (int64_t d = 0; d < dim; d += 32) {
    I low, high;
    interleave(x ? load_bf16(x + d, dim - d) : broadcast_i(0), y ? load_bf16(y + d, dim - d) : broadcast_i(0), low, high);
    store_i(to + d, low);
    store_i(to + d + W, high);
  }
}
FARLIGHT_INLINE void interleave_rows(const float* x, const float* y, int64_t dim, uint32_t* to, int64_t part) {
  for (int64_t d = 0; d < round_up(dim, 32); d += W)
    store_interleaved<kParts>(x ? load_f32(x + d, dim - d) : broadcast(0.0f), y ? load_f32(y + d, dim - d) : broadcast(0.0f), to + d, part);
}
#endif

}  // namespace farlight::FARLIGHT_NS

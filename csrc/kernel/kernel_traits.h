// Kernel traits: the compile-time choices that turn one source into five kernels.
//
//   F32          float32 tensors, FMA on float32; rows are read in place
//   Bf16Widened  bfloat16 tensors, FMA on float32; rows are widened to float32 a chunk at a time
//   Bf16Pairs    bfloat16 tensors, dot products of bfloat16 pairs (vdpbf16ps). The summed dimension is interleaved in pairs;
//   packed
//                blocks of keys are cached (packed_cache.h)
//   AmxBf16      bfloat16 tensors, AMX tile products of the same operands (amx_tiles.h)
//   AmxF32Split  float32 tensors on AMX: every operand is split into three bfloat16 parts, six tile products per product
#pragma once

#include "amx_tiles.h"
#include "arena.h"
#include "key_chunks.h"
#include "register_blocks.h"
#include "row_ops.h"

namespace farlight::FARLIGHT_NS {

// Stands in for AmxTileConfig where no tile registers are used.
struct NoTileConfig {
  static constexpr bool tiles = false;
  NoTileConfig() {}  // nontrivial, so that an unused variable gives no warning
};

// Element: element type of the tensors; ProductOp: multiply-accumulate of operand words (register_blocks.h); Degree: of the
// exp2 polynomial; Config: scope that sets up tile registers around a work item; NumParts: bfloat16 parts per operand element.
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

// Operand words hold a pair of bfloat16.
template <class Traits>
constexpr bool uses_pairs = Traits::Op::per == 2;
// bfloat16 parts per operand element: 3 for AmxF32Split, else 1.
template <class Traits>
constexpr int num_parts = Traits::parts;
// Whether Q is multiplied by the softmax scale before S = Q K^T. Not for bfloat16 operands, which would be rounded a second
// time: there the scores are scaled.
template <class Traits>
constexpr bool q_prescaled = !uses_pairs<Traits> || num_parts<Traits> > 1;
// Whether products run on AMX tiles; and to how many keys a chunk is padded.
template <class Traits>
constexpr bool uses_amx = Traits::tiles;
template <class Traits>
constexpr int key_group = uses_amx<Traits> ? 32 : kM;
// Keys of a chunk. A larger chunk amortises the walk over runs; with AMX the operands of a chunk must stay in L1.
template <class Traits>
constexpr int chunk_keys = uses_amx<Traits> ? 64 : kChunkKeys;

// The (N, D) rows of one (batch item, head) of a tensor; the stride counts elements.
template <class T>
struct HeadRows {
  const T* base;
  int64_t stride;
  HeadRows(const TensorView& rows, int64_t b, int64_t h)
      : base(static_cast<const T*>(rows.data) + b * rows.batch + h * rows.head),
        stride(rows.row) {}
  const T* row(int64_t i) const { return base + i * stride; }
};

#if defined(FARLIGHT_BF16_PAIRS)
// Stores two vectors as interleaved bfloat16 pairs, word i = (x[i], y[i]); split operands: each part, `part` words apart.
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
// Stores two vectors as bfloat16 in order, all of x before all of y; split operands: each part, `part` words apart.
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

// Interleaves two rows: to[d] = (x[d], y[d]) for d < dim rounded up to 32; a null row is zeros. float32 rows are split into
// parts, `part` words apart.
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
    store_interleaved<kParts>(x ? load_f32(x + d, dim - d) : broadcast(0.0f), y ? load_f32(y + d, dim - d) : broadcast(0.0f),
                              to + d, part);
}
#endif

}  // namespace farlight::FARLIGHT_NS

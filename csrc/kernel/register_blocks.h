// Register-blocked products (micro-kernels): kM broadcast operands x V vectors, whose kM * V sums stay in registers.
//
// An operand word is what is broadcast to all lanes: a float32, or a pair of bfloat16 that are neighbours along the summed
// dimension. The left operand comes in two layouts: row-major, A[m][k] (K in S^T = K Q^T, summed over the head dimension), and
// col-major, A[k][m] (V in O^T += V^T P^T, summed over keys). The right operand is B[k][lane], with query rows or head
// dimensions in lanes.
#pragma once

#include <cstring>

#include "../views.h"
#include "key_chunks.h"

namespace farlight::FARLIGHT_NS {

// float32 operands: FMA.
struct F32Word {
  using Word = float;
  using Vector = F;
  static constexpr int per = 1;  // elements per word
  static FARLIGHT_INLINE Vector splat(const Word* p) { return broadcast(*p); }
  static FARLIGHT_INLINE Vector read(const Word* p) { return load(p); }
  static FARLIGHT_INLINE F mac(F acc, Vector a, Vector b) { return fma(a, b, acc); }
};

#if defined(FARLIGHT_BF16_PAIRS)
// bfloat16 operands in pairs: vdpbf16ps.
struct Bf16PairWord {
  using Word = uint32_t;
  using Vector = I;
  static constexpr int per = 2;
  static FARLIGHT_INLINE Vector splat(const Word* p) {
    uint32_t x;
    std::memcpy(&x, p, sizeof x);  // a bfloat16 row may start at any even address
    return broadcast_i(x);
  }
  static FARLIGHT_INLINE Vector read(const Word* p) { return load_i(p); }
  static FARLIGHT_INLINE F mac(F acc, Vector a, Vector b) { return dot_bf16_pairs(acc, a, b); }
};
#endif

// One step of the row-major product: acc[m][v] += row[m][i] * b[v].
template <class Op, int M, int V>
FARLIGHT_INLINE void mac_row_major(F (&acc)[M][V], const typename Op::Word* const (&row)[M], int64_t i,
                                   const typename Op::Word* b) {
  typename Op::Vector x[V];
  FARLIGHT_UNROLL
  for (int v = 0; v < V; ++v) x[v] = Op::read(b + v * W);
  FARLIGHT_UNROLL
  for (int m = 0; m < M; ++m) {
    const auto a = Op::splat(row[m] + i);
    FARLIGHT_UNROLL
    for (int v = 0; v < V; ++v) acc[m][v] = Op::mac(acc[m][v], a, x[v]);
  }
}

// Row-major product: acc[m][v] += sum over i < n of rows[m][i] * b[i][v]; `ld` words between rows of b.
template <class Op, int M, int V>
FARLIGHT_INLINE void gemm_row_major(F (&acc)[M][V], const typename Op::Word* const* rows, const typename Op::Word* b,
                                    int64_t ld, int64_t n) {
  const typename Op::Word* row[M];
  FARLIGHT_UNROLL
  for (int m = 0; m < M; ++m) row[m] = rows[m];
  FARLIGHT_UNROLL_4
  for (int64_t i = 0; i < n; ++i, b += ld) mac_row_major<Op, M, V>(acc, row, i, b);
}

// One step of the col-major product: acc[m][v] += row[m] * b[v].
template <class Op, int M, int V>
FARLIGHT_INLINE void mac_col_major(F (&acc)[M][V], const typename Op::Word* row, const typename Op::Word* b) {
  typename Op::Vector x[V];
  FARLIGHT_UNROLL
  for (int v = 0; v < V; ++v) x[v] = Op::read(b + v * W);
  FARLIGHT_UNROLL
  for (int m = 0; m < M; ++m) {
    const auto a = Op::splat(row + m);
    FARLIGHT_UNROLL
    for (int v = 0; v < V; ++v) acc[m][v] = Op::mac(acc[m][v], a, x[v]);
  }
}

// acc = 0.
template <int M, int V>
FARLIGHT_INLINE void clear(F (&acc)[M][V]) {
  FARLIGHT_UNROLL
  for (int m = 0; m < M; ++m) {
    FARLIGHT_UNROLL
    for (int v = 0; v < V; ++v) acc[m][v] = broadcast(0.0f);
  }
}

// Col-major product of a block: to[d][lane] (+)= sum over i < n of rows[i][d] * b[i][lane], for M values of d and V vectors of
// lanes. `overwrite`: ignores what is in `to`. `rescale`, unless null: multiplies `to` by rescale[lane] first (online softmax).
// Even and odd keys go to separate accumulators (kAccumulators): rounding error then grows with the length of one sum plus the
// number of chunks, not with their product.
template <class Op, int M, int V>
FARLIGHT_INLINE void gemm_col_major_block(float* to, const typename Op::Word* const* rows, int64_t at,
                                          const typename Op::Word* b, int64_t n, bool overwrite, const float* rescale) {
  F sums[kAccumulators][M][V];
  FARLIGHT_UNROLL
  for (int j = 0; j < kAccumulators; ++j) clear(sums[j]);
  int64_t i = 0;
  FARLIGHT_UNROLL_2
  for (; i + kAccumulators <= n; i += kAccumulators) {
    FARLIGHT_UNROLL
    for (int j = 0; j < kAccumulators; ++j) mac_col_major<Op, M, V>(sums[j], rows[i + j] + at, b + (i + j) * kRows);
  }
  for (; i < n; ++i) mac_col_major<Op, M, V>(sums[0], rows[i] + at, b + i * kRows);
  FARLIGHT_UNROLL
  for (int m = 0; m < M; ++m) {
    FARLIGHT_UNROLL
    for (int v = 0; v < V; ++v) {
      F sum = sums[0][m][v];
      FARLIGHT_UNROLL
      for (int j = 1; j < kAccumulators; ++j) sum = add(sum, sums[j][m][v]);
      float* dst = to + m * kRows + v * W;
      store(dst, overwrite ? sum : rescale ? fma(load(dst), load(rescale + v * W), sum) : add(load(dst), sum));
    }
  }
}

// gemm_col_major_block for all d < dim, M as large as the registers allow.
template <class Op, int V>
FARLIGHT_NOINLINE void gemm_col_major(float* to, const typename Op::Word* const* rows, const typename Op::Word* b, int64_t n,
                                      int64_t dim, bool overwrite, const float* rescale) {
  constexpr int block_dims = kM * kV / (V * kAccumulators);
  for (int64_t d = 0; d < dim;) {
    const int64_t left = dim - d;
    const int64_t step = left >= block_dims ? block_dims : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    float* at = to + d * kRows;
    if (step == block_dims) gemm_col_major_block<Op, block_dims, V>(at, rows, d, b, n, overwrite, rescale);
    else if (step == 4) gemm_col_major_block<Op, 4, V>(at, rows, d, b, n, overwrite, rescale);
    else if (step == 2) gemm_col_major_block<Op, 2, V>(at, rows, d, b, n, overwrite, rescale);
    else gemm_col_major_block<Op, 1, V>(at, rows, d, b, n, overwrite, rescale);
    d += step;
  }
}

// Col-major product over the spans of a chunk: O^T += V^T P^T and dQ^T += K^T dS^T. A half of the rows that sees nothing of a
// span is left out.
template <class Op>
inline void accumulate_col_major(float* to, const typename Op::Word* const* rows, const typename Op::Word* b,
                                 const Spans& spans, int64_t dim, int lanes, bool overwrite, const float* rescale = nullptr) {
  if (overwrite && (spans.count == 0 || spans.span[0].halves != kBothHalves)) {
    for (int64_t i = 0; i < dim * kRows; i += W) store(to + i, broadcast(0.0f));
    overwrite = false;
  }
  for (const Span* span = spans.span; span < spans.span + spans.count; ++span, overwrite = false) {
    const int64_t first = span->first / Op::per, last = (span->last + Op::per - 1) / Op::per;
    for_lanes(span->halves, lanes, [&]<int V>(int g) {
      gemm_col_major<Op, V>(to + g, rows + first, b + first * kRows + g, last - first, dim, overwrite,
                            rescale ? rescale + g : nullptr);
    });
  }
}

// Row-major product of one block of kM keys: sums[m][d] += sum over i < n of rows[m][i] * b[i][d], i.e. dV += P dO and dK += dS
// Q with head dimensions in lanes. `ld`: words between rows of b, a multiple of 16; rows of `sums` are padded to a multiple of
// 16 floats.
template <class Op, int M, int V>
FARLIGHT_INLINE void gemm_row_major_block(float* const* sums, int64_t at, const typename Op::Word* const* rows,
                                          const typename Op::Word* b, int64_t ld, int64_t n) {
  float* to[M];
  FARLIGHT_UNROLL
  for (int m = 0; m < M; ++m) {
    to[m] = sums[m] + at;
    FARLIGHT_UNROLL
    for (int v = 0; v < V; ++v) FARLIGHT_PREFETCH(to[m] + v * W);
  }
  F acc[M][V];
  clear(acc);
  gemm_row_major<Op, M, V>(acc, rows, b + at, ld, n);
  FARLIGHT_UNROLL
  for (int m = 0; m < M; ++m) {
    FARLIGHT_UNROLL
    for (int v = 0; v < V; ++v) store(to[m] + v * W, add(load(to[m] + v * W), acc[m][v]));
  }
}

// gemm_row_major_block for all d < dim, in blocks of kM keys.
template <class Op>
inline void accumulate_row_major(float* const* sums, const typename Op::Word* const* rows, const typename Op::Word* b,
                                 int64_t ld, int64_t n, int64_t dim) {
  constexpr int half = kM / 2, wide = 2 * kV;
  int64_t d = 0;
  for (; d + (wide - 1) * W < dim; d += wide * W) {  // whole rows of few keys are contiguous; few columns of many keys are not
    gemm_row_major_block<Op, half, wide>(sums, d, rows, b, ld, n);
    gemm_row_major_block<Op, half, wide>(sums + half, d, rows + half, b, ld, n);
  }
  for (; d + (kV - 1) * W < dim; d += kV * W) gemm_row_major_block<Op, kM, kV>(sums, d, rows, b, ld, n);
  for (; d < dim; d += W) gemm_row_major_block<Op, kM, 1>(sums, d, rows, b, ld, n);
}

}  // namespace farlight::FARLIGHT_NS

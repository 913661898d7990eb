// Dot products of a query with rows, and weighted sums of rows, of any element type: the arithmetic of decode_attend.h.
//
// Rows are runs of consecutive rows or tables of addresses. Keys are scored W at a time, one accumulator each, and a tree of
// shuffles sums the accumulators' lanes.
#pragma once

#include "decode_elements.h"

namespace farlight::FARLIGHT_NS {

constexpr int kSlab = W == 16 ? 4 : 2;  // vectors of an output row that are accumulated at a time

// An integer that is known at compile time; `int64_t` where it is not.
template <int N>
struct Constant {
  static constexpr int value = N;
  constexpr operator int64_t() const { return N; }
};

// Consecutive rows. Rows by address are `const T* const*`.
template <class T, class Dim>
struct RowRun {
  const T* first;
  Dim dim;
  FARLIGHT_INLINE const T* operator[](int64_t i) const { return first + i * dim; }
};
template <class T, class Dim>
FARLIGHT_INLINE RowRun<T, Dim> rows_from(const RowRun<T, Dim>& rows, int64_t first) {
  return {rows[first], rows.dim};
}
template <class T>
FARLIGHT_INLINE const T* const* rows_from(const T* const* rows, int64_t first) {
  return rows + first;
}

// Lane i: q · rows[i]. q is in the order of T's groups.
template <class T, class Rows, class Dim>
FARLIGHT_INLINE F dot_keys(const float* q, const Rows& rows, Dim dim) {
  F sums[W];
  FARLIGHT_UNROLL
  for (int i = 0; i < W; ++i) sums[i] = broadcast(0.0f);
  int64_t d = 0;
  for (; d + 2 * W <= dim; d += 2 * W) {
    const F qa = load(q + d), qb = load(q + d + W);
    FARLIGHT_UNROLL
    for (int i = 0; i < W; ++i) {
      F a, b;
      widen_group(rows[i] + d, a, b);
      sums[i] = fma(b, qb, fma(a, qa, sums[i]));
    }
  }
  if (d + W <= dim) {
    const F qa = load(q + d);
    FARLIGHT_UNROLL
    for (int i = 0; i < W; ++i) sums[i] = fma(widen(rows[i] + d), qa, sums[i]);
    d += W;
  }
  F total = sum_each(sums);
  if (d < dim) {
    float rest[W];
    for (int i = 0; i < W; ++i) {
      rest[i] = 0.0f;
      for (int64_t e = d; e < dim; ++e) rest[i] += q[e] * to_float(rows[i][e]);
    }
    total = add(total, load(rest));
  }
  return total;
}

// Whether scores of queries and keys of T are sums of pairs of products (vdpbf16ps). Not in the AMX build, where this was not
// measured.
template <class T>
constexpr bool multiplies_pairs = false;
#if defined(FARLIGHT_ISA_AVX512BF16)
template <>
constexpr bool multiplies_pairs<Bf16> = true;

// Lane i: q · rows[i], both bfloat16; q is padded with zeros to whole groups of 2 W.
template <class Rows, class Dim>
FARLIGHT_INLINE F dot_pairs(const Bf16* q, const Rows& rows, Dim dim) {
  F sums[W];
  FARLIGHT_UNROLL
  for (int i = 0; i < W; ++i) sums[i] = broadcast(0.0f);
  int64_t d = 0;
  for (; d + 2 * W <= dim; d += 2 * W) {
    const I pairs = _mm512_loadu_si512(q + d);
    FARLIGHT_UNROLL
    for (int i = 0; i < W; ++i) sums[i] = dot_bf16_pairs(sums[i], _mm512_loadu_si512(rows[i] + d), pairs);
  }
  if (d < dim) {
    const I pairs = _mm512_loadu_si512(q + d);
    const __mmask32 rest = (__mmask32{1} << (dim - d)) - 1;
    FARLIGHT_UNROLL
    for (int i = 0; i < W; ++i) sums[i] = dot_bf16_pairs(sums[i], _mm512_maskz_loadu_epi16(rest, rows[i] + d), pairs);
  }
  return sum_each(sums);
}
#else
template <class Rows, class Dim>
F dot_pairs(const Bf16*, const Rows&, Dim) = delete;
#endif

// Adds weights[r][i] * row[0 …] to sums[r] for R rows and V vectors.
template <class T, int R, int V>
FARLIGHT_INLINE void add_key(const T* row, int i, const float* const* weights, F (&sums)[R][V]) {
  F x[V];
  if constexpr (V == 1) x[0] = widen(row);
  else {
    FARLIGHT_UNROLL
    for (int v = 0; v < V; v += 2) widen_group(row + v * W, x[v], x[v + 1]);
  }
  FARLIGHT_UNROLL
  for (int r = 0; r < R; ++r) {
    const F w = broadcast(weights[r][i]);
    FARLIGHT_UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = fma(w, x[v], sums[r][v]);
  }
}

struct NoPrefetch {
  FARLIGHT_INLINE void operator()(int) const {}
};

// out[r][d …] += Σ_i weights[r][i] * rows[i][d …] for R rows and V vectors (V > 1: whole groups); prefetch(i) follows key i.
// Two sets of accumulators for one row hide the latency of the multiply-add.
template <class T, int R, int V, class Rows, class Prefetch>
FARLIGHT_INLINE void accumulate_slab(const Rows& rows, int n, const float* const* weights, float* const* out, int64_t d,
                                     const Prefetch& prefetch) {
  constexpr int kSets = R == 1 ? 2 : 1;
  F sums[kSets][R][V];
  FARLIGHT_UNROLL
  for (int r = 0; r < R; ++r) {
    FARLIGHT_UNROLL
    for (int v = 0; v < V; ++v) {
      sums[0][r][v] = load(out[r] + d + v * W);
      if constexpr (kSets == 2) sums[1][r][v] = broadcast(0.0f);
    }
  }
  int i = 0;
  for (; i + kSets <= n; i += kSets) {
    FARLIGHT_UNROLL
    for (int set = 0; set < kSets; ++set) {
      add_key<T, R, V>(rows[i + set] + d, i + set, weights, sums[set]);
      prefetch(i + set);
    }
  }
  if (i < n) {
    add_key<T, R, V>(rows[i] + d, i, weights, sums[0]);
    prefetch(i);
  }
  FARLIGHT_UNROLL
  for (int r = 0; r < R; ++r) {
    FARLIGHT_UNROLL
    for (int v = 0; v < V; ++v) {
      if constexpr (kSets == 2) sums[0][r][v] = add(sums[0][r][v], sums[1][r][v]);
      store(out[r] + d + v * W, sums[0][r][v]);
    }
  }
}

template <class T, int R, class Rows, class Dim, class Prefetch>
FARLIGHT_INLINE void accumulate(const Rows& rows, int n, const float* const* weights, float* const* out, Dim dim,
                                const Prefetch& prefetch) {
  int64_t d = 0;
  if (kSlab * W <= dim) accumulate_slab<T, R, kSlab>(rows, n, weights, out, d, prefetch), d += kSlab * W;
  else
    for (int i = 0; i < n; ++i) prefetch(i);
  for (; d + kSlab * W <= dim; d += kSlab * W) accumulate_slab<T, R, kSlab>(rows, n, weights, out, d, NoPrefetch{});
  for (; d + 2 * W <= dim; d += 2 * W) accumulate_slab<T, R, 2>(rows, n, weights, out, d, NoPrefetch{});
  for (; d + W <= dim; d += W) accumulate_slab<T, R, 1>(rows, n, weights, out, d, NoPrefetch{});
  for (; d < dim; ++d)
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < n; ++i) out[r][d] += weights[r][i] * to_float(rows[i][d]);
}

}  // namespace farlight::FARLIGHT_NS

// Operations on single rows of tensors (dtype conversion, dot, axpy, prefetch), and the transpose of a row block between
// row-major order and rows in lanes.
#pragma once

#include <cstring>

#include "../views.h"
#include "isa.h"

namespace farlight::FARLIGHT_NS {

using Bf16 = uint16_t;  // the bits of a bfloat16

FARLIGHT_INLINE float to_float(float x) { return x; }
FARLIGHT_INLINE float to_float(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
FARLIGHT_INLINE Bf16 to_bf16(float x) {  // round to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t round_up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<Bf16>(x == x ? round_up : 0x7fc0u);
}
FARLIGHT_INLINE F widen(const float* p) { return load(p); }

// to[d] = from[d] as float32 for d < n.
template <class T>
FARLIGHT_INLINE void copy_as_float(const T* from, float* to, int64_t n) {
  int64_t d = 0;
  for (; d + W <= n; d += W) store(to + d, widen(from + d));
  for (; d < n; ++d) to[d] = to_float(from[d]);
}

// to[at + d] = factor * from[d] for d < n, rounded to the element type.
FARLIGHT_INLINE void write_row(Type type, void* to, int64_t at, const float* from, int64_t n, float factor = 1.0f) {
  const F f = broadcast(factor);
  int64_t d = 0;
  if (type == Type::f32) {
    float* out = static_cast<float*>(to) + at;
    for (; d + W <= n; d += W) store(out + d, mul(load(from + d), f));
    for (; d < n; ++d) out[d] = factor * from[d];
  } else {
    Bf16* out = static_cast<Bf16*>(to) + at;
#if defined(FARLIGHT_BF16_PAIRS)
    for (; d + 2 * W <= n; d += 2 * W) store_bf16(out + d, narrow(mul(load(from + d), f), mul(load(from + d + W), f)));
#endif
    for (; d < n; ++d) out[d] = to_bf16(factor * from[d]);
  }
}
// to[d] = from[at + d] as float32 for d < n.
FARLIGHT_INLINE void read_row(Type type, const void* from, int64_t at, float* to, int64_t n) {
  if (type == Type::f32) copy_as_float(static_cast<const float*>(from) + at, to, n);
  else copy_as_float(static_cast<const Bf16*>(from) + at, to, n);
}

// Software prefetch of a row of n elements into L2.
template <class T>
FARLIGHT_INLINE void prefetch_row(const T* row, int64_t n) {
  const char* at = reinterpret_cast<const char*>(row);
  for (int64_t byte = 0; byte < n * static_cast<int64_t>(sizeof(T)); byte += 64) FARLIGHT_PREFETCH_L2(at + byte);
}

// Software prefetch of an accumulator row of n floats into L1.
FARLIGHT_INLINE void prefetch_row_for_write(const float* row, int64_t n) {
  for (int64_t d = 0; d < n; d += 16) FARLIGHT_PREFETCH(row + d);
}

// dot(a, b) in float32. Two accumulators, then the tail, in a fixed order: deterministic.
template <class S, class T>
FARLIGHT_INLINE float dot(const S* a, const T* b, int64_t n) {
  F x = broadcast(0.0f), y = broadcast(0.0f);
  int64_t d = 0;
  for (; d + 2 * W <= n; d += 2 * W) {
    x = fma(widen(a + d), widen(b + d), x);
    y = fma(widen(a + d + W), widen(b + d + W), y);
  }
  for (; d + W <= n; d += W) x = fma(widen(a + d), widen(b + d), x);
  float total = sum(add(x, y));
  for (; d < n; ++d) total += to_float(a[d]) * to_float(b[d]);
  return total;
}
// to += weight * b.
template <class T>
FARLIGHT_INLINE void axpy(float* to, float weight, const T* b, int64_t n) {
  const F w = broadcast(weight);
  int64_t d = 0;
  for (; d + W <= n; d += W) store(to + d, fma(w, widen(b + d), load(to + d)));
  for (; d < n; ++d) to[d] += weight * to_float(b[d]);
}

// Transposes a block of 32-bit words: to[j][i] = rows[i][j] for `count` rows (a multiple of 8) and 8 words of each, from byte
// `offset` of the rows on; `stride` bytes between rows of `to`.
FARLIGHT_INLINE void transpose_block(const char* const* rows, int count, int64_t offset, char* to, int64_t stride) {
  int i = 0;
#if defined(FARLIGHT_TRANSPOSE16)
  for (; i + 16 <= count; i += 16) transpose16(rows + i, offset, to + i * 4, stride);
#endif
  for (; i < count; i += 8) transpose8(rows + i, offset, to + i * 4, stride);
}

// Transpose of a row block into lanes: to[d][s] = rows[s][d] for kRows rows of `words` 32-bit words.
inline void transpose_to_lanes(const char* const* rows, int64_t words, void* to) {
  constexpr int64_t line = kRows * 4;
  char* out = static_cast<char*>(to);
  int64_t d = 0;
  for (; d + 8 <= words; d += 8) transpose_block(rows, kRows, d * 4, out + d * line, line);
  for (; d < words; ++d)
    for (int s = 0; s < kRows; ++s) std::memcpy(out + d * line + s * 4, rows[s] + d * 4, 4);
}

// Inverse of transpose_to_lanes: to[s][d] = from[d][s], rows of `to` `ld` floats apart; both arrays are padded to a multiple of
// 8 in d.
inline void transpose_from_lanes(const float* from, int64_t dim, float* to, int64_t ld) {
  for (int64_t d = 0; d < dim; d += 16) {
    const int count = dim - d > 8 ? 16 : 8;
    const char* rows[16];
    for (int i = 0; i < count; ++i) rows[i] = reinterpret_cast<const char*>(from + (d + i) * kRows);
    for (int s = 0; s < kRows; s += 8) transpose_block(rows, count, s * 4, reinterpret_cast<char*>(to + s * ld + d), ld * 4);
  }
}

}  // namespace farlight::FARLIGHT_NS

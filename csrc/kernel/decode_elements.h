// Element types of stored keys and values: conversion of 2 W elements to two vectors of float32, and back for single rows.
//
// A group of 2 W elements may be widened in the order that is cheapest: bfloat16 pairs are split into even and odd elements by
// one shift and one mask. Queries are brought into the same order once (`to_group_order`), sums back at the end.
#pragma once

#include <cstring>

#include "../decode.h"
#include "row_ops.h"

namespace farlight::FARLIGHT_NS {

struct Half {
  uint16_t bits;
};

FARLIGHT_INLINE float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  uint32_t bits = magnitude << 13;
  float y;
  if (magnitude >= 0x7c00u) {  // inf and NaN
    bits |= 0x7f800000u;
    std::memcpy(&y, &bits, sizeof y);
  } else {
    std::memcpy(&y, &bits, sizeof y);
    y *= 0x1p112f;  // the difference of the exponents' biases; subnormal numbers become normal ones
  }
  std::memcpy(&bits, &y, sizeof bits);
  bits |= sign;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
FARLIGHT_INLINE Half to_half(float x) {  // round to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu, half;
  if (magnitude > 0x7f800000u) half = 0x7e00u;
  else if (magnitude >= 0x477ff000u) half = 0x7c00u;  // from 65 520 on: infinity
  else if (magnitude < 0x38800000u) {                 // subnormal: the addition rounds to multiples of 2^-24
    float y;
    std::memcpy(&y, &magnitude, sizeof y);
    y += 0.5f;
    std::memcpy(&magnitude, &y, sizeof y);
    half = magnitude - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}
FARLIGHT_INLINE float to_float(int8_t x) { return static_cast<float>(x); }

#if defined(FARLIGHT_BF16_PAIRS) || defined(FARLIGHT_ISA_AVX512)
FARLIGHT_INLINE F widen(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FARLIGHT_INLINE F widen(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#define FARLIGHT_SPLIT_BF16
FARLIGHT_INLINE void split_pairs(const Bf16* p, F& even, F& odd) {
  const I words = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
// Lane i of the result is the sum of x[i].
FARLIGHT_INLINE F sum_each(F (&x)[W]) {
  F y[8], z[4];
  FARLIGHT_UNROLL
  for (int i = 0; i < 8; ++i)
    y[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  FARLIGHT_UNROLL
  for (int i = 0; i < 4; ++i) {  // 128-bit lane l of z[i]: partial sums of x[4 i …]
    const __m512d a = _mm512_castps_pd(y[2 * i]), b = _mm512_castps_pd(y[2 * i + 1]);
    z[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const F a = _mm512_add_ps(_mm512_shuffle_f32x4(z[0], z[1], 0x88), _mm512_shuffle_f32x4(z[0], z[1], 0xdd));
  const F b = _mm512_add_ps(_mm512_shuffle_f32x4(z[2], z[3], 0x88), _mm512_shuffle_f32x4(z[2], z[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
FARLIGHT_INLINE float max_lane(F x) { return _mm512_reduce_max_ps(x); }
#elif defined(FARLIGHT_ISA_AVX2)
FARLIGHT_INLINE F widen(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
FARLIGHT_INLINE F widen(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#define FARLIGHT_SPLIT_BF16
FARLIGHT_INLINE void split_pairs(const Bf16* p, F& even, F& odd) {
  const I words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(words, broadcast_i(0xffff0000u)));
}
FARLIGHT_INLINE F sum_each(F (&x)[W]) {
  const F a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  const F b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
FARLIGHT_INLINE float max_lane(F x) {
  float v[W], m;
  store(v, x);
  m = v[0];
  for (int i = 1; i < W; ++i) m = max(m, v[i]);
  return m;
}
#else
FARLIGHT_INLINE F widen(const Half* p) {
  float v[W];
  for (int i = 0; i < W; ++i) v[i] = to_float(p[i]);
  return load(v);
}
FARLIGHT_INLINE F widen(const int8_t* p) {
  float v[W];
  for (int i = 0; i < W; ++i) v[i] = static_cast<float>(p[i]);
  return load(v);
}
FARLIGHT_INLINE F sum_each(F (&x)[W]) {
  float v[W];
  for (int i = 0; i < W; ++i) v[i] = sum(x[i]);
  return load(v);
}
FARLIGHT_INLINE float max_lane(F x) {
  float v[W], m;
  store(v, x);
  m = v[0];
  for (int i = 1; i < W; ++i) m = max(m, v[i]);
  return m;
}
#endif

// Whether groups of 2 W elements of T are widened as (even elements, odd elements), else as (first W, last W).
template <class T>
constexpr bool splits_pairs = false;
#if defined(FARLIGHT_SPLIT_BF16)
template <>
constexpr bool splits_pairs<Bf16> = true;
#endif

template <class T>
FARLIGHT_INLINE void widen_group(const T* p, F& a, F& b) {
  a = widen(p), b = widen(p + W);
}
#if defined(FARLIGHT_SPLIT_BF16)
FARLIGHT_INLINE void widen_group(const Bf16* p, F& a, F& b) { split_pairs(p, a, b); }
#endif

// A row of `dim` floats, times a factor, in the order in which T is widened, and back; groups begin at multiples of 2 W.
template <class T>
FARLIGHT_INLINE void to_group_order(const float* from, int64_t dim, float factor, float* to) {
  const int64_t groups_end = splits_pairs<T> ? dim / (2 * W) * (2 * W) : 0;
  for (int64_t d = 0; d < groups_end; d += 2 * W)
    for (int64_t i = 0; i < W; ++i) to[d + i] = factor * from[d + 2 * i], to[d + W + i] = factor * from[d + 2 * i + 1];
  for (int64_t d = groups_end; d < dim; ++d) to[d] = factor * from[d];
}
template <class T>
FARLIGHT_INLINE void from_group_order(const float* from, int64_t dim, float* to) {
  const int64_t groups_end = splits_pairs<T> ? dim / (2 * W) * (2 * W) : 0;
  for (int64_t d = 0; d < groups_end; d += 2 * W)
    for (int64_t i = 0; i < W; ++i) to[d + 2 * i] = from[d + i], to[d + 2 * i + 1] = from[d + W + i];
  for (int64_t d = groups_end; d < dim; ++d) to[d] = from[d];
}

// A row of `dim` elements as float32, in the order of its elements.
template <class T>
FARLIGHT_INLINE void widen_row(const void* from, int64_t dim, float factor, float* to) {
  const T* row = static_cast<const T*>(from);
  for (int64_t d = 0; d < dim; ++d) to[d] = factor * to_float(row[d]);
}

inline void widen_row(KeyType type, const void* row, int64_t dim, float factor, float* to) {
  if (type == KeyType::f32) widen_row<float>(row, dim, factor, to);
  else if (type == KeyType::bf16) widen_row<Bf16>(row, dim, factor, to);
  else if (type == KeyType::f16) widen_row<Half>(row, dim, factor, to);
  else widen_row<int8_t>(row, dim, factor, to);
}

// i8: symmetric, scale = max |x| / 127, so that |x - scale * code| <= scale / 2. A row that is not finite gets the scale NaN.
inline float quantize_row(const float* row, int64_t dim, int8_t* to) {
  float largest = 0.0f, nan_or_zero = 0.0f;
  for (int64_t d = 0; d < dim; ++d) {
    const float size = row[d] < 0.0f ? -row[d] : row[d];
    largest = max(largest, size);
    nan_or_zero += row[d] * 0.0f;
  }
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  const bool is_finite = nan_or_zero == nan_or_zero && inverse <= 3.4e38f;
  for (int64_t d = 0; d < dim; ++d) {
    const float x = is_finite ? row[d] * inverse : 0.0f;
    to[d] = static_cast<int8_t>(static_cast<int>(x + (x < 0.0f ? -0.5f : 0.5f)));
  }
  return largest / 127.0f + (nan_or_zero == nan_or_zero ? 0.0f : nan_or_zero);
}

inline float narrow_row(KeyType type, const float* row, int64_t dim, void* to) {
  if (type == KeyType::i8) return quantize_row(row, dim, static_cast<int8_t*>(to));
  if (type == KeyType::f32) std::memcpy(to, row, static_cast<size_t>(dim) * 4);
  else if (type == KeyType::bf16)
    for (int64_t d = 0; d < dim; ++d) static_cast<Bf16*>(to)[d] = to_bf16(row[d]);
  else
    for (int64_t d = 0; d < dim; ++d) static_cast<Half*>(to)[d] = to_half(row[d]);
  return 1.0f;
}

}  // namespace farlight::FARLIGHT_NS

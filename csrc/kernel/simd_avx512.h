// Sixteen lanes: AVX-512 F, DQ, BW, VL, and where the machine has it BF16.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "transpose_x86.h"
namespace farlight::FARLIGHT_NS {

using F = __m512;
using I = __m512i;
constexpr int W = 16;           // lanes
constexpr int kM = 8, kV = 2;         // register block: broadcast operands x vectors

FARLIGHT_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
FARLIGHT_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
FARLIGHT_INLINE F all(float x) { return _mm512_set1_ps(x); }
FARLIGHT_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
FARLIGHT_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
FARLIGHT_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
FARLIGHT_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
// The larger; b where either is NaN.
FARLIGHT_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
FARLIGHT_INLINE float sum(F x) { return _mm512_reduce_add_ps(x); }
FARLIGHT_INLINE uint32_t greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
// Lane i: yes where bit i is set.
FARLIGHT_INLINE F choose(uint32_t bits, F yes, F no) { return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), no, yes); }

// 2^x without its fractional part's polynomial: x = floor(x) + f; scaled(p, x) = p * 2^floor(x).
FARLIGHT_INLINE F fraction(F& x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
FARLIGHT_INLINE F scaled(F p, F x) { return _mm512_scalef_ps(p, x); }

FARLIGHT_INLINE I load_i(const int32_t* p) { return _mm512_loadu_si512(p); }
FARLIGHT_INLINE I load_i(const uint32_t* p) { return _mm512_loadu_si512(p); }
FARLIGHT_INLINE void store_i(uint32_t* p, I x) { _mm512_storeu_si512(p, x); }
FARLIGHT_INLINE I all_i(uint32_t x) { return _mm512_set1_epi32(static_cast<int32_t>(x)); }
FARLIGHT_INLINE I exclusive(I a, I b) { return _mm512_xor_si512(a, b); }
FARLIGHT_INLINE I times(I a, I b) { return _mm512_mullo_epi32(a, b); }
template <int N>
FARLIGHT_INLINE I right(I a) { return _mm512_srli_epi32(a, N); }
FARLIGHT_INLINE uint32_t less(I a, I b) { return _mm512_cmplt_epi32_mask(a, b); }
FARLIGHT_INLINE uint32_t below(I a, I b) { return _mm512_cmplt_epu32_mask(a, b); }  // unsigned
FARLIGHT_INLINE uint32_t share_bits(I a, I b) { return _mm512_test_epi32_mask(a, b); }

FARLIGHT_INLINE F widen(const uint16_t* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

#if defined(FARLIGHT_PAIRS)
// Pairs of bfloat16 in 32-bit words: acc + a.low * b.low + a.high * b.high.
FARLIGHT_INLINE F dot_pairs(F acc, I a, I b) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh&>(a), reinterpret_cast<__m512bh&>(b));
}
// Both vectors to bfloat16, a's lanes first: word i holds the neighbours 2i, 2i + 1.
FARLIGHT_INLINE I narrowed(F a, F b) {
  const __m512bh x = _mm512_cvtne2ps_pbh(b, a);
  return reinterpret_cast<const __m512i&>(x);
}
// The lanes of two rows of 32 bfloat16 side by side: word i of (low, high) holds (x[i], y[i]) for i < 16 and from 16.
FARLIGHT_INLINE void interleave(I x, I y, I& low, I& high) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36,
                                         4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  low = _mm512_permutex2var_epi16(x, first, y);
  high = _mm512_permutex2var_epi16(x, second, y);
}
// The first n <= 32 of a row of bfloat16, zeros behind.
FARLIGHT_INLINE I load_halves(const uint16_t* p, int64_t n) {
  return n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << n) - 1), p);
}
// Word i holds (a[i], b[i]), rounded to bfloat16.
FARLIGHT_INLINE I paired(F a, F b) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                         19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, narrowed(a, b));
}
#endif

}  // namespace farlight::FARLIGHT_NS

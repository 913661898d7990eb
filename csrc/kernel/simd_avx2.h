// SIMD layer, 8 float32 lanes: AVX2 and FMA. See simd_avx512.h for what the functions mean.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "transpose_x86.h"

namespace farlight::FARLIGHT_NS {

using F = __m256;
using I = __m256i;
constexpr int W = 8;
constexpr int kM = 6, kV = 2;     // register block: 6 broadcast operands x 2 vectors, 12 of 16 registers hold sums
constexpr int kAccumulators = 1;  // independent accumulators per sum over keys

FARLIGHT_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
FARLIGHT_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
FARLIGHT_INLINE F broadcast(float x) { return _mm256_set1_ps(x); }
FARLIGHT_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
FARLIGHT_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
FARLIGHT_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
FARLIGHT_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
FARLIGHT_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
FARLIGHT_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
FARLIGHT_INLINE float sum(F x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
}
FARLIGHT_INLINE uint32_t greater(F a, F b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}

FARLIGHT_INLINE I load_i(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
FARLIGHT_INLINE I load_i(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
FARLIGHT_INLINE void store_i(uint32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
FARLIGHT_INLINE I broadcast_i(uint32_t x) { return _mm256_set1_epi32(static_cast<int32_t>(x)); }
FARLIGHT_INLINE I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
FARLIGHT_INLINE I mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
template <int N>
FARLIGHT_INLINE I shr(I a) {
  return _mm256_srli_epi32(a, N);
}
FARLIGHT_INLINE uint32_t bits_of(I mask) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(mask))); }
FARLIGHT_INLINE uint32_t less_i32(I a, I b) { return bits_of(_mm256_cmpgt_epi32(b, a)); }
FARLIGHT_INLINE uint32_t less_u32(I a, I b) { return ~bits_of(_mm256_cmpeq_epi32(_mm256_max_epu32(a, b), a)) & 0xffu; }
FARLIGHT_INLINE uint32_t test_bits(I a, I b) {
  return ~bits_of(_mm256_cmpeq_epi32(_mm256_and_si256(a, b), _mm256_setzero_si256())) & 0xffu;
}
FARLIGHT_INLINE F select(uint32_t bits, F yes, F no) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i mask = _mm256_cmpeq_epi32(_mm256_and_si256(broadcast_i(bits), lane), lane);
  return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(mask));
}

// min and max return their second operand where either is NaN, so the clamps keep NaN; inputs below -127 become -127, whose
// power is 0.
FARLIGHT_INLINE F split_floor(F& x) {
  x = _mm256_max_ps(broadcast(-127.0f), _mm256_min_ps(broadcast(127.0f), x));
  return sub(x, _mm256_floor_ps(x));
}
FARLIGHT_INLINE F mul_pow2_floor(F p, F x) {
  const __m256i n = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_floor_ps(x)), _mm256_set1_epi32(127));
  return mul(p, _mm256_castsi256_ps(_mm256_slli_epi32(n, 23)));
}

FARLIGHT_INLINE F widen(const uint16_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}

}  // namespace farlight::FARLIGHT_NS

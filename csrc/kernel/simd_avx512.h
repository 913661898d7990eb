// SIMD layer, 16 float32 lanes: AVX-512 F, DQ, BW, VL, and BF16 where FARLIGHT_BF16_PAIRS is defined.
//
// All SIMD layers define the same names: F and I are vectors of W float32 and W 32-bit integers; functions act on every lane.
// Comparisons return a bit mask, bit i for lane i. `_i` marks integer vectors, `_u32` and `_i32` the signedness of a
// comparison.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "transpose_x86.h"
namespace farlight::FARLIGHT_NS {

using F = __m512;
using I = __m512i;
constexpr int W = 16;             // lanes
constexpr int kM = 8, kV = 2;     // register block: 8 broadcast operands x 2 vectors, 16 of 32 registers hold sums
constexpr int kAccumulators = 2;  // independent accumulators per sum over keys

FARLIGHT_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
FARLIGHT_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
FARLIGHT_INLINE F broadcast(float x) { return _mm512_set1_ps(x); }
FARLIGHT_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
FARLIGHT_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
FARLIGHT_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
FARLIGHT_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
FARLIGHT_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
// max(a, b), min(a, b); b where either is NaN.
FARLIGHT_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
FARLIGHT_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
FARLIGHT_INLINE float sum(F x) { return _mm512_reduce_add_ps(x); }
FARLIGHT_INLINE uint32_t greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
// Blend: `yes` in lanes whose bit is set, else `no`.
FARLIGHT_INLINE F select(uint32_t bits, F yes, F no) { return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), no, yes); }

// The two halves of exp2: split_floor returns x - floor(x) (and may clamp x); mul_pow2_floor(p, x) returns p * 2^floor(x).
FARLIGHT_INLINE F split_floor(F& x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
FARLIGHT_INLINE F mul_pow2_floor(F p, F x) { return _mm512_scalef_ps(p, x); }

FARLIGHT_INLINE I load_i(const int32_t* p) { return _mm512_loadu_si512(p); }
FARLIGHT_INLINE I load_i(const uint32_t* p) { return _mm512_loadu_si512(p); }
FARLIGHT_INLINE void store_i(uint32_t* p, I x) { _mm512_storeu_si512(p, x); }
FARLIGHT_INLINE I broadcast_i(uint32_t x) { return _mm512_set1_epi32(static_cast<int32_t>(x)); }
FARLIGHT_INLINE I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
FARLIGHT_INLINE I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
template <int N>
FARLIGHT_INLINE I shr(I a) {
  return _mm512_srli_epi32(a, N);
}
FARLIGHT_INLINE uint32_t less_i32(I a, I b) { return _mm512_cmplt_epi32_mask(a, b); }
FARLIGHT_INLINE uint32_t less_u32(I a, I b) { return _mm512_cmplt_epu32_mask(a, b); }  // unsigned
FARLIGHT_INLINE bool equal(I a, I b) { return _mm512_cmpneq_epi32_mask(a, b) == 0; }
FARLIGHT_INLINE uint32_t test_bits(I a, I b) { return _mm512_test_epi32_mask(a, b); }

FARLIGHT_INLINE F widen(const uint16_t* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

#define FARLIGHT_TRANSPOSE16
// Transposes 32-bit words: to[j][i] = rows[i][j] for 16 rows, 8 words of each from byte `offset` on; `stride` bytes between
// rows of `to`.
FARLIGHT_INLINE void transpose16(const char* const* rows, int64_t offset, char* to, int64_t stride) {
  // per half h (rows 8h to 8h + 7): lanes of rows 0-3 of word j, rows 0-3 of word j + 4, rows 4-7 of j, rows 4-7 of j + 4
  F column[2][4];
  FARLIGHT_UNROLL
  for (int h = 0; h < 2; ++h) {
    F x[4];
    FARLIGHT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const __m256 low = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[8 * h + i] + offset));
      const __m256 high = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[8 * h + i + 4] + offset));
      x[i] = _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
    }
    const F a = _mm512_unpacklo_ps(x[0], x[1]), b = _mm512_unpacklo_ps(x[2], x[3]);
    const F c = _mm512_unpackhi_ps(x[0], x[1]), d = _mm512_unpackhi_ps(x[2], x[3]);
    column[h][0] = _mm512_shuffle_ps(a, b, 0x44);
    column[h][1] = _mm512_shuffle_ps(a, b, 0xee);
    column[h][2] = _mm512_shuffle_ps(c, d, 0x44);
    column[h][3] = _mm512_shuffle_ps(c, d, 0xee);
  }
  FARLIGHT_UNROLL
  for (int j = 0; j < 4; ++j) {
    store(reinterpret_cast<float*>(to + j * stride), _mm512_shuffle_f32x4(column[0][j], column[1][j], 0x88));
    store(reinterpret_cast<float*>(to + (j + 4) * stride), _mm512_shuffle_f32x4(column[0][j], column[1][j], 0xdd));
  }
}

#if defined(FARLIGHT_BF16_PAIRS)
// vdpbf16ps on pairs of bfloat16 in 32-bit words: acc + a.low * b.low + a.high * b.high.
FARLIGHT_INLINE F dot_bf16_pairs(F acc, I a, I b) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh&>(a), reinterpret_cast<__m512bh&>(b));
}
// Rounds both vectors to bfloat16, a's lanes first: word i holds elements 2i and 2i + 1.
FARLIGHT_INLINE I narrow(F a, F b) {
  const __m512bh x = _mm512_cvtne2ps_pbh(b, a);
  return reinterpret_cast<const __m512i&>(x);
}
// Interleaves two rows of 32 bfloat16: words 0-15 of (low, high) hold (x[i], y[i]) for i < 16 and for i >= 16.
FARLIGHT_INLINE void interleave(I x, I y, I& low, I& high) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36,
                                         4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  low = _mm512_permutex2var_epi16(x, first, y);
  high = _mm512_permutex2var_epi16(x, second, y);
}
// The first min(n, 32) elements of a row of bfloat16; zeros behind.
FARLIGHT_INLINE I load_bf16(const uint16_t* p, int64_t n) {
  return n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << n) - 1), p);
}
FARLIGHT_INLINE void store_bf16(uint16_t* p, I x) { _mm512_storeu_si512(p, x); }
// Rounds to bfloat16 and interleaves: word i holds (a[i], b[i]).
FARLIGHT_INLINE I narrow_interleaved(F a, F b) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
                                         4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, narrow(a, b));
}

// The first min(n, 16) elements of a row of float32; zeros behind.
FARLIGHT_INLINE F load_f32(const float* p, int64_t n) {
  return n >= 16 ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(static_cast<__mmask16>(n > 0 ? (1u << n) - 1 : 0), p);
}
// Splits float32 exactly into three bfloat16, x = part[0] + part[1] + part[2], each in the upper half of a word: bfloat16 has 8
// significant bits and float32 has 24. part[0] truncates; part[1] rounds, so that the products the kernels leave out have
// either sign and do not accumulate a bias.
constexpr int kParts = 3;
// Lanes that hold +inf or -inf.
FARLIGHT_INLINE uint32_t inf_mask(F x) { return _mm512_fpclass_ps_mask(x, 0x18); }
FARLIGHT_INLINE void split_bf16x3(F x, I (&part)[kParts]) {
  const I upper = broadcast_i(0xffff0000u);
  part[0] = _mm512_and_si512(_mm512_castps_si512(x), upper);
  const F rest = _mm512_sub_ps(x, _mm512_castsi512_ps(part[0]));
  part[1] = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(rest), broadcast_i(0x8000u)), upper);
  part[2] = _mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(part[1])));
}
// Takes the upper 16 bits of both vectors: interleave_upper: word i holds (a[i], b[i]); pack_upper: word i holds elements 2i
// and 2i + 1, a's lanes first.
FARLIGHT_INLINE I interleave_upper(I a, I b) { return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(a, 16), b); }
FARLIGHT_INLINE I pack_upper(I a, I b) {
  const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21,
                                       19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(a, odd, b);
}
#endif

}  // namespace farlight::FARLIGHT_NS

// Transpose of 8 x 8 32-bit words with 256-bit shuffles, for AVX2 and AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace farlight::FARLIGHT_NS {

// to[c][r] = from[r][c]; `at` (offset into the rows) and `ld` (row stride of `to`) in bytes.
FARLIGHT_INLINE void transpose8(const char* const* from, int64_t at, char* to, int64_t ld) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(from[i] + at));
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(reinterpret_cast<float*>(to + i * ld), _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(reinterpret_cast<float*>(to + (i + 4) * ld), _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

}  // namespace farlight::FARLIGHT_NS

// SIMD layer, 4 float32 lanes, for any CPU: GCC/Clang vector types (NEON on arm64, SSE2 on x86-64), or plain arrays and loops
// for other compilers. See simd_avx512.h for what the functions mean.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace farlight::FARLIGHT_NS {

// W lanes; kAccumulators independent accumulators per sum over keys; register block of kM broadcast operands x kV vectors,
// whose sums take half of the vector registers.
constexpr int W = 4;
constexpr int kAccumulators = 1;
#if defined(__aarch64__)
constexpr int kM = 4, kV = 4;
#else
constexpr int kM = 4, kV = 2;
#endif

#if defined(__GNUC__) || defined(__clang__)

typedef float F __attribute__((vector_size(16)));
typedef uint32_t I __attribute__((vector_size(16)));
typedef int32_t Signed __attribute__((vector_size(16)));

FARLIGHT_INLINE F broadcast(float x) { return F{x, x, x, x}; }
FARLIGHT_INLINE I broadcast_i(uint32_t x) { return I{x, x, x, x}; }
FARLIGHT_INLINE F fma(F a, F b, F c) { return a * b + c; }
FARLIGHT_INLINE F add(F a, F b) { return a + b; }
FARLIGHT_INLINE F sub(F a, F b) { return a - b; }
FARLIGHT_INLINE F mul(F a, F b) { return a * b; }
FARLIGHT_INLINE F div(F a, F b) { return a / b; }
FARLIGHT_INLINE F max(F a, F b) { return a > b ? a : b; }
FARLIGHT_INLINE I bit_xor(I a, I b) { return a ^ b; }
FARLIGHT_INLINE I mul(I a, I b) { return a * b; }
template <int N>
FARLIGHT_INLINE I shr(I a) {
  return a >> N;
}
template <class M>
FARLIGHT_INLINE uint32_t bits_of(M mask) {
  const Signed lane = {1, 2, 4, 8};
  const Signed x = (Signed)mask & lane;
  return static_cast<uint32_t>(x[0] | x[1] | x[2] | x[3]);
}
FARLIGHT_INLINE uint32_t greater(F a, F b) { return bits_of(a > b); }
FARLIGHT_INLINE uint32_t less_i32(I a, I b) { return bits_of((Signed)a < (Signed)b); }
FARLIGHT_INLINE uint32_t less_u32(I a, I b) { return bits_of(a < b); }
FARLIGHT_INLINE uint32_t test_bits(I a, I b) { return bits_of((a & b) != I{0, 0, 0, 0}); }
FARLIGHT_INLINE F select(uint32_t bits, F yes, F no) {
  const I lane = {1, 2, 4, 8};
  return (broadcast_i(bits) & lane) != I{0, 0, 0, 0} ? yes : no;
}
FARLIGHT_INLINE F split_floor(F& x) {
  x = x < broadcast(-127.0f) ? broadcast(-127.0f) : x;
  x = x > broadcast(127.0f) ? broadcast(127.0f) : x;
  // floor: adding 1.5 * 2^23 rounds to the nearest integer, which is at most one too large
  F n = (x + broadcast(12582912.0f)) - broadcast(12582912.0f);
  n = n > x ? n - broadcast(1.0f) : n;
  return x - n;
}
FARLIGHT_INLINE F mul_pow2_floor(F p, F x) {
  F n = (x + broadcast(12582912.0f)) - broadcast(12582912.0f);
  n = n > x ? n - broadcast(1.0f) : n;
  n = n == n ? n : broadcast(0.0f);  // p is NaN itself there
  const Signed bits = (__builtin_convertvector(n, Signed) + 127) << 23;
  return p * (F)bits;
}

#else

struct F {
  float v[W];
};
struct I {
  uint32_t v[W];
};

#define FARLIGHT_LANES(TYPE, EXPRESSION)             \
  TYPE r;                                            \
  for (int i = 0; i < W; ++i) r.v[i] = (EXPRESSION); \
  return r
#define FARLIGHT_BITS(EXPRESSION)                               \
  uint32_t r = 0;                                               \
  for (int i = 0; i < W; ++i) r |= (EXPRESSION) ? 1u << i : 0u; \
  return r

FARLIGHT_INLINE F broadcast(float x) { FARLIGHT_LANES(F, x); }
FARLIGHT_INLINE I broadcast_i(uint32_t x) { FARLIGHT_LANES(I, x); }
FARLIGHT_INLINE F fma(F a, F b, F c) { FARLIGHT_LANES(F, a.v[i] * b.v[i] + c.v[i]); }
FARLIGHT_INLINE F add(F a, F b) { FARLIGHT_LANES(F, a.v[i] + b.v[i]); }
FARLIGHT_INLINE F sub(F a, F b) { FARLIGHT_LANES(F, a.v[i] - b.v[i]); }
FARLIGHT_INLINE F mul(F a, F b) { FARLIGHT_LANES(F, a.v[i] * b.v[i]); }
FARLIGHT_INLINE F div(F a, F b) { FARLIGHT_LANES(F, a.v[i] / b.v[i]); }
FARLIGHT_INLINE F max(F a, F b) { FARLIGHT_LANES(F, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
FARLIGHT_INLINE I bit_xor(I a, I b) { FARLIGHT_LANES(I, a.v[i] ^ b.v[i]); }
FARLIGHT_INLINE I mul(I a, I b) { FARLIGHT_LANES(I, a.v[i] * b.v[i]); }
template <int N>
FARLIGHT_INLINE I shr(I a) {
  FARLIGHT_LANES(I, a.v[i] >> N);
}
FARLIGHT_INLINE uint32_t greater(F a, F b) { FARLIGHT_BITS(a.v[i] > b.v[i]); }
FARLIGHT_INLINE uint32_t less_i32(I a, I b) { FARLIGHT_BITS(static_cast<int32_t>(a.v[i]) < static_cast<int32_t>(b.v[i])); }
FARLIGHT_INLINE uint32_t less_u32(I a, I b) { FARLIGHT_BITS(a.v[i] < b.v[i]); }
FARLIGHT_INLINE uint32_t test_bits(I a, I b) { FARLIGHT_BITS((a.v[i] & b.v[i]) != 0); }
FARLIGHT_INLINE F select(uint32_t bits, F yes, F no) { FARLIGHT_LANES(F, (bits >> i) & 1 ? yes.v[i] : no.v[i]); }
FARLIGHT_INLINE F split_floor(F& x) {
  for (int i = 0; i < W; ++i) x.v[i] = x.v[i] < -127.0f ? -127.0f : x.v[i] > 127.0f ? 127.0f : x.v[i];
  FARLIGHT_LANES(F, x.v[i] - std::floor(x.v[i]));
}
FARLIGHT_INLINE F mul_pow2_floor(F p, F x) {
  FARLIGHT_LANES(F, x.v[i] < -126.0f ? 0.0f : x.v[i] == x.v[i] ? std::ldexp(p.v[i], (int)std::floor(x.v[i])) : x.v[i]);
}
#undef FARLIGHT_LANES
#undef FARLIGHT_BITS

#endif

FARLIGHT_INLINE F load(const float* p) {
  F x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
FARLIGHT_INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
FARLIGHT_INLINE I load_i(const int32_t* p) {
  I x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
FARLIGHT_INLINE I load_i(const uint32_t* p) {
  I x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
FARLIGHT_INLINE void store_i(uint32_t* p, I x) { std::memcpy(p, &x, sizeof x); }
FARLIGHT_INLINE float sum(F x) {
  float v[W];
  store(v, x);
  return (v[0] + v[2]) + (v[1] + v[3]);
}
FARLIGHT_INLINE F widen(const uint16_t* p) {
  uint32_t v[W];
  for (int i = 0; i < W; ++i) v[i] = static_cast<uint32_t>(p[i]) << 16;
  F x;
  std::memcpy(&x, v, sizeof x);
  return x;
}
// 8 x 8 words: to[c][r] = from[r][c], `at` and `ld` in bytes.
FARLIGHT_INLINE void transpose8(const char* const* from, int64_t at, char* to, int64_t ld) {
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < 8; ++c) std::memcpy(to + c * ld + 4 * r, from[r] + at + 4 * c, 4);
}

}  // namespace farlight::FARLIGHT_NS

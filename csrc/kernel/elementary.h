// Elementary functions: vectorised exp2 for softmax, tanh for softcap, and the counter-based hash of dropout.
#pragma once

#include "isa.h"

namespace farlight::FARLIGHT_NS {

// 2^x for x <= 127: 2^floor(x) times a polynomial in the fractional part. Relative error 8e-8 (Degree 5, float32) or 1e-4
// (Degree 3, enough for weights that are rounded to bfloat16). Underflow below 2^-126 gives 0; NaN stays NaN. The coefficients
// are minimax under the constraint p(0) = 1, for degree 3 also p(1) = 2: an x that should be 0 and was rounded to just below it
// still gives 1.
template <int Degree>
FARLIGHT_INLINE F exp2_poly(F x) {
  const F f = split_floor(x);
  F p;
  if constexpr (Degree == 3) {
    p = fma(broadcast(0.07826796919107437f), f, broadcast(0.226307675242424f));
    p = fma(p, f, broadcast(0.6954243183135986f));
  } else {
    p = fma(broadcast(0.0018671301659196615f), f, broadcast(0.009017029777169228f));
    p = fma(p, f, broadcast(0.05579991266131401f));
    p = fma(p, f, broadcast(0.24016444385051727f));
    p = fma(p, f, broadcast(0.6931512951850891f));
  }
  return mul_pow2_floor(fma(p, f, broadcast(1.0f)), x);
}

// tanh(x), relative error 3e-7: an odd rational function on [-9, 9], beyond which tanh rounds to ±1.
FARLIGHT_INLINE F tanh_rational(F x) {
  x = select(greater(x, broadcast(9.0f)), broadcast(9.0f), x);  // NaN stays NaN
  x = select(greater(broadcast(-9.0f), x), broadcast(-9.0f), x);
  const F u = mul(x, x);
  F n = fma(broadcast(-1.2247458255898458e-11f), u, broadcast(3.064431552957103e-08f));
  n = fma(n, u, broadcast(2.803210554702673e-05f));
  n = fma(n, u, broadcast(0.003869548672810197f));
  n = fma(n, u, broadcast(0.13680888712406158f));
  n = fma(n, u, broadcast(1.0f));
  F d = fma(broadcast(1.2890889138361672e-06f), u, broadcast(0.00039407843723893166f));
  d = fma(d, u, broadcast(0.02725030668079853f));
  d = fma(d, u, broadcast(0.4701422154903412f));
  d = fma(d, u, broadcast(1.0f));
  return div(mul(x, n), d);
}

// MurmurHash3's finalizer, bit for bit as in farlight/patterns/hashing.py.
FARLIGHT_INLINE uint32_t mix32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ (x >> 16);
}

FARLIGHT_INLINE I mix32(I x) {
  x = bit_xor(x, shr<16>(x));
  x = mul(x, broadcast_i(0x85EBCA6Bu));
  x = bit_xor(x, shr<13>(x));
  x = mul(x, broadcast_i(0xC2B2AE35u));
  return bit_xor(x, shr<16>(x));
}

// One round: mixes a 32-bit word into the hash.
FARLIGHT_INLINE uint32_t hash_word(uint32_t h, uint32_t word) { return mix32(h ^ word) * 5u + 0xE6546B64u; }

// Hash of (seed, batch item, head, query position). The hash of a link is mix32(row_hash ^ key_word(key)).
FARLIGHT_INLINE uint32_t row_hash(uint32_t low, uint32_t high, int64_t b, int64_t h, int64_t position) {
  uint32_t x = 0x9E3779B9u;
  x = hash_word(x, low);
  x = hash_word(x, high);
  x = hash_word(x, static_cast<uint32_t>(b));
  x = hash_word(x, static_cast<uint32_t>(h));
  return hash_word(x, static_cast<uint32_t>(position));
}
FARLIGHT_INLINE uint32_t key_word(int32_t key) { return static_cast<uint32_t>(key) * 0x9E3779B9u; }

}  // namespace farlight::FARLIGHT_NS

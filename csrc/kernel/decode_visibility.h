// Evaluation of visibility programs (VisibilityOp in decode.h): which slots one query sees, one byte each.
//
// Every instruction is one loop over the positions of all slots that the compiler vectorises; divisibility by reciprocals in
// double, since vectors have no integer division.
#pragma once

#include "../decode.h"
#include "isa.h"

namespace farlight::FARLIGHT_NS {

// x mod s in 0 … s - 1 for |x| < 2^51: the reciprocal's rounding leaves the quotient at most one off.
class Modulus {
 public:
  explicit Modulus(int64_t s) : s_(static_cast<double>(s)), inverse_(1.0 / static_cast<double>(s)) {}
  FARLIGHT_INLINE double operator()(double x) const {
    const double rest = x - __builtin_floor(x * inverse_) * s_;
    return rest < 0.0 ? rest + s_ : rest >= s_ ? rest - s_ : rest;
  }

 private:
  double s_, inverse_;
};

// The indices of the nonzero bytes. Up to kListSlack entries behind the last one are overwritten.
inline int64_t list_nonzero(const uint8_t* bytes, int64_t count, int32_t* to) {
  int64_t n = 0, s = 0;
#if defined(FARLIGHT_BF16_PAIRS) || defined(FARLIGHT_ISA_AVX512)
  static_assert(kListSlack >= 16);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; s + 16 <= count; s += 16) {
    const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + s));
    const __mmask16 seen = _mm_test_epi8_mask(some, some);
    const __m512i slots = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(s)));
    _mm512_storeu_si512(to + n, _mm512_maskz_compress_epi32(seen, slots));
    n += FARLIGHT_COUNT_BITS(seen);
  }
#endif
  for (; s < count; ++s) to[n] = static_cast<int32_t>(s), n += bytes[s] != 0;  // without a branch on what is seen
  return n;
}

inline ExpiredSlots expired(const int64_t* last_use, int64_t count, int64_t oldest) {
  int64_t number = 0, slot = -1, least = kNoUse;
  for (int64_t s = 0; s < count; ++s) {
    const bool is_expired = last_use[s] < oldest;
    number += is_expired;
    slot = max(slot, is_expired ? s : int64_t{-1});
    least = min(least, is_expired ? kNoUse : last_use[s]);
  }
  return {number, slot, least};
}

inline int64_t floor_divide(int64_t x, int64_t by) { return x >= 0 ? x / by : -((-x + by - 1) / by); }
inline int64_t floor_modulo(int64_t x, int64_t by) { return x - floor_divide(x, by) * by; }

inline bool in_runs(const int64_t* runs, int64_t n, int64_t x) {
  int64_t low = 0, high = n;  // the last run that begins at or before x
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (runs[2 * middle] <= x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x < runs[2 * low - 1];
}

class VisibilityEvaluator {
 public:
  VisibilityEvaluator(const int64_t* position, int64_t count, int64_t query, uint8_t* stack)
      : position_(position), count_(count), query_(query), stack_(stack) {}

  void run(const VisibilityProgram& program, uint8_t* to) {
    const int64_t *code = program.code, *end = code + program.length;
    while (code < end) code = step(code);
    for (int64_t s = 0; s < count_; ++s) to[s] = stack_[s];
  }

 private:
  // Executes one instruction and returns the next.
  const int64_t* step(const int64_t* code) {
    const int64_t op = code[0], *a = code + 1;
    switch (op) {
      case kConstant:
        return constant(a[0] != 0), a + 1;
      case kBetween: {
        const int64_t low = query_ + a[0], high = query_ + a[1];
        each([=](int64_t j) { return j >= low && j <= high; });
        return a + 2;
      }
      case kDivides: {
        const Modulus modulus(a[0]);
        const int64_t i = query_;
        each([=](int64_t j) { return modulus(static_cast<double>(j - i)) == 0.0; });
        return a + 1;
      }
      case kKeyModulo: {
        const Modulus modulus(a[0]);
        const double low = static_cast<double>(a[1]), high = static_cast<double>(a[2]);
        each([=](int64_t j) {
          const double rest = modulus(static_cast<double>(j));
          return rest >= low && rest < high;
        });
        return a + 3;
      }
      case kQueryModulo: {
        const int64_t rest = floor_modulo(query_, a[0]);
        return constant(rest >= a[1] && rest < a[2]), a + 3;
      }
      case kKeyRuns:
        return runs(a, 0), a + 1 + 2 * a[0];
      case kQueryRuns:
        return constant(in_runs(a + 1, a[0], query_)), a + 1 + 2 * a[0];
      case kDistanceRuns:
        return runs(a, query_), a + 1 + 2 * a[0];
      case kBlockBetween: {
        // The same key positions as whole blocks around the query's.
        const int64_t block = floor_divide(query_, a[0]), low = (block + a[1]) * a[0], high = (block + a[2] + 1) * a[0];
        each([=](int64_t j) { return j >= low && j < high; });
        return a + 3;
      }
      case kNot:
        for (int64_t s = 0; s < count_; ++s) top(0)[s] ^= 1;
        return a;
      default:
        combine(op);
        return a;
    }
  }

  void combine(int64_t op) {
    uint8_t *x = top(1), *y = top(0);
    if (op == kAnd)
      for (int64_t s = 0; s < count_; ++s) x[s] &= y[s];
    else if (op == kOr)
      for (int64_t s = 0; s < count_; ++s) x[s] |= y[s];
    else
      for (int64_t s = 0; s < count_; ++s) x[s] &= static_cast<uint8_t>(y[s] ^ 1);
    --used_;
  }

  // j - shift in one of the runs a[1] …; few runs are compared with all positions, more are searched.
  void runs(const int64_t* a, int64_t shift) {
    const int64_t n = a[0];
    if (n == 1) {
      const int64_t low = a[1] + shift, high = a[2] + shift;
      each([=](int64_t j) { return j >= low && j < high; });
    } else {
      each([=](int64_t j) { return in_runs(a + 1, n, j - shift); });
    }
  }

  void constant(bool value) {
    uint8_t* to = stack_ + used_++ * count_;
    for (int64_t s = 0; s < count_; ++s) to[s] = value;
  }
  template <class Test>
  FARLIGHT_INLINE void each(const Test& test) {
    uint8_t* to = stack_ + used_++ * count_;
    if (position_)
      for (int64_t s = 0; s < count_; ++s) to[s] = test(position_[s]);
    else
      for (int64_t s = 0; s < count_; ++s) to[s] = test(s);
  }
  // The array `depth` below the top.
  uint8_t* top(int64_t depth) { return stack_ + (used_ - 1 - depth) * count_; }

  const int64_t* position_;
  int64_t count_, query_;
  uint8_t* stack_;
  int64_t used_ = 0;
};

}  // namespace farlight::FARLIGHT_NS

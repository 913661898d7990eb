// ISA selection. kernel.cpp is compiled once per ISA with FARLIGHT_ISA_<NAME> defined and the matching -m flags. Everything
// under kernel/ lives in the namespace of that ISA, so the linker cannot merge functions of different ISAs; for the same reason
// nothing under kernel/ uses a template or inline function of the standard library.
//
// This header defines the portability macros (forced inlining, unrolling, software prefetch), includes the SIMD layer of the
// ISA, and defines min and max. FARLIGHT_BF16_PAIRS: the ISA has dot products of bfloat16 pairs (AVX512-BF16 or AMX-BF16).
// FARLIGHT_PREFETCH fetches into L1, FARLIGHT_PREFETCH_L2 into L2. FARLIGHT_LOWEST_BIT: index of the lowest bit set,
// FARLIGHT_COUNT_BITS: how many are set.
// FARLIGHT_NO_UNROLL: sanitizer builds keep loops rolled.
#pragma once

#include <cstdint>

#if defined(__GNUC__) || defined(__clang__)
#define FARLIGHT_INLINE inline __attribute__((always_inline))
#define FARLIGHT_NOINLINE __attribute__((noinline))
#if defined(FARLIGHT_NO_UNROLL)
#define FARLIGHT_UNROLL
#define FARLIGHT_UNROLL_2
#define FARLIGHT_UNROLL_4
#else
#define FARLIGHT_UNROLL _Pragma("GCC unroll 16")
#define FARLIGHT_UNROLL_2 _Pragma("GCC unroll 2")
#define FARLIGHT_UNROLL_4 _Pragma("GCC unroll 4")
#endif
#define FARLIGHT_PREFETCH(p) __builtin_prefetch(p)
#define FARLIGHT_PREFETCH_L2(p) __builtin_prefetch(p, 0, 2)
#define FARLIGHT_COUNT_BITS(x) __builtin_popcount(x)
#define FARLIGHT_LOWEST_BIT(x) __builtin_ctz(x)
#else
#include <intrin.h>
#define FARLIGHT_INLINE __forceinline
#define FARLIGHT_NOINLINE __declspec(noinline)
#define FARLIGHT_UNROLL
#define FARLIGHT_UNROLL_2
#define FARLIGHT_UNROLL_4
#define FARLIGHT_PREFETCH(p) ((void)(p))
#define FARLIGHT_PREFETCH_L2(p) ((void)(p))
// Without a popcnt or tzcnt instruction, which ARM64 and the portable kernels lack: at most 16 bits are counted.
static __forceinline int farlight_count_bits(unsigned x) {
  int count = 0;
  for (; x; x &= x - 1) ++count;
  return count;
}
static __forceinline int farlight_lowest_bit(unsigned x) {
  unsigned long index;
  _BitScanForward(&index, x);
  return static_cast<int>(index);
}
#define FARLIGHT_COUNT_BITS(x) farlight_count_bits(x)
#define FARLIGHT_LOWEST_BIT(x) farlight_lowest_bit(x)
#endif

#if defined(FARLIGHT_ISA_AMX)
#define FARLIGHT_NS amx
#define FARLIGHT_BF16_PAIRS
#elif defined(FARLIGHT_ISA_AVX512BF16)
#define FARLIGHT_NS avx512bf16
#define FARLIGHT_BF16_PAIRS
#elif defined(FARLIGHT_ISA_AVX512)
#define FARLIGHT_NS avx512
#elif defined(FARLIGHT_ISA_AVX2)
#define FARLIGHT_NS avx2
#else
#define FARLIGHT_NS portable
#endif

#if defined(FARLIGHT_BF16_PAIRS) || defined(FARLIGHT_ISA_AVX512)
#include "simd_avx512.h"
#elif defined(FARLIGHT_ISA_AVX2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace farlight::FARLIGHT_NS {

#if defined(FARLIGHT_BF16_PAIRS)
constexpr bool kPairsBf16 = true;
#else
constexpr bool kPairsBf16 = false;
#endif

template <class T>
FARLIGHT_INLINE T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
FARLIGHT_INLINE T max(T a, T b) {
  return a < b ? b : a;
}

}  // namespace farlight::FARLIGHT_NS

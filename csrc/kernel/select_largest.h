// Indices of the `count` largest weights, ascending. The threshold is found by bisection and interpolation, on the bit patterns
// of the weights mapped to integers of the same order and compared in vector lanes; nothing is sorted.
#pragma once

#include <cstring>

#include "elementary.h"

namespace farlight::FARLIGHT_NS {

// Number of x[0 ... n) above `limit`; n is a multiple of W.
FARLIGHT_INLINE int64_t count_above(const int32_t* x, int64_t n, int32_t limit) {
  const I threshold = broadcast_i(static_cast<uint32_t>(limit));
  int64_t count = 0;
  for (int64_t c = 0; c < n; c += W) count += FARLIGHT_COUNT_BITS(less_i32(threshold, load_i(x + c)));
  return count;
}

// An integer whose order is that of the numbers, and its inverse.
FARLIGHT_INLINE int32_t key_of(float weight) {
  int32_t bits;
  std::memcpy(&bits, &weight, sizeof bits);
  return bits ^ ((bits >> 31) & INT32_MAX);
}
FARLIGHT_INLINE float weight_of(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & INT32_MAX);
  float weight;
  std::memcpy(&weight, &bits, sizeof weight);
  return weight;
}

// Writes the indices of the `count` largest of weights[0 ... width), ascending, to chosen[0 ... count): equal weights go to
// the smaller index, NaN is the lowest. `sizes`: entries of size 0 are left out, at least `count` others exist; null = none is.
// `keys` is scratch memory for `width` rounded up to whole vectors.
inline void select_largest(const float* weights, const int32_t* sizes, int64_t width, int64_t count, int32_t* keys,
                           int32_t* chosen) {
  constexpr int32_t kLeftOut = INT32_MIN, kNan = INT32_MIN + 1;
  const int64_t padded = (width + W - 1) / W * W;
  int32_t lowest = INT32_MAX, highest = INT32_MIN;
  for (int64_t c = 0; c < width; ++c) {
    const int32_t key = weights[c] != weights[c] ? kNan : key_of(weights[c] + 0.0f);  // -0.0 equals 0.0
    keys[c] = key;
    lowest = key < lowest ? key : lowest;
    highest = key > highest ? key : highest;
  }
  for (int64_t c = 0; sizes && c < width; ++c)
    if (!sizes[c]) keys[c] = lowest = kLeftOut;
  for (int64_t c = width; c < padded; ++c) keys[c] = kLeftOut;
  // Fewer than `count` keys are above `high`, at least `count` above `low`, which may be one below every key.
  int64_t low = static_cast<int64_t>(lowest) - 1, high = highest, above = 0;
  if (low < kLeftOut) low = kLeftOut;
  int64_t above_low = count_above(keys, padded, static_cast<int32_t>(low));
  for (int step = 0; high - low > 1; ++step) {
    // Weights are spread more evenly than their bit patterns: two interpolations, the middle of the weights, the middle of the
    // patterns, which bounds the number of steps. Every key between `low` and `high` is allowed.
    int64_t middle = low + (high - low) / 2;
    if (step % 4 != 3) {
      const float part = step % 4 == 2 ? 0.5f : static_cast<float>(above_low - count) / static_cast<float>(above_low - above);
      const float from = weight_of(static_cast<int32_t>(low)), to = weight_of(static_cast<int32_t>(high));
      const int64_t key = key_of(from + (to - from) * part);
      if (key > low && key < high) middle = key;
    }
    const int64_t number = count_above(keys, padded, static_cast<int32_t>(middle));
    if (number > count) {
      low = middle;
      above_low = number;
      continue;
    }
    high = middle;
    above = number;
    if (number == count) break;
  }
  // Everything above `high`, and of the entries equal to it the first ones.
  int64_t equal = count - above, n = 0;
  for (int64_t c = 0; c < padded && n < count; c += W) {
    const I x = load_i(keys + c);
    uint32_t taken = less_i32(broadcast_i(static_cast<uint32_t>(high)), x);
    uint32_t ties = equal ? ~(taken | less_i32(x, broadcast_i(static_cast<uint32_t>(high)))) & ((1u << W) - 1) : 0;
    for (; ties && equal; --equal, ties &= ties - 1) taken |= ties & -ties;
    for (; taken; taken &= taken - 1) chosen[n++] = static_cast<int32_t>(c) + FARLIGHT_LOWEST_BIT(taken);
  }
}

}  // namespace farlight::FARLIGHT_NS

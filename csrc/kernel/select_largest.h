// Indices of the `count` largest weights, ascending. The threshold is found by bisection on the bit patterns of the weights,
// mapped to integers of the same order and compared in vector lanes; nothing is sorted.
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

// Writes the indices of the `count` largest of weights[0 ... width), ascending, to chosen[0 ... count): equal weights go to
// the smaller index, NaN is the lowest. `sizes`: entries of size 0 are left out, at least `count` others exist; null = none is.
// `keys` is scratch memory for `width` rounded up to whole vectors.
inline void select_largest(const float* weights, const int32_t* sizes, int64_t width, int64_t count, int32_t* keys,
                           int32_t* chosen) {
  constexpr int32_t kLeftOut = INT32_MIN, kNan = INT32_MIN + 1;
  const int64_t padded = (width + W - 1) / W * W;
  int32_t lowest = INT32_MAX, highest = INT32_MIN;
  for (int64_t c = 0; c < width; ++c) {
    const float weight = weights[c] + 0.0f;  // -0.0 equals 0.0
    int32_t bits;
    std::memcpy(&bits, &weight, sizeof bits);
    bits ^= (bits >> 31) & INT32_MAX;
    if (weight != weight) bits = kNan;
    if (sizes && !sizes[c]) bits = kLeftOut;
    keys[c] = bits;
    lowest = bits < lowest ? bits : lowest;
    highest = bits > highest ? bits : highest;
  }
  for (int64_t c = width; c < padded; ++c) keys[c] = kLeftOut;
  // Fewer than `count` keys are above `high`, at least `count` above `low`, which may be one below every key.
  int64_t low = static_cast<int64_t>(lowest) - 1, high = highest, above = 0;
  if (low < kLeftOut) low = kLeftOut;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2, number = count_above(keys, padded, static_cast<int32_t>(middle));
    if (number > count) {
      low = middle;
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

// A tile of full attention probabilities, as the loss analysis forms them (src/farlight/analysis/loss/probabilities.py).
#pragma once

#include <cstdint>

namespace farlight {

// Contiguous float32 (batch, heads, rows, keys); nonnegative, NaN only where the scores are NaN.
struct ProbabilityTile {
  const float* data;
  int64_t batch, heads, rows, keys;

  // Row `index` of the batch · heads · rows rows, counted in storage order.
  const float* row(int64_t index) const { return data + index * keys; }
};

}  // namespace farlight

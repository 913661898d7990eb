// Queries of the channel-wise bounds of key blocks: Summaries with BlockScore::kMinMax hold [max | min] of each block, and
// scale * q . k <= |scale| * (max(x, 0) . max + min(x, 0) . min) with x = sign(scale) q, for every key k of the block.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "query_blocks.h"
#include "summaries.h"

namespace farlight {

class BoundQueries {
 public:
  BoundQueries(const ChoiceProblem& problem, const Summaries& summaries) : p_(problem) {
    largest_key_.assign(p_.batch * p_.kv_heads, 0.0f);
    const int64_t width = summaries.padded() * summaries.dim();
    for (size_t i = 0; i < largest_key_.size(); ++i) {
      const float* x = summaries.panels_of(p_, static_cast<int64_t>(i) / p_.kv_heads, static_cast<int64_t>(i) % p_.kv_heads);
      for (int64_t j = 0; j < width; ++j) largest_key_[i] = std::max(largest_key_[i], std::fabs(x[j]));
    }
  }

  // From a product to an exponent of 2.
  float factor() const { return std::fabs(p_.scale) * kLog2e; }

  // Reads a query as [max(x, 0) | min(x, 0)]. Returns a bound of the rounding error of its products with bounds or keys, times
  // the factor: half a unit in the last place for each of 4 dim operations in float32.
  float read(int64_t b, int64_t h, int64_t row, float* to) const {
    read_row(p_.type, p_.q, b, h, row, p_.dim, to);
    const float sign = p_.scale < 0.0f ? -1.0f : 1.0f;
    float size = 0.0f;
    for (int64_t d = 0; d < p_.dim; ++d) {
      const float x = sign * to[d];
      size += std::fabs(x);
      to[d] = std::max(x, 0.0f);
      to[p_.dim + d] = std::min(x, 0.0f);
    }
    const int64_t kv_head = h / (p_.heads / p_.kv_heads);
    return factor() * 4.0f * static_cast<float>(p_.dim) * 0x1p-24f * size * largest_key_[b * p_.kv_heads + kv_head];
  }

 private:
  const ChoiceProblem& p_;
  std::vector<float> largest_key_;  // largest magnitude of an element of k, for each (batch item, key head)
};

}  // namespace farlight

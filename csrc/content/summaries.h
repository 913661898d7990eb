// Summaries of key blocks, packed in panels for the score kernels (kernel/block_scores.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../memory.h"
#include "../parallel.h"
#include "choose.h"

namespace farlight {

// Row `row` of a tensor as float32.
inline void read_row(Type type, const TensorView& x, int64_t b, int64_t h, int64_t row, int64_t dim, float* to) {
  const int64_t at = b * x.batch + h * x.head + row * x.row;
  if (type == Type::f32) {
    std::memcpy(to, static_cast<const float*>(x.data) + at, static_cast<size_t>(dim) * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(x.data) + at;
  for (int64_t d = 0; d < dim; ++d) {
    const uint32_t bits = static_cast<uint32_t>(from[d]) << 16;
    std::memcpy(to + d, &bits, sizeof bits);
  }
}

// Summaries of the key blocks of every (batch item, key head), packed in panels: the mean, or the upper and the lower bounds.
class Summaries {
 public:
  Summaries(const ChoiceProblem& p, int threads, InterruptCheck& interrupt)
      : blocks_((p.n_k + p.block - 1) / p.block),
        panels_((blocks_ + kPanel - 1) / kPanel),
        dim_(p.score == BlockScore::kMinMax ? 2 * p.dim : p.dim),
        values_(p.batch * p.kv_heads * panels_ * kPanel * dim_ * static_cast<int64_t>(sizeof(float))),
        sizes_((p.key_mask ? p.mask_batch : 1) * panels_ * kPanel, 0),
        log_sizes_(sizes_.size()) {
    count_sizes(p);
    parallel_for(p.batch * p.kv_heads * panels_, threads, interrupt, [&](int64_t i) {
      fill_panel(p, i / panels_ / p.kv_heads, i / panels_ % p.kv_heads, i % panels_);
    });
  }

  int64_t blocks() const { return blocks_; }
  int64_t padded() const { return panels_ * kPanel; }
  int64_t dim() const { return dim_; }
  float* panels_of(const ChoiceProblem& p, int64_t b, int64_t kv_head) const {
    return values_.as<float>() + (b * p.kv_heads + kv_head) * panels_ * kPanel * dim_;
  }
  // Real keys of each block, and their logarithm in base 2 (hugely negative for a block without any).
  const int32_t* sizes(const ChoiceProblem& p, int64_t b) const { return sizes_.data() + row_of(p, b); }
  const float* log_sizes(const ChoiceProblem& p, int64_t b) const { return log_sizes_.data() + row_of(p, b); }

 private:
  int64_t row_of(const ChoiceProblem& p, int64_t b) const { return p.key_mask && p.mask_batch > 1 ? b * panels_ * kPanel : 0; }

  static const uint8_t* keep(const ChoiceProblem& p, int64_t b) {
    return p.key_mask ? p.key_mask + (p.mask_batch > 1 ? b * p.n_k : 0) : nullptr;
  }

  void count_sizes(const ChoiceProblem& p) {
    const int64_t width = panels_ * kPanel;
    for (size_t row = 0; row < sizes_.size() / std::max<int64_t>(1, width); ++row) {
      const uint8_t* real = keep(p, static_cast<int64_t>(row));
      for (int64_t key = 0; key < p.n_k; ++key) sizes_[row * width + key / p.block] += !real || real[key];
    }
    for (size_t i = 0; i < sizes_.size(); ++i)
      log_sizes_[i] = sizes_[i] ? std::log2(static_cast<float>(sizes_[i])) : kMaskedLog;
  }

  void fill_panel(const ChoiceProblem& p, int64_t b, int64_t kv_head, int64_t panel) const {
    float* to = panels_of(p, b, kv_head) + panel * kPanel * dim_;
    const uint8_t* real = keep(p, b);
    std::vector<float> row(p.dim), low(p.dim), high(p.dim);
    std::memset(to, 0, static_cast<size_t>(kPanel * dim_) * sizeof(float));
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t c = panel * kPanel + lane;
      if (c >= blocks_ || sizes(p, b)[c] == 0) continue;
      const bool bounds = p.score == BlockScore::kMinMax;
      std::fill(low.begin(), low.end(), bounds ? std::numeric_limits<float>::infinity() : 0.0f);
      std::fill(high.begin(), high.end(), -std::numeric_limits<float>::infinity());
      for (int64_t key = c * p.block; key < std::min((c + 1) * p.block, p.n_k); ++key) {
        if (real && !real[key]) continue;
        read_row(p.type, p.k, b, kv_head, key, p.dim, row.data());
        for (int64_t d = 0; d < p.dim; ++d) {
          low[d] = bounds ? std::min(low[d], row[d]) : low[d] + row[d];
          if (bounds) high[d] = std::max(high[d], row[d]);
        }
      }
      const float inverse = 1.0f / static_cast<float>(sizes(p, b)[c]);
      for (int64_t d = 0; d < p.dim; ++d) {
        to[d * kPanel + lane] = bounds ? high[d] : low[d] * inverse;
        if (bounds) to[(p.dim + d) * kPanel + lane] = low[d];
      }
    }
  }

  static constexpr float kMaskedLog = -1e30f;
  int64_t blocks_, panels_, dim_;
  Buffer values_;
  std::vector<int32_t> sizes_;
  std::vector<float> log_sizes_;
};

}  // namespace farlight

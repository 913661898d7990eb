// Scores of queries against summaries of key blocks, and softmax over the blocks pooled over the queries of a query block.
//
// Summaries are packed in panels of kPanel blocks, [dim][kPanel]: blocks stand in lanes, query elements are broadcast.
#pragma once

#include "elementary.h"
#include "register_blocks.h"

namespace farlight::FARLIGHT_NS {

// scores[r * ld + c] = sum over d of rows[r][d] * summary of block c, for r < num_rows and c < panels * kPanel. Rows are
// computed in groups of kM: rows[] has a valid pointer for each row of the last group, scores has room for it.
inline void block_scores(const float* const* rows, int64_t num_rows, const float* panel, int64_t panels, int64_t dim,
                         float* scores, int64_t ld) {
  constexpr int64_t kLine = 64 / sizeof(float);
  for (int64_t p = 0; p < panels; ++p, panel += dim * kPanel)
    for (int64_t r = 0; r < num_rows; r += kM) {
      // The next panel comes from L2 while the last group of rows is computed.
      if (r + kM >= num_rows && p + 1 < panels)
        for (int64_t i = dim * kPanel; i < 2 * dim * kPanel; i += kLine) FARLIGHT_PREFETCH(panel + i);
      for (int64_t lane = 0; lane < kPanel; lane += kV * W) {
        F acc[kM][kV];
        clear(acc);
        gemm_row_major<F32Word, kM, kV>(acc, rows + r, panel + lane, kPanel, dim);
        FARLIGHT_UNROLL
        for (int m = 0; m < kM; ++m) {
          FARLIGHT_UNROLL
          for (int v = 0; v < kV; ++v) store(scores + (r + m) * ld + p * kPanel + lane + v * W, acc[m][v]);
        }
      }
    }
}

static_assert(kPanel == 32 && kPanel % (kV * W) == 0);
constexpr float kLowest = -1e30f;  // below every score; finite, so that differences are

// The largest lane of x.
FARLIGHT_INLINE float largest_lane(F x) {
  alignas(64) float lane[W];
  store(lane, x);
  float y = lane[0];
  for (int i = 1; i < W; ++i) y = max(y, lane[i]);
  return y;
}

// columns[r]: the first column c < width of the largest scores[r * ld + c], for r < num_rows. Whole panels are read.
inline void largest_columns(const float* scores, int64_t num_rows, int64_t ld, int64_t width, int64_t* columns) {
  const F lowest = broadcast(-INFINITY);
  for (int64_t r = 0; r < num_rows; ++r, scores += ld) {
    const auto lanes = [&](int64_t c) { return c + W <= width ? (1u << W) - 1 : (1u << (width - c)) - 1; };
    F largest = lowest;
    for (int64_t c = 0; c < width; c += W) largest = max(select(lanes(c), load(scores + c), lowest), largest);
    const F threshold = broadcast(largest_lane(largest));
    columns[r] = 0;
    for (int64_t c = 0; c < width; c += W) {
      const uint32_t reached = ~greater(threshold, load(scores + c)) & lanes(c);
      if (!reached) continue;
      columns[r] = c + FARLIGHT_LOWEST_BIT(reached);
      break;
    }
  }
}

// sum over c < panels * kPanel of counts[c] * 2^(factor * row[c] + shift).
inline float weighted_exponentials(const float* row, const float* counts, int64_t panels, float factor, float shift) {
  const F f = broadcast(factor), s = broadcast(shift);
  F total = broadcast(0.0f);
  for (int64_t c = 0; c < panels * kPanel; c += W) {
    const F x = fma(load(row + c), f, s), largest = broadcast(126.0f);  // a sum this large bounds nothing
    total = fma(load(counts + c), exp2_poly<5>(select(greater(x, largest), largest, x)), total);
  }
  return sum(total);
}

// Softmax numerators of one row in place: row[c] = 2^(factor * row[c] + bias[c] - max) for c < width, 0 in the padding of the
// last panel. Returns the reciprocal of their sum, and the maximum in `*largest_exponent`.
inline float exponentials(float* row, int64_t width, float factor, const float* bias, float* largest_exponent) {
  constexpr int kVectors = kPanel / W;
  const F f = broadcast(factor);
  F largest[kVectors], total[kVectors];
  FARLIGHT_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    largest[v] = broadcast(kLowest);
    total[v] = broadcast(0.0f);
  }
  for (int64_t c = 0; c < width; c += kPanel) {
    const uint32_t in_row = c + kPanel <= width ? 0xffffffffu : (1u << (width - c)) - 1;  // a bit per lane of the panel
    FARLIGHT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      F x = mul(load(row + c + v * W), f);
      if (bias) x = add(x, load(bias + c + v * W));
      if (in_row != 0xffffffffu) x = select(in_row >> (v * W), x, broadcast(kLowest));
      store(row + c + v * W, x);
      largest[v] = max(x, largest[v]);
    }
  }
  for (int v = 1; v < kVectors; ++v) largest[0] = max(largest[v], largest[0]);
  *largest_exponent = largest_lane(largest[0]);
  const F reference = broadcast(*largest_exponent);
  for (int64_t c = 0; c < width; c += kPanel) {
    FARLIGHT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const F e = exp2_poly<5>(sub(load(row + c + v * W), reference));
      store(row + c + v * W, e);
      total[v] = add(total[v], e);
    }
  }
  for (int v = 1; v < kVectors; ++v) total[0] = add(total[0], total[v]);
  return 1.0f / sum(total[0]);
}

// weights[c] = sum over r < num_rows of softmax over c < width of (factor * scores[r * ld + c] + bias[c]), in base 2; bias may
// be null. Overwrites the scores, the padding of the last panel included, with 2^(factor * scores[r * ld + c] + bias[c] -
// maximum); the rows' maxima go to largest_exponents[r] unless that is null.
inline void pool_softmax(float* scores, int64_t num_rows, int64_t ld, int64_t width, float factor, const float* bias,
                         float* weights, float* largest_exponents) {
  constexpr int kTogether = 4;  // rows added per sweep, so that the weights are loaded and stored once for four of them
  const int64_t padded = (width + kPanel - 1) / kPanel * kPanel;
  for (int64_t r = 0; r < num_rows; r += kTogether) {
    float share[kTogether], largest;
    for (int i = 0; i < kTogether; ++i) {
      float* row = scores + min(r + i, num_rows - 1) * ld;
      if (r + i >= num_rows) {
        share[i] = 0.0f;
        continue;
      }
      share[i] = exponentials(row, width, factor, bias, &largest);
      if (largest_exponents) largest_exponents[r + i] = largest;
    }
    const float* row[kTogether];
    for (int i = 0; i < kTogether; ++i) row[i] = scores + min(r + i, num_rows - 1) * ld;
    for (int64_t c = 0; c < padded; c += W) {
      F x = r ? load(weights + c) : broadcast(0.0f);
      FARLIGHT_UNROLL
      for (int i = 0; i < kTogether; ++i) x = fma(load(row[i] + c), broadcast(share[i]), x);
      store(weights + c, x);
    }
  }
}

}  // namespace farlight::FARLIGHT_NS

// Terms on the scores of a row block: softcap, biases by distance and by key, and the gradients of the two tables.
//
// The table of biases by distance is stored by i - j, its ends repeated: the biases of one key for 32 consecutive query rows
// are then one contiguous load, clipped by clamping its start. Rows in another order gather theirs. All terms are in base 2.
#pragma once

#include "scores.h"

namespace farlight::FARLIGHT_NS {

// Adds a sink's weight to a row's sum. Where the sink raises the maximum, the weighted sum of values follows by `factor`.
FARLIGHT_INLINE void add_sink(float sink, float& row_max, float& row_sum, float& factor) {
  const float raised = row_max > sink ? row_max : sink, weight = exp2f(row_max - raised);
  row_sum = row_sum * weight + exp2f(sink - raised);
  factor *= weight;
  row_max = raised;
}

// The terms of a call for one row block.
class BlockTerms {
 public:
  BlockTerms(const Call& call, const RowBlock& row_block) : view_(call.terms), count_(row_block.count) {
    if (!view_.on) return;
    const WorkItem& item = row_block.item;
    if (view_.distance) {
      distance_ = view_.distance + item.head * view_.distance_length;
      last_ = view_.distance_length - 1 - 2 * (kRows - 1);
    }
    if (view_.key_bias) key_bias_ = view_.key_bias + item.batch * view_.key_batch + item.head * view_.key_head;
    head_in_group_ = item.head % (call.heads / call.kv_heads);
    consecutive_ = true;
    for (int s = 0; s < kRows; ++s) {
      // rows past the end of the block repeat the last one
      position_[s] = call.plan->q_offset + row_block.row[min(s, count_ - 1)] - view_.lowest;
      if (s < count_ && position_[s] != position_[0] + s) consecutive_ = false;
    }
  }

  bool on() const { return view_.on; }

  // Scores of keys [first, last) of a chunk, lanes [from, to): S = capped(factor * score) + biases, -inf where masked. Raises
  // row_max (may be null) to the largest. slope (may be null): the derivative of the capped score.
  void apply(const Chunk& c, int first, int last, int from, int to, float factor, float* scores, float* slope,
             float* row_max) const {
    if (view_.cap != 0.0f) apply_terms<true>(c, first, last, from, to, factor, scores, slope, row_max);
    else apply_terms<false>(c, first, last, from, to, factor, scores, slope, row_max);
  }

  // S and its slope for one pair of row s.
  float pair(float score, int s, int32_t key, float* slope) const {
    *slope = 1.0f;
    if (!view_.on) return score;
    if (view_.cap != 0.0f) {
      float t[W];
      store(t, tanh_rational(broadcast(score / view_.cap)));
      *slope = 1.0f - t[0] * t[0];
      score = view_.cap * t[0];
    }
    if (distance_) score += distance_[index(s, key)];
    return key_bias_ ? score + key_bias_[key] : score;
  }

  // Adds the gradients of S of a chunk, ds[key][row], to the sums of the slab; rows past the end of the block are zero.
  FARLIGHT_NOINLINE void add_gradients(const Chunk& c, const float* ds, const TermSums& sums) const {
    float* const distance = sums.distance ? sums.distance + head_in_group_ * view_.distance_length : nullptr;
    float* const keys = sums.keys ? sums.keys + head_in_group_ * sums.key_count : nullptr;
    for (int i = 0; i < c.n; ++i, ds += kRows) {
      if (keys) {
        F total = load(ds);
        for (int g = W; g < kRows; g += W) total = add(total, load(ds + g));
        keys[c.key[i]] += sum(total);
      }
      if (!distance) continue;
      if (consecutive_) {
        float* const at = distance + start(c.key[i]);
        for (int g = 0; g < kRows; g += W) store(at + g, add(load(at + g), load(ds + g)));
      } else {
        for (int s = 0; s < count_; ++s) distance[index(s, c.key[i])] += ds[s];
      }
    }
  }
  void add_gradient(float ds, int s, int32_t key, const TermSums& sums) const {
    if (sums.distance) sums.distance[head_in_group_ * view_.distance_length + index(s, key)] += ds;
    if (sums.keys) sums.keys[head_in_group_ * sums.key_count + key] += ds;
  }
  bool wants_gradients(const TermSums& sums) const { return sums.distance || sums.keys; }
  // Bit s: lane s holds a row.
  uint32_t rows() const { return count_ == kRows ? kAllRows : (1u << count_) - 1; }

 private:
  // Start of the biases of a key for 32 consecutive rows; index of that for one row.
  int64_t start(int32_t key) const { return max<int64_t>(0, min<int64_t>(position_[0] - key + kRows - 1, last_ + kRows - 1)); }
  int64_t index(int s, int32_t key) const { return max<int64_t>(0, min<int64_t>(position_[s] - key, last_)) + kRows - 1; }

  // The biases by distance of a key: in the table, or gathered into the buffer.
  const float* biases(int32_t key, float* buffer) const {
    if (!distance_) return buffer;
    if (consecutive_) return distance_ + start(key);
    for (int s = 0; s < kRows; ++s) buffer[s] = distance_[index(s, key)];
    return buffer;
  }

  template <bool Capped>
  FARLIGHT_NOINLINE void apply_terms(const Chunk& c, int first, int last, int from, int to, float factor, float* scores,
                                     float* slope, float* row_max) const {
    alignas(64) float buffer[kRows] = {};
    F running_max[kRows / W];
    FARLIGHT_UNROLL
    for (int v = 0; v < kRows / W; ++v) running_max[v] = broadcast(kMaskedScore);
    const F by = broadcast(Capped ? factor / view_.cap : factor);
    [[maybe_unused]] const F cap = broadcast(view_.cap);
    for (int i = first; i < last; ++i) {
      const float* const bias = biases(c.key[i], buffer);
      const F of_key = broadcast(key_bias_ ? key_bias_[c.key[i]] : 0.0f);
      const bool masked = c.masked[i / kM];
      FARLIGHT_UNROLL
      for (int v = 0; v < kRows / W; ++v) {
        const int g = v * W, at = i * kRows + g;
        if (g < from || g >= to) continue;
        F x = mul(load(scores + at), by);
        if constexpr (Capped) {
          const F t = tanh_rational(x);
          if (slope) store(slope + at, sub(broadcast(1.0f), mul(t, t)));
          x = mul(t, cap);
        }
        x = add(x, add(load(bias + g), of_key));
        if (masked) x = select(c.row_mask[i] >> g, x, broadcast(kMaskedScore));
        store(scores + at, x);
        running_max[v] = max(x, running_max[v]);
      }
    }
    for (int v = 0; row_max && v < kRows / W; ++v)
      if (v * W >= from && v * W < to) store(row_max + v * W, max(running_max[v], load(row_max + v * W)));
  }

  const TermsView& view_;
  const float *distance_ = nullptr, *key_bias_ = nullptr;
  int64_t last_ = 0;  // last index of the table without its repeated ends
  int64_t head_in_group_ = 0;
  int count_;
  bool consecutive_ = false;
  int64_t position_[kRows];  // index of the row's distance to key 0
};

// Scores of a chunk under terms, with their maxima; the product is scored without masks.
template <class Traits, class LinesFor>
inline void score_with_terms(const Chunk& c, const BlockTerms& terms, const Operand<Traits>& keys,
                             const Transposed<Traits>& queries, int lanes, float factor, float* scores, float* row_max,
                             const LinesFor& lines_for) {
  for (int g = 0; g < lanes; g += W) store(row_max + g, broadcast(kMaskedScore));
  score<Traits, false>(c, keys, queries, lanes, scores, nullptr, lines_for);
  for (const Span* span = c.spans.span; span < c.spans.span + c.spans.count; ++span)
    for_lanes(span->halves, lanes, [&]<int V>(int g) {
      terms.apply(c, span->first, span->last, g, g + V * W, factor, scores, nullptr, row_max);
    });
}

// From S (with terms, relative to the row's reference) and dP to (P with dropout, the gradient of scale * q k), handed to
// `write(key, lane, P, gradient)`; ds_of_terms[key][row] becomes the gradient of S, 0 where there is no pair.
template <class Traits, class Write>
FARLIGHT_INLINE void scored_softmax_backward(const Chunk& c, const BlockTerms& terms, const DropoutMask& dropout,
                                             const float* lse, const float* delta, float scale, int lanes, const float* scores,
                                             const float* dp, const float* slope, float* ds_of_terms, const Write& write) {
  const uint32_t rows = terms.rows();
  for (int i = 0; i < c.n; ++i)
    for (int g = 0; g < kRows; g += kV * W) {
      F p[kV], ds[kV];
      FARLIGHT_UNROLL
      for (int v = 0; v < kV; ++v) {
        const int lane = g + v * W, at = i * kRows + lane;
        if (g >= lanes) {
          store(ds_of_terms + at, broadcast(0.0f));
          continue;
        }
        const uint32_t visible = (c.masked[i / kM] ? c.row_mask[i] & rows : rows) >> lane;
        p[v] = exp2_poly<Traits::degree>(fma(load(lse + lane), broadcast(-kLog2E), load(scores + at)));
        p[v] = select(visible, p[v], broadcast(0.0f));
        F grad = load(dp + at);
        if (dropout.on()) {
          const uint32_t kept = dropout.keep_mask(c.key[i], lane);
          grad = select(kept, mul(grad, broadcast(dropout.keep_scale())), broadcast(0.0f));
          ds[v] = mul(p[v], sub(grad, load(delta + lane)));
          p[v] = select(kept, mul(p[v], broadcast(dropout.keep_scale())), broadcast(0.0f));
        } else {
          ds[v] = mul(p[v], sub(grad, load(delta + lane)));
        }
        ds[v] = select(visible, ds[v], broadcast(0.0f));
        store(ds_of_terms + at, ds[v]);
        ds[v] = mul(ds[v], broadcast(scale));
        if (slope) ds[v] = select(visible, mul(ds[v], load(slope + at)), broadcast(0.0f));
      }
      if (g < lanes) write(i, g, p, ds);
    }
}

}  // namespace farlight::FARLIGHT_NS

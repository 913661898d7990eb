// Gathered keys, forward: single (query row, key) pairs, with the head dimension in lanes. A random key per query thus costs
// one dot product instead of a key block for all 32 rows.
#pragma once

#include "operands.h"
#include "packed_cache.h"
#include "score_terms.h"

namespace farlight::FARLIGHT_NS {

constexpr int kGatherBatch = 256;  // pairs per batch

// to += sum over i < n of weight[i] * values[key[i]].
template <class T>
inline void accumulate_rows(float* to, const float* weight, const int32_t* key, int n, const HeadRows<T>& values, int64_t dim) {
  constexpr int kRowsTogether = 4;  // rows per sweep, so that `to` is loaded and stored once for four of them
  for (int i = 0; i < n; i += kRowsTogether) {
    const int count = min(n - i, kRowsTogether);
    const T* row[kRowsTogether];
    for (int j = 0; j < count; ++j) row[j] = values.row(key[i + j]);
    int64_t d = 0;
    for (; d + W <= dim; d += W) {
      F sum = load(to + d);
      for (int j = 0; j < count; ++j) sum = fma(broadcast(weight[i + j]), widen(row[j] + d), sum);
      store(to + d, sum);
    }
    for (; d < dim; ++d)
      for (int j = 0; j < count; ++j) to[d] += weight[i + j] * to_float(row[j][d]);
  }
}

// Online-softmax state of a row block after its runs: per row the running maximum, the sum of weights, and the weighted sum of
// values (rows `ld` floats apart). `query`: scratch for one row.
struct SoftmaxRows {
  float *row_max, *row_sum, *rows;
  int64_t ld;
  float* query;
};

// Continues the online softmax of a row block over its gathered keys. Per batch: all scores (dot products), then all weights
// (one vectorised exp2), then all values, so that the latencies of different pairs overlap.
template <class T>
class GatheredSoftmax {
 public:
  GatheredSoftmax(const RowBlock& row_block, const HeadRows<T>& queries, const HeadRows<T>& keys, const HeadRows<T>& values,
                  int64_t dim, int64_t value_dim, float scale, const DropoutMask& dropout, const BlockTerms& terms,
                  const SoftmaxRows& state)
      : row_block_(row_block),
        queries_(queries),
        keys_(keys),
        values_(values),
        dim_(dim),
        value_dim_(value_dim),
        scale_(scale),
        dropout_(dropout),
        terms_(terms),
        state_(state) {}

  // Processes all gathered keys of a layer.
  void process_layer(const LayerView& layer) {
    int64_t first, last, ignored;
    row_block_.gathered_range(layer, 0, first, ignored);
    row_block_.gathered_range(layer, row_block_.count - 1, ignored, last);
    int s = 0;
    for (int64_t x = first; x < last; x += kGatherBatch) {
      const int n = static_cast<int>(min<int64_t>(last - x, kGatherBatch));
      while (end(layer, s) <= x) ++s;
      compute_weights(layer, s, x, n);
      for (int row = s, from = 0; from < n; ++row) {
        const int to = static_cast<int>(min<int64_t>(end(layer, row) - x, n));
        state_.row_sum[row] += add(layer.point_keys + x, from, to, row);
        from = max(from, to);
      }
    }
  }

 private:
  // End of row s's gathered keys in layer.point_keys.
  int64_t end(const LayerView& layer, int s) const {
    int64_t first, last;
    row_block_.gathered_range(layer, s, first, last);
    return last;
  }

  // Weights of pairs x to x + n - 1, the first of which belongs to row s. Raises and rescales a row's state where a score
  // exceeds its maximum.
  void compute_weights(const LayerView& layer, int s, int64_t x, int n) {
    for (int from = 0; from < n; ++s) {
      const int to = static_cast<int>(min<int64_t>(end(layer, s) - x, n));
      if (from >= to) continue;
      copy_as_float(queries_.row(row_block_.row[s]), state_.query, dim_);
      float largest = kMaskedScore;
      for (int i = from; i < to; ++i) {
        const int32_t key = layer.point_keys[x + i];
        float slope;
        weight_[i] = terms_.pair(dot(state_.query, keys_.row(key), dim_) * scale_, s, key, &slope);
        largest = weight_[i] > largest ? weight_[i] : largest;
      }
      if (largest > state_.row_max[s]) {
        float rescale[W];
        store(rescale, exp2_poly<5>(broadcast(state_.row_max[s] - largest)));
        for (int64_t d = 0; d < value_dim_; ++d) state_.rows[s * state_.ld + d] *= rescale[0];
        state_.row_sum[s] *= rescale[0];
        state_.row_max[s] = largest;
      }
      for (; from < to; ++from) reference_[from] = state_.row_max[s];
    }
    for (int i = n; i % W; ++i) weight_[i] = reference_[i] = 0.0f;
    for (int i = 0; i < n; i += W) store(weight_ + i, exp2_poly<5>(sub(load(weight_ + i), load(reference_ + i))));
  }

  // Accumulates the weighted values of pairs [from, to) into row s; returns the sum of their weights. Dropout removes values,
  // not weights.
  float add(const int32_t* key, int from, int to, int s) {
    float sum = 0.0f, *row = state_.rows + s * state_.ld;
    if (!dropout_.on()) {
      for (int i = from; i < to; ++i) sum += weight_[i];
      if (from < to) accumulate_rows(row, weight_ + from, key + from, to - from, values_, value_dim_);
      return sum;
    }
    for (int i = from; i < to; ++i) {
      sum += weight_[i];
      if (dropout_.keeps_pair(key[i], s)) axpy(row, weight_[i], values_.row(key[i]), value_dim_);
    }
    return sum;
  }

  const RowBlock& row_block_;
  const HeadRows<T>&queries_, &keys_, &values_;
  int64_t dim_, value_dim_;
  float scale_;
  const DropoutMask& dropout_;
  const BlockTerms& terms_;
  SoftmaxRows state_;
  float weight_[kGatherBatch], reference_[kGatherBatch];
};

}  // namespace farlight::FARLIGHT_NS

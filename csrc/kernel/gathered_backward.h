// Gathered keys, backward: the contributions of single (query row, key) pairs to dq, dk and dv.
#pragma once

#include "gathered.h"

namespace farlight::FARLIGHT_NS {

// Gradients of the gathered keys of a row block. Per batch: all products with K and V while the dk/dv accumulators are being
// prefetched; then all weights by one vectorised exp2; then the accumulations.
template <class T>
class GatheredGradients {
 public:
  // reference, lse, delta: per row of the block (lse relative to reference, see Backward); dq: rows `ld` floats apart.
  GatheredGradients(const RowBlock& row_block, const HeadRows<T>& queries, const HeadRows<T>& dout, const HeadRows<T>& keys,
                    const HeadRows<T>& values, int64_t dim, int64_t value_dim, float scale, const DropoutMask& dropout,
                    const BlockTerms& terms, const DkDvBlocks& dkdv_blocks, const float* reference, const float* lse,
                    const float* delta, float* dq, int64_t ld)
      : row_block_(row_block),
        queries_(queries),
        dout_(dout),
        keys_(keys),
        values_(values),
        dim_(dim),
        value_dim_(value_dim),
        scale_(scale),
        dropout_(dropout),
        terms_(terms),
        dkdv_blocks_(dkdv_blocks),
        reference_(reference),
        lse_(lse),
        delta_(delta),
        dq_(dq),
        ld_(ld) {}

  // Processes a layer's gathered keys; returns the mask of rows that have any.
  uint32_t process_layer(const LayerView& layer) {
    int64_t x, last, end;
    row_block_.gathered_range(layer, 0, x, end);
    row_block_.gathered_range(layer, row_block_.count - 1, end, last);
    uint32_t touched = 0;
    for (int s = 0; x < last; x += kBatch) {
      const int n = static_cast<int>(min<int64_t>(last - x, kBatch));
      for (int i = 0; i < n; ++i) {
        for (row_block_.gathered_range(layer, s, end, end); end <= x + i; row_block_.gathered_range(layer, s, end, end)) ++s;
        row_[i] = s;
        touched |= 1u << s;
      }
      const int32_t* keys = layer.point_keys + x;
      multiply(keys, n);
      softmax_backward(keys, n);
      add(keys, n);
    }
    return touched;
  }

 private:
  static constexpr int kBatch = 32;  // pairs per batch

  // S = q k and dP = dO v of each pair, and the softmax statistics of its row.
  void multiply(const int32_t* keys, int n) {
    for (int i = 0; i < n; ++i) {
      const int64_t row = row_block_.row[row_[i]];
      prefetch_row_for_write(dk(keys[i]), dim_);
      prefetch_row_for_write(dv(keys[i]), value_dim_);
      const float score = dot(queries_.row(row), keys_.row(keys[i]), dim_) * (scale_ * kLog2E);
      weight_[i] = terms_.pair(score, row_[i], keys[i], slope_ + i);
      ds_[i] = dot(dout_.row(row), values_.row(keys[i]), value_dim_);
      row_reference_[i] = reference_[row_[i]];
      row_lse_[i] = lse_[row_[i]];
    }
    for (int i = n; i % W; ++i) weight_[i] = row_reference_[i] = row_lse_[i] = 0.0f;
  }

  // From (S, dP) to (P with dropout, dS).
  void softmax_backward(const int32_t* keys, int n) {
    for (int i = 0; i < n; i += W)
      store(weight_ + i,
            exp2_poly<5>(fma(load(row_lse_ + i), broadcast(-kLog2E), sub(load(weight_ + i), load(row_reference_ + i)))));
    for (int i = 0; i < n; ++i) {
      const float keep = !dropout_.on() ? 1.0f : dropout_.keeps_pair(keys[i], row_[i]) ? dropout_.keep_scale() : 0.0f;
      const float ds = weight_[i] * (ds_[i] * keep - delta_[row_[i]]);
      if (terms_.on()) terms_.add_gradient(ds, row_[i], keys[i], dkdv_blocks_.terms);
      ds_[i] = ds * scale_ * slope_[i];
      weight_[i] *= keep;
    }
  }

  // dq += dS k, dk += dS q, dv += P dO.
  void add(const int32_t* keys, int n) {
    for (int i = 0, next; i < n; i = next) {
      for (next = i + 1; next < n && row_[next] == row_[i];) ++next;
      accumulate_rows(dq_ + row_[i] * ld_, ds_ + i, keys + i, next - i, keys_, dim_);
      const int64_t row = row_block_.row[row_[i]];
      for (int at = i; at < next; ++at) {
        axpy(dk(keys[at]), ds_[at], queries_.row(row), dim_);
        axpy(dv(keys[at]), weight_[at], dout_.row(row), value_dim_);
      }
    }
  }

  float* dk(int32_t key) const { return dkdv_blocks_.dk[key / kBlock] + key % kBlock * dkdv_blocks_.dk_stride; }
  float* dv(int32_t key) const { return dkdv_blocks_.dv[key / kBlock] + key % kBlock * dkdv_blocks_.dv_stride; }

  const RowBlock& row_block_;
  const HeadRows<T>&queries_, &dout_, &keys_, &values_;
  int64_t dim_, value_dim_;
  float scale_;
  const DropoutMask& dropout_;
  const BlockTerms& terms_;
  const DkDvBlocks& dkdv_blocks_;
  const float *reference_, *lse_, *delta_;
  float* dq_;
  int64_t ld_;
  int row_[kBatch];
  float weight_[kBatch], ds_[kBatch], slope_[kBatch], row_reference_[kBatch], row_lse_[kBatch];
};

}  // namespace farlight::FARLIGHT_NS

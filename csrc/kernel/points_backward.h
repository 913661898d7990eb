// Single pairs, backward: what a key gathered for one row adds to dq, dk and dv.
#pragma once

#include "points.h"

namespace farlight::FARLIGHT_NS {

// Some points at a time: first all their products with K and V, while the sums that they will be added to are on their way
// from memory; then all weights at once; then the sums.
template <class T>
class PointGradients {
 public:
  // By row of the tile: `reference` and `lse` above it, `delta`, and dq, `ld` floats between two rows.
  PointGradients(const Tile& tile, const Source<T>& queries, const Source<T>& upstream, const Source<T>& keys, const Source<T>& values,
                 int64_t dim, float scale, const Dropped& dropped, const Sums& sums, const float* reference, const float* lse,
                 const float* delta, float* dq, int64_t ld)
      : tile_(tile), queries_(queries), upstream_(upstream), keys_(keys), values_(values), dim_(dim), scale_(scale),
        dropped_(dropped), sums_(sums), reference_(reference), lse_(lse), delta_(delta), dq_(dq), ld_(ld) {}

  // The rows that have points in the layer.
  uint32_t take(const LayerView& layer) {
    int64_t x, last, end;
    tile_.points(layer, 0, x, end);
    tile_.points(layer, tile_.count - 1, end, last);
    uint32_t touched = 0;
    for (int s = 0; x < last; x += kTogether) {
      const int n = static_cast<int>(least<int64_t>(last - x, kTogether));
      for (int i = 0; i < n; ++i) {
        for (tile_.points(layer, s, end, end); end <= x + i; tile_.points(layer, s, end, end)) ++s;
        row_[i] = s;
        touched |= 1u << s;
      }
      const int32_t* keys = layer.point_keys + x;
      multiply(keys, n);
      differentiate(keys, n);
      add(keys, n);
    }
    return touched;
  }

 private:
  static constexpr int kTogether = 32;

  void multiply(const int32_t* keys, int n) {
    for (int i = 0; i < n; ++i) {
      const int64_t row = tile_.row[row_[i]];
      ask_for_write(dk(keys[i]), dim_);
      ask_for_write(dv(keys[i]), dim_);
      weight_[i] = dot(queries_.row(row), keys_.row(keys[i]), dim_) * (scale_ * kLog2E);
      slope_[i] = dot(upstream_.row(row), values_.row(keys[i]), dim_);
      top_[i] = reference_[row_[i]];
      base_[i] = lse_[row_[i]];
    }
    for (int i = n; i % W; ++i) weight_[i] = top_[i] = base_[i] = 0.0f;
  }

  // From S and dP to P (with dropout) and dS.
  void differentiate(const int32_t* keys, int n) {
    for (int i = 0; i < n; i += W)
      store(weight_ + i, power2<5>(fma(load(base_ + i), all(-kLog2E), sub(load(weight_ + i), load(top_ + i)))));
    for (int i = 0; i < n; ++i) {
      const float kept = !dropped_.on() ? 1.0f : dropped_.kept_one(keys[i], row_[i]) ? dropped_.inverse() : 0.0f;
      slope_[i] = weight_[i] * scale_ * (slope_[i] * kept - delta_[row_[i]]);
      weight_[i] *= kept;
    }
  }

  void add(const int32_t* keys, int n) {
    for (int i = 0, next; i < n; i = next) {
      for (next = i + 1; next < n && row_[next] == row_[i];) ++next;
      add_rows(dq_ + row_[i] * ld_, slope_ + i, keys + i, next - i, keys_, dim_);
      const int64_t row = tile_.row[row_[i]];
      for (int at = i; at < next; ++at) {
        add_times(dk(keys[at]), slope_[at], queries_.row(row), dim_);
        add_times(dv(keys[at]), weight_[at], upstream_.row(row), dim_);
      }
    }
  }

  float* dk(int32_t key) const { return sums_.dk[key / kBlock] + key % kBlock * sums_.stride; }
  float* dv(int32_t key) const { return sums_.dv[key / kBlock] + key % kBlock * sums_.stride; }

  const Tile& tile_;
  const Source<T>&queries_, &upstream_, &keys_, &values_;
  int64_t dim_;
  float scale_;
  const Dropped& dropped_;
  const Sums& sums_;
  const float *reference_, *lse_, *delta_;
  float* dq_;
  int64_t ld_;
  int row_[kTogether];
  float weight_[kTogether], slope_[kTogether], top_[kTogether], base_[kTogether];
};

}  // namespace farlight::FARLIGHT_NS

// Single pairs: a key gathered for one row, the head dimension in lanes.
#pragma once

#include "columns.h"
#include "operands.h"
#include "scores.h"

namespace farlight::FARLIGHT_NS {

constexpr int kPoints = 256;  // taken together

// to += sum over i < n of weight[i] * values[key[i]]
template <class T>
inline void add_rows(float* to, const float* weight, const int32_t* key, int n, const Source<T>& values, int64_t dim) {
  constexpr int kFew = 4;  // whose rows are walked together, so that `to` is read and written once for all
  for (int i = 0; i < n; i += kFew) {
    const int few = least(n - i, kFew);
    const T* row[kFew];
    for (int j = 0; j < few; ++j) row[j] = values.row(key[i + j]);
    int64_t d = 0;
    for (; d + W <= dim; d += W) {
      F sum = load(to + d);
      for (int j = 0; j < few; ++j) sum = fma(all(weight[i + j]), widen(row[j] + d), sum);
      store(to + d, sum);
    }
    for (; d < dim; ++d)
      for (int j = 0; j < few; ++j) to[d] += weight[i + j] * as_float(row[j][d]);
  }
}

// What the rows of a tile have seen so far: by row the reference of their weights, the sum of these, and the values with them, `ld`
// floats between two rows. `query` has room for one row.
struct Seen {
  float *top, *total, *rows;
  int64_t ld;
  float* query;
};

// The softmax of a tile's rows over their points, going on from what they have seen. Scores of all rows come first, so that one
// waits for no other.
template <class T>
class PointSoftmax {
 public:
  PointSoftmax(const Tile& tile, const Source<T>& queries, const Source<T>& keys, const Source<T>& values, int64_t dim, float scale,
               const Dropped& dropped, const Seen& seen)
      : tile_(tile), queries_(queries), keys_(keys), values_(values), dim_(dim), scale_(scale), dropped_(dropped), seen_(seen) {}

  void take(const LayerView& layer) {
    int64_t first, last, ignored;
    tile_.points(layer, 0, first, ignored);
    tile_.points(layer, tile_.count - 1, ignored, last);
    int s = 0;
    for (int64_t x = first; x < last; x += kPoints) {
      const int n = static_cast<int>(least<int64_t>(last - x, kPoints));
      while (end(layer, s) <= x) ++s;
      weigh(layer, s, x, n);
      for (int row = s, from = 0; from < n; ++row) {
        const int to = static_cast<int>(least<int64_t>(end(layer, row) - x, n));
        seen_.total[row] += add(layer.point_keys + x, from, to, row);
        from = most(from, to);
      }
    }
  }

 private:
  int64_t end(const LayerView& layer, int s) const {
    int64_t first, last;
    tile_.points(layer, s, first, last);
    return last;
  }

  // The weights of points x ... x + n - 1, the first of which are row s's.
  void weigh(const LayerView& layer, int s, int64_t x, int n) {
    for (int from = 0; from < n; ++s) {
      const int to = static_cast<int>(least<int64_t>(end(layer, s) - x, n));
      if (from >= to) continue;
      copy_as_float(queries_.row(tile_.row[s]), seen_.query, dim_);
      float largest = kUnseen;
      for (int i = from; i < to; ++i) {
        weight_[i] = dot(seen_.query, keys_.row(layer.point_keys[x + i]), dim_) * scale_;
        largest = weight_[i] > largest ? weight_[i] : largest;
      }
      if (largest > seen_.top[s]) {
        float shrink[W];
        store(shrink, power2<5>(all(seen_.top[s] - largest)));
        for (int64_t d = 0; d < dim_; ++d) seen_.rows[s * seen_.ld + d] *= shrink[0];
        seen_.total[s] *= shrink[0];
        seen_.top[s] = largest;
      }
      for (; from < to; ++from) reference_[from] = seen_.top[s];
    }
    for (int i = n; i % W; ++i) weight_[i] = reference_[i] = 0.0f;
    for (int i = 0; i < n; i += W) store(weight_ + i, power2<5>(sub(load(weight_ + i), load(reference_ + i))));
  }

  // Adds the values of row s's points; the sum of their weights.
  float add(const int32_t* key, int from, int to, int s) {
    float sum = 0.0f, *row = seen_.rows + s * seen_.ld;
    if (!dropped_.on()) {
      for (int i = from; i < to; ++i) sum += weight_[i];
      if (from < to) add_rows(row, weight_ + from, key + from, to - from, values_, dim_);
      return sum;
    }
    for (int i = from; i < to; ++i) {
      sum += weight_[i];
      if (dropped_.kept_one(key[i], s)) add_times(row, weight_[i], values_.row(key[i]), dim_);
    }
    return sum;
  }

  const Tile& tile_;
  const Source<T>&queries_, &keys_, &values_;
  int64_t dim_;
  float scale_;
  const Dropped& dropped_;
  Seen seen_;
  float weight_[kPoints], reference_[kPoints];
};

}  // namespace farlight::FARLIGHT_NS

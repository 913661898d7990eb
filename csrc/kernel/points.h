// Single pairs: a key gathered for one row, the head dimension in lanes.
#pragma once

#include "columns.h"
#include "operands.h"
#include "scores.h"

namespace farlight::FARLIGHT_NS {

constexpr int kPoints = 64;  // taken together

// Asks for the rows of all points of a tile early: they lie anywhere.
template <class T>
inline void prefetch_points(const Tile& tile, const Source<T>& keys, const Source<T>& values, int64_t dim) {
  for (int i = 0; i < tile.piece->layer_count; ++i) {
    const LayerView& layer = tile.piece->layers[i];
    if (!tile.has_points(layer)) continue;
    int64_t first, last, ignored;
    tile.points(layer, 0, first, ignored);
    tile.points(layer, tile.count - 1, ignored, last);
    if (last - first > 16 * kRows) continue;
    for (int64_t x = first; x < last; ++x) {
      const char* k = reinterpret_cast<const char*>(keys.row(layer.point_keys[x]));
      const char* v = reinterpret_cast<const char*>(values.row(layer.point_keys[x]));
      for (int64_t byte = 0; byte < dim * static_cast<int64_t>(sizeof(T)); byte += 64) {
        FARLIGHT_PREFETCH(k + byte);
        FARLIGHT_PREFETCH(v + byte);
      }
    }
  }
}

// The softmax of one row, as far as it has come.
struct Softmax {
  float top, total;
  float* row;
  int64_t dim;

  template <class T>
  void take(const float* query, const int32_t* key, int n, const Source<T>& keys, const Source<T>& values, float scale,
            const Dropped& dropped, int s) {
    float weight[kPoints];
    float largest = kUnseen;
    for (int i = 0; i < n; ++i) {
      weight[i] = dot(query, keys.row(key[i]), dim) * scale;
      largest = weight[i] > largest ? weight[i] : largest;
    }
    if (largest > top) {
      float shrink[W];
      store(shrink, power2<5>(all(top - largest)));
      for (int64_t d = 0; d < dim; ++d) row[d] *= shrink[0];
      total *= shrink[0];
      top = largest;
    }
    for (int i = n; i % W; ++i) weight[i] = kUnseen;
    F sums = all(0.0f);
    for (int i = 0; i < n; i += W) {
      const F w = power2<5>(sub(load(weight + i), all(top)));
      sums = add(sums, w);
      store(weight + i, w);
    }
    total += sum(sums);
    for (int i = 0; i < n; ++i)
      if (!dropped.on() || dropped.kept_one(key[i], s)) add_times(row, weight[i], values.row(key[i]), dim);
  }
};

}  // namespace farlight::FARLIGHT_NS

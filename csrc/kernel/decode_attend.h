// Attention of a few query rows over listed slots of one key head: online softmax over chunks of kDecodeChunk keys.
//
// A step of decoding is bound by the bytes of K and V, so a chunk is read once for all rows of a group and stays in L1 while
// each row uses it. Keys are scored W at a time, one accumulator each, and a tree of shuffles sums the accumulators' lanes.
// Narrow element types are widened in registers; from kWidenRows rows on, once per chunk into scratch memory.
#pragma once

#include "arena.h"
#include "decode_elements.h"
#include "elementary.h"

namespace farlight::FARLIGHT_NS {

constexpr int kDecodeChunk = 64;
constexpr int kWidenRows = 3;
constexpr int kSlab = W == 16 ? 4 : 2;  // vectors of an output row that are accumulated at a time

// Lane i: q · rows[i]. q is in the order of T's groups.
template <class T>
FARLIGHT_INLINE F dot_keys(const float* q, const T* const* rows, int64_t dim) {
  F sums[W];
  FARLIGHT_UNROLL
  for (int i = 0; i < W; ++i) sums[i] = broadcast(0.0f);
  int64_t d = 0;
  for (; d + 2 * W <= dim; d += 2 * W) {
    const F qa = load(q + d), qb = load(q + d + W);
    FARLIGHT_UNROLL
    for (int i = 0; i < W; ++i) {
      F a, b;
      widen_group(rows[i] + d, a, b);
      sums[i] = fma(b, qb, fma(a, qa, sums[i]));
    }
  }
  if (d + W <= dim) {
    const F qa = load(q + d);
    FARLIGHT_UNROLL
    for (int i = 0; i < W; ++i) sums[i] = fma(widen(rows[i] + d), qa, sums[i]);
    d += W;
  }
  F total = sum_each(sums);
  if (d < dim) {
    float rest[W];
    for (int i = 0; i < W; ++i) {
      rest[i] = 0.0f;
      for (int64_t e = d; e < dim; ++e) rest[i] += q[e] * to_float(rows[i][e]);
    }
    total = add(total, load(rest));
  }
  return total;
}

// out[r][d …] += Σ_i weights[r][i] * rows[i][d …] for R rows and V vectors (V > 1: whole groups). Two sets of accumulators for
// one row hide the latency of the multiply-add.
template <class T, int R, int V>
FARLIGHT_INLINE void accumulate_slab(const T* const* rows, int n, const float* const* weights, float* const* out, int64_t d) {
  constexpr int kSets = R == 1 ? 2 : 1;
  F sums[kSets][R][V];
  FARLIGHT_UNROLL
  for (int r = 0; r < R; ++r) {
    FARLIGHT_UNROLL
    for (int v = 0; v < V; ++v) {
      sums[0][r][v] = load(out[r] + d + v * W);
      if constexpr (kSets == 2) sums[1][r][v] = broadcast(0.0f);
    }
  }
  auto add_key = [&](int i, int set) {
    F x[V];
    if constexpr (V == 1) x[0] = widen(rows[i] + d);
    else {
      FARLIGHT_UNROLL
      for (int v = 0; v < V; v += 2) widen_group(rows[i] + d + v * W, x[v], x[v + 1]);
    }
    FARLIGHT_UNROLL
    for (int r = 0; r < R; ++r) {
      const F w = broadcast(weights[r][i]);
      FARLIGHT_UNROLL
      for (int v = 0; v < V; ++v) sums[set][r][v] = fma(w, x[v], sums[set][r][v]);
    }
  };
  int i = 0;
  for (; i + kSets <= n; i += kSets) {
    add_key(i, 0);
    if constexpr (kSets == 2) add_key(i + 1, 1);
  }
  if (i < n) add_key(i, 0);
  FARLIGHT_UNROLL
  for (int r = 0; r < R; ++r) {
    FARLIGHT_UNROLL
    for (int v = 0; v < V; ++v) {
      if constexpr (kSets == 2) sums[0][r][v] = add(sums[0][r][v], sums[1][r][v]);
      store(out[r] + d + v * W, sums[0][r][v]);
    }
  }
}

template <class T, int R>
FARLIGHT_INLINE void accumulate(const T* const* rows, int n, const float* const* weights, float* const* out, int64_t dim) {
  int64_t d = 0;
  for (; d + kSlab * W <= dim; d += kSlab * W) accumulate_slab<T, R, kSlab>(rows, n, weights, out, d);
  for (; d + 2 * W <= dim; d += 2 * W) accumulate_slab<T, R, 2>(rows, n, weights, out, d);
  for (; d + W <= dim; d += W) accumulate_slab<T, R, 1>(rows, n, weights, out, d);
  for (; d < dim; ++d)
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < n; ++i) out[r][d] += weights[r][i] * to_float(rows[i][d]);
}

// One DecodeItem with keys of type T.
template <class T>
class DecodeAttend {
 public:
  DecodeAttend(const DecodeItem& item, Arena& arena)
      : item_(item),
        q_(arena.allocate<float>(item.rows * item.dim)),
        scores_(arena.allocate<float>(item.rows * kDecodeChunk)),
        weights_(arena.allocate<const float*>(item.rows)),
        widened_(arena.allocate<float>(kDecodeChunk * item.dim)) {}

  void run() {
    for (int64_t r = 0; r < item_.rows; ++r) {
      for (int64_t d = 0; d < item_.dim; ++d) q_[r * item_.dim + d] = item_.q[r][element_at<T>(d, item_.dim)];
      for (int64_t d = 0; d < item_.dim; ++d) item_.result[r][d] = 0.0f;
      item_.result[r][item_.dim] = -kInfinity;
      item_.result[r][item_.dim + 1] = 0.0f;
      weights_[r] = scores_ + r * kDecodeChunk;
    }
    int n = locate(0, next_);
    for (int64_t at = 0; n > 0; at += kDecodeChunk) {
      present_ = next_;
      prefetch_scales(at + 2 * kDecodeChunk);
      const int following = locate(at + kDecodeChunk, next_);
      chunk(at, n, following);
      n = following;
    }
    for (int64_t r = 0; splits_pairs<T> && r < item_.rows; ++r) restore_order(item_.result[r]);
  }

 private:
  static constexpr float kInfinity = __builtin_huge_valf();
  static constexpr bool kHasScales = sizeof(T) == 1;

  // Addresses of the rows of a chunk, padded to a multiple of W with the last one.
  struct Rows {
    const T *k[kDecodeChunk], *v[kDecodeChunk];
    float k_scale[kHasScales ? kDecodeChunk : 1], v_scale[kHasScales ? kDecodeChunk : 1];
  };

  FARLIGHT_INLINE int64_t slot(int64_t at) const { return item_.slots ? item_.slots[at] : item_.first + at; }

  // Fills the rows of list positions at … and returns their number.
  FARLIGHT_INLINE int locate(int64_t at, Rows& rows) const {
    const int n = static_cast<int>(min<int64_t>(item_.count - at, kDecodeChunk));
    const int64_t mask = (int64_t{1} << item_.page_shift) - 1, dim = item_.dim;
    int64_t number = -1, first_row = 0;
    const KeyPage* page = nullptr;
    for (int i = 0; i < n; ++i) {
      const int64_t s = slot(at + i);
      if (s >> item_.page_shift != number) {
        number = s >> item_.page_shift;
        page = item_.pages + number;
        first_row = item_.head * page->capacity;
      }
      const int64_t row = first_row + (s & mask);
      rows.k[i] = reinterpret_cast<const T*>(page->k) + row * dim;
      rows.v[i] = reinterpret_cast<const T*>(page->v) + row * dim;
      if constexpr (kHasScales) rows.k_scale[i] = page->k_scale[row], rows.v_scale[i] = page->v_scale[row];
    }
    for (int i = n; i > 0 && i % W; ++i) {
      rows.k[i] = rows.k[n - 1];
      if constexpr (kHasScales) rows.k_scale[i] = rows.v_scale[i] = 0.0f;
    }
    return n;
  }

  // Software prefetch of rows first … first + W - 1 of `n`.
  FARLIGHT_INLINE void prefetch(const T* const* rows, int first, int n) const {
    const int64_t bytes = item_.dim * static_cast<int64_t>(sizeof(T));
    if (bytes == 64) prefetch_lines<1>(rows, first, n);
    else if (bytes == 128) prefetch_lines<2>(rows, first, n);
    else if (bytes == 256) prefetch_lines<4>(rows, first, n);
    else
      for (int i = first; i < min(first + W, n); ++i)
        for (int64_t byte = 0; byte < bytes; byte += 64) FARLIGHT_PREFETCH(reinterpret_cast<const char*>(rows[i]) + byte);
  }
  template <int Lines>
  FARLIGHT_INLINE void prefetch_lines(const T* const* rows, int first, int n) const {
    const int end = min(first + W, n);
    for (int i = first; i < end; ++i) {
      FARLIGHT_UNROLL
      for (int line = 0; line < Lines; ++line) FARLIGHT_PREFETCH(reinterpret_cast<const char*>(rows[i]) + 64 * line);
    }
  }

  // Software prefetch of the scales that `locate(at, …)` will load: a line holds those of 16 neighbouring slots.
  FARLIGHT_INLINE void prefetch_scales(int64_t at) const {
    if constexpr (kHasScales)
      for (int64_t i = at; i < min(item_.count, at + kDecodeChunk); i += 16) {
        const KeyPage& page = item_.pages[slot(i) >> item_.page_shift];
        const int64_t row = item_.head * page.capacity + (slot(i) & ((int64_t{1} << item_.page_shift) - 1));
        FARLIGHT_PREFETCH(page.k_scale + row);
        FARLIGHT_PREFETCH(page.v_scale + row);
      }
  }

  FARLIGHT_INLINE bool widens() const { return sizeof(T) < 4 && item_.rows >= kWidenRows; }

  // Rows first … first + W - 1 of `n`, in the order of T's groups, as float32 in scratch memory.
  FARLIGHT_INLINE void widen_rows(const T* const* rows, int first, int n) {
    for (int i = first; i < min(first + W, n); ++i) {
      float* to = widened_ + i * item_.dim;
      int64_t d = 0;
      for (; d + 2 * W <= item_.dim; d += 2 * W) {
        F a, b;
        widen_group(rows[i] + d, a, b);
        store(to + d, a), store(to + d + W, b);
      }
      for (; d < item_.dim; ++d) to[d] = to_float(rows[i][d]);
    }
  }

  void chunk(int64_t at, int n, int following) {
    const float* float_rows[kDecodeChunk];
    for (int i = 0; widens() && i < kDecodeChunk; ++i) float_rows[i] = widened_ + i * item_.dim;
    for (int first = 0; first < n; first += W) {
      prefetch(present_.v, first, n);
      if (widens()) widen_rows(present_.k, first, (n + W - 1) / W * W);
      for (int64_t r = 0; r < item_.rows; ++r) {
        const float* q = q_ + r * item_.dim;
        F x = widens() ? dot_keys<float>(q, float_rows + first, item_.dim) : dot_keys<T>(q, present_.k + first, item_.dim);
        if constexpr (kHasScales) x = mul(x, load(present_.k_scale + first));
        store(scores_ + r * kDecodeChunk + first, x);
      }
    }
    for (int64_t r = 0; r < item_.rows; ++r) softmax(r, at, n);
    for (int first = 0; first < n; first += W) {
      prefetch(next_.k, first, following);
      const int count = min(W, n - first);
      if (widens()) {
        widen_rows(present_.v, first, n);
        accumulate_rows<float>(float_rows + first, first, count);
      } else {
        accumulate_rows<T>(present_.v + first, first, count);
      }
    }
  }

  template <class S>
  FARLIGHT_INLINE void accumulate_rows(const S* const* rows, int first, int n) {
    int64_t r = 0;
    const auto run = [&](auto width) {
      constexpr int R = decltype(width)::value;
      const float* weights[R];
      for (int i = 0; i < R; ++i) weights[i] = weights_[r + i] + first;
      accumulate<S, R>(rows, n, weights, item_.result + r, item_.dim);
      r += R;
    };
    while (r + 4 <= item_.rows) run(Constant<4>{});
    if (r + 2 <= item_.rows) run(Constant<2>{});
    if (r < item_.rows) run(Constant<1>{});
  }

  template <int N>
  struct Constant {
    static constexpr int value = N;
  };

  // Score terms of a row of a chunk, in base 2.
  FARLIGHT_NOINLINE void add_terms(const RowTerms& row, int64_t at, int n, float* scores) const {
    constexpr float kLog2E = 1.44269504088896340736f;
    float bias[kDecodeChunk] = {};
    for (int i = 0; i < n; ++i) {
      const int64_t s = slot(at + i), key = item_.position ? item_.position[s] : s, distance = key - row.position;
      bias[i] = -row.slope * static_cast<float>(distance < 0 ? -distance : distance);
      if (row.distance)
        bias[i] += row.distance[max<int64_t>(0, min<int64_t>(distance - item_.terms->first, item_.terms->length - 1))];
      if (row.key_bias) bias[i] += row.key_bias[key];
    }
    const float cap = item_.terms->cap * kLog2E;
    for (int i = 0; i < n; i += W) {
      F x = load(scores + i);
      if (cap != 0.0f) x = mul(tanh_rational(mul(x, broadcast(1.0f / cap))), broadcast(cap));
      store(scores + i, fma(load(bias + i), broadcast(kLog2E), x));
    }
  }

  // Replaces the scores of a row by 2^(score - maximum), after rescaling the row's sums to the new maximum.
  void softmax(int64_t r, int64_t at, int n) {
    float* scores = scores_ + r * kDecodeChunk;
    float *result = item_.result[r], &row_max = result[item_.dim], &row_sum = result[item_.dim + 1];
    if (item_.terms) add_terms(item_.row_terms[r], at, n, scores);
    for (int i = n; i % W; ++i) scores[i] = -kInfinity;
    if (item_.mask)
      for (int i = 0; i < n; ++i) scores[i] = item_.mask[r][slot(at + i)] ? scores[i] : -kInfinity;
    F largest = broadcast(-kInfinity);
    for (int i = 0; i < n; i += W) largest = max(load(scores + i), largest);
    const float chunk_max = max_lane(largest);
    if (chunk_max == -kInfinity) {  // nothing visible, or NaN
      float check = 0.0f;
      for (int i = 0; i < n; ++i) check += scores[i] == scores[i] ? 0.0f : scores[i];
      row_sum += check;
      for (int i = 0; i < n; ++i) scores[i] = 0.0f;
      return;
    }
    if (chunk_max > row_max) {
      if (row_max > -kInfinity) {
        float factor[W];
        store(factor, exp2_poly<5>(broadcast(max(row_max - chunk_max, -200.0f))));
        for (int64_t d = 0; d < item_.dim; ++d) result[d] *= factor[0];
        row_sum *= factor[0];
      }
      row_max = chunk_max;
    }
    F total = broadcast(0.0f);
    for (int i = 0; i < n; i += W) {
      // Below -200 the power is 0; max keeps NaN in its second operand.
      const F p = exp2_poly<5>(max(broadcast(-200.0f), sub(load(scores + i), broadcast(row_max))));
      total = add(total, p);
      if constexpr (kHasScales) store(scores + i, mul(p, load(present_.v_scale + i)));
      else store(scores + i, p);
    }
    row_sum += sum(total);
  }

  // Sums from the order of T's groups to the order of elements.
  void restore_order(float* row) {
    for (int64_t d = 0; d < item_.dim; ++d) widened_[d] = row[d];
    for (int64_t d = 0; d < item_.dim; ++d) row[element_at<T>(d, item_.dim)] = widened_[d];
  }

  const DecodeItem& item_;
  float *q_, *scores_;
  const float** weights_;
  float* widened_;
  Rows present_, next_;
};

}  // namespace farlight::FARLIGHT_NS

// Attention of a few query rows over listed slots of one key head: online softmax over chunks of up to kDecodeChunk keys.
//
// A step of decoding is bound by the bytes of K and V, so a chunk is read once for all rows of a group and stays in L1 while
// each row uses it. Keys are scored W at a time, one accumulator each, and a tree of shuffles sums the accumulators' lanes;
// values are accumulated in registers over the whole chunk. Chunks are runs of consecutive slots of a page where the list has
// them, else tables of row addresses. Narrow element types are widened in registers; from kWidenRows rows on, once per chunk
// into scratch memory.
#pragma once

#include "arena.h"
#include "decode_rows.h"
#include "elementary.h"

namespace farlight::FARLIGHT_NS {

constexpr int kDecodeChunk = 64;
constexpr int kShortestRun = 16;  // shorter runs of slots are read by addresses
constexpr int kWidenRows = 3;

// One DecodeItem with keys of type T. Dim: Constant of the head dim, or int64_t.
template <class T, class Dim>
class DecodeAttend {
 public:
  DecodeAttend(const DecodeItem& item, Dim dim, Arena& arena)
      : item_(item),
        dim_(dim),
        has_pairs_(multiplies_pairs<T> && item.query_type == KeyType::bf16),
        q_(arena.allocate<float>(item.rows * dim)),
        q_pairs_(arena.allocate<Bf16>(item.rows * pair_stride())),
        scores_(arena.allocate<float>(item.rows * kDecodeChunk)),
        weights_(arena.allocate<const float*>(item.rows)),
        sums_(arena.allocate<float>(item.rows * sum_stride())),
        sum_rows_(arena.allocate<float*>(item.rows)),
        widened_(arena.allocate<float>(kDecodeChunk * dim)) {}

  void run() {
    for (int64_t r = 0; r < item_.rows; ++r) {
      if (has_pairs_) set_pairs(item_.q[r], q_pairs_ + r * pair_stride());
      else to_group_order<T>(item_.q[r], dim_, item_.factor, q_ + r * dim_);
      float* sums = sum_rows_[r] = sums_ + r * sum_stride();
      for (int64_t d = 0; d < dim_; ++d) sums[d] = 0.0f;
      sums[dim_] = -kInfinity;
      sums[dim_ + 1] = 0.0f;
      weights_[r] = scores_ + r * kDecodeChunk;
    }
    locate(0, chunks_[0]);
    prefetch(chunks_[0], chunks_[0].k, 0, kDecodeChunk);
    for (int c = 0; chunks_[c].n > 0; c ^= 1) {
      const Chunk& chunk = chunks_[c];
      Chunk& next = chunks_[c ^ 1];
      locate(chunk.at + chunk.n, next);
      if (chunk.is_run) attend(chunk, RowRun<T, Dim>{chunk.k[0], dim_}, RowRun<T, Dim>{chunk.v[0], dim_}, next);
      else attend<const T* const*>(chunk, chunk.k, chunk.v, next);
    }
    for (int64_t r = 0; r < item_.rows; ++r) write_result(sum_rows_[r], item_.result[r]);
  }

 private:
  static constexpr float kInfinity = __builtin_huge_valf();
  static constexpr bool kHasScales = sizeof(T) == 1;

  // The keys of list positions at … at + n - 1. is_run: slots of one page in sequence, of which row 0 only is in the tables.
  struct Chunk {
    int64_t at;
    int n;
    bool is_run;
    const T *k[kDecodeChunk], *v[kDecodeChunk];
    const float *k_scale[kHasScales ? kDecodeChunk : 1], *v_scale[kHasScales ? kDecodeChunk : 1];
  };

  // Accumulators are in aligned scratch memory: results of neighbouring items share cache lines.
  FARLIGHT_INLINE int64_t sum_stride() const { return round_up(dim_ + 2, 16); }

  FARLIGHT_INLINE int64_t pair_stride() const { return round_up(dim_, 2 * W); }

  // A query that is exact in bfloat16. Its scores are scaled, since a scaled query would be rounded a second time.
  FARLIGHT_INLINE void set_pairs(const float* q, Bf16* to) const {
    for (int64_t d = 0; d < dim_; ++d) to[d] = to_bf16(q[d]);
    for (int64_t d = dim_; d < pair_stride(); ++d) to[d] = 0;
  }

  FARLIGHT_INLINE int64_t slot(int64_t at) const { return item_.slots ? item_.slots[at] : item_.first + at; }

  // Whether the `n` list positions from `at` on are consecutive slots of one page. Lists ascend, so both ends tell.
  FARLIGHT_INLINE bool is_run(int64_t at, int64_t n) const {
    if (at + n > item_.count) return false;
    const int64_t first = slot(at), last = slot(at + n - 1);
    return last == first + n - 1 && first >> item_.page_shift == last >> item_.page_shift;
  }

  FARLIGHT_INLINE void set_row(Chunk& chunk, int i, int64_t s) const {
    const KeyPage& page = item_.pages[s >> item_.page_shift];
    const int64_t row = item_.head * page.capacity + (s & ((int64_t{1} << item_.page_shift) - 1));
    chunk.k[i] = reinterpret_cast<const T*>(page.k) + row * dim_;
    chunk.v[i] = reinterpret_cast<const T*>(page.v) + row * dim_;
    if constexpr (kHasScales) chunk.k_scale[i] = page.k_scale + row, chunk.v_scale[i] = page.v_scale + row;
  }

  // The chunk that begins at list position `at`: a run, or single slots up to the next run; n = 0 at the end of the list.
  FARLIGHT_INLINE void locate(int64_t at, Chunk& chunk) const {
    chunk.at = at, chunk.n = 0;
    chunk.is_run = is_run(at, kShortestRun) || (!item_.slots && at < item_.count);
    if (chunk.is_run) {
      set_row(chunk, 0, slot(at));
      int n = kDecodeChunk;
      while (n > 1 && !is_run(at, n)) n = n > kShortestRun && !is_run(at, n / 2) ? n / 2 : n - 1;
      chunk.n = n;
      return;
    }
    for (; chunk.n < kDecodeChunk && at + chunk.n < item_.count && !is_run(at + chunk.n, kShortestRun); ++chunk.n)
      set_row(chunk, chunk.n, slot(at + chunk.n));
  }

  // Software prefetch of a row into L2, of which more can be under way than into L1.
  FARLIGHT_INLINE void prefetch(const T* row) const {
    const int64_t bytes = dim_ * static_cast<int64_t>(sizeof(T));
    FARLIGHT_UNROLL_4
    for (int64_t byte = 0; byte < bytes; byte += 64) FARLIGHT_PREFETCH_L2(reinterpret_cast<const char*>(row) + byte);
  }
  // Of keys or values `first` … `first` + count - 1 of a chunk.
  FARLIGHT_INLINE void prefetch(const Chunk& chunk, const T* const* rows, int first, int count) const {
    const int end = min(first + count, chunk.n);
    if (chunk.is_run)
      for (int i = first; i < end; ++i) prefetch(rows[0] + i * dim_);
    else
      for (int i = first; i < end; ++i) prefetch(rows[i]);
  }
  struct KeyPrefetch {
    const DecodeAttend& attend;
    const Chunk& chunk;
    FARLIGHT_INLINE void operator()(int i) const { attend.prefetch(chunk, chunk.k, i, 1); }
  };

  // Copies the scales of a chunk, zeros behind them, and prefetches those of the next one.
  FARLIGHT_INLINE void load_scales(const Chunk& chunk, const Chunk& next) {
    copy_scales(chunk, chunk.k_scale, k_scale_);
    copy_scales(chunk, chunk.v_scale, v_scale_);
    for (int i = 0; i < next.n; i += next.is_run ? 16 : 1) {
      FARLIGHT_PREFETCH(next.is_run ? next.k_scale[0] + i : next.k_scale[i]);
      FARLIGHT_PREFETCH(next.is_run ? next.v_scale[0] + i : next.v_scale[i]);
    }
  }
  FARLIGHT_INLINE static void copy_scales(const Chunk& chunk, const float* const* from, float* to) {
    if (chunk.is_run) copy_as_float(from[0], to, chunk.n);
    else
      for (int i = 0; i < chunk.n; ++i) to[i] = *from[i];
    for (int i = chunk.n; i % W; ++i) to[i] = 0.0f;
  }

  // `n` rows in the order of T's groups, as float32 in scratch memory.
  template <class Rows>
  FARLIGHT_INLINE RowRun<float, Dim> widen_rows(const Rows& rows, int n) {
    const int64_t groups_end = dim_ / (2 * W) * (2 * W);
    for (int i = 0; i < n; ++i) {
      float* to = widened_ + i * dim_;
      for (int64_t d = 0; d < groups_end; d += 2 * W) {
        F a, b;
        widen_group(rows[i] + d, a, b);
        store(to + d, a), store(to + d + W, b);
      }
      for (int64_t d = groups_end; d < dim_; ++d) to[d] = to_float(rows[i][d]);
    }
    return {widened_, dim_};
  }

  // V of the chunk is prefetched while keys are scored, K of the next one while values are accumulated.
  template <class Rows>
  FARLIGHT_INLINE void attend(const Chunk& chunk, const Rows& k, const Rows& v, const Chunk& next) {
    const int n = chunk.n;
    if constexpr (kHasScales) load_scales(chunk, next);
    if constexpr (sizeof(T) < 4)
      if (item_.rows >= kWidenRows) {
        if (has_pairs_) score<T>(chunk, k);
        else score<float>(chunk, widen_rows(k, n));
        for (int64_t r = 0; r < item_.rows; ++r) softmax(r, chunk);
        return accumulate_rows<float>(n, widen_rows(v, n), next);
      }
    score<T>(chunk, k);
    for (int64_t r = 0; r < item_.rows; ++r) softmax(r, chunk);
    accumulate_rows<T>(n, v, next);
  }

  template <class S, class Rows>
  FARLIGHT_INLINE void score(const Chunk& chunk, const Rows& rows) {
    const int n = chunk.n;
    int first = 0;
    for (; first + W <= n; first += W) {
      prefetch(chunk, chunk.v, first, W);
      for (int64_t r = 0; r < item_.rows; ++r)
        store(scores_ + r * kDecodeChunk + first, dot<S>(r, rows_from(rows, first)));
    }
    if (first == n) return;
    prefetch(chunk, chunk.v, first, W);
    const S* rest[W];
    for (int i = 0; i < W; ++i) rest[i] = rows[min(first + i, n - 1)];
    for (int64_t r = 0; r < item_.rows; ++r)
      store(scores_ + r * kDecodeChunk + first, dot<S, const S* const*>(r, rest));
  }
  // Scaled scores of row r over W keys.
  template <class S, class Rows>
  FARLIGHT_INLINE F dot(int64_t r, const Rows& rows) const {
    if constexpr (multiplies_pairs<S>)
      if (has_pairs_) return mul(dot_pairs(q_pairs_ + r * pair_stride(), rows, dim_), broadcast(item_.factor));
    return dot_keys<S, Rows>(q_ + r * dim_, rows, dim_);
  }

  template <class S, class Rows>
  FARLIGHT_INLINE void accumulate_rows(int n, const Rows& rows, const Chunk& next) {
    if (item_.rows == 1) {
      accumulate<S, 1>(rows, n, weights_, sum_rows_, dim_, KeyPrefetch{*this, next});
      return prefetch(next, next.k, n, kDecodeChunk);
    }
    prefetch(next, next.k, 0, kDecodeChunk);
    int64_t r = 0;
    for (; r + 4 <= item_.rows; r += 4) accumulate<S, 4>(rows, n, weights_ + r, sum_rows_ + r, dim_, NoPrefetch{});
    if (r + 2 <= item_.rows) accumulate<S, 2>(rows, n, weights_ + r, sum_rows_ + r, dim_, NoPrefetch{}), r += 2;
    if (r < item_.rows) accumulate<S, 1>(rows, n, weights_ + r, sum_rows_ + r, dim_, NoPrefetch{});
  }

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
  void softmax(int64_t r, const Chunk& chunk) {
    const int n = chunk.n;
    float* scores = scores_ + r * kDecodeChunk;
    float *sums = sum_rows_[r], &row_max = sums[dim_], &row_sum = sums[dim_ + 1];
    for (int i = 0; kHasScales && i < n; i += W) store(scores + i, mul(load(scores + i), load(k_scale_ + i)));
    if (item_.terms) add_terms(item_.row_terms[r], chunk.at, n, scores);
    for (int i = n; i % W; ++i) scores[i] = -kInfinity;
    if (item_.mask)
      for (int i = 0; i < n; ++i) scores[i] = item_.mask[r][slot(chunk.at + i)] ? scores[i] : -kInfinity;
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
        for (int64_t d = 0; d < dim_; ++d) sums[d] *= factor[0];
        row_sum *= factor[0];
      }
      row_max = chunk_max;
    }
    F total = broadcast(0.0f);
    for (int i = 0; i < n; i += W) {
      // Below -200 the power is 0; max keeps NaN in its second operand.
      const F p = exp2_poly<5>(max(broadcast(-200.0f), sub(load(scores + i), broadcast(row_max))));
      total = add(total, p);
      if constexpr (kHasScales) store(scores + i, mul(p, load(v_scale_ + i)));
      else store(scores + i, p);
    }
    row_sum += sum(total);
  }

  // Sums in the order of elements, the maximum and the sum of weights.
  FARLIGHT_INLINE void write_result(const float* sums, float* result) const {
    from_group_order<T>(sums, dim_, result);
    result[dim_] = sums[dim_], result[dim_ + 1] = sums[dim_ + 1];
  }

  const DecodeItem& item_;
  const Dim dim_;
  const bool has_pairs_;  // queries are q_pairs_, else q_
  float* q_;
  Bf16* q_pairs_;
  float* scores_;
  const float** weights_;
  float *sums_, **sum_rows_, *widened_;
  Chunk chunks_[2];  // the present and the next one
  float k_scale_[kHasScales ? kDecodeChunk : 1], v_scale_[kHasScales ? kDecodeChunk : 1];
};

}  // namespace farlight::FARLIGHT_NS

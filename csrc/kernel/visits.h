// Attention of rows that each choose their own keys (content/row_visits.h): a group of up to kVisitRows rows is computed one
// key group of kVisitKeys keys after the other, each time for the rows that visit it, several at once.
//
// K of the key group is transposed, so that keys stand in lanes: scores are a register-blocked product of the rows' queries
// with that panel, and the output is one of the rows' weights with V. A row's running maximum, sums and output stay in scratch
// memory until the last key group. Every row adds its key groups in ascending order, whatever rows are computed beside it.
#pragma once

#include <math.h>

#include "online_softmax.h"
#include "operands.h"

namespace farlight::FARLIGHT_NS {

template <class T>
class VisitAttention {
 public:
  VisitAttention(const Call& call, const RowVisits& visits, Arena& arena)
      : call_(call),
        visits_(visits),
        keys_(call.k, visits.batch, kv_head()),
        values_(call.v, visits.batch, kv_head()),
        query_ld_(round_up(call.dim, 8)),
        value_ld_(round_up(call.value_dim, kV * W)) {
    const int64_t slots = visits.rows + 1;  // the last one stands in for a missing row
    queries_ = arena.allocate<float>(slots * query_ld_);
    sums_ = arena.allocate<float>(slots * value_ld_);
    row_max_ = arena.allocate<float>(slots);
    row_sum_ = arena.allocate<float>(slots * W);
    weights_ = arena.allocate<float>(kM * kVisitKeys);
    panel_ = arena.allocate<float>(query_ld_ * kVisitKeys);
    key_rows_ = arena.allocate<float>(kVisitKeys * query_ld_);
    value_rows_ = arena.allocate<float>(kVisitKeys * value_ld_);
  }

  void run() {
    start();
    int64_t first = 0;
    for (int64_t g = 0; g < visits_.groups; ++g) {
      const int64_t last = visits_.ends[g];
      if (g + 1 < visits_.groups) prefetch(visits_.group[g + 1]);
      fetch(visits_.group[g]);
      for (int64_t x = first; x < last;) {
        const int64_t left = last - x;
        if (kM > 4 && left > 4) add<kM>(x, last);
        else if (left > 2) add<4>(x, last);
        else add<2>(x, last);
        x += kM > 4 && left > 4 ? kM : left > 2 ? 4 : 2;
      }
      first = last;
    }
    for (int64_t s = 0; s < visits_.rows; ++s) write(s);
  }

 private:
  static constexpr int kVectors = kVisitKeys / W;
  static constexpr float kMaxSlack = OnlineSoftmax<F32>::kMaxSlack;
  static_assert(kVisitKeys % W == 0 && kVisitKeys % 8 == 0);

  int64_t kv_head() const { return visits_.head / (call_.heads / call_.kv_heads); }

  // Queries times the softmax scale in base 2; no keys seen.
  void start() {
    const HeadRows<T> q(call_.q, visits_.batch, visits_.head);
    const float scale = call_.scale * kLog2E;
    for (int64_t s = 0; s <= visits_.rows; ++s) {
      float* const to = queries_ + s * query_ld_;
      for (int64_t d = 0; d < query_ld_; ++d) to[d] = 0.0f;
      if (s < visits_.rows) copy_as_float(q.row(visits_.first_row + s), to, call_.dim);
      for (int64_t d = 0; d < call_.dim; ++d) to[d] *= scale;
      row_max_[s] = kInitialMax;
      store(row_sum_ + s * W, broadcast(0.0f));
    }
    std::memset(sums_, 0, (visits_.rows + 1) * value_ld_ * sizeof(float));
  }

  void prefetch(int64_t group) const {
    for (int64_t j = group * kVisitKeys; j < min((group + 1) * kVisitKeys, visits_.n_k); ++j) {
      prefetch_row(keys_.row(j), call_.dim);
      prefetch_row(values_.row(j), call_.value_dim);
    }
  }

  // K transposed to panel_[d][key], and V as float32 rows: in place where it is that already.
  void fetch(int64_t group) {
    const int64_t first = group * kVisitKeys, last = visits_.n_k - 1;
    const bool is_whole = first + kVisitKeys - 1 <= last;
    const char* rows[kVisitKeys];
    for (int j = 0; j < kVisitKeys; ++j) {
      const T* const row = keys_.row(min(first + j, last));  // no row visits a key behind the last
      rows[j] = reinterpret_cast<const char*>(row);
      if (sizeof(T) == sizeof(float) && call_.dim % 8 == 0) continue;
      float* const to = key_rows_ + j * query_ld_;
      for (int64_t d = call_.dim; d < query_ld_; ++d) to[d] = 0.0f;
      copy_as_float(row, to, call_.dim);
      rows[j] = reinterpret_cast<const char*>(to);
    }
    constexpr int64_t line = kVisitKeys * sizeof(float);
    for (int64_t d = 0; d < query_ld_; d += 8)
      transpose_block(rows, kVisitKeys, d * static_cast<int64_t>(sizeof(float)), reinterpret_cast<char*>(panel_) + d * line, line);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (is_whole && call_.value_dim == value_ld_) {
        value_ = values_.row(first), value_stride_ = values_.stride;
        return;
      }
    }
    for (int j = 0; j < kVisitKeys; ++j) {
      float* const to = value_rows_ + j * value_ld_;
      for (int64_t d = call_.value_dim; d < value_ld_; ++d) to[d] = 0.0f;
      copy_as_float(values_.row(min(first + j, last)), to, call_.value_dim);
    }
    value_ = value_rows_, value_stride_ = value_ld_;
  }

  // Continues the softmax of the rows of visits x, ..., x + M - 1, of which those from `last` on do not exist.
  template <int M>
  FARLIGHT_INLINE void add(int64_t x, int64_t last) {
    int64_t row[M];
    uint32_t mask[M];
    const float *query[M], *weight[M];
    FARLIGHT_UNROLL
    for (int m = 0; m < M; ++m) {
      const bool exists = x + m < last;
      row[m] = exists ? visits_.visit[x + m].row : visits_.rows;
      mask[m] = exists ? visits_.visit[x + m].keys : 0;
      query[m] = queries_ + row[m] * query_ld_;
      weight[m] = weights_ + m * kVisitKeys;
    }
    F acc[M][kVectors];
    clear(acc);
    gemm_row_major<F32Word, M, kVectors>(acc, query, panel_, kVisitKeys, query_ld_);
    FARLIGHT_UNROLL
    for (int m = 0; m < M; ++m) {
      if (mask[m] != kEveryKey) {
        FARLIGHT_UNROLL
        for (int v = 0; v < kVectors; ++v) acc[m][v] = select(mask[m] >> (v * W), acc[m][v], broadcast(kMaskedScore));
      }
      const F best = largest(acc[m]);
      if (greater(best, broadcast(row_max_[row[m]] + kMaxSlack))) raise_max(row[m], best);
      const F reference = broadcast(row_max_[row[m]]);
      F sum = load(row_sum_ + row[m] * W);
      FARLIGHT_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const F w = exp2_poly<5>(sub(acc[m][v], reference));
        store(weights_ + m * kVisitKeys + v * W, w);
        sum = farlight::FARLIGHT_NS::add(sum, w);
      }
      store(row_sum_ + row[m] * W, sum);
    }
    for (int64_t d = 0; d < value_ld_; d += kV * W) {
      F out[M][kV];
      FARLIGHT_UNROLL
      for (int m = 0; m < M; ++m) {
        FARLIGHT_UNROLL
        for (int v = 0; v < kV; ++v) out[m][v] = load(sums_ + row[m] * value_ld_ + d + v * W);
      }
      gemm_row_major<F32Word, M, kV>(out, weight, value_ + d, value_stride_, kVisitKeys);
      FARLIGHT_UNROLL
      for (int m = 0; m < M; ++m) {
        FARLIGHT_UNROLL
        for (int v = 0; v < kV; ++v) store(sums_ + row[m] * value_ld_ + d + v * W, out[m][v]);
      }
    }
  }

  // Raises the running maximum of a row to the largest lane of `scores` and rescales what was summed before.
  FARLIGHT_NOINLINE void raise_max(int64_t row, F scores) {
    alignas(64) float lane[W];
    store(lane, scores);
    float highest = lane[0];
    for (int i = 1; i < W; ++i) highest = max(highest, lane[i]);
    const F factor = exp2_poly<5>(broadcast(row_max_[row] - highest));
    row_max_[row] = highest;
    store(row_sum_ + row * W, mul(load(row_sum_ + row * W), factor));
    float* const sums = sums_ + row * value_ld_;
    for (int64_t d = 0; d < value_ld_; d += W) store(sums + d, mul(load(sums + d), factor));
  }

  // Writes out and lse of a row; a row without keys gets zeros and -inf.
  void write(int64_t s) {
    const int64_t at = (visits_.batch * call_.heads + visits_.head) * visits_.n_q + visits_.first_row + s;
    const float total = sum(load(row_sum_ + s * W));
    write_row(call_.out_type, call_.result, at * call_.value_dim, sums_ + s * value_ld_, call_.value_dim,
              total == 0.0f ? 0.0f : 1.0f / total);
    call_.lse[at] = total == 0.0f ? -INFINITY : row_max_[s] * kLn2 + logf(total);
  }

  static constexpr uint32_t kEveryKey = (1u << kVisitKeys) - 1;

  const Call& call_;
  const RowVisits& visits_;
  HeadRows<T> keys_, values_;
  int64_t query_ld_, value_ld_;
  float *queries_, *sums_, *row_max_, *row_sum_, *weights_, *panel_, *key_rows_, *value_rows_;
  const float* value_ = nullptr;
  int64_t value_stride_ = 0;
};

}  // namespace farlight::FARLIGHT_NS

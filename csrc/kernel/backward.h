// Backward pass of one work item: weights recomputed from the lse, then four products, chunk by chunk; lanes are query rows.
//
//   P = exp(S - lse)    dS = P (dP - delta + dlse)    dV += P^T dO    dK += dS^T Q    dQ = dS K
//
// delta = rowsum(dO * out). dQ^T is accumulated per row block; dK and dV go to the slab's accumulators (dkdv_accumulator.h), so
// there are no atomics and results are deterministic.
#pragma once

#include <math.h>
#include <utility>

#include "dkdv_accumulator.h"
#include "gathered_backward.h"
#include "pair_operands.h"
#include "row_prefetch.h"
#include "score_terms.h"
#include "split_k.h"

namespace farlight::FARLIGHT_NS {

template <class Traits>
class Backward {
  using T = typename Traits::T;
  using Op = typename Traits::Op;
  using Word = typename Op::Word;

 public:
  using TileConfig = typename Traits::TileConfig;
  static constexpr int kCachedRowOperands = num_parts<Traits> > 1 ? 2 : 0;  // in the packed cache: K and V

  // Lays out the scratch memory of the pass. The packed cache comes first, see PackedCache::reserve.
  Backward(const Call& call, const WorkItem& item, Arena& arena)
      : call_(call),
        item_(item),
        dim_(call.dim),
        value_dim_(call.value_dim),
        shared_dim_(min(call.dim, call.value_dim)),
        ld_(round_up(call.dim, 32)),
        value_ld_(round_up(call.value_dim, 32)),
        keys_({call.k, item.batch, kv_head()}, dim_, call.plan->n_k),
        values_({call.v, item.batch, kv_head()}, value_dim_, call.plan->n_k),
        sources_{keys_.source(), values_.source()},
        packed_(keys_.source(), sources_, kCachedRowOperands, dim_, item.batch * call.kv_heads + kv_head()),
        dkdv_(dim_, value_dim_),
        queries_(dim_),
        dout_(value_dim_) {
    packed_.reserve(arena);
    recent_ = arena.allocate<RecentBlocks>(1);
    chunks_ = arena.allocate<Chunk>(2);
    keys_.reserve(arena, true, !uses_amx<Traits>);
    values_.reserve(arena, true, false);
    queries_.reserve(arena);
    dout_.reserve(arena);
    query_rows_ = arena.allocate<Word>(num_parts<Traits> * kRows * ld_ / Op::per);
    dout_rows_ = arena.allocate<Word>(num_parts<Traits> * kRows * value_ld_ / Op::per);
    scores_ = arena.allocate<float>(kChunkKeys * kRows);
    ds_ = arena.allocate<float>(kChunkKeys * kRows);
    if (uses_pairs<Traits>) {
      weight_rows_ = arena.allocate<Word>(num_parts<Traits> * kWeights);
      ds_rows_ = arena.allocate<Word>(num_parts<Traits> * kWeights);
      ds_columns_ = arena.allocate<Word>(num_parts<Traits> * kWeights);
    }
    if (call.terms.on) {
      slope_ = arena.allocate<float>(kChunkKeys * kRows);
      ds_of_terms_ = arena.allocate<float>(kChunkKeys * kRows);
    }
    dkdv_.reserve(arena);
    dq_ = arena.allocate<float>(round_up(dim_, 16) * kRows);
    dq_total_ = arena.allocate<float>(round_up(dim_, 16) * kRows);
    dq_rows_ = arena.allocate<float>(kRows * ld_);
    row_buffer_ = arena.allocate<float>(ld_);
  }

  // Processes rows [first_row, first_row + kRows) of the item's tile.
  void run(int first_row, const DkDvBlocks& dkdv_blocks, const WorkItem* next) {
    const RowBlock row_block(*call_.plan, item_, first_row);
    const DropoutMask dropout(call_.dropout, *call_.plan, row_block);
    const BlockTerms score_terms(call_, row_block);
    const HeadRows<T> q(call_.q, item_.batch, item_.head), dout(call_.dout, item_.batch, item_.head);
    const float scale_log2 = call_.scale * kLog2E, factor = q_prescaled<Traits> ? 1.0f : scale_log2;
    GatherPrefetcher<T> gather_prefetcher(row_block, keys_.source(), values_.source(), shared_dim_);
    const int64_t lines = PrefetchLines::lines_per_row<T>(shared_dim_);
    [[maybe_unused]] DkDvPrefetcher dkdv_prefetcher(row_block, dkdv_blocks, lines, shared_dim_);
    [[maybe_unused]] RowPrefetcher row_prefetcher(*call_.plan, lines);
    const RowBlockId next_block = RowBlockId{&item_, first_row}.next(*call_.plan, next);
    if constexpr (!uses_amx<Traits>) {
      row_prefetcher.add(next_block, call_.q, sizeof(T));
      row_prefetcher.add(next_block, call_.dout, sizeof(T));
      row_prefetcher.add(next_block, call_.out, sizeof(T));
    }
    queries_.fetch(q, row_block, q_prescaled<Traits> ? scale_log2 : 1.0f);
    dout_.fetch(dout, row_block, 1.0f);
    pack_rows<Traits>(q, row_block, dim_, ld_, query_rows_);
    pack_rows<Traits>(dout, row_block, value_dim_, value_ld_, dout_rows_);
    prepare(row_block, dout);
    dkdv_.clear_discard();
    const int lanes = static_cast<int>(round_up(row_block.count, kV * W));
    const int terms = (row_block.count + Op::per - 1) / Op::per;
    uint32_t touched = 0;
    int num_chunks = 0;
    KeyWalk walk(row_block, chunk_keys<Traits>, key_group<Traits>);
    bool has_next = walk.next(chunks_[0]);
    for (int slot = 0; has_next; slot ^= 1) {
      chunk_ = chunks_ + slot;
      has_next = walk.next(chunks_[slot ^ 1]);
      const Chunk& c = *chunk_;
      KeyPrefetcher<Traits> prefetcher(has_next ? chunks_ + (slot ^ 1) : nullptr, keys_, values_, packed_, gather_prefetcher,
                                       recent_, shared_dim_);
      for (int i = 0; i < c.n; ++i) touched |= c.row_mask[i];
      dkdv_.locate(c, dkdv_blocks);
      if constexpr (uses_amx<Traits>) {
#if defined(FARLIGHT_ISA_AMX)
        packed_.fetch(c);
        score_amx(c, keys_, packed_, 0, queries_, scores_, prefetcher);
        score_amx(c, values_, packed_, 1, dout_, ds_, prefetcher);
#endif
      } else {
        keys_.fetch_row_major(c, true);
        values_.fetch_row_major(c);
        score<Traits, false>(c, keys_, queries_, lanes, scores_, nullptr, [&](int block) { return prefetcher.lines(block); });
        score<Traits, false>(c, values_, dout_, lanes, ds_, nullptr, [&](int) {
          const PrefetchLines* lines = dkdv_prefetcher.lines();
          return lines ? lines : row_prefetcher.lines();
        });
      }
      if (score_terms.on()) softmax_backward_scored(score_terms, dkdv_blocks.terms, dropout, factor, lanes);
      else softmax_backward(dropout, factor, lanes);
      finish_weights();
      dkdv_.add(c, weights(), dout_rows_, ds(), query_rows_, terms);
      if (num_chunks && num_chunks % kChunksPerSum == 0) flush_dq(num_chunks == kChunksPerSum);
      add_dq(lanes, num_chunks % kChunksPerSum == 0, prefetcher);
      ++num_chunks;
    }
    if (!num_chunks) {
      for (int s = 0; s < row_block.count; ++s) std::memset(dq_rows_ + s * ld_, 0, ld_ * sizeof(float));
    } else {
      if (num_chunks > kChunksPerSum) {
        flush_dq(false);
        std::swap(dq_, dq_total_);
      }
      transpose_from_lanes(dq_, dim_, dq_rows_, ld_);
    }
    if (row_block.any_gathered()) touched |= add_gathered(row_block, q, dout, dropout, score_terms, dkdv_blocks);
    finish(row_block, touched);
  }

  // Sums dq over the parts of a split-K tile and writes its rows.
  void merge_parts() {
    SplitK(call_, item_).merge([&](int64_t row, int parts, const auto& partial) {
      bool touched = false;
      for (int part = 0; part < parts; ++part) touched |= partial(part)[0] != 0.0f;
      for (int64_t d = 0; d < dim_; ++d) {
        double sum = 0.0;  // float64: there may be a thousand parts
        for (int part = 0; part < parts; ++part) sum += partial(part)[2 + d];
        dq_rows_[d] = static_cast<float>(sum);
      }
      write(row, dq_rows_, touched);
    });
  }

 private:
  // Grouped-query attention: heads / kv_heads query heads share a key head.
  int64_t kv_head() const { return item_.head / (call_.heads / call_.kv_heads); }

  // Two-level summation of dQ: 16 chunks are summed in one accumulator, which is then added to the total. A row that sees
  // thousands of chunks thus has a sixteenth of the roundings at full magnitude.
  static constexpr int kChunksPerSum = 16;

  // Adds the accumulator to the total.
  void flush_dq(bool first) {
    for (int64_t i = 0; i < dim_ * kRows; i += W) {
      const F sum = load(dq_ + i);
      store(dq_total_ + i, first ? sum : add(load(dq_total_ + i), sum));
    }
  }

  // Per row: reference maximum, lse relative to it, and delta - dlse. A row without keys gets an lse that makes all weights 0.
  void prepare(const RowBlock& row_block, const HeadRows<T>& dout) {
    const HeadRows<T> out(call_.out, item_.batch, item_.head);
    for (int s = 0; s < kRows; ++s) {
      reference_[s] = lse_[s] = delta_[s] = 0.0f;
      if (s >= row_block.count) continue;
      const int64_t at = (item_.batch * call_.heads + item_.head) * call_.plan->n_q + row_block.row[s];
      lse_[s] = call_.lse[at] == -INFINITY ? -kInitialMax : call_.row_stats ? call_.row_stats[at].row_sum : call_.lse[at];
      if (call_.row_stats) reference_[s] = call_.row_stats[at].row_max;
      delta_[s] = dot(dout.row(row_block.row[s]), out.row(row_block.row[s]), value_dim_) - (call_.dlse ? call_.dlse[at] : 0.0f);
      if (call_.terms.delta && row_block.piece->part[item_.entry] == 0) call_.terms.delta[at] = delta_[s];
    }
  }

  // From (S, dP) to (P with dropout, dS), both as operands of the next products.
  void softmax_backward(const DropoutMask& dropout, float factor, int lanes) {
    const Chunk& c = *chunk_;
    if (call_.row_stats) {
      if (!q_prescaled<Traits>) scale_scores(scores_, c.n, factor);
      subtract_references(scores_, c.n, reference_);
      factor = 1.0f;
    }
    const F scale = broadcast(call_.scale * dropout.keep_scale()), keep_scale = broadcast(dropout.keep_scale()),
            minus_log2e = broadcast(-kLog2E);
    for (int g = 0; g < lanes; g += kV * W) {
      F lse[kV], minus_delta[kV];  // minus_delta: scale * (dlse - delta)
      for (int v = 0; v < kV; ++v) {
        lse[v] = q_prescaled<Traits> ? load(lse_ + g + v * W) : mul(load(lse_ + g + v * W), minus_log2e);
        minus_delta[v] = mul(load(delta_ + g + v * W), broadcast(-call_.scale));
      }
      for (int i = 0; i < c.n; ++i) {
        const bool masked = c.masked[i / kM];
        F p[kV], ds[kV];
        FARLIGHT_UNROLL
        for (int v = 0; v < kV; ++v) {
          const int at = i * kRows + g + v * W;
          const F score = load(scores_ + at);
          // An error of the lse affects all weights of its row: in float32 it enters the fma unrounded.
          p[v] = exp2_poly<Traits::degree>(q_prescaled<Traits> ? fma(lse[v], minus_log2e, score)
                                                               : fma(score, broadcast(factor), lse[v]));
          if (masked) p[v] = select(c.row_mask[i] >> (g + v * W), p[v], broadcast(0.0f));
          F ds_over_p = fma(load(ds_ + at), scale, minus_delta[v]);
          if (dropout.on()) {
            const uint32_t keep_mask = dropout.keep_mask(c.key[i], g + v * W);
            ds_over_p = select(keep_mask, ds_over_p, minus_delta[v]);
            ds[v] = mul(p[v], ds_over_p);
            p[v] = select(keep_mask, mul(p[v], keep_scale), broadcast(0.0f));
          } else {
            ds[v] = mul(p[v], ds_over_p);
          }
          if (masked) ds[v] = select(c.row_mask[i] >> (g + v * W), ds[v], broadcast(0.0f));
        }
        store_weights(i, g, p, ds);
      }
    }
  }

  // The same under terms, whose gradients are added to the slab's sums.
  void softmax_backward_scored(const BlockTerms& terms, const TermSums& sums, const DropoutMask& dropout, float factor,
                               int lanes) {
    const Chunk& c = *chunk_;
    float* const slope = call_.terms.cap != 0.0f ? slope_ : nullptr;
    terms.apply(c, 0, c.n, 0, lanes, factor, scores_, slope, nullptr);
    if (call_.row_stats) subtract_references(scores_, c.n, reference_);
    scored_softmax_backward<Traits>(c, terms, dropout, lse_, delta_, call_.scale, lanes, scores_, ds_, slope, ds_of_terms_,
                                    [&](int i, int g, const F(&p)[kV], const F(&ds)[kV]) { store_weights(i, g, p, ds); });
    if (terms.wants_gradients(sums)) terms.add_gradients(c, ds_of_terms_, sums);
  }

  // Brings the stored P and dS into the layout of the next products.
  void finish_weights() {
    if constexpr (uses_pairs<Traits>) {
      if (uses_amx<Traits>) clear_padding<Traits>(*chunk_, weight_rows_, ds_rows_, kWeights);
      interleave_ds<Traits>(*chunk_, ds_rows_, ds_columns_, kWeights);
    }
  }

  // Stores P and dS of one key.
  FARLIGHT_INLINE void store_weights(int i, int g, const F (&p)[kV], const F (&ds)[kV]) {
    if constexpr (uses_pairs<Traits>) {
#if defined(FARLIGHT_BF16_PAIRS)
      store_narrow<num_parts<Traits>>(p[0], p[1], weight_rows_ + i * kRows / 2, kWeights);
      store_narrow<num_parts<Traits>>(ds[0], ds[1], ds_rows_ + i * kRows / 2, kWeights);
#endif
    } else {
      FARLIGHT_UNROLL
      for (int v = 0; v < kV; ++v) {
        store(scores_ + i * kRows + g + v * W, p[v]);
        store(ds_ + i * kRows + g + v * W, ds[v]);
      }
    }
  }

  // P and dS as operands, [key][row]; dS also [pair of keys][row].
  static const Word* operand([[maybe_unused]] const Word* words, [[maybe_unused]] const float* floats) {
    if constexpr (uses_pairs<Traits>) return words;
    else return floats;
  }
  const Word* weights() const { return operand(weight_rows_, scores_); }
  const Word* ds() const { return operand(ds_rows_, ds_); }
  const Word* ds_by_key_pairs() const { return operand(ds_columns_, ds_); }

  // dQ^T += K^T dS^T.
  void add_dq(int lanes, bool overwrite, [[maybe_unused]] KeyPrefetcher<Traits>& prefetcher) {
    const Chunk& c = *chunk_;
    if constexpr (uses_amx<Traits>) {
#if defined(FARLIGHT_ISA_AMX)
      const int groups = (c.n + kDepth - 1) / kDepth;
      accumulate_key_groups<num_parts<Traits>>(dq_, packed_.groups, packed_.part(), ds_columns_, kWeights, groups, dim_,
                                               overwrite, [&] { prefetcher.issue_some(); });
#endif
    } else {
      if constexpr (uses_pairs<Traits>) keys_.fetch_col_major(c, packed_);
      accumulate_col_major<Op>(dq_, keys_.col_major, ds_by_key_pairs(), c.spans, dim_, lanes, overwrite);
    }
  }

  // Processes gathered keys; returns the mask of rows that have any.
  uint32_t add_gathered(const RowBlock& row_block, const HeadRows<T>& q, const HeadRows<T>& dout, const DropoutMask& dropout,
                        const BlockTerms& terms, const DkDvBlocks& dkdv_blocks) {
    GatheredGradients<T> gradients(row_block, q, dout, keys_.source(), values_.source(), dim_, value_dim_, call_.scale, dropout,
                                   terms, dkdv_blocks, reference_, lse_, delta_, dq_rows_, ld_);
    uint32_t touched = 0;
    for (int i = 0; i < row_block.piece->layer_count; ++i)
      if (row_block.has_gathered(row_block.piece->layers[i])) touched |= gradients.process_layer(row_block.piece->layers[i]);
    return touched;
  }

  // Writes dq, or stores it as a split-K partial: whether the row is touched, and its values.
  void finish(const RowBlock& row_block, uint32_t touched) {
    const SplitK split(call_, item_);
    for (int s = 0; s < row_block.count; ++s) {
      const bool row_touched = (touched >> s) & 1;
      if (split.is_part()) split.store(row_block.first_row + s, row_touched ? 1.0f : 0.0f, 0.0f, dq_rows_ + s * ld_);
      else write(row_block.row[s], dq_rows_ + s * ld_, row_touched);
    }
  }

  // Writes a row of dq; adds to it where pieces overlap.
  void write(int64_t row, float* sum, bool touched) {
    const int64_t at = ((item_.batch * call_.heads + item_.head) * call_.plan->n_q + row) * dim_;
    if (!touched) {
      if (keep_masked_rows(call_, item_)) return;
      std::memset(sum, 0, dim_ * sizeof(float));
    }
    if (call_.merges) {
      read_row(call_.out_type, call_.result, at, row_buffer_, dim_);
      for (int64_t d = 0; d < dim_; ++d) sum[d] += row_buffer_[d];
    }
    write_row(call_.out_type, call_.result, at, sum, dim_);
  }

  static constexpr int64_t kWeights = DkDvAccumulator<Traits>::kWeights;

  const Call& call_;
  const WorkItem& item_;
  int64_t dim_, value_dim_;  // of rows of Q, K and dq; of V, out and dO
  int64_t shared_dim_;       // the smaller one, which prefetches follow
  int64_t ld_, value_ld_;
  Operand<Traits> keys_, values_;
  HeadRows<T> sources_[2];
  PackedCacheOf<Traits> packed_;
  RecentBlocks* recent_ = nullptr;
  DkDvAccumulator<Traits> dkdv_;
  Transposed<Traits> queries_, dout_;
  Chunk *chunks_, *chunk_ = nullptr;  // double buffer; the current chunk
  Word *query_rows_, *dout_rows_, *weight_rows_ = nullptr, *ds_rows_ = nullptr, *ds_columns_ = nullptr;
  float *slope_ = nullptr, *ds_of_terms_ = nullptr;  // with terms only: derivative of softcap, gradient of the scores
  float *scores_, *ds_, *dq_, *dq_total_, *dq_rows_, *row_buffer_;
  // lse_ is relative to reference_, which is 0 unless the call has RowStats
  float reference_[kRows], lse_[kRows], delta_[kRows];
};

}  // namespace farlight::FARLIGHT_NS

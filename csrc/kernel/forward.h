// Forward pass of one work item: online softmax over the keys of a row block, chunk by chunk, with query rows in lanes.
//
// Per chunk: S^T = K Q^T with masks and row maxima (scores.h); raise the running maximum and rescale the accumulators where
// needed; weights P = exp2(S - max); O^T += V^T P^T. S^T is [key][row] and O^T is [d][row], so maximum, sum and rescaling are
// vertical vector operations. After the last chunk O^T is transposed to rows, gathered keys continue the softmax row by row
// (gathered.h), and the result is normalised and written, or stored as a split-K partial, or merged with that of earlier
// pieces.
#pragma once

#include <math.h>

#include "gathered.h"
#include "online_softmax.h"
#include "row_prefetch.h"
#include "score_terms.h"
#include "split_k.h"

namespace farlight::FARLIGHT_NS {

template <class Traits>
class Forward {
  using T = typename Traits::T;
  using Word = typename Traits::Op::Word;

 public:
  using TileConfig = typename Traits::TileConfig;
  static constexpr int kCachedRowOperands = num_parts<Traits> > 1 ? 1 : 0;  // row-major operands in the packed cache: K

  // Lays out the scratch memory of the pass. The packed cache comes first, see PackedCache::reserve.
  Forward(const Call& call, const WorkItem& item, Arena& arena)
      : call_(call),
        item_(item),
        dim_(call.dim),
        value_dim_(call.value_dim),
        shared_dim_(min(call.dim, call.value_dim)),
        ld_(round_up(call.value_dim, 16)),
        keys_({call.k, item.batch, kv_head()}, dim_, call.plan->n_k),
        values_({call.v, item.batch, kv_head()}, value_dim_, call.plan->n_k),
        packed_(values_.source(), &keys_.source(), kCachedRowOperands, value_dim_, item.batch * call.kv_heads + kv_head()),
        queries_(dim_) {
    packed_.reserve(arena);
    recent_ = arena.allocate<RecentBlocks>(1);
    chunks_ = arena.allocate<Chunk>(2);
    keys_.reserve(arena, true, false);
    values_.reserve(arena, false, !uses_amx<Traits>);
    queries_.reserve(arena);
    scores_ = arena.allocate<float>(kChunkKeys * kRows);
    weights_ = num_parts<Traits> > 1 ? arena.allocate<Word>(num_parts<Traits> * kWeights) : reinterpret_cast<Word*>(scores_);
    acc_ = arena.allocate<float>(round_up(value_dim_, 16) * kRows);
    out_rows_ = arena.allocate<float>(kRows * ld_);
    row_buffer_ = arena.allocate<float>(round_up(max(dim_, value_dim_), 16));
  }

  // Processes rows [first_row, first_row + kRows) of the item's tile.
  void run(int first_row, const WorkItem* next) {
    const RowBlock row_block(*call_.plan, item_, first_row);
    const DropoutMask dropout(call_.dropout, *call_.plan, row_block);
    const BlockTerms terms(call_, row_block);
    const HeadRows<T> q(call_.q, item_.batch, item_.head);
    const auto [before, factor] = scale_of<Traits>(call_.scale);
    RowPrefetcher row_prefetcher(*call_.plan, PrefetchLines::lines_per_row<T>(shared_dim_));
    const RowBlockId current{&item_, first_row};
    row_prefetcher.add(current, results(), call_.out_type == Type::f32 ? 4 : 2);
    if (uses_amx<Traits>) row_prefetcher.issue_some(kRows);
    row_prefetcher.add(current.next(*call_.plan, next), call_.q, sizeof(T));
    GatherPrefetcher<T> gather_prefetcher(row_block, keys_.source(), values_.source(), shared_dim_);
    queries_.fetch(q, row_block, before);
    const int lanes = static_cast<int>(round_up(row_block.count, kV * W));
    softmax_.reset();
    bool first_chunk = true;
    KeyWalk walk(row_block, chunk_keys<Traits>, key_group<Traits>);
    bool has_next = walk.next(chunks_[0]);
    for (int slot = 0; has_next; slot ^= 1) {
      chunk_ = chunks_ + slot;
      has_next = walk.next(chunks_[slot ^ 1]);
      KeyPrefetcher<Traits> prefetcher(has_next ? chunks_ + (slot ^ 1) : nullptr, keys_, values_, packed_, gather_prefetcher,
                                       recent_, shared_dim_);
      if constexpr (uses_amx<Traits>) {
        process_chunk_amx(prefetcher, dropout, terms, factor, lanes, first_chunk);
        row_prefetcher.issue_some(kRows / 4);
      } else {
        process_chunk(prefetcher, row_prefetcher, dropout, terms, factor, lanes, first_chunk);
      }
      first_chunk = false;
    }
    if (first_chunk) {
      for (int s = 0; s < row_block.count; ++s) std::memset(out_rows_ + s * ld_, 0, ld_ * sizeof(float));
    } else {
      transpose_from_lanes(acc_, value_dim_, out_rows_, ld_);
    }
    if (row_block.any_gathered()) add_gathered(row_block, q, dropout, terms);
    finish(row_block, dropout.keep_scale());
  }

 private:
  // Grouped-query attention: heads / kv_heads query heads share a key head.
  int64_t kv_head() const { return item_.head / (call_.heads / call_.kv_heads); }

  // The result tensor as a view, for prefetching its rows.
  TensorView results() const {
    return {call_.result, call_.heads * call_.plan->n_q * value_dim_, call_.plan->n_q * value_dim_, value_dim_};
  }

  // One chunk by vector products: scores, running maximum, weights, values.
  FARLIGHT_INLINE void process_chunk(KeyPrefetcher<Traits>& prefetcher, RowPrefetcher& row_prefetcher,
                                     const DropoutMask& dropout, const BlockTerms& terms, float factor, int lanes,
                                     bool first_chunk) {
    float row_max[kRows];
    keys_.fetch_row_major(*chunk_);
    const auto lines_for = [&](int block) {
      const PrefetchLines* lines = prefetcher.lines(block);
      return lines ? lines : row_prefetcher.lines();
    };
    if (terms.on()) {
      score_with_terms(*chunk_, terms, keys_, queries_, lanes, factor, scores_, row_max, lines_for);
      factor = 1.0f;
    } else {
      score<Traits, true>(*chunk_, keys_, queries_, lanes, scores_, row_max, lines_for);
      for (int g = 0; !q_prescaled<Traits> && g < lanes; g += W) store(row_max + g, mul(load(row_max + g), broadcast(factor)));
    }
    const bool rescales = softmax_.raise_max(row_max, lanes, first_chunk);
    compute_weights(dropout, broadcast(scale_large(factor, lanes)), lanes);
    add_pv(lanes, first_chunk, rescales);
  }

  // One chunk by AMX tile products.
  FARLIGHT_INLINE void process_chunk_amx(KeyPrefetcher<Traits>& prefetcher, const DropoutMask& dropout,
                                         const BlockTerms& terms, float factor, int lanes, bool first_chunk) {
#if defined(FARLIGHT_ISA_AMX)
    const int groups = packed_.fetch(*chunk_);
    score_amx(*chunk_, keys_, packed_, 0, queries_, scores_, prefetcher);
    if (terms.on()) {
      terms.apply(*chunk_, 0, chunk_->blocks * kM, 0, lanes, factor, scores_, nullptr, nullptr);
      factor = 1.0f;
    }
    F sums[kRows / W];
    if (OnlineSoftmax<Traits>::kMaxSlack == 0.0f || first_chunk || compute_weights_amx(dropout, factor, lanes, sums)) {
      float row_max[kRows];
      row_max_of(*chunk_, scores_, factor, lanes, row_max);
      if (softmax_.raise_max(row_max, lanes, first_chunk)) rescale_sums();
      compute_weights_amx(dropout, scale_large(factor, lanes), lanes, sums);
    }
    for (int g = 0; g < lanes; g += W) softmax_.add_sums(g, sums[g / W]);
    accumulate_key_groups<num_parts<Traits>>(acc_, packed_.groups, packed_.part(), weights_, kWeights, groups, value_dim_,
                                             first_chunk, [&] { prefetcher.issue_some(); });
#else
    (void)prefetcher, (void)dropout, (void)terms, (void)factor, (void)lanes, (void)first_chunk;
#endif
  }

  // The factor still to be applied to the chunk's scores. Where a running maximum is large (kLargeReference) it is applied
  // here.
  float scale_large(float factor, int lanes) {
    if (q_prescaled<Traits> || !softmax_.any_large(lanes)) return factor;
    scale_scores(scores_, chunk_->blocks * kM, factor);
    return 1.0f;
  }

  // O^T *= rescale.
  void rescale_sums() {
    for (int64_t d = 0; d < value_dim_; ++d)
      for (int g = 0; g < kRows; g += W) {
        float* const at = acc_ + d * kRows + g;
        store(at, mul(load(at), load(softmax_.rescale + g)));
      }
  }

#if defined(FARLIGHT_ISA_AMX)
  // Weights of a block of kM keys after AMX products: scales and masks the scores (padding keys included), applies exp2 and
  // dropout, and stores bfloat16 pairs. Returns the sum of the weights; running_max is raised to the largest exponent.
  FARLIGHT_INLINE F weights_of_block(int block, int g, [[maybe_unused]] F factor, F reference, const DropoutMask& dropout,
                                     F& running_max) {
    const Chunk& c = *chunk_;
    const int first = block * kM;
    F w[kM];
    FARLIGHT_UNROLL
    for (int i = 0; i < kM; ++i) {
      const F x = load(scores_ + (first + i) * kRows + g);
      w[i] = sub(q_prescaled<Traits> ? x : mul(x, factor), reference);
    }
    if (c.masked[block])
      for (int i = 0; i < kM; ++i) w[i] = select(c.row_mask[first + i] >> g, w[i], broadcast(kMaskedScore));
    if (OnlineSoftmax<Traits>::kMaxSlack > 0.0f) running_max = max(largest(w), running_max);
    FARLIGHT_UNROLL
    for (int i = 0; i < kM; ++i) w[i] = exp2_poly<Traits::degree>(w[i]);
    const F sum = add(add(add(w[0], w[1]), add(w[2], w[3])), add(add(w[4], w[5]), add(w[6], w[7])));
    if (dropout.on())
      for (int i = 0; i < kM; ++i) w[i] = select(dropout.keep_mask(c.key[first + i], g), w[i], broadcast(0.0f));
    FARLIGHT_UNROLL
    for (int i = 0; i < kM; i += 2)
      store_interleaved<num_parts<Traits>>(w[i], w[i + 1], weights_ + (first + i) / 2 * kRows + g, kWeights);
    return sum;
  }

  // Weights of a chunk with the present running maximum, their sums in `sums`. Returns true where a row must raise its maximum;
  // then the caller raises it and calls this again. Where that is rare, this is cheaper than a separate pass for the maximum.
  bool compute_weights_amx(const DropoutMask& dropout, float factor, int lanes, F* sums) {
    uint32_t raised = 0;
    for (int g = 0; g < lanes; g += W) {
      const F reference = load(softmax_.row_max + g);
      F sum = broadcast(0.0f), running_max = broadcast(kMaskedScore);
      for (int block = 0; block < chunk_->blocks; ++block)
        sum = add(sum, weights_of_block(block, g, broadcast(factor), reference, dropout, running_max));
      sums[g / W] = sum;
      raised |= greater(running_max, broadcast(OnlineSoftmax<Traits>::kMaxSlack));
    }
    return raised != 0;
  }
#endif

  // Scores to weights and their sums; then dropout. Weights are stored as operands of P V.
  void compute_weights(const DropoutMask& dropout, F factor, int lanes) {
    const Spans& spans = chunk_->spans;
    for (const Span* span = spans.span; span < spans.span + spans.count; ++span)
      for_lanes(span->halves, lanes, [&]<int V>(int g) { weights_of_span<V>(*span, g, factor, dropout); });
  }

  // V vectors of lanes together: one alone would wait for the latency of its own exp2 chain.
  template <int V>
  FARLIGHT_INLINE void weights_of_span(const Span& span, int g, [[maybe_unused]] F factor, const DropoutMask& dropout) {
    F reference[V], row_sum[V];  // per span: keeps float sums short, see gemm_col_major_block
    FARLIGHT_UNROLL
    for (int v = 0; v < V; ++v) {
      reference[v] = load(softmax_.row_max + g + v * W);
      row_sum[v] = broadcast(0.0f);
    }
    const auto weight = [&](int i, int v) {
      const F x = load(scores_ + i * kRows + g + v * W);
      const F w = exp2_poly<Traits::degree>(q_prescaled<Traits> ? sub(x, reference[v])
                                                                : fma(x, factor, sub(broadcast(0.0f), reference[v])));
      row_sum[v] = add(row_sum[v], w);
      return dropout.on() ? select(dropout.keep_mask(chunk_->key[i], g + v * W), w, broadcast(0.0f)) : w;
    };
    for (int i = span.first; i < span.last; i += Traits::Op::per) {
      FARLIGHT_UNROLL
      for (int v = 0; v < V; ++v) {
        const F w = weight(i, v);
        if constexpr (uses_pairs<Traits>) {
#if defined(FARLIGHT_BF16_PAIRS)
          store_i(weights_ + i / 2 * kRows + g + v * W,
                  narrow_interleaved(w, i + 1 < span.last ? weight(i + 1, v) : broadcast(0.0f)));
#endif
        } else {
          store(scores_ + i * kRows + g + v * W, w);
        }
      }
    }
    FARLIGHT_UNROLL
    for (int v = 0; v < V; ++v) softmax_.add_sums(g + v * W, row_sum[v]);
  }

  // O^T += V^T P^T. The rescaling is fused into the product when every row block half takes part in the whole chunk.
  void add_pv(int lanes, bool first_chunk, bool rescales) {
    values_.fetch_col_major(*chunk_, packed_);
    const Spans& spans = chunk_->spans;
    const bool fused = spans.count == 1 && spans.span[0].halves == kBothHalves;
    if (rescales && !fused) rescale_sums();
    accumulate_col_major<typename Traits::Op>(acc_, values_.col_major, weights_, spans, value_dim_, lanes, first_chunk,
                                              rescales && fused ? softmax_.rescale : nullptr);
  }

  // Continues the softmax over gathered keys.
  void add_gathered(const RowBlock& row_block, const HeadRows<T>& q, const DropoutMask& dropout, const BlockTerms& terms) {
    GatheredSoftmax<T> softmax(row_block, q, keys_.source(), values_.source(), dim_, value_dim_, call_.scale * kLog2E,
                               dropout, terms, {softmax_.row_max, softmax_.row_sum, out_rows_, ld_, row_buffer_});
    for (int i = 0; i < row_block.piece->layer_count; ++i)
      if (row_block.has_gathered(row_block.piece->layers[i])) softmax.process_layer(row_block.piece->layers[i]);
  }

  // Writes the rows, or stores them as split-K partials.
  void finish(const RowBlock& row_block, float keep_scale) {
    const SplitK split(call_, item_);
    for (int s = 0; s < row_block.count; ++s) {
      const float row_max = softmax_.row_max[s], row_sum = softmax_.row_sum[s];
      float* const row = out_rows_ + s * ld_;
      if (split.is_part()) split.store(row_block.first_row + s, row_max, row_sum, row);
      else write(row_block.row[s], row_max, row_sum, row, keep_scale);
    }
  }

 public:
  // Merges the partial results of a split-K tile and writes its rows.
  void merge_parts() {
    const float keep_scale = call_.dropout.on ? call_.dropout.keep_scale : 1.0f;
    SplitK(call_, item_).merge([&](int64_t row, int parts, const auto& partial) {
      float row_max = kInitialMax, row_sum = 0.0f;
      std::memset(out_rows_, 0, ld_ * sizeof(float));
      for (int part = 0; part < parts; ++part) {
        const float* at = partial(part);
        if (at[1] == 0.0f) continue;
        const float reference = at[0] > row_max ? at[0] : row_max;
        const float acc_weight = exp2f(row_max - reference), part_weight = exp2f(at[0] - reference);
        row_sum = row_sum * acc_weight + at[1] * part_weight;
        for (int64_t d = 0; d < value_dim_; ++d) out_rows_[d] = out_rows_[d] * acc_weight + at[2 + d] * part_weight;
        row_max = reference;
      }
      write(row, row_max, row_sum, out_rows_, keep_scale);
    });
  }

 private:
  // Normalises a row and writes out and lse; merges with the result of earlier pieces by maximum and sum rather than by lse
  // (see RowStats).
  void write(int64_t row, float row_max, float row_sum, float* sum, float keep_scale) {
    const int64_t at = (item_.batch * call_.heads + item_.head) * call_.plan->n_q + row;
    if (row_sum == 0.0f) {
      if (keep_masked_rows(call_, item_)) return;
      std::memset(sum, 0, value_dim_ * sizeof(float));
      write_row(call_.out_type, call_.result, at * value_dim_, sum, value_dim_);
      call_.lse[at] = call_.terms.sinks ? call_.terms.sinks[item_.head] * kLn2 : -INFINITY;
      return;
    }
    if (call_.terms.sinks) add_sink(call_.terms.sinks[item_.head], row_max, row_sum, keep_scale);
    float factor = keep_scale / row_sum;
    RowStats* const previous = call_.row_stats ? call_.row_stats + at : nullptr;
    if (call_.merges && previous->row_sum != 0.0f) {
      const float merged_max = previous->row_max > row_max ? previous->row_max : row_max;
      const float previous_weight = previous->row_sum * exp2f(previous->row_max - merged_max),
                  acc_weight = row_sum * exp2f(row_max - merged_max), merged_sum = previous_weight + acc_weight;
      factor *= acc_weight / merged_sum;
      read_row(call_.out_type, call_.result, at * value_dim_, row_buffer_, value_dim_);
      for (int64_t d = 0; d < value_dim_; ++d) sum[d] = sum[d] * factor + row_buffer_[d] * (previous_weight / merged_sum);
      factor = 1.0f;
      row_max = merged_max;
      row_sum = merged_sum;
    }
    if (previous) *previous = {row_max, row_sum};
    call_.lse[at] = row_max * kLn2 + logf(row_sum);
    write_row(call_.out_type, call_.result, at * value_dim_, sum, value_dim_, factor);
  }

  static constexpr int64_t kWeights = kChunkKeys / 2 * kRows;  // words between the parts of the weights of a chunk

  const Call& call_;
  const WorkItem& item_;
  int64_t dim_, value_dim_;  // of rows of Q and K; of V and out
  int64_t shared_dim_;       // the smaller one, which prefetches follow
  int64_t ld_;
  Operand<Traits> keys_, values_;
  PackedCacheOf<Traits> packed_;
  RecentBlocks* recent_ = nullptr;
  Transposed<Traits> queries_;
  Chunk *chunks_, *chunk_ = nullptr;  // double buffer; the current chunk
  // Weights overwrite their scores where they have the same size, to keep the working set in L1.
  Word* weights_ = nullptr;
  float *scores_, *acc_, *out_rows_, *row_buffer_;
  OnlineSoftmax<Traits> softmax_;
};

}  // namespace farlight::FARLIGHT_NS

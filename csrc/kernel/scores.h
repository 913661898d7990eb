// Scores S^T[key][row] = K Q^T of a chunk, with masks, the running maximum and prefetch; the scaling of scores; and the dropout
// mask.
#pragma once

#include <math.h>

#include "elementary.h"
#include "operands.h"
#include "prefetch.h"

namespace farlight::FARLIGHT_NS {

// running maximum before the first key: finite, and no finite score is below it
constexpr float kInitialMax = -3.402823466e38f;
constexpr float kMaskedScore = -INFINITY;  // score of a masked pair: exp2(kMaskedScore - kInitialMax) = 0
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Reduces N vectors in a balanced tree, for short dependency chains.
template <int N, class Combine>
FARLIGHT_INLINE F tree_reduce(const F (&x)[N], Combine combine) {
  if constexpr (N == 1) {
    return x[0];
  } else {
    constexpr int half = (N + 1) / 2;
    F pairs[half];
    FARLIGHT_UNROLL
    for (int i = 0; i < half; ++i) pairs[i] = i + half < N ? combine(x[i], x[i + half]) : x[i];
    return tree_reduce(pairs, combine);
  }
}
// Lane-wise maximum of N vectors.
template <int N>
FARLIGHT_INLINE F largest(const F (&x)[N]) {
  return tree_reduce(x, [](F a, F b) { return max(a, b); });
}

// Scale factors that make scores base-2 logarithms: Q is multiplied by `before`, scores by `after`.
struct Scale {
  float before, after;
};
// The factors for the softmax scale of a call.
template <class Traits>
FARLIGHT_INLINE Scale scale_of(float scale) {
  const float scale_log2 = scale * kLog2E, magnitude = scale_log2 < 0.0f ? -scale_log2 : scale_log2;
  if (q_prescaled<Traits>) return {scale_log2, 1.0f};
  if (uses_amx<Traits>) return {1.0f, scale_log2};
  // Scores are compared before they are scaled: `after` must be positive, so that the maximum stays the maximum and -inf stays
  // -inf. A negative scale is moved to Q as a factor of -1.
  return {scale_log2 < 0.0f ? -1.0f : 1.0f, max(magnitude, 1e-37f)};
}

#if defined(FARLIGHT_ISA_AMX)
// Scores of a group of 32 keys in float32 FMA, for groups that contain infinities.
template <class Traits>
FARLIGHT_NOINLINE void score_group_f32(const Chunk& c, int first, const Operand<Traits>& keys,
                                       const Transposed<Traits>& queries, float* scores) {
  if constexpr (num_parts<Traits> > 1) {
    for (int block = 0; block < kDepth; block += kM)
      for (int g = 0; g < kRows; g += kV * W) {
        const float* rows[kM];
        for (int m = 0; m < kM; ++m) rows[m] = keys.source().row(c.key[first + block + m]);
        F acc[kM][kV];
        clear(acc);
        gemm_row_major<F32Word, kM, kV>(acc, rows, queries.f32 + g, kRows, queries.dim());
        for (int m = 0; m < kM; ++m)
          for (int v = 0; v < kV; ++v) store(scores + (block + m) * kRows + g + v * W, acc[m][v]);
      }
  }
}

// Unscaled, unmasked scores of a chunk on AMX. `operand`: which of the cached row operands of split floats to use (0: K, 1: V).
// Where K or Q has an infinity the group is computed by FMA, since the lower parts of an infinity are NaN.
template <class Traits>
inline void score_amx(const Chunk& c, const Operand<Traits>& keys, const PackedCache<Traits>& packed, int operand,
                      const Transposed<Traits>& queries, float* scores, KeyPrefetcher<Traits>& prefetcher) {
  const int64_t steps = (queries.words + kTileDim - 1) / kTileDim;
  for (int first = 0; first < c.n; first += kDepth) {
    if (num_parts<Traits> > 1 && operand == 0 && (queries.has_inf || packed.has_inf(first / kDepth))) {
      score_group_f32(c, first, keys, queries, scores + first * kRows);
      continue;
    }
    const auto panel = [&](int half) {
      if constexpr (num_parts<Traits> == 1) return keys.panel(c, first + half * kTileDim, half);
      else return packed.panel(first / kDepth, operand, half);
    };
    score_key_group<num_parts<Traits>>(panel(0), panel(1), queries.transposed, queries.part(), steps, scores + first * kRows,
                                       [&] { prefetcher.issue_some(); });
  }
}

// row_max[row] = maximum of the visible scores, scaled. With a negative scale the minimum of the unscaled scores is taken.
inline void row_max_of(const Chunk& c, const float* scores, float scale, int lanes, float* row_max) {
  const auto scan = [&](float masked_value, auto combine) {
    for (int g = 0; g < lanes; g += W) {
      F running_max = broadcast(masked_value);
      for (int block = 0; block < c.blocks; ++block) {
        F x[kM];
        FARLIGHT_UNROLL
        for (int m = 0; m < kM; ++m) x[m] = load(scores + (block * kM + m) * kRows + g);
        if (c.masked[block])
          for (int m = 0; m < kM; ++m) x[m] = select(c.row_mask[block * kM + m] >> g, x[m], broadcast(masked_value));
        running_max = combine(tree_reduce(x, combine), running_max);
      }
      store(row_max + g, mul(running_max, broadcast(scale)));
    }
  };
  if (scale < 0.0f) scan(-kMaskedScore, [](F a, F b) { return min(a, b); });
  else scan(kMaskedScore, [](F a, F b) { return max(a, b); });
}
#endif

// Scores of a block of kM keys x V vectors of rows, interleaved with prefetches: one cache line per step of the product. With
// Masking, masked scores become -inf (`row_mask` is null where every row sees every key) and row_max is updated. Not inlined,
// so that the kM row pointers get registers of their own.
template <class Traits, bool Masking, int V>
FARLIGHT_NOINLINE void score_block(const typename Traits::Op::Word* const* rows, const typename Traits::Op::Word* queries,
                                   int64_t words, const uint32_t* row_mask, int g, float* to, float* row_max,
                                   const PrefetchLines* lines) {
  using Op = typename Traits::Op;
  F acc[kM][V];
  clear(acc);
  const typename Op::Word* row[kM];
  FARLIGHT_UNROLL
  for (int m = 0; m < kM; ++m) row[m] = rows[m];
  int64_t i = 0;
  // A row has at least as many words as cache lines. Lines go to L2, since L1 holds the working set of the row block. Loops of
  // a compile-time trip count take a third of the time of general ones.
  const auto mac_with_prefetch = [&]<int Count>() {
    for (int r = 0; r < PrefetchLines::kRanges; ++r) {
      const char* line = lines->start[r];
      FARLIGHT_UNROLL_4
      for (int64_t n = Count ? Count : lines->count; n > 0; --n, ++i, line += 64) {
        FARLIGHT_PREFETCH_L2(line);
        mac_row_major<Op, kM, V>(acc, row, i, queries + i * kRows);
      }
    }
  };
  if (lines) {
    if (lines->count == 1) mac_with_prefetch.template operator()<1>();
    else if (lines->count == 2) mac_with_prefetch.template operator()<2>();
    else if (lines->count == 4) mac_with_prefetch.template operator()<4>();
    else mac_with_prefetch.template operator()<0>();
  }
  FARLIGHT_UNROLL_4
  for (; i < words; ++i) mac_row_major<Op, kM, V>(acc, row, i, queries + i * kRows);
  if constexpr (Masking) {
    if (row_mask) {
      FARLIGHT_UNROLL
      for (int m = 0; m < kM; ++m) {
        FARLIGHT_UNROLL
        for (int v = 0; v < V; ++v) acc[m][v] = select(row_mask[m] >> (g + v * W), acc[m][v], broadcast(kMaskedScore));
      }
    }
    FARLIGHT_UNROLL
    for (int v = 0; v < V; ++v) {
      F lane_scores[kM];
      FARLIGHT_UNROLL
      for (int m = 0; m < kM; ++m) lane_scores[m] = acc[m][v];
      store(row_max + v * W, max(largest(lane_scores), load(row_max + v * W)));
    }
  }
  FARLIGHT_UNROLL
  for (int m = 0; m < kM; ++m) {
    FARLIGHT_UNROLL
    for (int v = 0; v < V; ++v) store(to + m * kRows + v * W, acc[m][v]);
  }
}

// scores[key][row] of a chunk, unscaled, and row_max[row], their maximum. Without Masking, masked pairs keep their scores.
// Halves of rows that see nothing of a block are not computed. lines_for(block) returns the cache lines to prefetch during a
// block.
template <class Traits, bool Masking, class LinesFor>
inline void score(const Chunk& c, const Operand<Traits>& keys, const Transposed<Traits>& queries, int lanes, float* scores,
                  float* row_max, const LinesFor& lines_for) {
  if constexpr (Masking) {
    for (int g = 0; g < lanes; g += W) store(row_max + g, broadcast(kMaskedScore));
  }
  for (const Span* span = c.spans.span; span < c.spans.span + c.spans.count; ++span)
    for (int at = span->first; at < span->last; at += kM) {
      const PrefetchLines* lines = lines_for(at / kM);
      const uint32_t* row_mask = c.masked[at / kM] ? c.row_mask + at : nullptr;
      for_lanes(span->halves, lanes, [&]<int V>(int g) {
        score_block<Traits, Masking, V>(keys.row_major + at, queries.transposed + g, queries.words, row_mask, g,
                                        scores + at * kRows + g, Masking ? row_max + g : nullptr, lines);
      });
    }
}

// Beyond this |row maximum|, the rounding of the maximum shows in weights computed by one fma(score, scale, -max): scores are
// then scaled (and rounded) first, so that the largest score has weight exactly 1.
constexpr float kLargeReference = 4096.0f;

// Not inlined: the compiler could contract the product with the following subtraction, and the product would not be rounded.
FARLIGHT_NOINLINE inline void scale_scores(float* scores, int keys, float factor) {
  for (int i = 0; i < keys * kRows; i += W) store(scores + i, mul(load(scores + i), broadcast(factor)));
}
// scores[key][row] -= reference[row].
FARLIGHT_NOINLINE inline void subtract_references(float* scores, int keys, const float* reference) {
  for (int g = 0; g < kRows; g += W) {
    const F r = load(reference + g);
    for (int i = g; i < keys * kRows; i += kRows) store(scores + i, sub(load(scores + i), r));
  }
}

// Dropout of the links of a row block: hashes (seed, batch, head, query position, key), so the mask does not depend on plan or
// ISA.
class DropoutMask {
 public:
  DropoutMask(const Dropout& dropout, const PlanView& plan, const RowBlock& row_block) : dropout_(dropout) {
    if (!dropout.on) return;
    for (int s = 0; s < kRows; ++s)
      row_hashes_[s] = s < row_block.count ? row_hash(dropout.seed_low, dropout.seed_high, row_block.item.batch,
                                                      row_block.item.head, plan.q_offset + row_block.row[s])
                                           : 0;
  }
  bool on() const { return dropout_.on; }
  float keep_scale() const { return dropout_.on ? dropout_.keep_scale : 1.0f; }
  // Bit i: the link between the row in lane g + i and the key is kept.
  uint32_t keep_mask(int32_t key, int g) const {
    if (dropout_.drop_all) return 0;
    const I hash = mix32(bit_xor(load_i(row_hashes_ + g), broadcast_i(key_word(key))));
    return ~less_u32(hash, broadcast_i(dropout_.threshold));
  }
  // Whether the link between row s and the key is kept.
  bool keeps_pair(int32_t key, int s) const {
    return !dropout_.drop_all && mix32(row_hashes_[s] ^ key_word(key)) >= dropout_.threshold;
  }

 private:
  const Dropout& dropout_;
  uint32_t row_hashes_[kRows];
};

}  // namespace farlight::FARLIGHT_NS

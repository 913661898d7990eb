// Accumulation of dV += P^T dO and dK += dS^T Q into the slab's float32 accumulators, which are blocks of 64 keys
// (dkdv_reduction.h).
#pragma once

#include "key_chunks.h"
#include "operands.h"
#include "register_blocks.h"

namespace farlight::FARLIGHT_NS {

// Adds a chunk's products to the accumulator rows of its keys. Each slab has accumulators of its own, so no atomics are needed.
template <class Traits>
class DkDvAccumulator {
  using Op = typename Traits::Op;
  using Word = typename Op::Word;

 public:
  DkDvAccumulator(int64_t dim, int64_t value_dim)
      : dim_(dim),
        value_dim_(value_dim),
        ld_(round_up(max(dim, value_dim), 32)) {}

  void reserve(Arena& arena) {
    dk_ = arena.allocate<float*>(kChunkKeys);
    dv_ = arena.allocate<float*>(kChunkKeys);
    weight_rows_ = arena.allocate<const Word*>(kM);
    discard_ = arena.allocate<float>(ld_);
    if (uses_amx<Traits>) staging_ = arena.allocate<float>(kPanelKeys * ld_);
  }

  // Clears the row that receives the sums of padding keys.
  void clear_discard() { std::memset(discard_, 0, ld_ * sizeof(float)); }

  // Looks up the accumulator rows of the chunk's keys; padding keys get the discard row.
  void locate(const Chunk& c, const DkDvBlocks& blocks) {
    const int n = c.blocks * kM;
    for (int i = 0; i < n; ++i) {
      const int64_t block = c.key[i] / kBlock, key_in_block = c.key[i] % kBlock;
      dk_[i] = i < c.n ? blocks.dk[block] + key_in_block * blocks.dk_stride : discard_;
      dv_[i] = i < c.n ? blocks.dv[block] + key_in_block * blocks.dv_stride : discard_;
    }
  }

  // dV += P^T dO and dK += dS^T Q. weights (P) and ds: [key][row]; dout and queries: [row][d]; `terms`: words of query rows.
  void add(const Chunk& c, const Word* weights, const Word* dout, const Word* ds, const Word* queries, int terms) {
    if constexpr (uses_amx<Traits>) {
      add_amx(c, dv_, weights, dout, value_dim_);
      add_amx(c, dk_, ds, queries, dim_);
      return;
    }
    for (const Span* span = c.spans.span; span < c.spans.span + c.spans.count; ++span) {
      const int first = span->halves == 2 ? kHalfLine : 0, count = min(terms, span->halves == 1 ? kHalfLine : kLine) - first;
      const auto accumulate = [&](int at, float* const* sums, const Word* weights_of_key, const Word* rows, int64_t dim) {
        const int64_t ld = round_up(dim, 32);
        if (c.maybe_duplicate[at / kM] && has_duplicates(at))
          add_serially(c, at, sums, weights_of_key + first, rows + first * ld, count, dim);
        else accumulate_row_major<Op>(sums + at, rows_of(weights_of_key + first, at), rows + first * ld, ld, count, dim);
      };
      for (int at = span->first; at < span->last; at += kM) {
        accumulate(at, dv_, weights, dout, value_dim_);
        accumulate(at, dk_, ds, queries, dim_);
      }
    }
  }

 private:
  static constexpr int kPanelKeys = 16;  // keys in an AMX panel
  static constexpr int kLine = kRows / Op::per, kHalfLine = kLine / 2;

 public:
  static constexpr int64_t kWeights = kChunkKeys * kLine;  // words between the parts of the weights of a chunk

 private:
  // The weight rows of the block of kM keys from `at` on.
  const Word* const* rows_of(const Word* weights, int at) {
    for (int m = 0; m < kM; ++m) weight_rows_[m] = weights + (at + m) * kLine;
    return weight_rows_;
  }

  // Whether two keys of the block share an accumulator row.
  bool has_duplicates(int at) const {
    for (int i = 1; i < kM; ++i)
      for (int j = 0; j < i; ++j)
        if (dk_[at + i] == dk_[at + j] && dk_[at + i] != discard_) return true;
    return false;
  }

  // A block with a repeated key: one key at a time, since a register block loads all its sums before it stores them.
  void add_serially(const Chunk& c, int at, float* const* sums, const Word* weights, const Word* rows, int terms, int64_t dim) {
    float* to[kM];
    for (int i = 0; i < kM && at + i < c.n; ++i) {
      for (int j = 0; j < kM; ++j) to[j] = j == i ? sums[at + i] : discard_;
      accumulate_row_major<Op>(to, rows_of(weights, at), rows, round_up(dim, 32), terms, dim);
    }
  }

  // AMX: panels whose accumulator rows are equidistant are updated in place; others are computed in `staging_` and added row by
  // row.
  void add_amx(const Chunk& c, float* const* sums, const Word* weights, const Word* rows, int64_t dim) {
#if defined(FARLIGHT_ISA_AMX)
    const int n = c.blocks * kM;
    float* to[kChunkKeys / kPanelKeys];
    for (int first = 0; first < n;) {
      const int64_t stride = sums[first + 1] - sums[first];
      int panels = 0;
      for (; first < n && evenly_spaced(sums + first, stride); first += kPanelKeys) to[panels++] = sums[first];
      if (panels) {
        accumulate_panels_at(to, stride, weights + (first - panels * kPanelKeys) * kLine, rows, panels, dim, false);
        continue;
      }
      accumulate_panels_at(&staging_, ld_, weights + first * kLine, rows, 1, dim, true);
      for (int i = 0; i < kPanelKeys && first + i < c.n; ++i)
        for (int64_t d = 0; d < dim; d += W)
          store(sums[first + i] + d, FARLIGHT_NS::add(load(sums[first + i] + d), load(staging_ + i * ld_ + d)));
      first += kPanelKeys;
    }
#else
    (void)c, (void)sums, (void)weights, (void)rows, (void)dim;
#endif
  }

#if defined(FARLIGHT_ISA_AMX)
  void accumulate_panels_at(float* const* to, int64_t stride, const Word* weights, const Word* rows, int panels,
                            int64_t dim, bool overwrite) const {
    const int64_t ld = round_up(dim, 32);
    const Bf16* a = reinterpret_cast<const Bf16*>(weights);
    if constexpr (num_parts<Traits> == 1) accumulate_panels(to, stride, a, rows, ld, panels, dim, overwrite);
    else accumulate_split_panels(to, stride, a, kWeights * 2, rows, ld, kRows / 2 * ld, panels, dim, overwrite);
  }

  // Whether the accumulator rows of a panel are `stride` floats apart.
  static bool evenly_spaced(float* const* sums, int64_t stride) {
    if (stride <= 0) return false;
    for (int i = 1; i < kPanelKeys; ++i)
      if (sums[i] != sums[0] + i * stride) return false;
    return true;
  }
#endif

  int64_t dim_, value_dim_, ld_;  // of dk; of dv; floats of a discarded or staged row
  float **dk_ = nullptr, **dv_ = nullptr, *discard_ = nullptr, *staging_ = nullptr;
  const Word** weight_rows_ = nullptr;
};

}  // namespace farlight::FARLIGHT_NS

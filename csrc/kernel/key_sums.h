// Where dk and dv of a chunk's keys are summed: rows of a slab's accumulators, which lie in blocks of 64 keys.
#pragma once

#include "blocks.h"
#include "chunk.h"
#include "operands.h"

namespace farlight::FARLIGHT_NS {

template <class Mode>
class KeySums {
  using Op = typename Mode::Op;
  using Word = typename Op::Word;

 public:
  explicit KeySums(int64_t dim) : dim_(dim), ld_(rounded(dim, 32)) {}

  void reserve(Arena& arena) {
    dk_ = arena.take<float*>(kKeys);
    dv_ = arena.take<float*>(kKeys);
    rows_ = arena.take<const Word*>(kM);
    spill_ = arena.take<float>(ld_);
    if (in_tiles<Mode>) loose_ = arena.take<float>(kStrip * ld_);
  }

  void begin() { std::memset(spill_, 0, ld_ * sizeof(float)); }

  // Where the chunk's sums lie: those of keys that only fill up its last block, nowhere.
  void find(const Chunk& c, const Sums& sums) {
    const int n = c.blocks * kM;
    for (int i = 0; i < n; ++i) {
      const int64_t block = c.key[i] / kBlock, within = c.key[i] % kBlock * sums.stride;
      dk_[i] = i < c.n ? sums.dk[block] + within : spill_;
      dv_[i] = i < c.n ? sums.dv[block] + within : spill_;
    }
  }

  // dV += P dO and dK += dS Q: `weights` and `slopes` are [key][row], `terms` words of rows; the others [row][d].
  void add(const Chunk& c, const Word* weights, const Word* upstream, const Word* slopes, const Word* queries, int terms) {
    if constexpr (in_tiles<Mode>) {
      add_tiles(c, dv_, weights, upstream);
      add_tiles(c, dk_, slopes, queries);
      return;
    }
    for (const Span* span = c.spans.span; span < c.spans.span + c.spans.count; ++span) {
      const int first = span->halves == 2 ? kHalfLine : 0, count = least(terms, span->halves == 1 ? kHalfLine : kLine) - first;
      const auto sum = [&](int at, float* const* sums, const Word* of, const Word* rows) {
        if (c.mixed[at / kM] && repeats(at)) add_one_by_one(c, at, sums, of + first, rows + first * ld_, count);
        else add_along<Op>(sums + at, rows_of(of + first, at), rows + first * ld_, ld_, count, dim_);
      };
      for (int at = span->first; at < span->last; at += kM) {
        sum(at, dv_, weights, upstream);
        sum(at, dk_, slopes, queries);
      }
    }
  }

 private:
  static constexpr int kStrip = 16;  // keys, where products are made of tiles
  static constexpr int kLine = kRows / Op::per, kHalfLine = kLine / 2;

 public:
  static constexpr int64_t kWeights = kKeys * kLine;  // words from one part of all weights to the next

 private:

  const Word* const* rows_of(const Word* weights, int at) {
    for (int m = 0; m < kM; ++m) rows_[m] = weights + (at + m) * kLine;
    return rows_;
  }

  bool repeats(int at) const {
    for (int i = 1; i < kM; ++i)
      for (int j = 0; j < i; ++j)
        if (dk_[at + i] == dk_[at + j] && dk_[at + i] != spill_) return true;
    return false;
  }

  // A block in which a key stands twice: its sums must not be read before the first one is written.
  void add_one_by_one(const Chunk& c, int at, float* const* sums, const Word* weights, const Word* rows, int terms) {
    float* to[kM];
    for (int i = 0; i < kM && at + i < c.n; ++i) {
      for (int j = 0; j < kM; ++j) to[j] = j == i ? sums[at + i] : spill_;
      add_along<Op>(to, rows_of(weights, at), rows, ld_, terms, dim_);
    }
  }

  // Strips whose sums lie at equal distances are added to where they are, others by way of `loose_`, one key after the other.
  void add_tiles(const Chunk& c, float* const* sums, const Word* weights, const Word* rows) {
#if defined(FARLIGHT_ISA_AMX)
    const int n = c.blocks * kM;
    float* to[kKeys / kStrip];
    for (int first = 0; first < n;) {
      const int64_t stride = sums[first + 1] - sums[first];
      int strips = 0;
      for (; first < n && even(sums + first, stride); first += kStrip) to[strips++] = sums[first];
      if (strips) {
        add_strips_at(to, stride, weights + (first - strips * kStrip) * kLine, rows, strips, false);
        continue;
      }
      add_strips_at(&loose_, ld_, weights + first * kLine, rows, 1, true);
      for (int i = 0; i < kStrip && first + i < c.n; ++i)
        for (int64_t d = 0; d < dim_; d += W) store(sums[first + i] + d, FARLIGHT_NS::add(load(sums[first + i] + d), load(loose_ + i * ld_ + d)));
      first += kStrip;
    }
#else
    (void)c, (void)sums, (void)weights, (void)rows;
#endif
  }

#if defined(FARLIGHT_ISA_AMX)
  void add_strips_at(float* const* to, int64_t stride, const Word* weights, const Word* rows, int strips, bool fresh) const {
    const Half* a = reinterpret_cast<const Half*>(weights);
    if constexpr (parts_of<Mode> == 1) add_strips(to, stride, a, rows, ld_, strips, dim_, fresh);
    else add_strips_of_parts(to, stride, a, kWeights * 2, rows, ld_, kRows / 2 * ld_, strips, dim_, fresh);
  }

  static bool even(float* const* sums, int64_t stride) {
    if (stride <= 0) return false;
    for (int i = 1; i < kStrip; ++i)
      if (sums[i] != sums[0] + i * stride) return false;
    return true;
  }
#endif

  int64_t dim_, ld_;
  float **dk_ = nullptr, **dv_ = nullptr, *spill_ = nullptr, *loose_ = nullptr;
  const Word** rows_ = nullptr;
};

}  // namespace farlight::FARLIGHT_NS

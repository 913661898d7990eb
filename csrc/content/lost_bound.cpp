#include "lost_bound.h"

#include <cmath>

#include "bound_query.h"
#include "row_masks.h"
#include "tile_clauses.h"

namespace farlight {

namespace {

// Scratch memory of one thread.
struct Scratch {
  std::vector<float> queries, scores, counts;
};

class LostBound {
 public:
  LostBound(const Kernels& kernels, const LostProblem& problem, const Summaries& summaries)
      : kernels_(kernels),
        p_(problem),
        t_(problem.tensors),
        summaries_(summaries),
        bounds_(problem.tensors, summaries),
        ld_(summaries.padded() + 16) {}

  void run(int64_t b, int64_t h, int64_t tile) const {
    thread_local Scratch s;
    s.queries.resize(kScoreRows * summaries_.dim());
    s.scores.resize(kRowSlots * ld_);
    s.counts.resize(kRows * ld_);
    RowMasks masks(t_.n_k);
    TileClauses(p_.pattern, b, h, masks).unite(tile * kRows);
    const int64_t first = tile * kRows, count = std::min<int64_t>(kRows, t_.n_q - first);
    for (int64_t r = 0; r < count; ++r) count_all(b, first + r, s.counts.data() + r * ld_);
    masks.drain([&](int64_t key, const uint32_t* seen, int keys, bool) {
      for (int i = 0; i < keys; ++i)
        for (uint32_t rows = real(b, key + i) ? seen[i] : 0; rows; rows &= rows - 1)
          s.counts[std::countr_zero(rows) * ld_ + key / kGranule] -= 1.0f;
    });
    for (int64_t r = 0; r < count; r += kScoreRows) bound(s, b, h, first + r, std::min(kScoreRows, count - r), r);
  }

 private:
  bool real(int64_t b, int64_t key) const { return !t_.key_mask || t_.key_mask[(t_.mask_batch > 1 ? b * t_.n_k : 0) + key]; }
  // Number of keys that full attention of a row sees: those before this one.
  int64_t limit(int64_t row) const {
    return t_.causal ? std::clamp<int64_t>(t_.offset + row + 1, 0, t_.n_k) : t_.n_k;
  }
  int64_t panels(int64_t row) const { return (limit(row) + kGranule * kPanel - 1) / (kGranule * kPanel); }

  // Keys of each granule that full attention of the row sees.
  void count_all(int64_t b, int64_t row, float* counts) const {
    const int32_t* sizes = summaries_.sizes(t_, b);
    const int64_t end = limit(row), whole = end / kGranule;
    std::copy(sizes, sizes + whole, counts);
    std::fill(counts + whole, counts + ld_, 0.0f);
    for (int64_t key = whole * kGranule; key < end; ++key) counts[whole] += real(b, key);
  }

  void bound(Scratch& s, int64_t b, int64_t h, int64_t first, int64_t count, int64_t tile_row) const {
    const int64_t kv_head = h / (t_.heads / t_.kv_heads), width = panels(first + count - 1);
    const float factor = bounds_.factor();
    const float* row[kRowSlots];
    float slack[kScoreRows];
    for (int64_t r = 0; r < kRowSlots; ++r) {
      row[r] = s.queries.data() + (r < count ? r : 0) * summaries_.dim();
      if (r < count) slack[r] = bounds_.read(b, h, first + r, s.queries.data() + r * summaries_.dim());
    }
    if (width)
      kernels_.block_scores(row, count, summaries_.panels_of(t_, b, kv_head), width, summaries_.dim(), s.scores.data(), ld_);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = (b * t_.heads + h) * t_.n_q + first + r;
      const float* counts = s.counts.data() + (tile_row + r) * ld_;
      p_.lost[at] = lost(s.scores.data() + r * ld_, counts, panels(first + r), factor, slack[r], p_.lse[at]);
    }
  }

  float lost(const float* scores, const float* counts, int64_t width, float factor, float slack, float lse) const {
    const auto misses_a_key = [&] { return std::any_of(counts, counts + width * kPanel, [](float n) { return n > 0.0f; }); };
    if (lse == -std::numeric_limits<float>::infinity()) return misses_a_key() ? 1.0f : 0.0f;
    // Error of the lse in base 2: weights of bfloat16 calls have a relative error of 1e-4 (exp2_poly<3>).
    const float lse_error = t_.type == Type::f32 ? 1e-5f : 3e-4f;
    const float shift = slack + lse_error + std::fabs(lse) * 0x1p-20f - lse * kLog2e;
    float u = kernels_.weighted_exponentials(scores, counts, width, factor, shift);
    if (u < 1e-30f && misses_a_key()) u = 1e-30f;               // what has underflowed is not nothing
    if (!(u < 1e30f)) return 1.0f;                              // NaN bounds nothing
    return std::min(1.0f, u / (1.0f + u) * (1.0f + 0x1p-21f));  // rounded upwards
  }

  const Kernels& kernels_;
  const LostProblem& p_;
  const ChoiceProblem& t_;
  const Summaries& summaries_;
  const BoundQueries bounds_;
  const int64_t ld_;
};

}  // namespace

void lost_bound(const Kernels& kernels, const LostProblem& problem, int threads, InterruptCheck& interrupt) {
  const ChoiceProblem& t = problem.tensors;
  const Summaries summaries(t, threads, interrupt);
  const LostBound bound(kernels, problem, summaries);
  const int64_t tiles = (t.n_q + kRows - 1) / kRows;
  parallel_for(t.batch * t.heads * tiles, threads, interrupt,
               [&](int64_t i) { bound.run(i / tiles / t.heads, i / tiles % t.heads, i % tiles); });
}

}  // namespace farlight
